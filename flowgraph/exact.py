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

Rows that kernels compute (`backend="triton"`) are not written where a sweep only sums them up: then a block is its
square, W between its own rows, and two products with a vector (`flowgraph.rows.BlockedRows`). The first sweep never
needs more; the second needs the block itself to list edges, and with `edges=TopK(0)`, which lists none, it doesn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgraph.flow import Flow
from flowgraph.graph import TokenGraph, closed_tokens, flow_masks
from flowgraph.rows import BlockedRows, Rows, solve_square
from flowgraph.sparsify import EdgeRule, Edges, TopK, check_weights, is_wrong

SMALLEST = 1e-280
"""Reach below this has lost digits in float64. Attention never comes near; the solvers of `trace_flow` go further."""


@torch.no_grad()
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
            strongest into each token; `TopK(0)`: none, where only credits are wanted). What the others carry is in
            `unlisted_inflow` and `unlisted_outflow`.
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
    summed = rows if isinstance(rows, BlockedRows) and rows.backend == "triton" else None
    if summed is not None:
        _descend_in_sums(summed, answer_mask, closed, reach)
    else:
        for _ in descend(rows, answer_mask, closed, reach):
            pass
    check_reach(reach)
    start = (masks["question_mask"] & (reach > 0)).double()
    injection = start / start.sum().clamp(min=1)
    rule = TopK(32) if edges is None else edges
    if summed is not None and rule == TopK(0):
        swept = _ascend_in_sums(summed, reach, injection, answer_mask, closed)
    else:
        swept = _ascend(rows, reach, injection, answer_mask, closed, rule)
    return _flow(swept, reach, injection, answer_mask, roles | masks)


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
        # x(i) = arriving(i) + sum_k W[k, i] x(k), and x = 1 at sinks.
        here = torch.where(ends, 1.0, arriving[start:stop])
        here = _solve(rows, block[:, start:], here, ~closed[start:stop], ~ends, backward=True)
        reach[start:stop] = here
        arriving[:start] += here @ weight[:, :start]
        yield start, block, weight


def _solve(rows: Rows, square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
    """`solve_square`, by what computes the rows."""
    if isinstance(rows, BlockedRows):
        return rows.solve(square, right, into, out_of, backward)
    return solve_square(square.double(), right, into, out_of, backward)


def _descend_in_sums(rows: BlockedRows, sinks: Tensor, closed: Tensor, reach: Tensor) -> None:
    """`descend` for rows that kernels sum up; it fills in reach alone. The host waits for the device once."""
    arriving = torch.zeros_like(reach)
    wrong = []
    for start in reversed(rows.starts):
        square = rows.square(start)
        wrong.append(is_wrong(square))
        here = slice(start, start + len(square))
        open_, ends = ~closed[here], sinks[here]
        right = torch.where(ends, 1.0, arriving[here])
        reach[here] = rows.solve(square, right, open_, ~ends, backward=True)
        arriving[:start] += rows.arriving(start, reach[here] * open_)
    # A wrong weight is in the square, or makes a sum wrong, even one that reach of 0 was a factor in.
    if torch.stack([*wrong, ~arriving.isfinite().all()]).any():
        for start, block in rows.blocks(last_first=True):
            check_weights(block, start)


def check_reach(reach: Tensor) -> None:
    """Raise a ValueError if reach has left the numbers that float64 holds exactly."""
    if ((reach > 0) & (reach < SMALLEST)).any() or not bool(torch.isfinite(reach).all()):
        raise ValueError(
            f"reach runs from {float(reach[reach > 0].min()):.0e} to {float(reach.max()):.0e}, beyond what exact "
            "sweeps in float64 can hold; build a TokenGraph and call trace_flow, which keeps an exponent for each token"
        )


class _Swept(NamedTuple):
    """What the ascending sweep finds: flow [N], listed edges and the flow [E] on each, flow [N] on all the others."""

    flow: Tensor
    edges: Edges
    edge_flow: Tensor
    unlisted_in: Tensor
    unlisted_out: Tensor


def _per_reach(injection: Tensor, reach: Tensor) -> Tensor:
    return torch.where(reach > 0, injection / reach.clamp(min=SMALLEST), 0)


def _ascend(rows: Rows, reach: Tensor, injection: Tensor, sinks: Tensor, closed: Tensor, rule: EdgeRule) -> _Swept:
    """The ascending sweep: flow, and the edges worth showing."""
    # y = f / h of tokens that pass flow on; sinks keep what they get, and dead ends get nothing.
    y = torch.zeros_like(reach)
    flow, unlisted_in, unlisted_out = torch.zeros_like(reach), torch.zeros_like(reach), torch.zeros_like(reach)
    per_reach = _per_reach(injection, reach)
    sources, targets, weights, carried, selves, losses = [], [], [], [], [], []
    for start, block in rows.blocks():
        stop = start + len(block)
        weight = block.double() * ~closed[start:stop, None]
        passing = ~sinks[start:stop] & (reach[start:stop] > 0)
        known = per_reach[start:stop] + weight[:, :start] @ y[:start]
        here = _solve(rows, block[:, start:], known, ~closed[start:stop], passing, backward=False)
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
    return _Swept(flow, listed, torch.cat(carried), unlisted_in, unlisted_out)


def _ascend_in_sums(rows: BlockedRows, reach: Tensor, injection: Tensor, sinks: Tensor, closed: Tensor) -> _Swept:
    """`_ascend` for rows that kernels sum up, and no edges."""
    y, flow, inflow = torch.zeros_like(reach), torch.zeros_like(reach), torch.zeros_like(reach)
    per_reach, ones = _per_reach(injection, reach), torch.ones_like(reach)
    selves, losses = [], []
    for start in rows.starts:
        square = rows.square(start)
        here = slice(start, start + len(square))
        open_, passing = ~closed[here], ~sinks[here] & (reach[here] > 0)
        known, mass = rows.known(start, torch.stack([y[:start], ones[:start]]))
        known = known * open_
        solved = rows.solve(square, per_reach[here] + known, open_, passing, backward=False)
        y[here] = solved * passing
        past = square.double().tril(-1)
        flow[here] = solved * reach[here]
        inflow[here] = (known + past @ y[here] * open_) * reach[here]
        selves.append(square.diagonal().clone())
        losses.append((mass + past.sum(-1)).to(square))
    none = torch.empty(2, 0, dtype=torch.int64, device=reach.device)
    listed = Edges(none, selves[0][:0], torch.cat(selves), torch.cat(losses), rule=f"by flow: {TopK(0)}")
    return _Swept(flow, listed, flow[:0], inflow, y * reach)


def _flow(swept: _Swept, reach: Tensor, injection: Tensor, sinks: Tensor, roles: dict[str, Any]) -> Flow:
    """All that a `Flow` holds."""
    flow, listed, edge_flow = swept.flow, swept.edges, swept.edge_flow
    graph = TokenGraph.from_sparse(listed, **roles)
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
        unlisted_inflow=out(swept.unlisted_in),
        unlisted_outflow=out(swept.unlisted_out),
        iterations=torch.ones(1, dtype=torch.int64, device=reach.device),
        solver="exact",
        graph=graph,
    )
