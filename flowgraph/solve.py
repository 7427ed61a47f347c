"""The two triangular solves behind every flow, by three algorithms with one signature.

    scipy      sparse triangular solve of SciPy (SuperLU) in float64: the fast one on a CPU
    scatter    message-passing layers (`flowgraph.layers`) on any device, in the graph's own dtype
    reference  dense float64, one token after the other: obviously right, O(N^2) memory, for tests

Each takes a `System` and returns a `Solution`. Shapes: N tokens, E edges, B graphs (a batch is one big system).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgraph.layers import AnswerReachability, FlowPropagation, Scaled


@dataclass(frozen=True)
class System:
    """What is to be solved.

    Attributes:
        edge_index: [2, E] sorted by target, then source. edge_weight: [E]; 0 for edges that don't exist.
        sinks: [N] bool. sources: [N] bool. batch: [N]. num_graphs: B.
        tol: relative error to stop at, for iterative solvers. max_hops: their limit, or None.
    """

    edge_index: Tensor
    edge_weight: Tensor
    sinks: Tensor
    sources: Tensor
    batch: Tensor
    num_graphs: int
    tol: float
    max_hops: int | None


@dataclass(frozen=True)
class Solution:
    """reach: `Scaled` [N]. flow, injection: [N]. transition: [E]. iterations: [B]."""

    reach: Scaled
    flow: Tensor
    injection: Tensor
    transition: Tensor
    iterations: Tensor


def transitions(edge_index: Tensor, edge_weight: Tensor, sinks: Tensor, reach: Scaled) -> Tensor:
    """[E] the conserving kernel `P(i -> k) = W[k, i] h(k) / sum_k W[k, i] h(k)`; 0 out of sinks and into dead ends.

    (Doob's h-transform; arXiv 2606.10646, conservation.) The sum itself is the divisor and not `h(i)`, so that each row
    of `P` sums to 1 to rounding whatever the error of `reach`.
    """
    source, target = edge_index
    weight = Scaled.of(edge_weight * ~sinks[source])
    # In units of h(i) the numbers are at most about 1, and nothing that matters underflows.
    share = weight.times(reach.at(target)).over(reach.at(source))
    share = torch.where(reach.mantissa[source] == 0, 0, share)
    total = torch.zeros_like(reach.mantissa).scatter_add_(0, source, share)
    return torch.where(share == 0, 0, share / total[source])


def inject(system: System, reach: Scaled) -> Tensor:
    """[N] 1 / |Q'| at each source that reaches the answer (Q'), graph by graph; 0 where none does."""
    start = (system.sources & (reach.mantissa > 0)).to(reach.mantissa.dtype)
    count = torch.zeros(system.num_graphs, dtype=start.dtype, device=start.device).scatter_add_(0, system.batch, start)
    return start / count.clamp(min=1)[system.batch]


def solve_scatter(system: System) -> Solution:
    edges, weight = system.edge_index, system.edge_weight
    reach, reach_hops = AnswerReachability(system.tol, system.max_hops)(edges, weight, system.sinks, system.batch)
    transition = transitions(edges, weight, system.sinks, reach)
    injection = inject(system, reach)
    flow, flow_hops = FlowPropagation(system.tol, system.max_hops)(edges, transition, injection, system.batch)
    return Solution(reach, flow, injection, transition, torch.maximum(reach_hops, flow_hops))


def solve_scipy(system: System) -> Solution:
    if system.edge_index.device.type != "cpu":
        raise ValueError(
            f'solver="scipy" works on the CPU, the graph is on {system.edge_index.device}; move it with graph.cpu() or '
            'take solver="scatter"'
        )
    source, target = system.edge_index.numpy()
    weight = system.edge_weight.double()
    leaving = weight.numpy() * ~system.sinks.numpy()[source]
    triangle = Triangle(source, target, len(system.sinks))
    value = triangle.solve(leaving, system.sinks.double().numpy(), backward=True)
    if _holds_in_floats(source, target, leaving, value):
        reach = Scaled.of(torch.from_numpy(value))
        share = leaving * value[target] / np.where(value > 0, value, 1)[source]
        total = np.bincount(source, share, len(value))
        transition = torch.from_numpy(share / np.where(total > 0, total, 1)[source])
    else:
        reach = _sweep_scaled(source, target, leaving, system.sinks.numpy())
        transition = transitions(system.edge_index, weight, system.sinks, reach)
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


def _holds_in_floats(source: np.ndarray, target: np.ndarray, weight: np.ndarray, reach: np.ndarray) -> bool:
    """Has reach [N] kept its digits, and is it 0 exactly where no path of edges leads to a sink?

    Below 1e-250 sums have lost digits to underflow, and with huge weights they overflow. A token that got 0 although it
    has a path was lost on the way, so somewhere on its path an edge leads from a 0 to something else.
    """
    if not ((reach == 0) | ((reach > 1e-250) & (reach < 1e250))).all():
        return False
    return not ((weight > 0) & (reach[source] == 0) & (reach[target] > 0)).any()


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
    "reference": solve_reference,
}


def choose_solver(solver: str, device: Any) -> str:
    """The solver's name; "auto" is scipy on the CPU and scatter elsewhere.

    Raises:
        ValueError: no such solver.
    """
    if solver == "auto":
        return "scipy" if torch.device(device).type == "cpu" else "scatter"
    if solver not in SOLVERS:
        raise ValueError(f'solver must be "auto", {", ".join(map(repr, SOLVERS))}, got {solver!r}')
    return solver
