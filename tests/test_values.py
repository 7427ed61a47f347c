"""Value norms equal a dense float64 computation, whatever kind of layer projects the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flowgraph import capture
from flowgraph.capture import recording, softmax_layers_of
from flowgraph.values import output_gram, value_norms
from tests.models import ARCHITECTURES, VOCABULARY, tiny

B, T = 2, 21


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


def dense_norms(value: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T] float64 from value [B, K, T, D] and the whole output matrix weight [C, H * D], one vector at a time."""
    D = value.shape[-1]
    H = weight.shape[1] // D
    value = value.double().repeat_interleave(H // value.shape[1], dim=1)
    heads = weight.double().view(-1, H, D)
    return torch.stack([(value[:, h] @ heads[:, h].T).norm(dim=-1) for h in range(H)], dim=1)


def values_of(model: Any, module: nn.Module, width: int) -> Tensor:
    """[B, K, T, D] out of a plain forward pass: what the value projection gave, its last `width` columns."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, out: seen.append(out[..., -width:]))
    with torch.no_grad():
        model(ids(), use_cache=False)
    hook.remove()
    return seen[0].view(B, T, -1, 16).transpose(1, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_equal_a_dense_computation(name: str) -> None:
    model = tiny(name)
    captured = capture(model, ids(), layers="all", values=True)
    for layer, kept in zip(captured.layers, captured._kept, strict=True):
        attention = model.model.layers[layer].self_attn
        expected = dense_norms(values_of(model, attention.v_proj, 32), attention.o_proj.weight)
        assert kept.value_norm is not None and kept.value_norm.dtype == torch.float32
        assert kept.value_norm.shape == (B, 4, T)
        assert ((kept.value_norm - expected) / expected).abs().max() < 1e-5


def test_norms_of_a_convolution_as_gpt2_has_it() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)).eval()
    (kept,) = capture(model, ids(), layers=[1], values=True)._kept
    attention = model.transformer.h[1].attn
    expected = dense_norms(values_of(model, attention.c_attn, 64), attention.c_proj.weight.T)
    assert kept.value_norm is not None
    assert ((kept.value_norm - expected) / expected).abs().max() < 1e-5


def adapted(**changes: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, lora_dropout=0.5, **changes)
    return peft.get_peft_model(tiny("llama"), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("dora", [False, True])
def test_norms_of_an_adapter_are_those_of_the_merged_model(dora: bool) -> None:
    model = adapted(use_dora=dora).eval()
    (ours,) = capture(model, ids(), layers=[3], values=True)._kept
    (merged,) = capture(model.merge_and_unload(), ids(), layers=[3], values=True)._kept
    assert ours.value_norm is not None and merged.value_norm is not None
    assert ((ours.value_norm - merged.value_norm) / merged.value_norm).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_recording_norms_changes_no_bit_of_a_pass_with_dropout() -> None:
    model = adapted().train()
    with torch.no_grad():
        torch.manual_seed(5)
        plain = model(ids()).logits
        with recording(model, values=True):
            torch.manual_seed(5)
            assert torch.equal(model(ids()).logits, plain)
    assert all(module.training for module in model.modules())


def test_recording_and_capture_keep_the_same_norms() -> None:
    model = tiny("gemma3")
    with torch.no_grad(), recording(model, values=True) as captures:
        model(ids())
    for ours, theirs in zip(captures[0]._kept, capture(model, ids(), values=True)._kept, strict=True):
        assert ours.value_norm is not None and theirs.value_norm is not None
        assert torch.equal(ours.value_norm, theirs.value_norm)


def test_norms_are_float64_where_the_model_is() -> None:
    model = tiny("llama").double()
    (kept,) = capture(model, ids(), layers=[2], values=True)._kept
    attention = model.model.layers[2].self_attn
    expected = dense_norms(values_of(model, attention.v_proj, 32), attention.o_proj.weight)
    assert kept.value_norm is not None and kept.value_norm.dtype == torch.float64
    assert ((kept.value_norm - expected) / expected).abs().max() < 1e-12


def test_norms_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    value, weight = torch.randn(2, 2, 50, 8), nn.Linear(32, 20, bias=False)
    gram = output_gram(nn.ModuleDict({"o_proj": weight}), 0, 4, 8)
    whole = value_norms(value, gram)
    monkeypatch.setattr("flowgraph.values._BLOCK", 7)
    assert (value_norms(value, gram) - whole).abs().max() < 1e-6
    assert ((whole - dense_norms(value, weight.weight)) / whole).abs().max() < 1e-5


def test_rows_by_value_need_the_values() -> None:
    captured = capture(tiny("llama"), ids())
    with pytest.raises(ValueError, match="values=True"):
        captured.rows(0, torch.arange(T), weights="value_norm")


def test_what_has_no_output_projection_is_refused() -> None:
    model = tiny("llama")
    softmax_layers_of(model, ids())
    attention = model.model.layers[2].self_attn
    attention.final = attention.o_proj
    del attention.o_proj
    with pytest.raises(ValueError, match=r"layer 2: .*o_proj, out_proj.*found none.*final \(Linear\)"):
        capture(model, ids(), layers=[2], values=True)
    assert capture(model, ids(), layers=[2]).layers == [2]
    attention.o_proj = nn.Linear(63, 64)
    with pytest.raises(ValueError, match=r"layer 2: o_proj \(Linear\) takes no vectors of 64 numbers"):
        capture(model, ids(), layers=[2], values=True)
