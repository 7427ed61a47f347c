"""Exact flow of a trace whose attention is never stored: two sweeps over its row blocks.

The first sweep reads the blocks last to first. When it comes to rows a..b-1, reach of every later token is known and
has been added up in `arriving`; what is left is one small triangular system for the rows themselves:

    h = 1 at sinks, else arriving + (rows within the block)^T h          then arriving += (rows before it)^T h

The second sweep reads them first to last and solves for `y = f / h`, the flow per unit of reach:

    y = injection / h + W y (over tokens that are no sinks)               then f = h * y

which is the conserving flow, since P(i -> k) = W[k, i] h(k) / h(i) (docs/method.md, sections 2 to 4). In this sweep
everything is known that makes an edge matter: `f(i) P(i -> k) = y(i) W[k, i] h(k)` is the flow that it carries. So
edges are chosen by flow and not by raw attention, and only for looking at: reach and flow don't depend on them.

Time is twice that of reading the rows once; memory is O(r * N) for blocks of r rows. All sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowgraph.flow import Flow
from flowgraph.graph import TokenGraph, closed_tokens, flow_masks
from flowgraph.rows import Rows
from flowgraph.sparsify import EdgeRule, Edges, TopK, check_weights

SMALLEST = 1e-280
"""Reach below this has lost digits in float64. Attention never comes near; the solvers of `trace_flow` go further."""


def exact_flow(
    rows: Rows,
    *,
    prompt_mask: Tensor,
    answer_mask: Tensor,
    question_mask: Tensor | None = None,
    absorb_at_prompt: bool = False,
    edges: EdgeRule | None = None,
    **roles: Any,
) -> Flow:
    """The flow through a trace from the stream of its rows; nothing of it is dropped.

    Args:
        rows: [N, N] attention as blocks, read twice.
        prompt_mask, answer_mask, question_mask: [N] bool, as in `TokenGraph.from_edges`.
        absorb_at_prompt: as in `trace_flow`.
        edges: which edges the graph shows, by the share of the whole flow that they carry (default: `TopK(32)`, the 32
            strongest into each token). What the others carry is in `unlisted_inflow` and `unlisted_outflow`.
        roles: further keyword arguments of `TokenGraph.from_edges`.

    Returns:
        A `Flow` with `solver="exact"`. Its `graph` holds the chosen edges with their attention as weight; reach, flow
        and throughput are those of the full attention.

    Raises:
        ValueError: a mask or weight breaks a law, or reach is too small for float64 (only with weights that are no
            attention; `trace_flow` can hold it).
    """
    masks = flow_masks(rows.num_tokens, prompt_mask, answer_mask, question_mask)
    # What rows that flow may not enter attend to gets nothing back from them.
    closed = closed_tokens(prompt_mask, answer_mask, absorb_at_prompt)
    reach = torch.zeros(rows.num_tokens, dtype=torch.float64, device=answer_mask.device)
    for _ in descend(rows, answer_mask, closed, reach):
        pass
    check_reach(reach)
    start = (masks["question_mask"] & (reach > 0)).double()
    injection = start / start.sum().clamp(min=1)
    return _forward(rows, reach, injection, answer_mask, closed, TopK(32) if edges is None else edges, roles | masks)


def descend(rows: Rows, sinks: Tensor, closed: Tensor, reach: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The descending sweep: fills in reach, and passes on each block once reach of its rows is known.

    Args:
        sinks: [N] bool. closed: [N] bool, the tokens that flow may not enter. reach: [N] float64 zeros.

    Yields:
        The number of a block's first row; the block; the same in float64, with closed rows set to 0.
    """
    arriving = torch.zeros_like(reach)
    for start, block in rows.blocks(last_first=True):
        check_weights(block, start)
        stop = start + len(block)
        weight = block.double() * ~closed[start:stop, None]
        ends = sinks[start:stop]
        # x(i) - sum_k W[k, i] x(k) = arriving(i), and x = 1 at sinks: upper triangular, ones on the diagonal.
        system = -weight[:, start:].tril(-1).mT * ~ends[:, None]
        here = torch.where(ends, 1.0, arriving[start:stop])
        here = torch.linalg.solve_triangular(system, here[:, None], upper=True, unitriangular=True)[:, 0]
        reach[start:stop] = here
        arriving[:start] += here @ weight[:, :start]
        yield start, block, weight


def check_reach(reach: Tensor) -> None:
    """Raise a ValueError if reach has left the numbers that float64 holds exactly."""
    if ((reach > 0) & (reach < SMALLEST)).any() or not bool(torch.isfinite(reach).all()):
        raise ValueError(
            f"reach runs from {float(reach[reach > 0].min()):.0e} to {float(reach.max()):.0e}, beyond what exact "
            "sweeps in float64 can hold; build a TokenGraph and call trace_flow, which keeps an exponent for each token"
        )


def _forward(
    rows: Rows, reach: Tensor, injection: Tensor, sinks: Tensor, closed: Tensor, rule: EdgeRule, roles: dict[str, Any]
) -> Flow:
    """The ascending sweep: flow, and the edges worth showing."""
    # y = f / h of tokens that pass flow on; sinks keep what they get, and dead ends get nothing.
    y = torch.zeros_like(reach)
    flow, unlisted_in, unlisted_out = torch.zeros_like(reach), torch.zeros_like(reach), torch.zeros_like(reach)
    per_reach = torch.where(reach > 0, injection / reach.clamp(min=SMALLEST), 0)
    sources, targets, weights, carried, selves, losses = [], [], [], [], [], []
    for start, block in rows.blocks():
        stop = start + len(block)
        weight = block.double() * ~closed[start:stop, None]
        passing = ~sinks[start:stop] & (reach[start:stop] > 0)
        within = -weight[:, start:].tril(-1) * passing
        known = per_reach[start:stop] + weight[:, :start] @ y[:start]
        here = torch.linalg.solve_triangular(within, known[:, None], upper=False, unitriangular=True)[:, 0]
        flow[start:stop] = here * reach[start:stop]
        y[start:stop] = here * passing
        weight = weight.tril(start - 1)
        edge_flow = weight * y[:stop] * reach[start:stop, None]
        keep = rule.keep(edge_flow)
        row, source = keep.nonzero(as_tuple=True)
        sources.append(source)
        targets.append(row + start)
        weights.append(block[row, source])
        carried.append(edge_flow[row, source])
        hidden = edge_flow.masked_fill(keep, 0)
        unlisted_in[start:stop] = hidden.sum(-1)
        unlisted_out[:stop] += hidden.sum(0)
        selves.append(block.diagonal(start).clone())
        losses.append(block.tril(start - 1).masked_fill(keep, 0).sum(-1))
    listed = Edges(
        edge_index=torch.stack([torch.cat(sources), torch.cat(targets)]),
        edge_weight=torch.cat(weights),
        self_weight=torch.cat(selves),
        dropped=torch.cat(losses),
        rule=f"by flow: {rule}",
    )
    graph = TokenGraph.from_sparse(listed, **roles)
    edge_flow = torch.cat(carried)
    passed = (flow * ~sinks)[graph.edge_index[0]]
    injected, absorbed = injection.sum()[None], (flow * sinks).sum()[None]

    def out(values: Tensor) -> Tensor:
        return values.to(graph.edge_weight.dtype)

    return Flow(
        reach=out(reach),
        log_reach=out(reach.log()),
        flow=out(flow),
        throughput=out(2 * flow),
        edge_flow=out(edge_flow),
        transition=out(torch.where(passed > 0, edge_flow / passed, 0)),
        injection=out(injection),
        injected=out(injected),
        absorbed=out(absorbed),
        unabsorbed=out(injected - absorbed),
        unlisted_inflow=out(unlisted_in),
        unlisted_outflow=out(unlisted_out),
        iterations=torch.ones(1, dtype=torch.int64, device=reach.device),
        solver="exact",
        graph=graph,
    )
