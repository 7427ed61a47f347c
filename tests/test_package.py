"""The public names: lazy, complete, and functions even where a module has the same name."""

from __future__ import annotations

import subprocess
import sys

import flowgraph


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_is_there() -> None:
    for name in flowgraph.__all__:
        assert getattr(flowgraph, name) is not None
    assert {name for name in flowgraph.__all__ if name != "__version__"} == set(flowgraph._MODULE_OF)
    assert set(flowgraph.__all__) <= set(dir(flowgraph))


def test_functions_win_over_modules_of_the_same_name_in_any_order() -> None:
    for first in ("from flowgraph.capture import choose_layers", "import flowgraph.sparsify, flowgraph.credit", "pass"):
        names = "capture, credit, sparsify"
        code = f"{first}\nfrom flowgraph import {names}\nprint(*map(callable, ({names})))"
        assert fresh(code) == "True True True"


def test_importing_the_package_or_its_command_line_waits_for_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'torch_geometric', 'scipy') if m in sys.modules]"
    assert fresh(f"import sys, flowgraph, flowgraph.cli\nprint({heavy})") == "[]"


def test_unknown_names() -> None:
    assert fresh("import flowgraph\nprint(hasattr(flowgraph, 'nonsense'))") == "False"
