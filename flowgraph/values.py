"""How much a token's value can move the model: the norm of what attention adds per unit of weight.

Head h adds `W_O^h v_i` to the residual stream for every unit of attention to token i, `W_O^h` being the columns of the
output projection that belong to h (Kobayashi et al. 2020, arXiv 2004.10102). Its norm comes from the Gram matrix,
`||W v||^2 = v^T (W^T W) v`, so nothing as wide as the residual stream is made for a token.

What a model does to the output of attention before the projection is left out: a gate (Qwen3-Next, Qwen3.5) or a norm.

Shapes: B batch, H query heads, K key heads, n tokens, D head size of the values, C width of the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What attention modules of transformers call their output projection."""

_BLOCK = 1024
"""Tokens at a time."""


def output_gram(attention: nn.Module, layer: int, num_heads: int, size: int) -> Tensor:
    """`W_O^h^T W_O^h` for every query head of an attention module: [H, D, D] float32 (float64 if the model is).

    A projection that isn't a plain linear layer with its weight at hand (LoRA, quantised, offloaded) is asked what
    it does with the unit vectors.

    Args:
        attention: the module. layer: its number, for messages. num_heads: H. size: D.

    Raises:
        ValueError: there is no output projection, or it is sharded, or not linear from H * D to C; names the layer
            and what there is.
    """
    found = [name for name in OUTPUT_PROJECTIONS if isinstance(getattr(attention, name, None), nn.Module)]
    if len(found) != 1:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in attention.named_children())
        raise ValueError(
            f"layer {layer}: values need the output projection of {type(attention).__name__}, looked for as "
            f"{', '.join(OUTPUT_PROJECTIONS)}; found {', '.join(found) or 'none'} among its modules: {children}. "
            "Use attention weights without value norms"
        )
    weight = output_weight(getattr(attention, found[0]), num_heads * size, f"layer {layer}: {found[0]}")
    weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    heads = weight.view(num_heads, size, -1)
    return heads @ heads.mT


def output_weight(projection: Any, width: int, what: str) -> Tensor:
    """[H * D, C] what a linear layer does with every unit vector."""
    weight: Any = getattr(projection, "weight", None)
    if any(hasattr(parameter, "full_tensor") for parameter in projection.parameters()):
        raise ValueError(f"{what} is sharded (DTensor), and value norms need all of it: leave the values out")
    if type(projection) is nn.Linear and not weight.is_meta and weight.shape[1] == width:
        return weight.detach().T
    if type(projection) is Conv1D and not weight.is_meta and weight.shape[0] == width:
        return weight.detach()
    # Not through __call__: the hooks of the caller are for the caller's passes.
    training = [module for module in projection.modules() if module.training]
    projection.eval()
    try:
        some = next(parameter for parameter in projection.parameters() if parameter.is_floating_point())
        units = torch.eye(width, device=some.device, dtype=some.dtype)
        with torch.no_grad():
            return (projection.forward(units) - projection.forward(torch.zeros_like(units[:1]))).detach()
    except (RuntimeError, StopIteration) as error:
        raise ValueError(
            f"{what} ({type(projection).__name__}) takes no vectors of {width} numbers, heads times head size: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True


def value_norms(value: Tensor, gram: Tensor) -> Tensor:
    """`||W_O^h v_i||` for each query head h and token i, with the value of the key head that h shares.

    Args:
        value: [B, K, n, D]. gram: [H, D, D] of `output_gram`.

    Returns:
        [B, H, n] in the dtype of `gram`.
    """
    (H, D, _), K = gram.shape, value.shape[1]
    gram = gram.view(K, H // K, D, D)
    parts = []
    for part in value.split(_BLOCK, dim=2):
        v = part.to(gram.dtype)[:, :, None]
        parts.append((v @ gram).mul_(v).sum(-1).clamp_(min=0).sqrt_().flatten(1, 2))
    return torch.cat(parts, dim=2)
