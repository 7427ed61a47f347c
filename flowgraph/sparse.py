"""The sparse graph of a long trace: edges for the attention that stands out, pools for all the rest, in one pass.

Leaving the weak attention out ruins the credits (it is a fifth of the mass, and spread over everything); pools keep it
at about ten numbers per token. What they do best depends on how the rows are read:

* From the last row to the first, as kept queries and keys allow: reach of a row is known when the row is read, so pools
  are shaped by it, and reach on the sparse graph *is* the reach of the full attention. Only the way forward is a model.
* From the first to the last, while the model still runs and its queries are thrown away: reach lies in the future.
  What stands in for it is the attention that a token gets from the rows right after it; sinks are known, and are apart.

Either way the flow of the graph obeys the same laws as any: conserved at every token, all of it absorbed.

Shapes: N tokens, E edges, r rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowgraph.certificate import Witnesses
from flowgraph.exact import check_reach, descend
from flowgraph.graph import TokenGraph, closed_tokens, flow_masks
from flowgraph.pools import PoolBuilder
from flowgraph.rows import BlockedRows, Rows
from flowgraph.sparsify import EdgeRule, Edges, Threshold, TopK, check_weights, wrong_weight

DEFAULT_RULE = Threshold(1 / 256)
"""About 25 edges per token in real traces. Credits hardly depend on it: pools carry what it leaves."""

_LEAST = 1e-290
"""Weight of rows without reach: they shape a pool only where all its rows are such."""


def sparse_graph(
    rows: Rows,
    *,
    prompt_mask: Tensor,
    answer_mask: Tensor,
    question_mask: Tensor | None = None,
    absorb_at_prompt: bool = False,
    edges: EdgeRule | None = None,
    witnesses: Witnesses | None = None,
    **roles: Any,
) -> TokenGraph:
    """Read the rows once; keep the edges that a rule chooses, and the rest as pools. For `trace_flow`.

    Args:
        rows: [N, N] attention as blocks. Read from the last block to the first, or the other way if they can be read in
            that order only (`rows.once`).
        prompt_mask, answer_mask, question_mask: [N] bool, as in `TokenGraph.from_edges`.
        absorb_at_prompt: what the flow through the graph will be asked for with; pools are shaped for it.
        edges: the rule that chooses edges (default: those over 1/256).
        witnesses: take the rows and columns of these tokens along, for `certify`.
        roles: further keyword arguments of `TokenGraph.from_edges`.

    Raises:
        ValueError: a mask or weight breaks a law, or reach is too small for float64 (only with weights that are no
            attention).
    """
    N = rows.num_tokens
    masks = flow_masks(N, prompt_mask, answer_mask, question_mask)
    rule = DEFAULT_RULE if edges is None else edges
    closed = closed_tokens(prompt_mask, answer_mask, absorb_at_prompt)
    device = answer_mask.device
    # Prompt and response, and the two halves of the prompt: within each, flow per reach varies less.
    end = int(prompt_mask.nonzero()[-1]) + 1 if prompt_mask.any() else 0
    cuts = sorted({cut for cut in (end // 2, end) if 0 < cut < N})
    once, kernels = getattr(rows, "once", False), getattr(rows, "backend", "torch") == "triton"
    builder = _builder(kernels)(N, cuts, answer_mask.long() if once else None, device)
    threshold = _threshold(rule) if kernels else None
    reach = torch.zeros(N, dtype=torch.float64, device=device)
    if once:
        weighed = _weigh_by_what_follows(rows, answer_mask, closed, check=threshold is None)
    elif threshold is not None and isinstance(rows, BlockedRows):
        weighed = _weigh_by_reach_in_kernels(rows, answer_mask, closed, reach)
    else:
        weighed = _weigh_by_reach(rows, answer_mask, closed, reach)
    if threshold is None:
        listed = _list_edges(weighed, rule, builder, witnesses)
    else:
        listed = _list_above(weighed, threshold, builder, witnesses, rows)
    check_reach(reach)
    listed = replace(listed, rule=f"{rule}, the rest in pools")
    return TokenGraph.from_sparse(listed, pools=builder.pools(listed.edge_weight.dtype), **roles | masks)


_Weighed = Iterator[tuple[int, Tensor, Tensor]]
"""The first row of a block; the block; [r] float64 > 0, how much each of its rows counts in the pools."""


def _builder(kernels: bool) -> Any:
    if not kernels:
        return PoolBuilder
    from flowgraph.triton_pools import TritonPools

    return TritonPools


def _threshold(rule: EdgeRule) -> float | None:
    """Edges are what is above this; None for rules that are not so simple."""
    if isinstance(rule, Threshold) and rule.cap is None:
        return rule.value
    return math.inf if rule == TopK(0) else None


# --- edges, and the rest to the pools ---------------------------------------------------------------------------------


def _list_edges(weighed: _Weighed, rule: EdgeRule, builder: Any, witnesses: Witnesses | None) -> Edges:
    parts: list[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for start, block, weight in weighed:
        past = block.tril(start - 1)
        if witnesses is not None:
            witnesses.see(start, past)
        keep = rule.keep(past)
        row, source = keep.nonzero(as_tuple=True)
        rest = past.masked_fill(keep, 0)
        parts.append((start, source, row + start, block[row, source], block.diagonal(start).clone(), rest.sum(-1)))
        builder.add(start, rest, weight)
    parts.sort(key=lambda part: part[0])
    source, target, kept, selves, losses = (torch.cat(column) for column in list(zip(*parts, strict=True))[1:])
    return Edges(torch.stack([source, target]), kept, selves, losses, "")


def _list_above(weighed: _Weighed, threshold: float, builder: Any, witnesses: Witnesses | None, rows: Rows) -> Edges:
    """`_list_edges` by kernels, for which the host doesn't wait between blocks and no block is written again.

    The check of weights comes last.
    """
    from flowgraph.triton_rows import Above

    above: Above | None = None
    for start, block, weight in weighed:
        if witnesses is not None:
            witnesses.see(start, block.tril(start - 1))
        above = Above(builder.num_tokens, threshold, block.device) if above is None else above
        above.take(start, block)
        builder.add(start, block, weight, threshold)
    assert above is not None
    kept = above.kept()
    if kept.wrong is not None:
        if not getattr(rows, "once", False):  # read again, to name what torch would name first
            for start, block in rows.blocks(last_first=True):
                check_weights(block, start)
        raise wrong_weight(*kept.wrong)
    return Edges(torch.stack([kept.source, kept.target]), kept.weight, kept.self_weight, kept.dropped, "")


# --- how much a row counts in the pools -------------------------------------------------------------------------------


def _weigh_by_reach(rows: Rows, sinks: Tensor, closed: Tensor, reach: Tensor) -> _Weighed:
    """Fills in reach [N] on the way."""
    for start, block, _ in descend(rows, sinks, closed, reach):
        stop = start + len(block)
        yield start, block, (reach[start:stop] * ~closed[start:stop]).clamp(min=_LEAST)


def _weigh_by_reach_in_kernels(rows: BlockedRows, sinks: Tensor, closed: Tensor, reach: Tensor) -> _Weighed:
    """`_weigh_by_reach`, less the check of weights."""
    from flowgraph.triton_pools import add_arriving

    arriving, into, out_of = torch.zeros_like(reach), (~closed).double(), (~sinks).double()
    for start, block in rows.blocks(last_first=True):
        here = slice(start, start + len(block))
        right = torch.where(sinks[here], 1.0, arriving[here])
        reach[here] = rows.solve(block[:, start:], right, into[here], out_of[here], backward=True)
        passed = reach[here] * into[here]
        add_arriving(arriving, start, block, passed)
        yield start, block, passed.clamp(min=_LEAST)


def _weigh_by_what_follows(rows: Rows, sinks: Tensor, closed: Tensor, check: bool) -> _Weighed:
    """Rows count by the mean attention that their tokens get from the rest of their block and from the next one.

    `check`: each block's weights, for which the host waits; else somebody does it afterwards.
    """
    last_sink = int(sinks.nonzero()[-1]) if sinks.any() else -1

    def weigh(start: int, block: Tensor, following: Tensor | None) -> Tensor:
        r = len(block)
        got = block[:, start : start + r].tril(-1).double().sum(0)
        count = torch.arange(r - 1, -1, -1, device=block.device).double()
        if following is not None:
            got, count = got + following[:, start : start + r].double().sum(0), count + len(following)
        mean = got / count.clamp(min=1)
        # Of the first rows enough is known: those that at least 8 rows follow, or as many as a short block has.
        known = r + (0 if following is None else len(following)) - min(8, max(r - 1, 1))
        typical = mean[:known].mean() if known > 0 else mean.new_ones(())
        mean[max(known, 0) :] = typical
        mean = torch.maximum(mean, 1e-3 * typical)
        place = torch.arange(start, start + r, device=block.device)
        counts = ~closed[start : start + r] & (place <= last_sink)
        return torch.where(sinks[start : start + r], 1.0, mean * counts).clamp(min=_LEAST)

    before: tuple[int, Tensor] | None = None
    for start, block in rows.blocks():
        if check:
            check_weights(block, start)
        if before is not None:
            yield *before, weigh(*before, block)
        before = start, block
    if before is not None:
        yield *before, weigh(*before, None)
