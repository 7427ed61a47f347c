"""What the credits of a training step look like, in a few numbers for any logger. Free of any trainer.

Over the n tokens of a row's mask, with scores s (throughput), p = s / sum(s) and weights w; e = w - min(1, lowest w of
the row) is a token's extra weight, and a credited token is one with e > 0: weight above 1 or, where a rule lowers
weights ("keep", a gain below 1), not among the lowest:

    effective_tokens    1 / sum(p^2): over how many tokens the flow is spread; n if evenly, 1 if one has it all
    effective_share     effective_tokens / n
    gini                sum over i of (2 i - n - 1) s_i / (n sum(s)), s ascending, i = 1..n: 0 if even, 1 - 1/n if one
                        token has it all
    credited_share      credited tokens / n
    credited_flow       sum of p over the credited tokens; credited_share for credits given by chance
    delimiter_share     credited tokens that are delimiters / credited tokens
    delimiter_base      tokens that are delimiters / n: what delimiter_share is for credits given by chance
    entropy_overlap     of the k credited tokens, the share that is among the row's k tokens of highest entropy;
                        credited_share for credits given by chance
    reward_correlation  Pearson correlation, over rows, of effective_share and reward; 0 by chance

Each is the mean over the rows where it is defined (those with flow, with credited tokens, with a mask); one that is
defined in no row is left out. A delimiter is a token of blanks and punctuation only; signs of arithmetic are none.

`Monitor` also compares a step with the one before. Let c(x) be the share of the extra weight that falls on tokens of
kind x, e / sum(e) in each row and then the mean over the rows with credit; a kind is one of the ten equal parts of a
row's mask (0..9: token j = 0..n-1 of it is in part floor(10 j / n)), or a token id. c' is that of the last step, and r'
that of the last step after the extra weights of each row were dealt out anew among the tokens of its mask, by chance:

    place_stability     sum over the ten parts of min(c, c') = 1 - total variation distance: 1 if the credits stand in
                        the same places of the responses as in the last step, 0 if in none of them
    place_base          the same with r': what place_stability is for credits given by chance
    token_stability     sum over token ids of min(c, c'): 1 if the same words are credited as in the last step
    token_base          the same with r'

Chance alone makes these high (rows are alike, frequent words are frequent in each step), so read the difference to the
base: about 0, of either sign, for credits given by chance.

Shapes: B rows, T tokens of a row with pads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

KEYS = (
    "effective_tokens",
    "effective_share",
    "gini",
    "credited_share",
    "credited_flow",
    "delimiter_share",
    "delimiter_base",
    "entropy_overlap",
    "reward_correlation",
    "place_stability",
    "place_base",
    "token_stability",
    "token_base",
)
_PARTS = 10
_ARITHMETIC = frozenset("-*/%")  # Unicode calls these punctuation


def monitor(
    throughput: Tensor,
    weights: Tensor,
    mask: Tensor,
    text: Sequence[Sequence[str]] | None = None,
    entropy: Tensor | None = None,
    rewards: Tensor | None = None,
) -> dict[str, float]:
    """Describe the credits of a batch (formulas at the top of this module).

    Args:
        throughput: [B, T], at least 0 under the mask; any other score will do. Read under the mask only.
        weights: [B, T], what the tokens' losses are multiplied with. Read under the mask only.
        mask: [B, T] bool, the tokens that could get credit.
        text: B lists of T pieces of text, for the delimiters.
        entropy: [B, T], nats or any other unit, of the policy's prediction of each token.
        rewards: [B].

    Returns:
        One number per key of `KEYS`, without those that are defined in no row and those of `Monitor`.

    Raises:
        ValueError: shapes that don't fit, or under the mask a score that is negative or not finite.
    """
    _check("throughput", throughput, mask)
    _check("weights", weights, mask)
    scores = throughput.double().masked_fill(~mask, 0)
    if (bad := mask & ~((scores >= 0) & (scores < torch.inf))).any():
        row, token = (int(i) for i in bad.nonzero()[0])
        raise ValueError(f"throughput is {float(scores[row, token])} at row {row}, token {token}: expected >= 0")
    credited = _extra(weights, mask) > 0
    n, k, total = mask.sum(1), credited.sum(1), scores.sum(1)
    has_tokens, has_credit, has_flow = n > 0, k > 0, total > 0

    p = scores / total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    effective = 1 / p.square().sum(1)
    share = effective / n
    found = {
        "effective_tokens": effective[has_flow],
        "effective_share": share[has_flow],
        "gini": _gini(scores, mask)[has_flow],
        "credited_share": (k / n)[has_tokens],
        "credited_flow": (p * credited).sum(1)[has_flow],
    }
    if text is not None:
        delimiters = _delimiters(text, mask)
        found["delimiter_share"] = ((delimiters & credited).sum(1) / k)[has_credit]
        found["delimiter_base"] = ((delimiters & mask).sum(1) / n)[has_tokens]
    if entropy is not None:
        found["entropy_overlap"] = entropy_overlap(weights, mask, entropy)[has_credit]
    if rewards is not None:
        if rewards.shape != mask.shape[:1]:
            raise ValueError(f"rewards must be [B] = {list(mask.shape[:1])}, got {list(rewards.shape)}")
        found["reward_correlation"] = _correlation(share[has_flow], rewards.to(share)[has_flow])
    return {key: float(found[key].double().mean()) for key in KEYS if key in found and found[key].numel()}


class Monitor:
    """`monitor` for a run of training: also how steady the credits are from step to step.

    Of a step it keeps two shares per token id that got credit and two per part of the responses, nothing else. A step
    without credited tokens leaves it as it was. With several processes each has its own, over its own rows.

    Example:
        >>> monitor = Monitor()
        >>> log(monitor(throughput, weights, mask, text=text, token_ids=token_ids))
    """

    def __init__(self) -> None:
        self._steps = 0
        self._last: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
        """"place" and "token" -> (c', r')."""

    def __call__(
        self,
        throughput: Tensor,
        weights: Tensor,
        mask: Tensor,
        text: Sequence[Sequence[str]] | None = None,
        entropy: Tensor | None = None,
        rewards: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> dict[str, float]:
        """Describe the credits of a step, as `monitor` does, and compare them with those of the last call.

        Args:
            token_ids: [B, T] whole numbers, for `token_stability`. The others as in `monitor`.

        Returns:
            One number per key of `KEYS`, without those that are not defined; nothing is compared in the first call.
        """
        if token_ids is not None and (token_ids.shape != mask.shape or token_ids.is_floating_point()):
            came = f"{list(token_ids.shape)} {token_ids.dtype}"
            raise ValueError(f"token_ids must be whole numbers [B, T] = {list(mask.shape)} like mask, got {came}")
        found = monitor(throughput, weights, mask, text, entropy, rewards)
        extra = _extra(weights, mask)
        rows = extra.sum(1) > 0
        if not rows.any():
            return found
        extra, mask = extra[rows], mask[rows]
        dealt = _dealt_anew(extra, mask, seed=self._steps)
        kinds = {"place": _parts(mask)}
        if token_ids is not None:
            kinds["token"] = token_ids[rows]
        for name, kind in kinds.items():
            now = _shares(extra, kind)
            if name in self._last:
                last, by_chance = self._last[name]
                found |= {f"{name}_stability": _common(now, last), f"{name}_base": _common(now, by_chance)}
            self._last[name] = now, _shares(dealt, kind)
        self._steps += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers and lists that JSON can hold."""
        return {"steps": self._steps} | {
            name: [sorted(shares.items()) for shares in pair] for name, pair in self._last.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the `Monitor` that gave `state` stood.

        Raises:
            ValueError: it is not from `state_dict`.
        """
        if "steps" not in state or (unknown := set(state) - {"steps", "place", "token"}):
            came = sorted(unknown) if "steps" in state else sorted(state)
            raise ValueError(f"state must be what Monitor.state_dict gave: steps, place, token; got {came}")
        self._steps = int(state["steps"])
        self._last = {}
        for name in ("place", "token"):
            if name in state:
                now, by_chance = ({int(kind): float(share) for kind, share in pairs} for pairs in state[name])
                self._last[name] = now, by_chance


def entropy_overlap(weights: Tensor, mask: Tensor, entropy: Tensor) -> Tensor:
    """[B] of the k credited tokens of each row, the share among its k tokens of highest entropy; NaN if k is 0.

    Args:
        weights, entropy: [B, T]. mask: [B, T] bool, the tokens that could get credit. Ties go to the earlier token.
    """
    _check("weights", weights, mask)
    _check("entropy", entropy, mask)
    credited = _extra(weights, mask) > 0
    k = credited.sum(1, keepdim=True)
    ranked = entropy.double().masked_fill(~mask, -torch.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    highest = torch.argsort(order, dim=1) < k
    return (highest & credited).sum(1).double() / k[:, 0]


def _extra(weights: Tensor, mask: Tensor) -> Tensor:
    """[B, T] float64 how far a weight is above the lowest of its row or 1, the lower one; 0 outside the mask."""
    weights = weights.double()
    low = weights.masked_fill(~mask, 1).clamp(max=1)
    low = low.min(1, keepdim=True).values if low.shape[1] else low
    return (weights - low).masked_fill(~mask, 0)


def _dealt_anew(extra: Tensor, mask: Tensor, seed: int) -> Tensor:
    """Extra weights [B, T] in another order within the mask of each row. The order is the same on any device."""
    draw = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chance = torch.full(mask.shape, 2.0, dtype=torch.float64, device=mask.device)
    chance[mask] = draw.to(mask.device)
    # The tokens of the mask come first in both, here in a random order and there in their own.
    shuffled, places = chance.argsort(1), (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.zeros_like(extra).scatter(1, places, extra.gather(1, shuffled))


def _parts(mask: Tensor) -> Tensor:
    """[B, T] which of the equal parts of its row's mask a token of the mask is in."""
    n = mask.sum(1, keepdim=True).clamp(min=1)
    return (mask.cumsum(1) - 1) * _PARTS // n


def _shares(extra: Tensor, kind: Tensor) -> dict[int, float]:
    """Kind -> its share of the extra weight [B, T], mean over the rows, each of which has some."""
    share = extra / extra.sum(1, keepdim=True) / len(extra)
    has = extra > 0
    kinds, number = kind[has].unique(return_inverse=True)
    return dict(zip(kinds.tolist(), torch.bincount(number, share[has]).tolist(), strict=True))


def _common(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """What two distributions have in common: 1 - total variation distance."""
    return sum(min(share, other.get(kind, 0.0)) for kind, share in one.items())


def _gini(scores: Tensor, mask: Tensor) -> Tensor:
    """[B] of scores [B, T], which are 0 outside the mask; NaN in rows without flow."""
    n = mask.sum(1, keepdim=True)
    # Those outside come first, so that rank 1 is the first token of the mask.
    ordered = scores.masked_fill(~mask, -1).sort(dim=1).values.clamp(min=0)
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device)[None] - (scores.shape[1] - n)
    return ((2 * rank - n - 1) * ordered).sum(1) / (n[:, 0] * scores.sum(1))


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """[1] Pearson correlation of x and y [n]; empty where one of them does not vary."""
    if len(x) < 2:
        return x[:0]
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / size)[None] if size > 1e-12 else x[:0]


def _delimiters(text: Sequence[Sequence[str]], mask: Tensor) -> Tensor:
    """[B, T] bool, tokens of blanks and punctuation only."""
    if [len(row) for row in text] != [mask.shape[1]] * len(mask):
        raise ValueError(f"text must be {mask.shape[0]} lists of {mask.shape[1]} pieces, one per token of the mask")
    known = {piece: _is_delimiter(piece) for piece in set(chain.from_iterable(text))}  # few, in many tokens
    found = [[known[piece] for piece in row] for row in text]
    return torch.tensor(found, dtype=torch.bool, device=mask.device).view(mask.shape)


def _is_delimiter(piece: str) -> bool:
    return bool(piece) and all(
        c.isspace() or (unicodedata.category(c)[0] == "P" and c not in _ARITHMETIC) for c in piece
    )


def _check(name: str, values: Tensor, mask: Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [B, T], got {list(mask.shape)} {mask.dtype}")
    if values.shape != mask.shape or not values.is_floating_point():
        came = f"{list(values.shape)} {values.dtype}"
        raise ValueError(f"{name} must be a float tensor [B, T] = {list(mask.shape)} like mask, got {came}")
