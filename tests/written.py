"""A model whose attention is written by hand, so that one known response token carries all flow; and what it reads.

Every adapter is tested with it: that token and no other must get the gain, wherever pads, shifts and slices put it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models import tiny

MARK = "@"
ANSWERS = re.compile(r"=(\d)")
"""Finds the answer of `marked` responses."""


def byte_tokenizer() -> Any:
    """One token per byte, after <pad>, <bos> and <eos> as ids 0, 1 and 2."""
    special = ["<pad>", "<bos>", "<eos>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)


def policy(**changes: Any) -> Any:
    """A tiny random Llama over bytes."""
    return tiny("llama", vocab_size=VOCABULARY, **{"num_hidden_layers": 3} | changes)


def ids(text: str, end: bool = True) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id] * end


def written_by_hand(**changes: Any) -> Any:
    """One layer in which "@" reads only "?" and ";", a digit reads only "@", and every other token only its own kind.

    A question of "?" and ";" then sends all its flow through "@" to the digits of the answer. Take preset="paper".
    """
    theta = {"rope_type": "default", "rope_theta": 1e12}
    model = policy(num_hidden_layers=1, rope_parameters=theta, **changes)
    kinds = torch.full((VOCABULARY,), 3)
    for text, kind in (("?;", 0), (MARK, 1), ("0123456789", 2)):
        kinds[ids(text, end=False)] = kind
    # With this theta the dimensions 4..7 of a head barely turn, so that only the kinds of tokens count.
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.input_layernorm.weight.fill_(1)
        table = model.model.embed_tokens.weight
        table.zero_()
        table[torch.arange(VOCABULARY), kinds] = 1
        reads = torch.tensor([0, 0, 1, 3])  # of kind 0, 1, 2, 3
        for projection, wanted in ((layer.self_attn.k_proj, torch.arange(4)), (layer.self_attn.q_proj, reads)):
            projection.weight.zero_()
            for head in range(projection.weight.shape[0] // 16):
                projection.weight[16 * head + 4 + wanted, torch.arange(4)] = 50.0
    return model


def marked(before: int, after: int, end: bool = True) -> list[int]:
    """Ids of a response: "a" * before, "@", "b" * after, "=7" and, unless it is cut off, the end token."""
    return ids("a" * before + MARK + "b" * after + "=7", end)


def is_mark(token_ids: Tensor) -> Tensor:
    """Bool, same shape: the tokens that carry all flow."""
    return token_ids == ids(MARK, end=False)[0]
