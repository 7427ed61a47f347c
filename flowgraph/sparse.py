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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowgraph.certificate import Witnesses
from flowgraph.exact import check_reach, descend
from flowgraph.graph import TokenGraph, closed_tokens, flow_masks
from flowgraph.pools import PoolBuilder
from flowgraph.rows import Rows
from flowgraph.sparsify import EdgeRule, Edges, Threshold, check_weights

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
    once = getattr(rows, "once", False)
    builder = PoolBuilder(N, cuts, answer_mask.long() if once else None, device)
    weighed = (_weigh_by_what_follows if once else _weigh_by_reach)(rows, answer_mask, closed)
    parts: list[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for start, block, weight in weighed:
        past = block.tril(start - 1)
        if witnesses is not None:
            witnesses.see(start, past)
        keep = rule.keep(past)
        row, source = keep.nonzero(as_tuple=True)
        rest = past.masked_fill(keep, 0)
        parts.append((start, source, row + start, block[row, source], block.diagonal(start).clone(), rest.sum(-1)))
        builder.add(start, rest.double(), weight)
    parts.sort(key=lambda part: part[0])
    source, target, kept, selves, losses = (torch.cat(column) for column in list(zip(*parts, strict=True))[1:])
    listed = Edges(
        edge_index=torch.stack([source, target]),
        edge_weight=kept,
        self_weight=selves,
        dropped=losses,
        rule=f"{rule}, the rest in pools",
    )
    return TokenGraph.from_sparse(listed, pools=builder.pools(listed.edge_weight.dtype), **roles | masks)


_Weighed = Iterator[tuple[int, Tensor, Tensor]]
"""The first row of a block; the block; [r] float64 > 0, how much each of its rows counts in the pools."""


def _weigh_by_reach(rows: Rows, sinks: Tensor, closed: Tensor) -> _Weighed:
    reach = torch.zeros(rows.num_tokens, dtype=torch.float64, device=sinks.device)
    for start, block, _ in descend(rows, sinks, closed, reach):
        stop = start + len(block)
        yield start, block, (reach[start:stop] * ~closed[start:stop]).clamp(min=_LEAST)
    check_reach(reach)


def _weigh_by_what_follows(rows: Rows, sinks: Tensor, closed: Tensor) -> _Weighed:
    """Rows count by the mean attention that their tokens get from the rest of their block and from the next one."""
    last_sink = int(sinks.nonzero()[-1]) if sinks.any() else -1

    def weigh(start: int, block: Tensor, following: Tensor | None) -> Tensor:
        r = len(block)
        got = block[:, start : start + r].tril(-1).double().sum(0)
        count = torch.arange(r - 1, -1, -1, device=block.device).double()
        if following is not None:
            got, count = got + following[:, start : start + r].double().sum(0), count + len(following)
        mean = got / count.clamp(min=1)
        known = count >= min(8, max(r - 1, 1))
        typical = mean[known].mean() if known.any() else mean.new_ones(())
        mean = torch.where(known, mean, typical).clamp(min=1e-3 * float(typical))
        place = torch.arange(start, start + r, device=block.device)
        counts = ~closed[start : start + r] & (place <= last_sink)
        return torch.where(sinks[start : start + r], 1.0, mean * counts).clamp(min=_LEAST)

    before: tuple[int, Tensor] | None = None
    for start, block in rows.blocks():
        check_weights(block, start)
        if before is not None:
            yield *before, weigh(*before, block)
        before = start, block
    if before is not None:
        yield *before, weigh(*before, None)
