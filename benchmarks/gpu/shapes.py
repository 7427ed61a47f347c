"""Shapes of models, and models of that shape with random weights, made on the device.

Time and memory depend on shapes and on how many edges there are, not on what a model has learned. So that there are
edges, the heads of a group take their queries with the weights of their key: a token then looks at earlier tokens like
itself, of which `ids_of` gives it about 16, rarer the further back they are. How many edges came of it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ANSWER = 4
"""Tokens at the end of a trace that stand for the answer."""

DEVIATION = 0.02
"""Of random weights."""

SHARPNESS = 8.5
"""The score of a token with itself; that with another word is about 0."""

PASSAGE, WORDS = 1024, 20


@dataclass(frozen=True)
class Shape:
    """A decoder, from its published configuration.

    Attributes:
        kind: "qwen3" (norms of queries and keys) or "llama". tied: are input and output embeddings the same?
        rope: `rope_parameters` of its configuration.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    rope: dict[str, Any]

    @property
    def chosen(self) -> int:
        """Number of the layers that are read: the middle third."""
        return max(2 * self.layers // 3, self.layers // 3 + 1) - self.layers // 3

    @property
    def deepest(self) -> int:
        """Number of layers up to the last one that is read."""
        return self.layers // 3 + self.chosen

    @property
    def numbers_per_layer(self) -> int:
        """Weights of the matrices of one layer."""
        attention = 2 * self.hidden * (self.heads + self.key_heads) * self.head_size
        return attention + 3 * self.hidden * self.intermediate


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-4b", "qwen3", 36, 2560, 9728, 32, 8, 128, 151_936, True, _rope(1e6)),
        Shape("qwen3-8b", "qwen3", 36, 4096, 12288, 32, 8, 128, 151_936, False, _rope(1e6)),
        Shape("llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128_256, False, _LLAMA3),
        Shape("small", "qwen3", 6, 256, 512, 8, 2, 128, 1024, True, _rope(1e6)),
        Shape("tiny", "qwen3", 6, 64, 96, 4, 2, 16, 128, True, _rope(1e6)),
    )
}


def model_of(shape: Shape, device: torch.device, longest: int, seed: int = 0) -> Any:
    """A model in bfloat16 and evaluation mode, made on the device.

    Args:
        longest: tokens that it has to say it can see.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": dict(shape.rope),
        "max_position_embeddings": longest,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    with torch.device("meta"):
        made: Any = (
            Qwen3ForCausalLM(Qwen3Config(**sizes)) if shape.kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
        )
    made = made.to(torch.bfloat16).to_empty(device=device)
    made.tie_weights()
    rotary = made.model.rotary_emb  # its frequencies are no weights, and were never worked out
    with device:
        made.model.rotary_emb = type(rotary)(made.config)
    draw = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, DEVIATION, generator=draw)
            else:
                weight.fill_(1)
        factor = (SHARPNESS / shape.head_size**0.5) ** 0.5
        for attention in (layer.self_attn for layer in made.model.layers):
            if shape.kind == "qwen3":
                attention.q_norm.weight.fill_(factor)
                attention.k_norm.weight.fill_(factor)
            else:
                attention.k_proj.weight.mul_(factor / (DEVIATION * shape.hidden**0.5))
            grouped = (shape.key_heads, -1, shape.head_size, shape.hidden)
            attention.q_proj.weight.view(grouped).copy_(attention.k_proj.weight.view(grouped))
    return made.eval()


def ids_of(shape: Shape, num_tokens: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """[rows, N] token ids on the CPU: in each passage of `PASSAGE` tokens `WORDS` words of its own, again and again."""
    import torch

    drawn = torch.randint(0, WORDS, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(num_tokens) // PASSAGE * WORDS + drawn) % (shape.vocabulary // 2)


def prompt_of(num_tokens: int) -> int:
    """Tokens of the prompt: 400, or a third of a trace that is too short for it."""
    return max(1, min(400, num_tokens // 3))


def masks_of(num_tokens: int) -> dict[str, Any]:
    """`prompt_mask` and `sink_mask` [1, N] of a trace."""
    import torch

    place = torch.arange(num_tokens)[None]
    sinks = min(ANSWER, num_tokens - 1)
    return {"prompt_mask": place < prompt_of(num_tokens), "sink_mask": place >= num_tokens - sinks}
