"""Tiny random models of every architecture that capture is tested on, and the dense attention that it must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3_5")


class Parallel(torch.nn.Module):
    """A wrapper like DDP's, for tests to put in its place: that one wants a process group."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def tiny(name: str, implementation: str = "sdpa", **changes: Any) -> Any:
    """A random model in evaluation mode, with attention sharp enough that a wrong mask or scale shows."""
    torch.manual_seed(7)
    if name in ("gemma2", "gpt_oss"):
        implementation = "eager"  # soft caps and sink logits are beyond sdpa
    sizes = _SIZES | changes | {"attn_implementation": implementation}
    model: Any
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=7))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=7))
    elif name == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=7))
    elif name == "gpt_oss":
        model = GptOssForCausalLM(GptOssConfig(**sizes, **_EXPERTS, sliding_window=8))
    elif name == "qwen3_5":
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **_LINEAR))
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("q_proj", "k_proj", "sinks")):
            parameter.data.mul_(8)
    return model.eval()


def eager_attention(model: Any, layers: list[int] | None = None, **inputs: Tensor) -> Tensor:
    """[B, T, T] float64: mean over all heads of the layers (default: all softmax layers), from `output_attentions`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    maps = [layer for layer in attentions if layer is not None and layer.dim() == 4]
    chosen = maps if layers is None else [maps[layer] for layer in layers]
    return torch.stack([layer.double() for layer in chosen]).mean((0, 2))
