"""What the credits of a training step look like, in a few numbers for any logger. Free of any trainer.

Over the n tokens of a row's mask, with scores s (throughput), p = s / sum(s) and weights w; a credited token is one
with w != 1:

    effective_tokens    1 / sum(p^2): over how many tokens the flow is spread; n if evenly, 1 if one has it all
    effective_share     effective_tokens / n
    gini                sum over i of (2 i - n - 1) s_i / (n sum(s)), s ascending, i = 1..n: 0 if even, 1 - 1/n if one
                        token has it all
    credited_share      credited tokens / n
    credited_flow       sum of p over the credited tokens
    delimiter_share     credited tokens that are delimiters / credited tokens
    delimiter_base      tokens that are delimiters / n: what delimiter_share is for credits given by chance
    entropy_overlap     of the k credited tokens, the share that is among the row's k tokens of highest entropy;
                        credited_share for credits given by chance
    reward_correlation  Pearson correlation, over rows, of effective_share and reward

Each is the mean over the rows where it is defined (those with flow, with credited tokens, with a mask); one that is
defined in no row is left out. A delimiter is a token of blanks and punctuation only; signs of arithmetic are none.

Shapes: B rows, T tokens of a row with pads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

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
)
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
        One number per key of `KEYS`, without those that are defined in no row.

    Raises:
        ValueError: shapes that don't fit, or under the mask a score that is negative or not finite.
    """
    _check("throughput", throughput, mask)
    _check("weights", weights, mask)
    scores = throughput.double().masked_fill(~mask, 0)
    if (bad := mask & ~((scores >= 0) & (scores < torch.inf))).any():
        row, token = (int(i) for i in bad.nonzero()[0])
        raise ValueError(f"throughput is {float(scores[row, token])} at row {row}, token {token}: expected >= 0")
    credited = mask & (weights != 1)
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


def entropy_overlap(weights: Tensor, mask: Tensor, entropy: Tensor) -> Tensor:
    """[B] of the k credited tokens of each row, the share among its k tokens of highest entropy; NaN if k is 0.

    Args:
        weights, entropy: [B, T]. mask: [B, T] bool, the tokens that could get credit. Ties go to the earlier token.
    """
    _check("weights", weights, mask)
    _check("entropy", entropy, mask)
    credited = mask & (weights != 1)
    k = credited.sum(1, keepdim=True)
    ranked = entropy.double().masked_fill(~mask, -torch.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    highest = torch.argsort(order, dim=1) < k
    return (highest & credited).sum(1).double() / k[:, 0]


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
    found = [[_is_delimiter(piece) for piece in row] for row in text]
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
