"""What is built is whole: every wheel holds the same files, asks for all it imports, and works on its own."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowgraph import doctor
from flowgraph._version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"flowgraph": "flowgraph", "rl": "flowgraph/rl", "adapters": "flowgraph/adapters"}


def shipped() -> dict[str, Path]:
    """Path in the wheel -> file of the checkout."""
    files: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        for here, _, names in os.walk(ROOT / folder, followlinks=False):
            for name in names:
                path = Path(here, name)
                if path.suffix in (".py", ".j2") or name == "py.typed":
                    files[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the checkout's reach: no PYTHONPATH leads back to it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_checkout(to: Path, *, links: bool) -> Path:
    """What a build reads, so that the checkout stays clean. Some archives and systems have no links."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for link in (to / "flowgraph" / "rl", to / "flowgraph" / "adapters"):
        assert link.is_symlink()
        if not links:
            link.unlink()
    return to


def build(source: Path, into: Path, *what: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", into, source, cwd=source)
    return next(into.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: from the source archive that lies beside it."""
    work = tmp_path_factory.mktemp("release")
    return build(copy_of_checkout(work / "checkout", links=True), work / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment that holds the wheel.

    What others make (torch and so on) is read from the environment of the tests, as a plain folder: the .pth
    files in it, and so the editable install, stay out. That the wheel asks for all of it is the business of
    test_every_import_is_declared.
    """
    work = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", work, cwd=work)
    programs = work / "bin"
    (packages,) = work.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", wheel, cwd=work)
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return programs


@pytest.mark.slow
def test_every_build_holds_the_same_files(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name == f"flowgraph_llm-{__version__}-py3-none-any.whl"

    def code(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}

    expected = {name: path.read_bytes() for name, path in shipped().items()}
    assert code(wheel) == expected
    for links in (True, False):
        source = copy_of_checkout(tmp_path / f"links-{links}", links=links)
        assert code(build(source, tmp_path / f"dist-{links}", "--wheel")) == expected


@pytest.mark.slow
def test_the_source_archive_holds_the_real_folders(wheel: Path) -> None:
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    for file in shipped().values():
        assert members[file.relative_to(ROOT).as_posix()].isfile()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(members)
    assert not any(name.startswith(("flowgraph/rl", "flowgraph/adapters")) for name in members)


@pytest.mark.slow
def test_it_is_the_wheel_that_is_installed(installed: Path, tmp_path: Path) -> None:
    code = "import flowgraph.rl as r, flowgraph.adapters as a; print(r.__file__, a.__file__, sep='\\n')"
    places = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 2
    assert all(Path(place).is_relative_to(installed.parent) for place in places)
    top = run(installed / "python", "-c", "import importlib.util as u; print(u.find_spec('rl'))", cwd=tmp_path)
    assert top.strip() == "None"


@pytest.mark.slow
def test_doctor_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert __version__ in run(installed / "flowgraph", "doctor", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.real
def test_the_example_of_the_readme_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert blocks, "README.md has no ```python block"
    (tmp_path / "example.py").write_text(blocks[0])
    run(installed / "python", "example.py", cwd=tmp_path)


def third_party(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level module, imported when the file is) for each import that is neither ours nor Python's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in (name.split(".")[0] for name in names):
            if name != "flowgraph" and name not in sys.stdlib_module_names:
                yield name, id(node) not in later


# What the adapter of a trainer imports of it and of what comes with it: who uses the adapter has it.
WITH_TRAINERS = {
    "flowgraph/adapters/nemo_rl.py": {"nemo_rl"},
    "flowgraph/adapters/openrlhf.py": {"openrlhf", "ray"},
    "flowgraph/adapters/prime_rl.py": {"prime_rl"},
    "flowgraph/adapters/roll.py": {"roll"},
    "flowgraph/adapters/skyrl.py": {"ray", "skyrl"},
    "flowgraph/adapters/slime.py": {"megatron", "slime"},
    "flowgraph/adapters/trl.py": {"peft"},
    "flowgraph/adapters/verl.py": {"omegaconf", "tensordict", "transfer_queue", "verl"},
    "flowgraph/adapters/verl_plugin.py": {"verl"},
}


OF_AN_EXTRA = {f"flowgraph/triton_{name}.py" for name in ("rows", "sweeps", "pools", "solve")}
"""Kernels: imported by who has named their backend."""


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in requirements}

    always = names(project["dependencies"])
    extras = project["optional-dependencies"]
    optional = names([line for extra in extras if extra != "dev" for line in extras[extra]])
    # Modules of extras, which need not be installed here.
    modules = {name: {"cupy-cuda12x", "cupy-cuda13x"} for name in ("cupy", "cupyx")}
    for module, distributions in importlib.metadata.packages_distributions().items():
        modules.setdefault(module, {name.lower().replace("_", "-") for name in distributions})

    seen = set()
    for file, path in shipped().items():
        if path.suffix != ".py":
            continue
        for module, at_once in third_party(path):
            seen.add(module)
            if module in WITH_TRAINERS.get(file, ()):
                continue
            wanted = modules.get(module, {module.replace("_", "-")})
            # Whoever imports an adapter wants its extra; the rest of the package may not count on one.
            core = at_once and not file.startswith("flowgraph/adapters/") and file not in OF_AN_EXTRA
            asked_for = always if core else always | optional
            assert wanted & asked_for, f"{file} imports {module}, which pyproject.toml does not ask for"
    assert "torch" in seen


def test_doctor_looks_for_what_the_extras_install() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {key: {re.split(r"[^\w-]", line)[0] for line in lines} for key, lines in extras.items() if key != "dev"}
    assert {extra: set(modules.values()) for extra, modules in doctor.EXTRAS.items()} == names


def test_constraints_fit_the_dependencies() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, filter(lambda x: x and x[0] != "#", lines))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        if wanted.marker:
            continue  # for an older Python than the one that is pinned
        (pin,) = pins[wanted.name.lower()].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), f"{wanted} against {pin}"
