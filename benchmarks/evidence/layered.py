"""A reference that keeps the order of the layers: a graph whose nodes are (token, layer), for short traces only.

The token graph averages attention over layers, so a path may take layer 9 before layer 5. Here it can't. Between
layer l and layer l + 1 information stays at its token, on the residual stream, or moves by attention:

    T_l[t, s] = (1 - a_l(t)) [s = t] + a_l(t) A_l[t, s]             from (s, l) to (t, l + 1); rows sum to 1

    r_L = 1 at sinks, else 0;    r_l(s) = sum_t r_(l+1)(t) T_l[t, s]                 reach: the walk from (sink, L) back
    g_0 = injection / r_0;       g_(l+1)(t) = sum_s T_l[t, s] g_l(s)
    f_l = r_l g_l                                                          the conserving flow (docs/method.md, 2 and 3)

Every edge goes up one layer, so there is nothing to solve: one product of [N] by [N, N] per layer and direction. In
every layer the reach sums to the number of sinks and the flow to 1. r_0 is attention rollout (Abnar & Zuidema 2020,
arXiv 2005.00928), read at the sinks' rows: where the walks end.

The nodes of a token are contracted to the token by leaving out what stays: `visits` counts a walk when it enters the
token from another one (or begins there), `throughput` the flow that enters it from another one (or is injected). A walk
never comes back to a later token, so these are the probability that a walk ever visits the token, summed over sinks,
and the share of the flow that passes it: what reach and flow are in the token graph.

How much of a row is attention, a_l(t): half, or by norms, |o_l(t)| / (|o_l(t)| + |x_l(t)|) with x_l the residual stream
before and o_l the output of the attention of layer l (after Kobayashi et al. 2021, arXiv 2109.07152; layer norms and
MLPs are left out).

Shapes: N tokens, L layers. It takes L [N, N] matrices of float64: traces longer than 1,024 tokens are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowgraph.adapters.evidence.signals import Reading, dense
from flowgraph.capture import evaluation_mode, unwrap

LONGEST = 1024
"""Tokens: 30 layers of that many squared are 250 MB."""

SCORES = ("flow", "reach", "rollout")


@dataclass(frozen=True, eq=False)
class Layered:
    """Reach and flow of every node; all float64.

    Attributes:
        reach, flow: [L + 1, N].
        visits: [N] reach, contracted to tokens. throughput: [N] flow, contracted to tokens.
    """

    reach: Tensor
    flow: Tensor
    visits: Tensor
    throughput: Tensor


def layered_flow(
    attention: Sequence[Tensor], sinks: Tensor, sources: Tensor, share: Sequence[Tensor | float] | float = 0.5
) -> Layered:
    """Reach from (sink, last layer) and flow from (source, first layer) through the graph of tokens and layers.

    Args:
        attention: L matrices [N, N], first layer first; row = later token, diagonal included, rows sum to at most 1.
        sinks, sources: [N] bool. Sources that no walk ends at inject nothing.
        share: what attention has of each row against the residual stream: one number, or per layer a number or [N].

    Raises:
        ValueError: more than `LONGEST` tokens, shapes that don't fit, or no sink.
    """
    N = len(sinks)
    _check_length(N)
    if not attention or any(A.shape != (N, N) for A in attention) or sources.shape != sinks.shape:
        shapes = sorted({tuple(A.shape) for A in attention})
        raise ValueError(f"attention must be matrices [{N}, {N}], one per layer, and sources [{N}]; got {shapes}")
    for number, A in enumerate(attention):
        if not (A >= 0).all() or (A.sum(1) > 1.001).any() or A.triu(1).any():
            raise ValueError(f"attention of layer {number} is none: rows must be >= 0, causal and sum to at most 1")
    if not sinks.any():
        raise ValueError("sinks marks no token: reach has nowhere to start")
    shares = [share] * len(attention) if isinstance(share, float) else list(share)
    steps = [_step(A.double(), torch.as_tensor(a).double()) for A, a in zip(attention, shares, strict=True)]
    reach = [sinks.double()]
    for T in reversed(steps):
        reach.append(reach[-1] @ T)
    reach.reverse()
    start = (sources & (reach[0] > 0)).double()
    per_reach = start / start.sum().clamp(min=1) / reach[0].where(reach[0] > 0, 1.0)
    flow = [reach[0] * per_reach]
    visits, throughput = reach[-1].clone(), flow[0].clone()
    for T, before, after in zip(steps, reach, reach[1:], strict=False):
        stays = T.diagonal()
        visits += before - stays * after
        passed = T @ per_reach
        throughput += after * (passed - stays * per_reach)
        per_reach = passed
        flow.append(after * per_reach)
    return Layered(torch.stack(reach), torch.stack(flow), visits, throughput)


def _step(A: Tensor, share: Tensor) -> Tensor:
    """[N, N] attention and residual stream together."""
    rows = share.expand(len(A))[:, None]
    return rows * A + torch.diag(1 - rows[:, 0])


def _check_length(N: int) -> None:
    if N > LONGEST:
        raise ValueError(f"the layered graph holds [N, N] for every layer and takes up to {LONGEST} tokens, got {N}")


# --- as a signal ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayeredSignal:
    """Scores [N] out of the layered graph over all layers of the model.

    Attributes:
        score: "flow" (throughput), "reach" (visits) or "rollout" (reach at the first layer).
        preset: which rows stand for the answer.
        weights: "attention" (half of each row is the residual stream) or "value_norm" (both by their norms; models
            that are built like Llama only).
    """

    score: str = "flow"
    preset: str = "flowgraph"
    weights: str = "attention"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")

    def __call__(self, reading: Reading) -> Tensor:
        found = reading.once(replace(self, score="flow"), lambda: self._layered(reading))
        return {"flow": found.throughput, "reach": found.visits, "rollout": found.reach[0]}[self.score]

    def _layered(self, reading: Reading) -> Layered:
        _check_length(len(reading))
        attention = [dense(reading.rows([layer], self.weights)).double() for layer in reading.captured().layers]
        share: Any = 0.5 if self.weights == "attention" else attention_shares(reading.model, reading.token_ids)
        return layered_flow(attention, reading.sinks(self.preset), reading.place.prompt_mask, share)


@torch.no_grad()
def attention_shares(model: nn.Module, token_ids: Tensor) -> list[Tensor]:
    """Per layer [N]: |output of attention| / (that + |residual stream before the layer|).

    Raises:
        ValueError: the layers of the model are not found where Llama has them.
    """
    inner = unwrap(model)
    layers: Any = getattr(getattr(inner, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"{type(inner).__name__} has no model.layers[..].self_attn, whose norms weigh attention against the "
            "residual stream: use weights='attention'"
        )
    before: list[Tensor] = []
    added: list[Tensor] = []
    hooks = []
    for layer in layers:
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: before.append(_norm(args[0] if args else kwargs["hidden_states"])),
                with_kwargs=True,
            )
        )
        hooks.append(layer.self_attn.register_forward_hook(lambda _, args, output: added.append(_norm(output[0]))))
    try:
        with evaluation_mode(inner):
            ids = token_ids[None].to(next(inner.parameters()).device)
            inner.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [o / (o + x) for o, x in zip(added, before, strict=True)]


def _norm(hidden: Tensor) -> Tensor:
    """[N] of hidden states [1, N, D]."""
    return hidden.reshape(-1, hidden.shape[-1]).double().norm(dim=-1).cpu()
