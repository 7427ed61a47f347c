"""Attention and its log-sum-exp in one call, on the very kernel that torch's own attention would run.

torch's fused kernels work out the log-sum-exp of every row on the way and throw it away. `attend` calls the kernel
that `scaled_dot_product_attention` would have chosen, with the same arguments, and keeps it; so its output is the
same to the bit. `log_sums` does this inside somebody else's code.

What torch doesn't give: nothing comes from the math kernel (soft caps, sinks and eager attention never get here), with
dropout, or with gradients; and on CUDA nothing with a mask. The three kernels of CUDA, of which an H100 takes cuDNN's
first, are called as torch declares them, which the tests check on tensors without numbers; no GPU has run them yet.
cuDNN's is told to write the log-sum-exp, where torch would have told it not to: whether its output then is the same to
the bit, as that of the others must be, is for a GPU to say.

Shapes: B batch, H query heads, K key heads, n queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.scaled_dot_product_attention`, and the log-sum-exp of the scores beside its output.

    Args:
        query: [B, H, n, D]. key, value: [B, K, N, D]. The rest is torch's (`is_causal` counts from the first key).

    Returns:
        (out [B, H, n, D], log_sum [B, H, n]): the output is torch's, bit by bit. log_sum: natural logarithm, of scores
        that are scaled and masked, float32 (float64 for float64 inputs); None where torch's choice of a kernel has
        none to give.
    """
    arguments: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if _is_plain(query, key, value, dropout_p):
        choice = torch._fused_sdp_choice(query, key, value, **arguments, enable_gqa=enable_gqa)
        kernel = _KERNELS.get((query.device.type, SDPBackend(choice)))
        result = None if kernel is None else kernel(query, key, value, attn_mask, is_causal, scale)
        if result is not None:
            out, log_sum = result
            return out, log_sum.contiguous()
    return scaled_dot_product_attention(query, key, value, **arguments, enable_gqa=enable_gqa), None


def _is_plain(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Does nothing stand between `scaled_dot_product_attention` and its kernel?"""
    kind = query.device.type
    return (
        query.dim() == 4
        and query.numel() > 0
        and dropout_p == 0
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        # Autocast converts what isn't in its dtype yet.
        and not (torch.is_autocast_enabled(kind) and query.dtype != torch.get_autocast_dtype(kind))
    )


def _flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=_additive(mask, query), scale=scale
    )


def _flash_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    if query.shape[-1] % 8 or mask is not None:
        return None  # torch pads such heads first
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return out, log_sum[:, :, : query.shape[2]]


def _efficient_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    if mask is not None:
        return None  # torch expands and aligns it first
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return out, log_sum[:, :, : query.shape[2]]  # it is rounded up to whole tiles


def _cudnn_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    if mask is not None:
        return None
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return out, log_sum.reshape(query.shape[:3])


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """What `scaled_dot_product_attention` makes of a boolean mask."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)


_KERNELS: dict[tuple[str, SDPBackend], Callable[..., tuple[Tensor, Tensor] | None]] = {
    ("cpu", SDPBackend.FLASH_ATTENTION): _flash_cpu,
    ("cuda", SDPBackend.FLASH_ATTENTION): _flash_cuda,
    ("cuda", SDPBackend.EFFICIENT_ATTENTION): _efficient_cuda,
    ("cuda", SDPBackend.CUDNN_ATTENTION): _cudnn_cuda,
}


class _Listener(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor | None] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            out, log_sum = attend(*args, **(kwargs or {}))
            self.heard.append(log_sum)
            return out
        return function(*args, **(kwargs or {}))


@contextmanager
def log_sums() -> Iterator[list[Tensor | None]]:
    """Inside the block every call of `scaled_dot_product_attention` runs as `attend`; the list holds their `log_sum`.

    Code under compilation keeps torch's own call, and the list stays empty.
    """
    if torch.compiler.is_compiling():
        yield []
        return
    with _Listener() as listener:
        yield listener.heard
