"""`attend` is torch's attention to the bit, with the log-sum-exp that a dense computation gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flowgraph.kernels import _KERNELS, attend, log_sums

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def inputs(dtype: torch.dtype, device: str, heads: int, key_heads: int, n: int, N: int, size: int) -> list[Tensor]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shapes = [(2, heads, n, size), (2, key_heads, N, size), (2, key_heads, N, size)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def dense_log_sum(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """[B, H, n] float64, with every head's own copy of its keys."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().mT * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("layout", ["causal", "past", "masked", "one query"])
def test_attend_is_torchs_attention_with_its_log_sum(
    device: str, dtype: torch.dtype, heads: int, key_heads: int, layout: str
) -> None:
    n, N = {"causal": (70, 70), "past": (30, 70), "masked": (30, 70), "one query": (1, 70)}[layout]
    query, key, value = inputs(dtype, device, heads, key_heads, n, N, 24)
    mask = torch.rand(2, 1, n, N, device=device) < 0.5 if layout == "masked" else None
    arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": layout == "causal", "scale": 0.3}
    arguments["enable_gqa"] = heads != key_heads
    out, log_sum = attend(query, key, value, **arguments)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, **arguments))
    if device == "cpu" or (mask is None and dtype in (torch.bfloat16, torch.float16)):
        assert log_sum is not None  # else every trace would pay for its own
    if log_sum is not None:
        expected = dense_log_sum(query, key, mask, layout == "causal", 0.3)
        assert log_sum.shape == query.shape[:3]
        assert log_sum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (log_sum - expected).abs().max() < TOLERANCE[dtype]


FUSED = [choice for device, choice in _KERNELS if device == "cuda"]


@pytest.mark.parametrize("choice", FUSED, ids=str)
@pytest.mark.parametrize("n", [40, 33])
def test_kernels_of_cuda_are_called_as_torch_declares_them(choice: SDPBackend, n: int) -> None:
    """Names, arguments and shapes, on tensors without numbers."""
    query, key = (torch.empty(2, 8, size, 64, dtype=torch.bfloat16, device="meta") for size in (n, 70))
    kernel = _KERNELS["cuda", choice]
    out, log_sum = kernel(query, key, key, None, False, 0.3) or pytest.fail("there is no result")
    assert out.shape == query.shape and out.dtype == query.dtype
    assert log_sum.shape == query.shape[:3] and log_sum.dtype == torch.float32
    assert kernel(query, key, key, torch.ones(n, 70, dtype=torch.bool, device="meta"), False, 0.3) is None


def test_all_that_torch_may_choose_on_cuda_is_known() -> None:
    without = {SDPBackend.ERROR, SDPBackend.MATH, SDPBackend.OVERRIDEABLE}  # the last is for other devices
    assert set(FUSED) == set(SDPBackend.__members__.values()) - without


@pytest.mark.parametrize("why", ["math kernel", "dropout", "gradients", "autocast", "three dimensions"])
def test_no_log_sum_where_torch_has_none_to_give(why: str) -> None:
    query, key, value = inputs(torch.float32, "cpu", 4, 4, 20, 20, 8)
    if why == "three dimensions":
        query, key, value = query[0], key[0], value[0]
    query.requires_grad_(why == "gradients")
    dropout = 0.5 if why == "dropout" else 0.0
    with (
        sdpa_kernel([SDPBackend.MATH] if why == "math kernel" else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"),
    ):
        torch.manual_seed(1)
        out, log_sum = attend(query, key, value, is_causal=True, dropout_p=dropout)
        torch.manual_seed(1)
        assert torch.equal(out, scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout))
    assert log_sum is None
    assert out.requires_grad == (why == "gradients")


def test_log_sums_hears_every_call_inside_and_none_outside() -> None:
    query, key, value = inputs(torch.float32, "cpu", 4, 4, 20, 20, 8)
    plain = scaled_dot_product_attention(query, key, value)
    with log_sums() as heard:
        inside = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        scaled_dot_product_attention(query, key, value, is_causal=True)
    scaled_dot_product_attention(query, key, value)
    assert torch.equal(inside, plain) and len(heard) == 2
    for log_sum, is_causal in zip(heard, (False, True), strict=True):
        assert log_sum is not None
        assert (log_sum - dense_log_sum(query, key, None, is_causal, 8**-0.5)).abs().max() < 1e-5
