"""Scores -> token weights: every rule of it, and credit, which applies one to a flow.

A weight multiplies a token's term in a policy-gradient loss. Over the n tokens of the mask, with scores s >= 0:

    top           gain for the ceil(top * n) highest, 1 for the rest (arXiv 2606.10646: top = 0.4, gain = 1.5)
    proportional  1 + (gain - 1) * s / max s
    rank          1 + (gain - 1) * (share of the mask's tokens with a score <= s)
    softmax       1 + (gain - 1) * exp((s - max s) / (temperature * std of s))
    keep          1 for the ceil(top * n) highest, 0 for the rest: those are not trained on; `gain` plays no part
                  (arXiv 2506.01939, there by entropy: top = 0.2)

What every rule promises:

    outside the mask                      weight 1
    a trace without any positive score    weight 1 at all its tokens
    a token of the mask with score 0      never picked: weight 1, with "keep" weight 0
    weights                               between 1 and gain, with "keep" 0 or 1
    ties for the last place               the earlier trace, then the earlier token
    all scores times the same factor      the same weights

Per "sequence" a rule looks at one trace at a time: n, max, std and shares are those of its mask. Per "batch" it looks
at all traces with a positive score as if they were one: of some traces more than the share `top` is picked, of some
nothing.

Shapes: T tokens of a trace, B traces, N tokens of all graphs of a flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor
from torch_geometric.utils import to_dense_batch

from flowgraph.flow import Flow, check_flow
from flowgraph.graph import graph_batch, graph_ptr

SCORES = ("throughput", "reach", "mix")
PER = ("sequence", "batch")


def weights_from_scores(
    scores: Tensor,
    mask: Tensor,
    rule: str = "top",
    *,
    top: float = 0.4,
    gain: float = 1.5,
    temperature: float = 1.0,
    per: str = "sequence",
) -> Tensor:
    """Turn scores into weights.

    Args:
        scores: [T] or [B, T], finite and >= 0 inside the mask; anything may stand outside.
        mask: bool, same shape: the tokens that take part.
        rule: "top", "proportional", "rank", "softmax" or "keep" (formulas at the top of this module).
        top: share of the tokens that "top" and "keep" pick, in (0, 1].
        gain: the highest weight, >= 0 (below 1 it damps). Not used by "keep".
        temperature: of "softmax", > 0, in standard deviations of the scores.
        per: "sequence": each trace by itself; "batch": all traces together. The same for scores [T].

    Returns:
        Weights, same shape and dtype as scores; what they promise is listed at the top of this module.

    Raises:
        ValueError: names the argument, the trace and the token.
    """
    check_rule(rule, top, gain, temperature, per)
    if scores.ndim not in (1, 2) or not scores.is_floating_point():
        raise ValueError(f"scores must be a float tensor [T] or [B, T], got {list(scores.shape)} {scores.dtype}")
    if mask.shape != scores.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(scores.shape)} like scores, got {list(mask.shape)} {mask.dtype}")
    rows, masks = torch.atleast_2d(scores), torch.atleast_2d(mask)
    if (bad := masks & ~((rows >= 0) & (rows < torch.inf))).any():
        row, token = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"scores of trace {row}, token {token} is {float(rows[row, token])}; scores must be finite and >= 0"
        )
    # In float32 at least: sums of half-precision scores over a batch would not fit.
    rows = rows.masked_fill(~masks, 0).to(torch.promote_types(rows.dtype, torch.float32))
    # A trace without any positive score has nothing to rank and must not count among the others' tokens.
    masks = masks & (rows > 0).any(-1, keepdim=True)
    size = rows.shape
    if per == "batch":
        rows, masks = rows.reshape(1, -1), masks.reshape(1, -1)
    strength = _RULES[rule](rows, masks, top, temperature).masked_fill(rows == 0, 0)
    low, high = (0.0, 1.0) if rule == "keep" else (1.0, gain)
    weights = torch.where(masks, low + (high - low) * strength, 1)
    return weights.view(size).view(scores.shape).to(scores.dtype)


def check_rule(rule: str, top: float, gain: float, temperature: float, per: str = "sequence") -> None:
    """Raise a ValueError that names the first argument of `weights_from_scores` which makes no sense."""
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, _RULES))}, got {rule!r}")
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(map(repr, PER))}, got {per!r}")
    for name, value in (("top", top), ("gain", gain), ("temperature", temperature)):
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < top <= 1:
        raise ValueError(f"top must be in (0, 1], got {top}")
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(f"gain must be finite and >= 0, got {gain}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


# Each rule: scores [B, T] (0 outside the mask), mask [B, T] -> strength [B, T] in [0, 1].


def _top(scores: Tensor, mask: Tensor, top: float, temperature: float) -> Tensor:
    # Rounded first: 0.1 * 30 is 3.0000000000000004 and must count as 3.
    count = torch.tensor([math.ceil(round(top * n, 6)) for n in mask.sum(-1).tolist()], device=scores.device)
    order = torch.sort(scores.masked_fill(~mask, -1), dim=-1, descending=True, stable=True).indices
    rank = torch.argsort(order, dim=-1)
    return (rank < count[:, None]).to(scores)


def _proportional(scores: Tensor, mask: Tensor, top: float, temperature: float) -> Tensor:
    most = _max(scores)
    return torch.where(most > 0, scores / most, 0)


def _rank(scores: Tensor, mask: Tensor, top: float, temperature: float) -> Tensor:
    ordered = scores.masked_fill(~mask, torch.inf).sort(dim=-1).values
    below = torch.searchsorted(ordered, scores.contiguous(), right=True)
    return (below.to(scores) / mask.sum(-1, keepdim=True).clamp(min=1)).clamp(max=1)


def _softmax(scores: Tensor, mask: Tensor, top: float, temperature: float) -> Tensor:
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.sum(-1, keepdim=True) / n
    std = (((scores - mean) * mask).square().sum(-1, keepdim=True) / n).sqrt()
    away = torch.where(std > 0, (scores - _max(scores)) / (temperature * std), 0)
    return away.clamp(max=0).exp()


def _max(scores: Tensor) -> Tensor:
    return scores.max(dim=-1, keepdim=True).values if scores.shape[-1] else scores.new_zeros(len(scores), 1)


_RULES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "top": _top,
    "proportional": _proportional,
    "rank": _rank,
    "softmax": _softmax,
    "keep": _top,
}


@dataclass(frozen=True, eq=False)
class Credit:
    """Credits for one graph or a batch, token by token in the graphs' order.

    Attributes:
        weights: [N] what to multiply a token's loss with; 1 outside `mask`.
        scores: [N] the throughput, reach or mix that they come from.
        mask: [N] bool, the tokens that could get credit (the graphs' `credit_mask`).
        flags: one tuple per graph: "no_answer" (it has no sinks) or "no_flow" (it has, but no flow passes any token of
            the mask). Either way the weights of that graph are uniform.
        ptr: [B + 1] where each graph begins.
    """

    weights: Tensor
    scores: Tensor
    mask: Tensor
    flags: list[tuple[str, ...]]
    ptr: Tensor

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.flags)

    def __getitem__(self, number: int) -> Credit:
        """The credit of one graph."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"graph {number} of credits for {len(self)}")
        number %= len(self)
        tokens = slice(int(self.ptr[number]), int(self.ptr[number + 1]))
        return Credit(
            self.weights[tokens],
            self.scores[tokens],
            self.mask[tokens],
            [self.flags[number]],
            self.ptr[number : number + 2] - self.ptr[number],
        )

    def __iter__(self) -> Iterator[Credit]:
        return (self[number] for number in range(len(self)))

    @property
    def credited(self) -> Tensor:
        """[N] bool, the tokens that got credit: weights above 1, or above the lowest of their graph if that is less."""
        found = torch.zeros_like(self.mask)
        for start, stop in pairwise(self.ptr.tolist()):
            weights, mask = self.weights[start:stop], self.mask[start:stop]
            low = weights.masked_fill(~mask, 1).min().clamp(max=1)
            found[start:stop] = mask & (weights > low)
        return found

    def to_layout(self, rows: Sequence[int], positions: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """Weights in the caller's own layout [B, T]; 1 where no graph has a token.

        Args:
            rows: for each graph the row of the batch that it stands in.
            positions: for each graph [N] the positions of its tokens in that row.
            shape: (B, T).
        """
        out = torch.ones(shape, dtype=self.weights.dtype, device=self.weights.device)
        for number, (row, position) in enumerate(zip(rows, positions, strict=True)):
            out[row, position.to(out.device)] = self[number].weights
        return out


def credit(
    flow: Flow,
    score: str = "throughput",
    *,
    rule: str = "top",
    top: float = 0.4,
    gain: float = 1.5,
    temperature: float = 1.0,
    per: str = "sequence",
) -> Credit:
    """Give every token of one trace, or of each trace of a batch, its weight.

    Ranked are the tokens of the graph's `credit_mask`: the response without the answer itself, special tokens and tool
    output. (arXiv 2606.10646, credit; docs/method.md, section 4.)

    Args:
        flow: from `trace_flow`.
        score: "throughput", the flow through a token; "reach", its influence on the answer wherever that comes from; or
            "mix", the geometric mean of the two, each as a share of its sum over the tokens that are ranked (which of
            them finds what: docs/evidence.md).
        rule, top, gain, temperature, per: as in `weights_from_scores`; with "batch" the graphs of this flow together.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    check_flow(flow)
    graph, mask = flow.graph, flow.graph.credit_mask
    scores = _mix(flow) if score == "mix" else {"throughput": flow.throughput, "reach": flow.reach}[score]
    batch, ptr = graph_batch(graph), graph_ptr(graph)
    sizes = {"batch_size": len(ptr) - 1}
    dense, real = to_dense_batch(scores, batch, **sizes)
    dense_mask, _ = to_dense_batch(mask, batch, **sizes)
    how = {"top": top, "gain": gain, "temperature": temperature}
    weights = weights_from_scores(dense, dense_mask & real, rule, per=per, **how)[real]

    def none_of(what: Tensor) -> list[bool]:
        return (to_dense_batch(what, batch, **sizes)[0].sum(-1) == 0).tolist()

    flags: list[tuple[str, ...]] = []
    for blind, dry in zip(none_of(graph.answer_mask), none_of((scores > 0) & mask), strict=True):
        flags.append(("no_answer",) if blind else ("no_flow",) if dry else ())
    return Credit(weights, scores, mask, flags, ptr)


def _mix(flow: Flow) -> Tensor:
    """[N] sqrt(flow share * reach share); 0 in a graph without flow or reach. In logs, since reach may be tiny."""
    graph, batch = flow.graph, graph_batch(flow.graph)

    def shares(logs: Tensor) -> Tensor:
        ranked = logs.masked_fill(~graph.credit_mask, -torch.inf)
        dense, _ = to_dense_batch(ranked, batch, fill_value=-torch.inf, batch_size=len(graph_ptr(graph)) - 1)
        total = dense.logsumexp(-1)[batch]
        return torch.where(total > -torch.inf, logs - total, -torch.inf)

    mean = (shares(flow.flow.double().log()) + shares(flow.log_reach.double())) / 2
    return mean.exp().to(flow.throughput)
