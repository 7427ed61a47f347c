"""What the tests of Triton's kernels share: the interpreter, layers to try the kernels on, and the compiler.

Triton asks once, when it is imported, whether to interpret. So the tests of kernels run in a process of their own,
which one test of each file starts; there every tensor that a kernel is to fill is NaN before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.rows import LayerQK
from tests import attention

pytest.importorskip("triton", reason="needs triton")

IN_THE_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IN_THE_INTERPRETER, reason="runs in the interpreter's own process")
compiled = pytest.mark.skipif(IN_THE_INTERPRETER, reason="needs Triton's compiler")

ROOT = Path(__file__).resolve().parents[1]
Visible = Callable[[Tensor, Tensor], Tensor]


def run_interpreted(file: str | Path, of: str | None = None, seconds: float = 900, **environment: str) -> None:
    """The tests of a file that are for the interpreter.

    Args:
        of: the module of `flowgraph` with the kernels, of which every line and every branch must be reached.
    """
    tests = ["pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    with TemporaryDirectory() as folder:
        place = Path(folder, "coverage")
        measured = [
            "coverage",
            "run",
            f"--rcfile={os.devnull}",
            "--branch",
            f"--data-file={place}",
            f"--include=*/flowgraph/{of}.py",
            "-m",
        ]
        command = [sys.executable, "-m", *([] if of is None else measured), *tests]
        environment = os.environ | {"TRITON_INTERPRET": "1"} | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout and "failed" not in done.stdout
        print(done.stdout.splitlines()[-1])
        if of is not None:
            lines, branches = unreached(place, ROOT / "flowgraph" / f"{of}.py")
            assert not lines and not branches, f"no test reaches lines {lines}, branches {branches} of {of}"


def unreached(place: Path, module: Path) -> tuple[list[int], list[list[int]]]:
    """Lines and branches of a module that nothing went through. The interpreter compiles kernels anew, and leaving them
    at a line that is not the last is an artefact of that: branches to the end of a function don't count."""
    command = [sys.executable, "-m", "coverage", "json", f"--data-file={place}", "-q", "-o", "-"]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    (found,) = (file for name, file in report["files"].items() if (ROOT / name).resolve() == module)
    return found["missing_lines"], [[line, to] for line, to in found["missing_branches"] if to > 0]


@pytest.fixture
def draw() -> torch.Generator:
    """Other numbers in every run, and a failure says which."""
    seed = int(os.environ.get("FLOWGRAPH_SEED") or torch.seed() % 2**31)
    print(f"FLOWGRAPH_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors are NaN (or the largest integer), and tiles so small that every loop goes round."""
    from flowgraph import triton_rows, triton_sweeps

    monkeypatch.setattr(triton_rows, "tile_for", lambda *_: triton_rows.Tile(16, 16, 1, 1))
    monkeypatch.setattr(triton_rows, "KEEP_COLUMNS", 16)
    monkeypatch.setattr(triton_sweeps, "SIDE", 8)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def window(size: int) -> Visible:
    return lambda query, key: query[:, None] - key[None, :] < size


def documents(of: Tensor) -> Visible:
    """`of`: [positions] the number of the document at each position."""
    return lambda query, key: of[query][:, None] == of[key][None, :]


def layer(
    draw: torch.Generator,
    N: int,
    heads: int = 2,
    key_heads: int = 1,
    D: int = 8,
    dtype: torch.dtype = torch.float32,
    loud: float = 1.0,
    **more: Any,
) -> LayerQK:
    """Laid out in memory as models do it, [N, H, D]."""
    query = (torch.randn(N, heads, D, generator=draw) * loud).to(dtype).transpose(0, 1)
    key = torch.randn(N, key_heads, D, generator=draw).to(dtype).transpose(0, 1)
    norms = torch.rand(heads, N, generator=draw) + 0.1
    return LayerQK(query, key, scaling=0.5, value_norm=norms, **more)


def with_log_sum(one: LayerQK, positions: Tensor) -> LayerQK:
    """From float64, densely."""
    return replace(one, log_sum=attention.log_sum(one, positions).float())


SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "odd size": (35, 13, {}),
    "blocks of one row": (5, 1, {}),
    "one token": (1, 16, {}),
    "one head": (17, 16, {"heads": 1}),
    "8 query heads per key head": (20, 16, {"heads": 8}),
    "2 key heads": (20, 16, {"heads": 4, "key_heads": 2}),
    "odd head size": (20, 16, {"D": 13}),
    "bfloat16": (20, 16, {"dtype": torch.bfloat16}),
    "float16": (20, 16, {"dtype": torch.float16}),
    "soft cap": (20, 16, {"softcap": 2.0}),
    "sinks": (20, 16, {"sink_logits": torch.tensor([-2.0, 3.0])}),
    "window": (34, 16, {"visible": window(10)}),
    "window of one": (20, 16, {"visible": window(1)}),
    "documents": (34, 20, {"visible": documents(torch.tensor([0] * 13 + [1] * 4 + [2] * 17))}),
}


def for_an_h100(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: set[str], **options: Any
) -> Any:
    """A kernel compiled for sm_90, which needs no GPU.

    Args:
        types: of the arguments that are no int32. aligned: what is a multiple of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flowgraph import triton_rows

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | triton_rows.COMPILED)


def of_tiles_for_an_h100(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Any, dtype: torch.dtype
) -> Any:
    """A kernel around `mean_tile`, in Qwen3's shape; see `for_an_h100`."""
    from flowgraph import triton_rows

    number = triton_rows._DTYPES[dtype]
    constants = {
        "KEY_HEADS": 8, "GROUP": 4, "HAS_CAP": False, "HAS_FIRST": False, "HAS_NORM": False,
        "DTYPE": number, "MULTIPLY": number, "ALIGN": 16,
        "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_D": 128,
    } | constants  # fmt: skip
    types = types | {"table": "*i64", "first": "*i32", "share": "fp32", "scale": "fp32", "cap": "fp32"}
    aligned = {"out", "table", "query_head", "query_row", "key_head", "key_row", "D"}
    return for_an_h100(kernel, types, constants, aligned, num_warps=tile.warps, num_stages=tile.stages)
