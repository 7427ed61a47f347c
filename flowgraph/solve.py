"""The two triangular solves behind every flow, by five algorithms with one signature.

    scipy      sparse triangular solve of SciPy (SuperLU) in float64: the fast one on a CPU
    scatter    message-passing layers (`flowgraph.layers`) on any device, in the graph's own dtype
    blocks     the same with dense blocks on the diagonal solved at once (`flowgraph.blocks`), in float64
    sweep      a program per graph that walks over its tokens (`flowgraph.triton_solve`), in float64
    reference  dense float64, one token after the other: obviously right, O(N^2) memory, for tests

Each takes a `System` and returns a `Solution`. What a graph gets does not depend on what else is in the batch. Shapes:
N tokens, E edges, B graphs (a batch is one big system).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgraph.blocks import BlockJacobi
from flowgraph.layers import AnswerReachability, FlowPropagation, Scaled
from flowgraph.rows import check_triton
from flowgraph.sums import LIBRARIES, Groups, check_library

LARGEST = 1e250
"""Reach between 1 / LARGEST and LARGEST has kept its digits in float64, where it comes of single sums and products."""

LARGEST_IN_BLOCKS = 1e25
"""The same where blocks were inverted: what an inverse lost below 1e-308 is multiplied by reach outside the block, so
what matters is the largest reach over the smallest."""


@dataclass(frozen=True)
class System:
    """What is to be solved.

    Attributes:
        edge_index: [2, E] sorted by target, then source. edge_weight: [E]; 0 for edges that don't exist.
        sinks: [N] bool. sources: [N] bool. batch: [N]. num_graphs: B.
        tol: relative error to stop at, for iterative solvers. max_hops: their limit, or None.
        backend: the library that a solver with several works with.
    """

    edge_index: Tensor
    edge_weight: Tensor
    sinks: Tensor
    sources: Tensor
    batch: Tensor
    num_graphs: int
    tol: float
    max_hops: int | None
    backend: str = "torch"

    @cached_property
    def ptr(self) -> Tensor:
        """[B + 1] the first token of each graph, and N."""
        return torch.searchsorted(self.batch, torch.arange(self.num_graphs + 1, device=self.batch.device))

    @cached_property
    def by_source(self) -> Groups:
        return Groups.by(self.edge_index[0], len(self.sinks), backend=self._sums)

    @cached_property
    def by_target(self) -> Groups:
        return Groups.by(self.edge_index[1], len(self.sinks), ascending=True, backend=self._sums)

    @property
    def _sums(self) -> str:
        return self.backend if self.backend in LIBRARIES else "torch"


@dataclass(frozen=True)
class Solution:
    """reach: `Scaled` [N]. flow, injection: [N]. transition: [E]. iterations: [B]."""

    reach: Scaled
    flow: Tensor
    injection: Tensor
    transition: Tensor
    iterations: Tensor


def transitions(
    edge_index: Tensor, edge_weight: Tensor, sinks: Tensor, reach: Scaled, by_source: Groups | None = None
) -> Tensor:
    """[E] the conserving kernel `P(i -> k) = W[k, i] h(k) / sum_k W[k, i] h(k)`; 0 out of sinks and into dead ends.

    (Doob's h-transform; arXiv 2606.10646, conservation.) The sum itself is the divisor and not `h(i)`, so that each row
    of `P` sums to 1 to rounding whatever the error of `reach`.
    """
    source, target = edge_index
    weight = Scaled.of(edge_weight * ~sinks[source])
    # In units of h(i) the numbers are at most about 1, and nothing that matters underflows.
    share = weight.times(reach.at(target)).over(reach.at(source))
    share = torch.where(reach.mantissa[source] == 0, 0, share)
    by_source = Groups.by(source, len(sinks)) if by_source is None else by_source
    total = by_source.sum(by_source.arrange(share))
    return torch.where(share == 0, 0, share / total[source])


def inject(system: System, reach: Scaled) -> Tensor:
    """[N] 1 / |Q'| at each source that reaches the answer (Q'), graph by graph; 0 where none does."""
    start = (system.sources & (reach.mantissa > 0)).to(reach.mantissa.dtype)
    # Whole numbers: in whatever order they are added, the sum is the same.
    count = torch.zeros(system.num_graphs, dtype=start.dtype, device=start.device).scatter_add_(0, system.batch, start)
    return start / count.clamp(min=1)[system.batch]


def solve_scatter(system: System) -> Solution:
    edges, weight, by_source = system.edge_index, system.edge_weight, system.by_source
    backward, forward = (layer(system.tol, system.max_hops) for layer in (AnswerReachability, FlowPropagation))
    reach, reach_hops = backward(edges, weight, system.sinks, system.batch, by_source)
    transition = transitions(edges, weight, system.sinks, reach, by_source)
    injection = inject(system, reach)
    flow, flow_hops = forward(edges, transition, injection, system.batch, system.by_target)
    return Solution(reach, flow, injection, transition, torch.maximum(reach_hops, flow_hops))


def solve_blocks(system: System) -> Solution:
    weight, sinks, by_source = system.edge_weight.double(), system.sinks, system.by_source
    leaving = weight * ~sinks[system.edge_index[0]]
    backward, forward = (BlockJacobi(system.tol, system.max_hops, backward=way) for way in (True, False))
    value, reach_rounds = backward(system.edge_index, leaving, sinks.double(), system.batch, by_source)
    # Where the sum was cut short, tokens without reach may well have a path.
    whole = None if system.max_hops is None else reach_rounds < system.max_hops
    reach, transition = _settle(system, leaving, value, by_source, largest=LARGEST_IN_BLOCKS, whole=whole)
    injection = inject(system, reach)
    flow, flow_rounds = forward(system.edge_index, transition, injection, system.batch, system.by_target)
    return Solution(reach, flow, injection, transition, torch.maximum(reach_rounds, flow_rounds))


def solve_sweep(system: System) -> Solution:
    from flowgraph.triton_solve import sweep

    (source, target), by_source = system.edge_index, system.by_source
    leaving = system.edge_weight * ~system.sinks[source]
    value = sweep(
        system.ptr,
        by_source.ptr,
        by_source.arrange(target),
        by_source.arrange(leaving),
        system.sinks.double(),
        backward=True,
    )
    reach, transition = _settle(system, leaving.double(), value, by_source)
    injection = inject(system, reach)
    flow = sweep(system.ptr, system.by_target.ptr, source, transition, injection, backward=False)
    return Solution(reach, flow, injection, transition, torch.ones_like(system.ptr[1:]))


def solve_scipy(system: System) -> Solution:
    (source, target), weight = system.edge_index, system.edge_weight.double()
    leaving = weight * ~system.sinks[source]
    triangle = Triangle(source.numpy(), target.numpy(), len(system.sinks))
    value = torch.from_numpy(triangle.solve(leaving.numpy(), system.sinks.double().numpy(), backward=True))
    reach, transition = _settle(system, leaving, value)
    injection = inject(system, reach)
    flow = torch.from_numpy(triangle.solve(transition.numpy(), injection.numpy(), backward=False))
    return Solution(reach, flow, injection, transition, torch.ones(system.num_graphs, dtype=torch.int64))


class Triangle:
    """`I - M` for a strictly triangular `M` given by edges sorted by target: row k holds its sources, then itself."""

    def __init__(self, source: np.ndarray, target: np.ndarray, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        counts = np.bincount(target, minlength=num_tokens)
        self._indptr = np.concatenate([[0], np.cumsum(counts + 1)]).astype(np.int32)
        self._diagonal = self._indptr[1:] - 1
        # Edge e of target k moves k places to the right, since each earlier row got its diagonal entry.
        self._place = np.arange(len(source)) + target
        self._indices = np.empty(len(source) + num_tokens, dtype=np.int32)
        self._indices[self._place] = source
        self._indices[self._diagonal] = np.arange(num_tokens)

    def solve(self, weight: np.ndarray, rhs: np.ndarray, *, backward: bool) -> np.ndarray:
        """[N] the x of `x(k) = rhs(k) + sum_i weight(i -> k) x(i)`, or, backward, of
        `x(i) = rhs(i) + sum_k weight(i -> k) x(k)`."""
        from scipy.sparse import csc_array, csr_array
        from scipy.sparse.linalg import spsolve_triangular

        data = np.empty(len(self._indices))
        data[self._place] = -weight
        data[self._diagonal] = 1.0
        # Read as columns, the same arrays are the transpose: that is the backward system.
        kind = csc_array if backward else csr_array
        matrix = kind((data, self._indices, self._indptr), shape=(self._num_tokens,) * 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # overflow is looked for, and mended, by the caller
            return spsolve_triangular(matrix, rhs, lower=not backward, unit_diagonal=True, overwrite_A=True)


def _settle(
    system: System,
    leaving: Tensor,
    value: Tensor,
    by_source: Groups | None = None,
    *,
    largest: float = LARGEST,
    whole: Tensor | None = None,
) -> tuple[Scaled, Tensor]:
    """Reach, and transitions [E], out of reach in floats [N]; graphs that floats don't hold are solved anew, alone.

    Below 1e-250 sums have lost digits to underflow, and with huge weights they overflow. A token that got 0 although it
    has a path was lost on the way, so somewhere on its path an edge leads from a 0 to something else.

    Args:
        leaving: [E] float64 weights, 0 out of sinks. by_source: None: a CPU adds them up one by one.
        largest: reach that is still trusted. whole: [B] graphs of which a 0 says that there is no path; None: all.
    """
    (source, target), batch = system.edge_index, system.batch
    lost = torch.zeros(system.num_graphs, dtype=torch.bool, device=value.device)
    here, there = value[source], value[target]
    bad = ~((value == 0) | ((value > 1 / LARGEST) & (value < largest)))
    stuck = (leaving > 0) & (here == 0) & (there > 0)
    if whole is not None:
        stuck &= whole[batch[source]]
    some_lost = bool(bad.any() | stuck.any())
    if some_lost:
        lost[batch[bad]] = True
        lost[batch[source[stuck]]] = True
        value = torch.where(lost[batch], 0, value)
        here, there = value[source], value[target]
    share = leaving * there / torch.where(here > 0, here, 1)
    if by_source is None:
        total = torch.zeros_like(value).scatter_add_(0, source, share)
    else:
        total = by_source.sum(by_source.arrange(share))
    reach, transition = Scaled.of(value), share / torch.where(total > 0, total, 1)[source]
    if some_lost:
        edge_ptr = torch.searchsorted(target.contiguous(), system.ptr)
        for graph in lost.nonzero().flatten().tolist():
            tokens = slice(*system.ptr[graph : graph + 2].tolist())
            edges = slice(*edge_ptr[graph : graph + 2].tolist())
            own, weight, sinks = (x.cpu() for x in (system.edge_index[:, edges], leaving[edges], system.sinks[tokens]))
            own = own - tokens.start
            found = _sweep_scaled(own[0].numpy(), own[1].numpy(), weight.numpy(), sinks.numpy())
            reach.mantissa[tokens], reach.exponent[tokens] = found.mantissa.to(value), found.exponent.to(source)
            transition[edges] = transitions(own, weight, sinks, found).to(transition)
    return reach, transition


def _sweep_scaled(source: np.ndarray, target: np.ndarray, weight: np.ndarray, sinks: np.ndarray) -> Scaled:
    """Reach where float64 is too small: back from the last token, with an exponent kept for each one. O(N + E)."""
    order = np.argsort(source, kind="stable")
    starts = np.searchsorted(source[order], np.arange(len(sinks) + 1))
    target = target[order]
    weight_mantissa, weight_exponent = np.frexp(weight[order])
    mantissa = np.zeros(len(sinks))
    exponent = np.zeros(len(sinks), dtype=np.int64)
    for token in range(len(sinks) - 1, -1, -1):
        if sinks[token]:
            mantissa[token], exponent[token] = 0.5, 1
            continue
        out = slice(starts[token], starts[token + 1])
        product = weight_mantissa[out] * mantissa[target[out]]
        alive = product > 0
        if alive.any():
            power = weight_exponent[out][alive] + exponent[target[out][alive]]
            top = power.max()
            mantissa[token], shift = np.frexp(np.ldexp(product[alive], np.maximum(power - top, -2000)).sum())
            exponent[token] = shift + top
    return Scaled.of(torch.from_numpy(mantissa), torch.from_numpy(exponent))


def solve_reference(system: System) -> Solution:
    """The definitions of docs/method.md, token by token, with logarithms where numbers may be too small."""
    N, (source, target) = len(system.sinks), system.edge_index.cpu()
    sinks, batch = system.sinks.cpu(), system.batch.cpu()
    W = torch.zeros(N, N, dtype=torch.float64)
    W[target, source] = system.edge_weight.double().cpu()
    W[:, sinks] = 0
    log_weight = W.log()
    log_reach = torch.full((N,), -torch.inf, dtype=torch.float64)
    for i in range(N - 1, -1, -1):
        log_reach[i] = 0 if sinks[i] else torch.logsumexp(log_weight[:, i] + log_reach, dim=0)
    reached = torch.isfinite(log_reach)
    # P[k, i] = P(i -> k); a column sums to 1 or, at sinks and dead ends, to 0.
    P = (log_weight + log_reach[:, None] - torch.where(reached, log_reach, 0)[None, :]).exp()
    P = P / P.sum(0).clamp(min=1e-300)
    start = (system.sources.cpu() & reached).double()
    injection = start / torch.zeros(system.num_graphs).double().scatter_add_(0, batch, start).clamp(min=1)[batch]
    flow = injection.clone()
    for k in range(N):
        flow[k] += P[k] @ flow
    exponent = torch.where(reached, log_reach / np.log(2), 0).floor()
    mantissa = torch.where(reached, (log_reach - exponent * np.log(2)).exp(), 0)
    ones = torch.ones(system.num_graphs, dtype=torch.int64)
    return Solution(Scaled.of(mantissa, exponent.long()), flow, injection, P[target, source], ones)


SOLVERS: dict[str, Callable[[System], Solution]] = {
    "scatter": solve_scatter,
    "scipy": solve_scipy,
    "blocks": solve_blocks,
    "sweep": solve_sweep,
    "reference": solve_reference,
}

LIBRARIES_OF: dict[str, tuple[str, ...]] = {
    "scatter": ("torch", "torch_scatter", "cupy"),
    "scipy": ("torch",),
    "blocks": ("torch", "cupy"),
    "sweep": ("triton",),
    "reference": ("torch",),
}
"""Which backends each solver works with, its own first. "torch" is what FlowGraph always has, SciPy included."""

BACKENDS = ("torch", "torch_scatter", "cupy", "triton")

AUTO = {"cpu": ("scipy", "torch"), "other": ("scatter", "torch")}
"""What "auto" takes: on a CPU the fastest of benchmarks/results/solvers.json; no GPU has been measured yet."""

ALONE = {"triton": "sweep", "torch_scatter": "scatter", "cupy": "scatter"}
"""The solver that "auto" takes where a backend is named."""


def check_names(solver: str, backend: str) -> None:
    """Is there such a solver, such a backend, and do they go together?

    Raises:
        ValueError: no.
    """
    if solver != "auto" and solver not in SOLVERS:
        raise ValueError(f'solver must be "auto", {", ".join(map(repr, SOLVERS))}, got {solver!r}')
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", {", ".join(map(repr, BACKENDS))}, got {backend!r}')
    if "auto" not in (solver, backend) and backend not in LIBRARIES_OF[solver]:
        raise ValueError(
            f'solver="{solver}" does not work with backend="{backend}", only with '
            f"{', '.join(map(repr, LIBRARIES_OF[solver]))}"
        )


def choose(solver: str, backend: str, device: Any) -> tuple[str, str]:
    """The names of solver and backend; what is named is taken or refused, "auto" follows `AUTO`.

    Raises:
        ValueError: there is none of that name, or it can't work on this device, or not with the other.
        ImportError: its library isn't installed.
    """
    check_names(solver, backend)
    device = torch.device(device)
    if solver == backend == "auto":
        return AUTO["cpu" if device.type == "cpu" else "other"]
    if solver == "auto":
        solver = ALONE[backend] if backend in ALONE else AUTO["cpu" if device.type == "cpu" else "other"][0]
    if backend == "auto":
        backend = LIBRARIES_OF[solver][0]
    if solver == "scipy" and device.type != "cpu":
        raise ValueError(
            f'solver="scipy" works on the CPU, the graph is on {device}; move it with graph.cpu() or '
            'take solver="scatter"'
        )
    check_library(backend, device)
    if backend == "triton":
        check_triton(device, 'solver="sweep" needs a GPU and the graph is on the CPU: use solver="scipy"')
    return solver, backend


def solvers_for(device: Any) -> list[tuple[str, str]]:
    """(solver, backend) of all that can work on this device with what is installed."""
    found = []
    for solver, libraries in LIBRARIES_OF.items():
        for backend in libraries:
            try:
                found.append(choose(solver, backend, device))
            except (ImportError, ValueError):
                continue
    return found
