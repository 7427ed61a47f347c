"""What is measured, in which order: the most telling first, since a lease of a GPU may end at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu.predict import predict
from benchmarks.gpu.shapes import SHAPES

STAGES = ("machine", "equality", "kernels", "credits", "solves", "scorer", "tune", "long")
"""In their order."""

EQUALITY = ("rows", "edges", "sweeps", "sparse", "solvers", "log-sum-exp", "bits")
SOLVES = ("sweep triton", "scatter torch", "blocks torch", "scatter torch_scatter", "scatter cupy", "blocks cupy")
WAYS = ("sparse triton", "exact triton", "sparse torch", "exact torch")
"""Mode and backend."""
BARE = "exact triton no edges"
"""Credits alone, as training wants them: no edges are listed."""
OFFLOAD = " offload"
"""At the end of a way: queries and keys wait in the memory of the host."""
LONG_WAYS = ("sparse triton" + OFFLOAD, "exact triton" + OFFLOAD, BARE + OFFLOAD, *WAYS)
_SIZES = ((64, 128, 4), (64, 256, 8), (64, 64, 4), (128, 64, 4), (128, 128, 8), (128, 64, 8), (64, 128, 8))
TILES = tuple(
    f"tile {rows}x{columns} warps {warps} stages {stages}" for rows, columns, warps in _SIZES for stages in (2, 3)
)
BLOCKS = tuple(f"block {rows}" for rows in (128, 256, 512, 1024, 2048))


class Case(NamedTuple):
    """One thing to measure. `shape` names one of `SHAPES`, or is "-"."""

    stage: str
    what: str
    shape: str = "-"
    tokens: int = 0

    @property
    def name(self) -> str:
        return f"{self.stage}: {self.what}, {self.shape}"

    @property
    def key(self) -> str:
        return f"{self.name}@{self.tokens}"

    @property
    def expected(self) -> dict[str, float]:
        return predict(self.stage, self.what, SHAPES.get(self.shape), self.tokens)


def plan(shape: str = "real") -> list[Case]:
    """All cases: "real", for a GPU, or "tiny", for a CPU."""
    if shape == "tiny":
        return _plan("tiny", 24, (48,), (*TILES[:1], *BLOCKS[:1]), (), (("tiny", 64),))
    more = (("qwen3-8b", 8192), ("llama-3.1-8b", 8192), ("qwen3-8b", 32768))
    longest = (("qwen3-4b", 131_072), ("qwen3-8b", 32_768), ("qwen3-4b", 32_768), ("qwen3-4b", 8192))
    return _plan("qwen3-4b", 300, (8192, 1024, 32_768), (*TILES, *BLOCKS), more, longest)


def _plan(
    shape: str,
    few: int,
    lengths: Sequence[int],
    tuned: Sequence[str],
    more: Sequence[tuple[str, int]],
    longest: Sequence[tuple[str, int]],
) -> list[Case]:
    """`few`: tokens of the checks of equality. What is measured once is measured at the first of the lengths."""
    typical = lengths[0]
    cases = [Case("machine", "ceilings")]
    cases += [Case("equality", what, "tiny" if shape == "tiny" else "small", few) for what in EQUALITY]
    cases += [Case("kernels", backend, shape, N) for N in lengths for backend in ("triton", "torch")]
    cases += [Case("credits", way, shape, N) for N in lengths for way in (*WAYS[:2], BARE, *WAYS[2:])]
    cases += [Case("solves", what, shape, typical) for what in SOLVES]
    cases += [Case("scorer", way, shape, typical) for way in ("sparse triton", "sparse torch")]
    cases += [Case("tune", what, shape, typical) for what in tuned]
    cases += [Case("credits", way, other, N) for other, N in more for way in WAYS[:2]]
    cases += [Case("long", way, other, N) for way in LONG_WAYS for other, N in longest]
    return cases
