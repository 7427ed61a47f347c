"""The attention of a layer, densely, in float64: what rows and kernels are compared with.

Shapes: N tokens, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgraph.rows import LayerQK


def scores(one: LayerQK, positions: Tensor) -> Tensor:
    """[H, N, N] float64 scaled, soft-capped and masked."""
    H, K, N = len(one.query), len(one.key), one.key.shape[1]
    out = one.query.double() @ one.key.double().repeat_interleave(H // K, 0).mT * one.scaling
    if one.softcap is not None:
        out = one.softcap * torch.tanh(out / one.softcap)
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    if one.visible is not None:
        seen &= one.visible(positions, positions)
    return out.masked_fill(~seen, -torch.inf)


def log_sum(one: LayerQK, positions: Tensor) -> Tensor:
    """[H, N] float64, the sink included."""
    total = scores(one, positions).logsumexp(-1)
    return total if one.sink_logits is None else torch.logaddexp(total, one.sink_logits.double()[:, None])
