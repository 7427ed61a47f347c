r"""Put token credits into advantages. Free of any trainer: tensors in, tensors out.

    A'[b, t] = c[b, t] * A[b, t]                    shape_advantages
    c        = 1 + part * (w - 1)                   warmed
    part     = 0 .. 1, by the step of training      schedule

in place of the advantage A in a policy-gradient loss, where w is the token's weight (1 for most tokens and
1.5 for those that carry the flow, say). The loss, its denominator and the clipping stay the trainer's.

Source: FlowTracer (arXiv 2606.10646, the part on credit), which leaves open for which signs of the advantage
the weights apply; arXiv 2510.13554, with the same recipe, finds both signs best, hence the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Signs = Literal["both", "positive", "negative"]


def shape_advantages(
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    signs: Signs = "both",
    normalize: bool = False,
) -> Tensor:
    r"""Multiply token weights into advantages.

        A'[b, t] = c[b, t] * A[b, t]   where mask[b, t] and the sign of A[b, t] is among `signs`
        A'[b, t] = A[b, t]             elsewhere

    Tokens outside the mask keep the plain advantage: losses mask them anyway, and what a trainer reads from
    them stays what it was. Weights of 1 return the advantages unchanged, to the bit.

    Args:
        advantages: [B], one per response, or [B, T], one per token; floating point.
        weights: [B, T], at least 0; floating point. Read only where the mask is set; padding may be NaN.
        mask: [B, T], the tokens that are trained on; bool, or integers 0 and 1.
        signs: the advantages that are weighted: "both", only "positive" (reward what carried a right answer)
            or only "negative". An advantage of 0 stays 0 in any case.
        normalize: divide the weights of a row by their mean over its mask, so that shaping moves the update
            between the tokens of a response and not its size. It acts before `signs`. A row with an empty
            mask stays as it is, and so does one whose weights are all 0: nothing of it is trained on.

    Returns:
        [B, T], in the dtype of `advantages` and on its device.

    Raises:
        TypeError: an argument is not a tensor of the kind named above.
        ValueError: shapes or devices that don't fit; under the mask, a NaN or infinite value or a negative
            weight; or unknown `signs`.
    """
    mask = _checked(advantages, weights, mask)
    if signs not in get_args(Signs):
        raise ValueError(f"signs is {signs!r}: expected one of {', '.join(map(repr, get_args(Signs)))}")

    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    _check_values("advantages", advantages, mask & ~torch.isfinite(advantages), "finite numbers")
    _check_values("weights", weights, mask & ~(torch.isfinite(weights) & (weights >= 0)), "finite numbers >= 0")

    weights = weights.to(torch.promote_types(weights.dtype, advantages.dtype))
    if normalize:
        weights = _mean_one(weights, mask)
    weighted = mask
    if signs == "positive":
        weighted = mask & (advantages > 0)
    elif signs == "negative":
        weighted = mask & (advantages < 0)
    return torch.where(weighted, (weights * advantages).to(advantages.dtype), advantages)


def follows_tokens(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether weights on the advantages of tokens become weights on their gradients. The loss itself is asked.

    Args:
        loss: (log-probabilities [B, T], advantages [B, T]) -> a number; all tokens have a loss, at the policy that
            wrote them, where no ratio is clipped.
    """
    weights = torch.tensor(((1.0, 1.5, 1.0, 2.0), (3.0, 1.0, 1.0, 1.0)))
    plain = torch.tensor([[0.5], [-2.0]]).expand(weights.shape)

    def gradient(advantages: Tensor) -> Tensor:
        logps = torch.full(weights.shape, -1.0, requires_grad=True)
        return torch.autograd.grad(loss(logps, advantages.clone()), logps)[0]

    by_row, by_token = gradient(plain), gradient(plain * weights)
    return bool((by_row != 0).all()) and torch.allclose(by_token, by_row * weights, rtol=1e-3)


def schedule(step: int, warmup_steps: int = 0, anneal_after: int | None = None, anneal_steps: int = 0) -> float:
    """How much of the credits counts at a step of training: 0 leaves plain advantages, 1 is all of it.

        part = step / warmup_steps                           step < warmup_steps
        part = 1                                             up to anneal_after
        part = 1 - (step - anneal_after) / anneal_steps      from anneal_after on, never below 0

    Without warm-up it starts at 1; with `anneal_steps` 0 it is 0 from step `anneal_after` on.

    Args:
        step: optimizer steps done, so 0 for the first one.
        warmup_steps: steps over which it goes up linearly; at least 0.
        anneal_after: the step from which on it goes down linearly, at least `warmup_steps`; None: never.
        anneal_steps: the steps that this takes; at least 0, and 0 if `anneal_after` is None.

    Raises:
        TypeError: a step that is no whole number.
        ValueError: a value outside the bounds above.
    """
    given = {"step": step, "warmup_steps": warmup_steps, "anneal_after": anneal_after, "anneal_steps": anneal_steps}
    for name, value in given.items():
        if value is None and name == "anneal_after":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: expected a whole number of steps")
        if value < 0:
            raise ValueError(f"{name} is {value}: expected at least 0")
    if anneal_after is None and anneal_steps:
        raise ValueError(f"anneal_steps is {anneal_steps} and anneal_after None: nothing would be annealed; give both")
    if anneal_after is not None and anneal_after < warmup_steps:
        raise ValueError(f"anneal_after is {anneal_after}, before the end of warmup_steps {warmup_steps}")
    if step < warmup_steps:
        return step / warmup_steps
    if anneal_after is None or step < anneal_after:
        return 1.0
    return max(0.0, 1 - (step - anneal_after) / anneal_steps) if anneal_steps else 0.0


def warmed(weights: Tensor, part: float) -> Tensor:
    """Weights, any shape, of which only a part counts: 1 + part * (w - 1). Part 1 changes no bit.

    Every rule of `weights_from_scores` is linear in the gain, so this is the rule with gain 1 + part * (gain - 1).

    Args:
        weights: floating point.
        part: in [0, 1], from `schedule`.
    """
    if not 0 <= part <= 1:
        raise ValueError(f"part is {part}: expected 0 to 1")
    return torch.lerp(torch.ones_like(weights), weights, part)


def _mean_one(weights: Tensor, mask: Tensor) -> Tensor:
    """Weights [B, T] over their mean in each row's mask."""
    # The sum is in float32 at least: bfloat16 cannot count beyond 256.
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    total = wide.where(mask, 0).sum(dim=1, keepdim=True)
    count = mask.sum(dim=1, keepdim=True)
    return torch.where(total > 0, wide * count / total, wide)


def _checked(advantages: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Kinds, shapes and devices; returns the mask as bool [B, T]."""
    for name, value in (("advantages", advantages), ("weights", weights), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: expected a tensor")
        if name != "mask" and not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}: expected floating point")
        if value.device != advantages.device:
            raise ValueError(f"{name} is on {value.device}, advantages on {advantages.device}: move one of them")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}: expected bool, or integers 0 and 1; use mask.bool()")
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {list(mask.shape)}: expected [B, T]")
    if weights.shape != mask.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}, mask {list(mask.shape)}: expected the same [B, T]")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantages has shape {list(advantages.shape)}: "
            f"expected {list(mask.shape[:1])} or {list(mask.shape)} to go with the mask"
        )
    if mask.dtype == torch.bool:
        return mask
    _check_values("mask", mask, (mask != 0) & (mask != 1), "0 or 1")
    return mask.bool()


def _check_values(name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    if wrong.any():
        row, token = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name} is {values[row, token].item()} at row {row}, token {token}: expected {expected}")
