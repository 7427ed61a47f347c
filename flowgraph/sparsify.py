"""Rows of attention -> edges, and what each row lost on the way.

Shapes: N tokens, E edges, r rows of a block, n its columns. A rule decides per row which of the earlier tokens
become edges; the diagonal never does. Ties go to the earlier token, so that a rule's choice is always the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowgraph.rows import Rows


class EdgeRule(Protocol):
    """Chooses edges. `str(rule)` goes into the graph's `rule`."""

    def keep(self, weight: Tensor) -> Tensor:
        """[r, n] weights, zero on and above the diagonal -> [r, n] bool: which of them become edges."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Edges with a weight strictly above `value`, at most `cap` per later token (the heaviest ones)."""

    value: float = 0.0
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"Threshold value must be in [0, 1), got {self.value}")
        _check_count("cap", self.cap)

    def keep(self, weight: Tensor) -> Tensor:
        return _cap(weight, weight > self.value, self.cap)

    def __str__(self) -> str:
        rule = "all edges" if self.value == 0 else f"weight > {self.value:g}"
        return rule + _cap_text(self.cap)


@dataclass(frozen=True)
class TopK:
    """The `k` heaviest edges into each token; 0: no edges."""

    k: int

    def __post_init__(self) -> None:
        _check_count("k", self.k, least=0)

    def keep(self, weight: Tensor) -> Tensor:
        if self.k == 0:
            return torch.zeros_like(weight, dtype=torch.bool)
        return _cap(weight, weight > 0, self.k)

    def __str__(self) -> str:
        return f"top {self.k} per token"


@dataclass(frozen=True)
class Mass:
    """The fewest edges into each token that hold `share` of its attention to other tokens, at most `cap`."""

    share: float
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Mass share must be in (0, 1], got {self.share}")
        _check_count("cap", self.cap)

    def keep(self, weight: Tensor) -> Tensor:
        if self.share == 1:
            return _cap(weight, weight > 0, self.cap)
        ordered, order = torch.sort(weight, dim=-1, descending=True, stable=True)
        before = ordered.double().cumsum(-1) - ordered
        enough = before >= self.share * weight.double().sum(-1, keepdim=True)
        chosen = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, order, ~enough)
        return _cap(weight, chosen & (weight > 0), self.cap)

    def __str__(self) -> str:
        return f"{self.share:g} of the mass" + _cap_text(self.cap)


def default_rule(num_tokens: int) -> EdgeRule:
    """All edges up to 2,048 tokens (2.1 M at most), above that those over 1/1024 (at most 1,023 per token)."""
    return Threshold(0.0) if num_tokens <= 2048 else Threshold(1 / 1024)


@dataclass(frozen=True)
class Edges:
    """Edges sorted by target, then source, with what was not made an edge.

    Attributes:
        edge_index: [2, E] int64, row 0 the earlier token. edge_weight: [E].
        self_weight: [N] the diagonal. dropped: [N] weight of each row that the rule left out.
        rule: the rule in words.
    """

    edge_index: Tensor
    edge_weight: Tensor
    self_weight: Tensor
    dropped: Tensor
    rule: str


def sparsify(rows: Rows, rule: EdgeRule | None = None) -> Edges:
    """Read `rows` once, block by block, and keep the edges that `rule` chooses (default: `default_rule`).

    Raises:
        ValueError: a weight is NaN, infinite or negative; names the row and column. Or the rule keeps nothing ever.
    """
    rule = default_rule(rows.num_tokens) if rule is None else rule
    if rule == TopK(0):
        raise ValueError('edges=TopK(0) keeps no edge, and flow needs some: it is for modes "exact" and "sparse"')
    if getattr(rows, "backend", "torch") == "triton" and isinstance(rule, Threshold) and rule.cap is None:
        return _above(rows, rule)
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    weights: list[Tensor] = []
    selves: list[Tensor] = []
    losses: list[Tensor] = []
    for start, block in rows.blocks():
        check_weights(block, start)
        selves.append(block.diagonal(start).clone())
        block = block.tril(start - 1)
        keep = rule.keep(block)
        row, source = keep.nonzero(as_tuple=True)
        sources.append(source)
        targets.append(row + start)
        weights.append(block[row, source])
        # Added up from what is left out, not as a difference: exactly 0 where nothing is dropped.
        losses.append(block.masked_fill(keep, 0).sum(-1))
    return Edges(
        edge_index=torch.stack([torch.cat(sources), torch.cat(targets)]),
        edge_weight=torch.cat(weights),
        self_weight=torch.cat(selves),
        dropped=torch.cat(losses),
        rule=str(rule),
    )


def _above(rows: Rows, rule: Threshold) -> Edges:
    """`sparsify` by a kernel, for which the host doesn't wait between blocks."""
    from flowgraph.triton_rows import keep_above

    kept = keep_above(rows.blocks(), rows.num_tokens, rule.value)
    if kept.wrong is not None:
        raise wrong_weight(*kept.wrong)
    edge_index = torch.stack([kept.source, kept.target])
    return Edges(edge_index, kept.weight, kept.self_weight, kept.dropped, str(rule))


def is_wrong(block: Tensor) -> Tensor:
    """[] bool: is any weight NaN, infinite or negative?"""
    least, most = block.aminmax()
    return ~((least >= 0) & (most < torch.inf))  # NaN is neither


def check_weights(block: Tensor, start: int) -> None:
    """Raise a ValueError that names the first NaN, infinite or negative weight of rows `start ..`."""
    if is_wrong(block):
        row, column = (int(x) for x in (~((block >= 0) & (block < torch.inf))).nonzero()[0])
        raise wrong_weight(start + row, column, float(block[row, column]))


def wrong_weight(row: int, column: int, weight: float) -> ValueError:
    return ValueError(
        f"W[{row}, {column}] = {weight}; attention weights must be finite and not negative (NaN from a model: check "
        "its inputs, or load it in float32 or bfloat16)"
    )


def _cap(weight: Tensor, keep: Tensor, cap: int | None) -> Tensor:
    """Of the kept entries of each row only the `cap` heaviest; of equal ones the earlier."""
    if cap is None or cap >= weight.shape[-1]:
        return keep
    weight = torch.where(keep, weight, -math.inf)
    least = weight.topk(cap, dim=-1).values[:, -1:]
    above, tied = weight > least, (weight == least) & keep
    room = cap - above.sum(-1, keepdim=True)
    if bool((tied.sum(-1, keepdim=True) <= room).all()):  # nearly always, and counting them up takes time
        return above | tied
    return above | (tied & (tied.cumsum(-1) <= room))


def _cap_text(cap: int | None) -> str:
    return "" if cap is None else f", at most {cap} per token"


def _check_count(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
