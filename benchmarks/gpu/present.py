"""Which optional parts are there and can work on a device; and the time that a solver takes inside `trace_flow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.clock import Clock
from flowgraph import TokenGraph, trace_flow
from flowgraph.solve import SOLVERS


class Absent(Exception):
    """What a case needs is not installed, or can't work here: the case is skipped, with this as the reason."""


def has_triton(device: torch.device) -> bool:
    """On a CPU: in its interpreter."""
    if find_spec("triton") is None:
        return False
    from flowgraph.triton_rows import INTERPRETED

    return device.type == "cuda" or INTERPRETED


def need_triton(device: torch.device) -> None:
    if not has_triton(device):
        raise Absent("needs Triton: a GPU, or TRITON_INTERPRET=1")


def need_solver(graph: TokenGraph, solver: str, backend: str) -> None:
    """Let the solver refuse a small graph."""
    if solver not in SOLVERS:
        raise Absent(f"there is no solver {solver!r}; there are {', '.join(sorted(SOLVERS))}")
    try:
        trace_flow(graph, solver, backend=backend)
    except (ImportError, ValueError) as error:
        raise Absent(str(error)) from error


class Inside:
    """Seconds of every call of a solver."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @property
    def median(self) -> float:
        """Without the first call, in which kernels are compiled."""
        return median(self.seconds[1:] or self.seconds)


@contextmanager
def solver_clock(clock: Clock) -> Iterator[Inside]:
    """What the solvers take inside the block."""
    inside, before = Inside(), dict(SOLVERS)

    def timed(solve: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(solve)
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            inside.seconds.append(clock.seconds(lambda: found.append(solve(*args, **kwargs))))
            return found[0]

        return call

    try:
        for name, solve in before.items():
            SOLVERS[name] = timed(solve)
        yield inside
    finally:
        SOLVERS.update(before)
