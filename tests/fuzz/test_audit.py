"""What the code never does: run what it reads. Every call in flowgraph/, rl/ and adapters/ is looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parents[2]
FILES = sorted(path for pattern in ("flowgraph/*.py", "rl/**/*.py", "adapters/**/*.py") for path in ROOT.glob(pattern))

NEVER_IMPORTED = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "numpy.load", "np.load", "pandas.read_pickle", "torch.hub.load", "tempfile.mktemp",
}  # fmt: skip
METHODS_NEVER_CALLED = {"extractall", "unpack_archive", "read_pickle"}
EXPLICIT = {"AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained"}
"""Without `trust_remote_code` transformers asks on standard input, where `flowgraph trace` reads text."""
TRUSTING = {"adapters/service.py": "self.trust_remote_code"}
"""The only places where it may be anything but False: an option that the user sets by name."""
WITHOUT_AUTOESCAPE = {"Environment", "Template"}


def problems(source: str, file: str) -> Iterator[str]:
    """What a module does and may not."""
    tree = ast.parse(source)
    mappings = {
        node.targets[0].id: ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where} imports {name}" for name in names if name.split(".")[0] in NEVER_IMPORTED)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        spread = " ".join(mappings.get(ast.unparse(word.value), "") for word in node.keywords if word.arg is None)
        if name in NEVER_CALLED or name.rpartition(".")[2] in METHODS_NEVER_CALLED:
            yield f"{where} calls {name}"
        if name == "torch.load" and words.get("weights_only") != "True":
            yield f"{where} calls {name} without weights_only=True"
        if words.get("shell") not in (None, "False"):
            yield f"{where} calls {name} through a shell"
        if name in WITHOUT_AUTOESCAPE and words.get("autoescape") != "True":
            yield f"{where} makes a template without autoescape=True"
        trust = words.get("trust_remote_code") or _of_mapping(spread)
        if trust not in (None, "False", TRUSTING.get(file)):
            yield f"{where} calls {name} with trust_remote_code={trust}"
        if name in EXPLICIT and trust is None:
            yield f"{where} calls {name} without saying trust_remote_code=False"


def _of_mapping(text: str) -> str | None:
    """The value of 'trust_remote_code' in the source of mappings."""
    return text.split("'trust_remote_code': ")[1].split("}")[0].split(",")[0] if "trust_remote_code" in text else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_that_is_read_is_run(path: Path) -> None:
    assert list(problems(path.read_text(encoding="utf-8"), f"{path.parent.name}/{path.name}")) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import pickle", "imports pickle"),
        ("from cloudpickle import loads", "imports cloudpickle"),
        ("eval(text)", "calls eval"),
        ("torch.load(path)", "without weights_only"),
        ("torch.load(path, weights_only=False)", "without weights_only"),
        ("yaml.load(text, Loader=Loader)", "calls yaml.load"),
        ("archive.extractall(folder)", "calls archive.extractall"),
        ("subprocess.run(text, shell=True)", "through a shell"),
        ("Environment(loader=loader)", "without autoescape"),
        ("AutoTokenizer.from_pretrained(name)", "without saying trust_remote_code=False"),
        ("AutoTokenizer.from_pretrained(name, trust_remote_code=True)", "with trust_remote_code=True"),
        (
            "how = {'trust_remote_code': True}\nAutoTokenizer.from_pretrained(name, **how)",
            "with trust_remote_code=True",
        ),
    ],
)
def test_the_audit_finds(source: str, problem: str) -> None:
    assert [problem in found for found in problems(source, "x.py")] == [True]


@pytest.mark.parametrize(
    "source",
    ["re.compile(text)", "model.eval()", "yaml.safe_load(text)", "torch.load(path, weights_only=True)",
     "how = {'trust_remote_code': False}\nAutoTokenizer.from_pretrained(name, **how)"],
)  # fmt: skip
def test_the_audit_lets_pass(source: str) -> None:
    assert list(problems(source, "x.py")) == []
