"""trace_flow: what of a trace reaches the answer, and how the flow from the question gets there.

Shapes: N tokens, E edges, B graphs of a batch; a single graph is a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.graph import TokenGraph, closed_tokens, graph_batch, graph_ptr
from flowgraph.pools import Pools, expand
from flowgraph.solve import SOLVERS, Solution, System, choose
from flowgraph.sums import Groups

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative error at which iterative solvers stop, by the dtype of the graph's weights."""

HOPPING = ("scatter", "blocks")
"""Solvers that add up hop after hop, until `tol` or `max_hops` ends it."""

_PER_TOKEN = (
    "reach", "log_reach", "flow", "throughput", "injection", "unlisted_inflow", "unlisted_outflow",
)  # fmt: skip
_PER_EDGE = ("edge_flow", "transition")
_PER_GRAPH = ("injected", "absorbed", "unabsorbed", "iterations")


@dataclass(frozen=True, eq=False)
class Flow:
    """The flow through one graph or a batch, in the dtype and on the device of its weights.

    Attributes:
        reach: [N] influence of each token that reaches the answer; exactly 0 where no path leads there. At most the
            number of sinks where rows sum to at most 1. Too small for the dtype it is 0, and `log_reach` is not.
        log_reach: [N] its natural logarithm, -inf where no path leads to the answer.
        flow: [N] the flow that passes through each token; the total injected into a graph is 1.
        throughput: [N] inflow + outflow = 2 * flow (injection counts as inflow, absorption as outflow).
        edge_flow: [E] the flow on each edge, in the order of `graph.edge_index`.
        transition: [E] P(i -> k), the share of token i's flow that takes the edge.
        injection: [N] what flows in from outside; sums to `injected` per graph.
        injected: [B] 1, or 0 where no source reaches the answer. absorbed: [B] what arrived at the sinks.
        unabsorbed: [B] their difference: rounding, or what `max_hops` has cut off.
        unlisted_inflow, unlisted_outflow: [N] flow on edges that the graph does not list: through its pools, or known
            from the sweeps of `exact_flow`; else 0.
        iterations: [B] hops of the iterative solver; 1 for the direct ones.
        solver: the algorithm that ran ("exact" for `exact_flow`). graph: the graph or batch itself.
        backend: the library it ran on.
    """

    reach: Tensor
    log_reach: Tensor
    flow: Tensor
    throughput: Tensor
    edge_flow: Tensor
    transition: Tensor
    injection: Tensor
    injected: Tensor
    absorbed: Tensor
    unabsorbed: Tensor
    unlisted_inflow: Tensor
    unlisted_outflow: Tensor
    iterations: Tensor
    solver: str
    graph: TokenGraph
    backend: str = "torch"

    def __repr__(self) -> str:
        several = f"{len(self)} graphs, " if len(self) != 1 else ""
        size = f"{several}{len(self.flow):,} nodes, {len(self.edge_flow):,} edges"
        injected, absorbed = float(self.injected.sum()), float(self.absorbed.sum())
        return f"Flow({size}, {injected:.6g} injected, {absorbed:.6g} absorbed, solver {self.solver!r})"

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.injected)

    def __getitem__(self, number: int) -> Flow:
        """The flow of one graph of the batch."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"graph {number} of a flow with {len(self)}")
        if not isinstance(self.graph, Batch):
            return self
        number %= len(self)
        ptr = graph_ptr(self.graph)
        tokens = slice(int(ptr[number]), int(ptr[number + 1]))
        ends = torch.searchsorted(self.graph.edge_index[1].contiguous(), ptr[number : number + 2].to(self.reach.device))
        edges = slice(int(ends[0]), int(ends[1]))
        one = slice(number, number + 1)
        return Flow(
            **{name: getattr(self, name)[tokens] for name in _PER_TOKEN},
            **{name: getattr(self, name)[edges] for name in _PER_EDGE},
            **{name: getattr(self, name)[one] for name in _PER_GRAPH},
            solver=self.solver,
            graph=self.graph[number],
            backend=self.backend,
        )

    def __iter__(self) -> Iterator[Flow]:
        return (self[number] for number in range(len(self)))

    @classmethod
    def of_batch(cls, flows: Sequence[Flow]) -> Flow:
        """Flows of single graphs as the flow of their batch."""
        joined = {
            name: torch.cat([getattr(flow, name) for flow in flows]) for name in _PER_TOKEN + _PER_EDGE + _PER_GRAPH
        }
        solver, backend = ("+".join(sorted({getattr(flow, name) for flow in flows})) for name in ("solver", "backend"))
        graph = Batch.from_data_list([flow.graph for flow in flows])
        return cls(**joined, solver=solver, graph=graph, backend=backend)


def check_flow(flow: object) -> None:
    """Raise a TypeError that says where the flow is, if this is none: a `Trace`, which has one, or a graph."""
    if not isinstance(flow, Flow):
        where = "pass its .flow" if isinstance(getattr(flow, "flow", None), Flow) else "trace_flow(graph) gives one"
        raise TypeError(f"flow must be a Flow, got {type(flow).__name__}; {where}")


def trace_flow(
    graph: TokenGraph,
    solver: str = "auto",
    backend: str = "auto",
    *,
    absorb_at_prompt: bool = False,
    tol: float | None = None,
    max_hops: int | None = None,
) -> Flow:
    """Send one unit of flow from the question of each graph to its answer.

    Backward, reach; from it the conserving transitions; forward, the flow (docs/method.md, sections 1 to 3).

    Args:
        graph: a `TokenGraph`, or a batch of them from `Batch.from_data_list` or a `DataLoader`.
        solver: the algorithm. "scipy": sparse triangular solve, CPU only. "scatter": message passing, any device.
            "blocks": message passing between dense blocks of 128 tokens, any device with float64. "sweep": one Triton
            program per graph, a GPU. "reference": dense float64, for tests. "auto": scipy on the CPU (scatter, if `tol`
            or `max_hops` is given), scatter elsewhere until a GPU has been measured.
        backend: the library that it works with. "torch": what is always there (with solver="scipy", SciPy). "triton"
            for "sweep"; "torch_scatter" or "cupy" for the sums of "scatter", "cupy" for those of "blocks". "auto": the
            solver's own. What is named is taken or refused.
        absorb_at_prompt: edges whose later end is a prompt token that is no sink don't exist: flow leaves the prompt at
            once and never runs within it.
        tol: relative error per token at which "scatter" and "blocks" stop; default 1e-6 in float32, 1e-12 in float64.
        max_hops: limit on their hops (default: none). What it cuts off is in `unabsorbed`. Both are refused with a
            solver that knows no hops.

    Raises:
        ValueError: unknown solver or backend, one that can't run on the graph's device or with the other, or a graph
            that breaks a law.
        ImportError: the backend that is named is not installed; says what to install.
    """
    if not isinstance(graph, TokenGraph):
        raise TypeError(
            f"graph must be a TokenGraph or a batch of them, got {type(graph).__name__}; see TokenGraph.from_edges"
        )
    if max_hops is not None and max_hops < 0:
        raise ValueError(f"max_hops must be >= 0, got {max_hops}")
    graph.validate()
    limits = [name for name, given in (("tol", tol), ("max_hops", max_hops)) if given is not None]
    if limits and solver == "auto" and backend in ("auto", "torch"):
        solver = "scatter"
    solver, backend = choose(solver, backend, graph.edge_weight.device)
    if limits and solver not in HOPPING:
        raise ValueError(f"{limits[0]} is for solvers that go by hops, {' and '.join(HOPPING)}; got solver={solver!r}")
    weight, source, target = graph.edge_weight.detach(), graph.edge_index[0], graph.edge_index[1]
    pools, batch, num_graphs = graph.pools, graph_batch(graph), len(graph_ptr(graph)) - 1
    if absorb_at_prompt:
        closed = closed_tokens(graph.prompt_mask, graph.answer_mask, absorb_at_prompt)
        weight, pools = weight * ~closed[target], pools.closed_to(closed)
    system = System(
        edge_index=graph.edge_index,
        edge_weight=weight,
        sinks=graph.answer_mask,
        sources=graph.question_mask,
        batch=batch,
        num_graphs=num_graphs,
        tol=TOLERANCE[weight.dtype] if tol is None else tol,
        max_hops=max_hops,
        backend=backend,
    )
    if pools.index.numel():
        solution, unlisted_in, unlisted_out = _solve_with_pools(SOLVERS[solver], system, pools)
    else:
        solution = SOLVERS[solver](system)
        unlisted_in = unlisted_out = torch.zeros_like(solution.flow)

    def per_graph(values: Tensor) -> Tensor:
        return Groups(None, system.batch.to(values.device), system.ptr.to(values.device)).sum(values)

    flow, transition = solution.flow, solution.transition
    injected = per_graph(solution.injection)
    absorbed = per_graph(flow * graph.answer_mask.to(flow.device))

    def out(values: Tensor) -> Tensor:
        return values.to(weight)

    return Flow(
        reach=out(solution.reach.value),
        log_reach=out(solution.reach.log),
        flow=out(flow),
        throughput=out(2 * flow),
        edge_flow=out(flow[source.to(flow.device)] * transition),
        transition=out(transition),
        injection=out(solution.injection),
        injected=out(injected),
        absorbed=out(absorbed),
        unabsorbed=out(injected - absorbed),
        unlisted_inflow=out(unlisted_in),
        unlisted_outflow=out(unlisted_out),
        iterations=solution.iterations.to(weight.device),
        solver=solver,
        graph=graph,
        backend=backend,
    )


def _solve_with_pools(
    solve: Callable[[System], Solution], system: System, pools: Pools
) -> tuple[Solution, Tensor, Tensor]:
    """The solution of tokens and edges, and what each token gets from pools and gives to them, [N] and [N]."""
    N = len(system.sinks)
    nodes = expand(system.edge_index, system.edge_weight, pools)
    token, collects = pools.index[0], pools.collects
    count = int(nodes.tokens[-1]) + 1  # no pool stands behind the last token

    def over_nodes(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_copy_(0, nodes.tokens, values)

    # A pool belongs to the graph of the token behind it, and the last node of each graph is a token.
    behind = torch.searchsorted(nodes.tokens, torch.arange(count, device=token.device))
    solution = solve(
        replace(
            system,
            edge_index=nodes.edge_index,
            edge_weight=nodes.edge_weight,
            sinks=over_nodes(system.sinks),
            sources=over_nodes(system.sources),
            batch=system.batch[behind],
        )
    )
    tokens, device = nodes.tokens.to(solution.flow.device), solution.flow.device
    moved = (solution.flow[nodes.edge_index[0].to(device)] * solution.transition)[nodes.links.to(device)]
    token, collects = token.to(device), collects.to(device)
    arrives, leaves = (_by_token(token[some], moved[some], N) for some in (~collects, collects))
    of_tokens = Solution(
        reach=solution.reach.at(tokens),
        flow=solution.flow[tokens],
        injection=solution.injection[tokens],
        transition=solution.transition[nodes.edges.to(device)],
        iterations=solution.iterations,
    )
    return of_tokens, arrives, leaves


def _by_token(token: Tensor, values: Tensor, num_tokens: int) -> Tensor:
    """[N] the values of each token added up."""
    groups = Groups.by(token, num_tokens, ascending=False)
    return groups.sum(groups.arrange(values))
