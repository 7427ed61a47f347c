"""Imports run one way: every import of flowgraph/, rl/ and adapters/ is read, and none may run backwards.

    flowgraph  <-  flowgraph.rl  <-  flowgraph.adapters        (the arrow points at what is imported)

Inside flowgraph/ a module imports only modules that stand before it in ORDER. Imports inside functions count
too, with one exception: there, cli.py may reach into the adapters, so that only who needs one pays.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    "spans",
    "triton_rows",
    "triton_sweeps",
    "rows",
    "kernels",
    "values",
    "interface",
    "chunks",
    "capture",
    "stream",
    "sparsify",
    "pools",
    "triton_pools",
    "graph",
    "layers",
    "blocks",
    "triton_solve",
    "solve",
    "flow",
    "exact",
    "certificate",
    "sparse",
    "coarse",
    "backbone",
    "checkpoints",
    "measures",
    "compare",
    "credit",
    "page",
    "options",
    "memory",
    "report",
    "trace",
    "tracer",
    "stability",
    "__init__",
    "demo",
    "terminal",
    "doctor",
    "cli_options",
    "cli",
)
# These import nothing of flowgraph, and any module may import them.
LEAVES = ("_version", "answers", "segments", "smollm2", "sums")

# A trainer is known to its adapter alone.
TRAINERS = {"nemo_rl", "openrlhf", "prime_rl", "roll", "skyrl", "skyrl_train", "slime", "trl", "verl"}


class Import(NamedTuple):
    """One imported module: its full name, where, and whether inside a function."""

    target: str
    file: str
    line: int
    lazy: bool

    def because(self, reason: str) -> str:
        return f"{self.file}:{self.line} imports {self.target}: {reason}"


def violations(root: Path) -> list[str]:
    """Every import below `root` that breaks a rule, with its place and the rule."""
    return [problem for module in _modules(root) for problem in _violations_of(*module)]


def _modules(root: Path) -> Iterator[tuple[str, list[Import]]]:
    """(module name, its imports) of every file, read in the real folders and not through the links."""
    names = {
        ".".join([package, *path.relative_to(root / folder).with_suffix("").parts]): path
        for folder, package in (
            ("flowgraph", "flowgraph"),
            ("rl", "flowgraph.rl"),
            ("adapters", "flowgraph.adapters"),
        )
        for path in _sources(root / folder)
    }
    known = {name.removesuffix(".__init__") for name in names}
    for name, path in sorted(names.items()):
        yield name, list(_imports(name, path, path.relative_to(root).as_posix(), known))


def _sources(folder: Path) -> Iterator[Path]:
    for here, _, files in os.walk(folder, followlinks=False):
        yield from (Path(here, file) for file in files if file.endswith(".py"))


def _imports(name: str, path: Path, file: str, known: set[str]) -> Iterator[Import]:
    package = name.split(".")[:-1]  # of `a.b.__init__` this is a.b, the package itself
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            # `from flowgraph import graph` imports that module, `from flowgraph import Flow` the package.
            names = [f"{start}.{alias.name}" for alias in node.names]
            targets = sorted({module if module in known else start for module in names})
        elif isinstance(node, ast.Call) and _is_import_call(node.func) and node.args:
            target = _literal_start(node.args[0])
            targets = [_absolute(target, package)] if target else []
        for target in targets:
            yield Import(target, file, getattr(node, "lineno", 0), id(node) in lazy)


def _is_import_call(function: ast.expr) -> bool:
    return ast.unparse(function).split(".")[-1] in ("import_module", "__import__")


def _absolute(target: str, package: list[str]) -> str:
    """The full name of what import_module is given, which may be relative."""
    level = len(target) - len(target.lstrip("."))
    return ".".join([*package[: len(package) - level + 1], target.lstrip(".")]) if level else target


def _literal_start(node: ast.expr) -> str:
    """A string, or what stands before the first placeholder of an f-string."""
    if isinstance(node, ast.JoinedStr):
        return _literal_start(node.values[0]).rstrip(".") if node.values else ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _violations_of(name: str, imports: list[Import]) -> Iterator[str]:
    layer, module = _place(name)
    if layer == "flowgraph" and module not in ORDER + LEAVES:
        yield f"{name} has no place: add it to ORDER or LEAVES in {Path(__file__).name}"
        return
    for found in imports:
        top = found.target.split(".")[0]
        if top in ("adapters", "rl"):
            yield found.because(f"write flowgraph.{found.target}, or every module exists twice")
        elif top in TRAINERS and layer != "adapters":
            yield found.because("only the adapters know a trainer")
        elif top == "flowgraph":
            reason = _backwards(layer, module, *_place(found.target), found.lazy)
            if reason:
                yield found.because(reason)


def _place(name: str) -> tuple[str, str]:
    """(layer, module in it): ("flowgraph", "graph"), ("rl", "shaping"), ("flowgraph", "__init__")."""
    parts = name.split(".")[1:]
    if parts and parts[0] in ("adapters", "rl"):
        return parts[0], ".".join(parts[1:]) or "__init__"
    return "flowgraph", parts[0] if parts else "__init__"


def _backwards(layer: str, module: str, target_layer: str, target: str, lazy: bool) -> str:
    """Why `layer`/`module` may not import `target_layer`/`target`; empty if it may."""
    layers = ("flowgraph", "rl", "adapters")
    if layers.index(target_layer) > layers.index(layer):
        if (layer, module, target_layer) != ("flowgraph", "cli", "adapters"):
            return f"{layer} comes before {target_layer}"
        return "" if lazy else "cli reaches into adapters inside a function only"
    if layer != target_layer:
        return "nothing imports the command line" if target == "cli" else ""
    if layer != "flowgraph" or target in LEAVES or target == module:
        return f"{module} is to import nothing of flowgraph" if module in LEAVES and target != module else ""
    if module in LEAVES:
        return f"{module} is to import nothing of flowgraph"
    if target not in ORDER:
        return f"there is no flowgraph.{target}"
    return f"{target} does not come before {module}" if ORDER.index(target) > ORDER.index(module) else ""


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_there_is_something_to_check() -> None:
    modules = dict(_modules(ROOT))
    assert {"flowgraph.__init__", "flowgraph.rl.__init__", "flowgraph.adapters.__init__"} <= set(modules)
    assert set(LEAVES) <= {name.split(".")[1] for name in modules}
    assert any(found.target.startswith("flowgraph.") for imports in modules.values() for found in imports)


GOOD = {
    "flowgraph/__init__.py": "from flowgraph.graph import TokenGraph\nfrom . import flow",
    "flowgraph/rows.py": "import torch",
    "flowgraph/answers.py": "import re",
    "flowgraph/spans.py": "from flowgraph.answers import Span",
    "flowgraph/graph.py": "from .rows import Rows\nfrom flowgraph import spans",
    "flowgraph/flow.py": "def f():\n    from flowgraph.graph import TokenGraph",
    "flowgraph/cli.py": "import flowgraph\ndef score():\n    from flowgraph.adapters.files import read",
    "rl/__init__.py": "from flowgraph.rl.shaping import shape",
    "rl/shaping.py": "from ..flow import f\nfrom flowgraph import TokenGraph",
    "adapters/__init__.py": "",
    "adapters/trl.py": "import trl\nfrom flowgraph.rl import x\nfrom . import files\nfrom ..flow import f",
    "adapters/files.py": "import json",
}


def planted(tmp_path: Path, changes: dict[str, str]) -> list[str]:
    for file, text in {**GOOD, **changes}.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(tmp_path)


def test_good_imports_pass(tmp_path: Path) -> None:
    assert planted(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("flowgraph/graph.py", "import flowgraph.flow", "flow does not come before graph"),
        ("flowgraph/graph.py", "\nfrom .flow import f", "graph.py:2 imports flowgraph.flow"),
        ("flowgraph/graph.py", "from . import flow", "flow does not come before graph"),
        ("flowgraph/graph.py", "from flowgraph import TokenGraph", "__init__ does not come before graph"),
        (
            "flowgraph/graph.py",
            "def f():\n    from flowgraph.flow import f",
            "flow does not come before graph",
        ),
        ("flowgraph/graph.py", "if TYPE_CHECKING:\n    import flowgraph.flow", "flow does not come before"),
        ("flowgraph/flow.py", "from flowgraph.rl import shaping", "flowgraph comes before rl"),
        ("flowgraph/flow.py", "from .adapters.trl import x", "flowgraph comes before adapters"),
        ("flowgraph/flow.py", "from . import adapters", "flowgraph comes before adapters"),
        ("flowgraph/flow.py", "import_module('flowgraph.adapters.trl')", "flowgraph comes before adapters"),
        ("flowgraph/flow.py", "importlib.import_module(f'.adapters.{n}', 'flowgraph')", "before adapters"),
        ("flowgraph/flow.py", "__import__('flowgraph.cli')", "cli does not come before flow"),
        ("flowgraph/answers.py", "from flowgraph.rows import Rows", "answers is to import nothing"),
        ("flowgraph/answers.py", "from flowgraph import smollm2", "answers is to import nothing"),
        ("flowgraph/cli.py", "from flowgraph.adapters import files", "inside a function only"),
        ("flowgraph/cli.py", "def f():\n    from flowgraph.rl import shaping", "flowgraph comes before rl"),
        ("flowgraph/helpers.py", "", "flowgraph.helpers has no place"),
        ("rl/shaping.py", "from flowgraph.adapters import trl", "rl comes before adapters"),
        ("rl/shaping.py", "from ..adapters.trl import x", "rl comes before adapters"),
        ("rl/shaping.py", "import flowgraph.cli", "nothing imports the command line"),
        ("rl/shaping.py", "def f():\n    import trl", "only the adapters know a trainer"),
        ("rl/shaping.py", "import rl.baselines", "write flowgraph.rl.baselines"),
        ("adapters/trl.py", "from adapters import files", "write flowgraph.adapters"),
        ("adapters/trl.py", "from flowgraph.cli import main", "nothing imports the command line"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    (problem,) = planted(tmp_path, {file: text})
    assert expected in problem
    assert file in problem or file.removesuffix(".py").replace("/", ".") in problem


@pytest.mark.parametrize("name", ["adapters", "rl"])
def test_the_links_are_relative_and_lead_to_the_folders(name: str) -> None:
    link = ROOT / "flowgraph" / name
    assert link.is_symlink(), f"{link} is no link: on Windows, clone with core.symlinks=true"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert not (ROOT / name).is_symlink()
