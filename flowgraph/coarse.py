"""Coarser views of a flow: tokens contracted to segments, with nothing of the flow lost.

    phi(I -> K) = sum of phi(i -> k) over tokens i of segment I and k of segment K
    f(K)        = injection(K) + inflow from other segments        (what merely moves within a segment is not counted)

So flow is conserved at every segment as it is at every token, and the totals are the same. The result is a `Flow`
again, over a graph whose nodes are segments, and whatever works on flows works on it. With every token a segment of its
own it is the flow that came in.

Shapes: N tokens, E edges, M segments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.utils import coalesce

from flowgraph.flow import Flow
from flowgraph.graph import TokenGraph, graph_ptr
from flowgraph.segments import Segments

_ALONE = {"answer_mask": ("sinks", "sink_mask"), "prompt_mask": ("prompt", "prompt_mask")}
"""What no segment may mix with other tokens: flow begins in one and ends in the other."""


def contract(flow: Flow, segments: Segments) -> Flow:
    """The flow between the segments of one trace.

    What `exact_flow` did not list stays a remainder: `unlisted_inflow` and `unlisted_outflow` of a segment are those of
    its tokens, and `flow` counts them, also where they stay within the segment (nobody kept where they lead).

    Args:
        flow: of one graph. segments: over its N tokens; none may mix sinks, or the prompt, with others.

    Returns:
        A `Flow` over M nodes. `reach` of a segment is the influence on the answer that enters it from outside: the
        expected number of times that the walks of docs/method.md, section 1, come into it, over listed edges that flow
        can take. `transition` is the share of the flow that leaves a segment; 0 where none does. Of its graph,
        `edge_weight` is the attention that the tokens of the later segment pay to the earlier one, on average; a mask
        is set where all tokens have it (`question_mask`, `credit_mask`: one of them); `internal_flow` [M] is the flow
        between tokens of the same segment; `token_ids` are -1.

    Raises:
        ValueError: a batch, segments over another number of tokens, or one that mixes sinks or prompt with others.
    """
    graph = flow.graph
    if len(graph_ptr(graph)) != 2:
        raise ValueError(f"flow is over a batch of {len(flow)} graphs; contract them one by one: for one in flow")
    if segments.num_tokens != graph.num_nodes:
        raise ValueError(f"segments are over {segments.num_tokens} tokens, the flow over {graph.num_nodes}")
    device = flow.flow.device
    index, M = segments.index.to(device), len(segments)
    size = torch.bincount(index, minlength=M)

    def total(values: Tensor) -> Tensor:
        """[M] sums of values [N], in float64 meanwhile."""
        out = torch.zeros(M, dtype=torch.float64, device=device)
        return out.index_add_(0, index, values.double()).to(values.dtype)

    masks = {}
    for name in ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask"):
        count = total(graph[name].double())
        masks[name] = count > 0 if name in ("question_mask", "credit_mask") else count == size
        if name in _ALONE and (mixed := (count > 0) & (count < size)).any():
            number, (what, argument) = int(mixed.nonzero()[0]), _ALONE[name]
            raise ValueError(
                f"segment {number} ({segments.names[number]!r}) holds {what} and other tokens; pass {argument} to split"
            )
    source, target = index[graph.edge_index]
    outside = source != target
    weight = graph.edge_weight.double()
    values = torch.stack([flow.edge_flow.double(), weight], dim=1)[outside]
    edges, summed = coalesce(
        torch.stack([source, target])[:, outside], values, num_nodes=M, reduce="sum", sort_by_row=False
    )
    edge_flow, edge_weight = summed.unbind(1)
    # What a walk carries over an edge: the reach at its later end times its weight, where flow may run.
    entering = flow.log_reach.double()[graph.edge_index[1]] + weight.log()
    open_ = outside & (flow.transition > 0)
    log_reach = _log_sums(entering[open_], source[open_], M)
    log_reach = torch.where(masks["answer_mask"], size.double().log(), log_reach)
    inner = torch.zeros(M, dtype=torch.float64, device=device)
    inner.index_add_(0, source[~outside], flow.edge_flow.double()[~outside])
    inner_weight = torch.zeros(M, dtype=torch.float64, device=device).index_add_(0, source[~outside], weight[~outside])

    def kept(values: Tensor) -> Tensor:
        return values.to(graph.edge_weight.dtype)

    coarse = TokenGraph.from_edges(
        edges,
        kept(edge_weight / size[edges[1]]),
        **masks,
        self_weight=kept((total(graph.self_weight.double()) + inner_weight) / size),
        dropped=kept(total(graph.dropped.double()) / size),
        model=graph.model,
        layers=graph.layers,
        rule=f"segments of {graph.rule}",
    )
    coarse.internal_flow = kept(inner)
    injection = total(flow.injection.double())
    unlisted_in, unlisted_out = total(flow.unlisted_inflow.double()), total(flow.unlisted_outflow.double())
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


def _log_sums(logs: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] log of the sum of exp(logs) by index; -inf where there is none. Reach can be beyond any float."""
    most = torch.full((size,), -torch.inf, dtype=logs.dtype, device=logs.device)
    most = most.scatter_reduce(0, index, logs, "amax")
    safe = most.masked_fill(most == -torch.inf, 0)
    sums = torch.zeros_like(safe).index_add_(0, index, torch.exp(logs - safe[index]))
    return safe + sums.log()
