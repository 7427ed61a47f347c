"""Coarser views of a flow: tokens contracted to segments, with nothing of the flow lost.

    phi(I -> K) = sum of phi(i -> k) over tokens i of segment I and k of segment K
    f(K)        = injection(K) + inflow from other segments        (what merely moves within a segment is not counted)

So flow is conserved at every segment as it is at every token, and the totals are the same. The result is a `Flow`
again, over a graph whose nodes are segments, and whatever works on flows works on it. With every token a segment of its
own it is the flow that came in.

Shapes: N tokens, E edges, M segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.utils import coalesce

from flowgraph.flow import Flow, check_flow
from flowgraph.graph import TokenGraph, closed_tokens, graph_ptr
from flowgraph.rows import Rows
from flowgraph.segments import Segments

_ALONE = {"answer_mask": ("sinks", "sink_mask"), "prompt_mask": ("prompt", "prompt_mask")}
"""What no segment may mix with other tokens: flow begins in one and ends in the other."""


def contract(flow: Flow, segments: Segments, rows: Rows | None = None, *, absorb_at_prompt: bool = False) -> Flow:
    """The flow between the segments of one trace.

    What the graph does not list (`exact_flow`, pools) stays a remainder: `unlisted_inflow` and `unlisted_outflow` of a
    segment are those of its tokens, and `flow` counts them, also where they stay within the segment (nobody kept where
    they lead). With `rows` there is no remainder: phi(i -> k) = f(i) W[k, i] h(k) / h(i) is read off the attention, in
    one more sweep.

    Args:
        flow: of one graph. segments: over its N tokens; none may mix sinks, or the prompt, with others.
        rows: the attention that the flow came from, all of it. absorb_at_prompt: how the flow was made; with `rows`.

    Returns:
        A `Flow` over M nodes. `reach` of a segment is the influence on the answer that enters it from outside: the
        expected number of times that the walks of docs/method.md, section 1, come into it, over listed edges that flow
        can take. `transition` is the share of the flow that leaves a segment; 0 where none does. Of its graph,
        `edge_weight` is the attention that the tokens of the later segment pay to the earlier one, on average; a mask
        is set where all tokens have it (`question_mask`, `credit_mask`: one of them); `internal_flow` [M] is the flow
        between tokens of the same segment; `segment_names` are those of the segments; `token_ids` are -1.

    Raises:
        TypeError: flow is no `Flow`.
        ValueError: a batch, segments over another number of tokens, or one that mixes sinks or prompt with others; rows
            with a flow through a graph that dropped some of them.
    """
    check_flow(flow)
    graph = flow.graph
    if len(graph_ptr(graph)) != 2:
        raise ValueError(f"flow is over a batch of {len(flow)} graphs; contract them one by one: for one in flow")
    if segments.num_tokens != graph.num_nodes:
        raise ValueError(f"segments are over {segments.num_tokens} tokens, the flow over {graph.num_nodes}")
    if rows is not None and flow.solver != "exact" and (graph.dropped > 1e-6).any():
        raise ValueError(
            f"rows are more than the flow came from: the graph has {graph.rule}, and flow took its edges and pools "
            "alone; contract it without rows"
        )
    device = flow.flow.device
    index, M = segments.index.to(device), len(segments)
    size = torch.bincount(index, minlength=M)

    def total(values: Tensor) -> Tensor:
        """[M] sums of values [N], in float64 meanwhile."""
        out = torch.zeros(M, dtype=torch.float64, device=device)
        return out.index_add_(0, index, values.double()).to(values.dtype)

    masks: dict[str, Any] = {}
    for name in ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask"):
        count = total(graph[name].double())
        masks[name] = count > 0 if name in ("question_mask", "credit_mask") else count == size
        if name in _ALONE and (mixed := (count > 0) & (count < size)).any():
            number, (what, argument) = int(mixed.nonzero()[0]), _ALONE[name]
            raise ValueError(
                f"segment {number} ({segments.names[number]!r}) holds {what} and other tokens; pass {argument} to split"
            )
    pairs = _listed(flow, index, M) if rows is None else _read(flow, index, rows, absorb_at_prompt)
    inside = pairs.edges[0] == pairs.edges[1]
    inner, inner_weight = (
        torch.zeros(M, dtype=torch.float64, device=device).index_add_(0, pairs.edges[0, inside], values[inside])
        for values in (pairs.flow, pairs.weight)
    )
    edges, edge_flow, edge_weight = pairs.edges[:, ~inside], pairs.flow[~inside], pairs.weight[~inside]
    log_reach = _log_sums(pairs.log_entering[~inside], edges[0], M)
    log_reach = torch.where(masks["answer_mask"], size.double().log(), log_reach)

    def kept(values: Tensor) -> Tensor:
        return values.to(graph.edge_weight.dtype)

    coarse = TokenGraph.from_edges(
        edges,
        kept(edge_weight / size[edges[1]]),
        **masks,
        self_weight=kept((total(graph.self_weight.double()) + inner_weight) / size),
        dropped=kept(total(graph.dropped.double() * (rows is None)) / size),
        model=graph.model,
        layers=graph.layers,
        rule=f"segments of {graph.rule}",
    )
    coarse.internal_flow, coarse.segment_names = kept(inner), list(segments.names)
    injection = total(flow.injection.double())
    remainder = rows is None
    unlisted_in = total(flow.unlisted_inflow.double() * remainder)
    unlisted_out = total(flow.unlisted_outflow.double() * remainder)
    arrived = torch.zeros(M, dtype=torch.float64, device=device).index_add_(0, edges[1], edge_flow)
    passed = torch.zeros(M, dtype=torch.float64, device=device).index_add_(0, edges[0], edge_flow) + unlisted_out
    through = injection + arrived + unlisted_in
    return Flow(
        reach=kept(log_reach.exp()),
        log_reach=kept(log_reach),
        flow=kept(through),
        throughput=kept(2 * through),
        edge_flow=kept(edge_flow),
        transition=kept(torch.where(passed[edges[0]] > 0, edge_flow / passed[edges[0]], 0)),
        injection=kept(injection),
        injected=flow.injected,
        absorbed=flow.absorbed,
        unabsorbed=flow.unabsorbed,
        unlisted_inflow=kept(unlisted_in),
        unlisted_outflow=kept(unlisted_out),
        iterations=flow.iterations,
        solver=flow.solver,
        graph=coarse,
    )


class _Pairs(NamedTuple):
    """Sums over the edges between two segments, or within one; sorted by target, then source. All float64."""

    edges: Tensor
    """[2, K] segments, earlier and later."""
    flow: Tensor
    weight: Tensor
    log_entering: Tensor
    """[K] log of what walks carry over these edges, weight times reach at the later end, where flow may run."""


def _listed(flow: Flow, index: Tensor, M: int) -> _Pairs:
    """From the edges of the graph."""
    target = flow.graph.edge_index[1]
    weight = flow.graph.edge_weight.double()
    logs = flow.log_reach.double()[target] + weight.log()
    logs = logs.where(flow.transition > 0, -torch.inf)
    ends = index[flow.graph.edge_index]
    edges, summed = coalesce(
        ends, torch.stack([flow.edge_flow.double(), weight], dim=1), num_nodes=M, reduce="sum", sort_by_row=False
    )
    key = edges[1] * M + edges[0]
    place = torch.searchsorted(key, ends[1] * M + ends[0])
    return _Pairs(edges, summed[:, 0], summed[:, 1], _log_sums(logs, place, len(key)))


def _read(flow: Flow, index: Tensor, rows: Rows, absorb_at_prompt: bool) -> _Pairs:
    """From the attention itself, block by block: nothing of it is left out."""
    graph, M = flow.graph, int(index[-1]) + 1
    if rows.num_tokens != graph.num_nodes:
        raise ValueError(f"rows are over {rows.num_tokens} tokens, the flow over {graph.num_nodes}")
    log_h = flow.log_reach.double()
    passing = ~graph.answer_mask & torch.isfinite(log_h)
    log_y = torch.where(passing, flow.flow.double().log() - log_h, -torch.inf)  # flow per unit of reach
    most = log_h.max().nan_to_num(neginf=0.0)  # -inf: no sinks
    closed = closed_tokens(graph.prompt_mask, graph.answer_mask, absorb_at_prompt)
    found, edges = [], []
    for start, block in rows.blocks():
        stop = start + len(block)
        weight = block.double().tril(start - 1)
        taken = weight * ~closed[start:stop, None]
        carried = taken * torch.exp(log_y[None, :stop] + log_h[start:stop, None])
        entering = taken * passing[:stop] * torch.exp(log_h[start:stop, None] - most)
        first, earlier = int(index[start]), int(index[stop - 1]) + 1
        sums = torch.zeros(3, earlier - first, earlier, dtype=torch.float64, device=weight.device)
        by_row = torch.zeros(3, stop - start, earlier, dtype=torch.float64, device=weight.device)
        by_row.index_add_(2, index[:stop], torch.stack([carried, weight, entering]))
        sums.index_add_(1, index[start:stop] - first, by_row)
        target, source = (sums[1] > 0).nonzero(as_tuple=True)
        edges.append(torch.stack([source, target + first]))
        found.append(sums[:, target, source].T)
    both, summed = coalesce(torch.cat(edges, 1), torch.cat(found), num_nodes=M, reduce="sum", sort_by_row=False)
    return _Pairs(both, summed[:, 0], summed[:, 1], summed[:, 2].log() + most)


def _log_sums(logs: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] log of the sum of exp(logs) by index; -inf where there is none. Reach can be beyond any float."""
    most = torch.full((size,), -torch.inf, dtype=logs.dtype, device=logs.device)
    most = most.scatter_reduce(0, index, logs, "amax")
    safe = most.masked_fill(most == -torch.inf, 0)
    sums = torch.zeros_like(safe).index_add_(0, index, torch.exp(logs - safe[index]))
    return safe + sums.log()
