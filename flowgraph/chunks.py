"""Prefill by chunks of tokens: passes of a model that go on from its own cache, and what they keep, put together.

The memory of activations is that of one chunk. Between two chunks the model is as it was before; what they share is
the cache, which holds keys and values of all layers up to the deepest wanted one. The keys of the wanted layers are not
kept a second time where the cache holds them all; a cache with a sliding window lets them go, and then they are copied.

Shapes: B rows of a batch, T their length, n tokens of a chunk, N tokens up to its end, H query heads, K key heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from flowgraph.interface import (
    KeptLayer,
    ModelInUseError,
    Recorder,
    device_of,
    forward,
    softmax_layers_of,
    unwrap,
)
from flowgraph.rows import bring

_CPU = torch.device("cpu")


class ChunkCache(DynamicCache):
    """The cache that a model of this configuration would use, between the chunks of one sequence.

    Args:
        offload: whatever it holds waits in CPU memory (pinned, where the model is on CUDA), and each layer's part comes
            to the model only while it is used.
        total: T, the tokens of all chunks; for offload.
    """

    def __init__(self, config: Any, offload: bool, total: int = 0) -> None:
        super().__init__(config=config)
        self.offload_layers = offload
        self._total = total
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}
        self._given: dict[int, ref[Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.offload_layers and layer_idx < len(self.layers):
            held: Any = self.layers[layer_idx]
            if held.is_initialized:
                held.keys, held.values = (
                    bring(x.flatten(0, 1), key_states.device).unflatten(0, x.shape[:2])
                    for x in (held.keys, held.values)
                )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._given[layer_idx] = ref(keys)
        if self.offload_layers:
            self._put_away(layer_idx, key_states, value_states)
        return keys, values

    def _put_away(self, layer: int, new_keys: Tensor, new_values: Tensor) -> None:
        """Let what a layer holds wait in CPU memory. Of one that grows, only what is new has to go there."""
        # Not `layer.offload`: it doesn't wait for its copies.
        held: Any = self.layers[layer]
        if getattr(held, "is_sliding", False):
            held.keys, held.values = held.keys.to(_CPU), held.values.to(_CPU)
            return
        if layer not in self._rooms:
            self._rooms[layer] = _room(new_keys, self._total), _room(new_values, self._total)
        start = held.keys.shape[2] - new_keys.shape[2]
        held.keys, held.values = (
            _fill(room, new, start) for room, new in zip(self._rooms[layer], (new_keys, new_values), strict=True)
        )

    def holder(self, key: Tensor) -> int | None:
        """The layer whose part of the cache is `key`, as the model got it, now and after every later chunk.

        None: the cache lets keys go (sliding windows), or the model made something else of them.
        """
        for layer, given in self._given.items():
            if given() is key and not getattr(self.layers[layer], "is_sliding", False):
                return layer
        return None

    def keys(self, layer: int) -> Tensor:
        """[B, K, N, D] what the cache holds of a layer, where it holds it."""
        held: Any = self.layers[layer]
        return held.keys


def _room(new: Tensor, total: int) -> Tensor:
    """[B, H, T, ..] for tensors like `new` [B, H, n, ..], in CPU memory."""
    return torch.empty(
        *new.shape[:2], total, *new.shape[3:], dtype=new.dtype, device=_CPU, pin_memory=new.device.type == "cuda"
    )


def _fill(room: Tensor, new: Tensor, start: int) -> Tensor:
    """[B, H, N, ..] of a room [B, H, T, ..], once [B, H, n, ..] is written behind its first `start` tokens.

    Head by head: each lies in one piece, and only that goes from a GPU to pinned memory without another copy on the
    host, which waits for each.
    """
    stop = start + new.shape[2]
    for theirs, ours in zip(room[:, :, start:stop], new, strict=True):
        for there, here in zip(theirs, ours, strict=True):
            there.copy_(here)
    return room[:, :, :stop]


class Chunk(NamedTuple):
    """One pass of a prefill by chunks."""

    start: int
    stop: int
    """Its tokens: start .. stop - 1."""
    kept: dict[int, KeptLayer]
    cache: ChunkCache | None
    """What the next chunk will go on from. None: there is only one."""


def passes(
    model: Any, recorder: Recorder, inputs: dict[str, Tensor], chunk: int | None = None, offload: bool = False
) -> Iterator[Chunk]:
    """Run the model over `inputs`, `chunk` tokens at a time (None: all at once), each pass ending in the last layer.

    Between two passes the model is as it was before. Whoever holds on to the keys of a chunk makes the next one keep
    them twice.
    """
    T = inputs["input_ids"].shape[1]
    if chunk is None or chunk >= T:
        forward(model, recorder, inputs)
        _check_tokens(model, recorder, 0, T)
        yield Chunk(0, T, recorder.take(), None)
        return
    if (why := refusal(model)) is not None:
        raise ValueError(f"chunk: {why}: pass chunk=None")
    cache = ChunkCache(model.config, offload, T)
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        part = {name: x[:, (0 if name == "attention_mask" else start) : stop] for name, x in inputs.items()}
        forward(model, recorder, part, cache)
        _check_tokens(model, recorder, start, stop)
        if start and (alone := recorder.without_past()):
            raise ValueError(f"chunk: {_forgets(model, alone)}: pass chunk=None")
        yield Chunk(start, stop, recorder.take(), cache)


def _check_tokens(model: Any, recorder: Recorder, start: int, stop: int) -> None:
    """Refuse models that put tokens of their own before those start .. stop - 1: places would mean other tokens."""
    for layer, kept in recorder.kept.items():
        # A cache with a window may hold less than all tokens so far, never more; the first pass sees its own alone.
        own = max(kept.query.shape[2] - (stop - start), kept.key.shape[2] - stop)
        if own > 0:
            raise ValueError(
                f"model: {type(model).__name__} puts {own} tokens of its own before the input in layer {layer}, as "
                "prompt tuning and prefix tuning do, and attention to them is attention to no token of the trace: "
                "trace the model without them"
            )


def _forgets(model: Any, layers: list[int]) -> str:
    return (
        f"layers {layers} of {type(model).__name__} saw nothing but the tokens of their chunk, so the model doesn't go "
        "on from a cache"
    )


def has_state(model: Any) -> bool:
    """Are there layers that keep a state, beside keys and values or in their place?"""
    try:
        layers = DynamicCache(config=model.config).layers
    except KeyError:  # a kind of layer that transformers has no cache for
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


_REFUSALS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_NOT_ITS_FAULT = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError), ModelInUseError)
"""Errors of the moment, which say nothing of a model. torch has AcceleratorError from 2.8 on."""


def refusal(model: nn.Module) -> str | None:
    """Why a model can't be read by chunks; None: it can. Found out once per model, by passes over eight tokens."""
    model = unwrap(model)
    if model not in _REFUSALS:
        _REFUSALS[model] = _try(model)
    return _REFUSALS[model]


def _try(model: Any) -> str | None:
    """Eight tokens in one pass and in two chunks: does the second chunk go on from the first?

    Linear layers of some models begin anew with every pass of more than one token, which shows in the keys after them.
    How far the keys of the first chunk differ, which has no state to go on from, says how much is rounding.
    """
    tokens = torch.arange(8, device=device_of(model))[None]
    layers = softmax_layers_of(model, tokens)

    def read(part: Tensor, cache: ChunkCache | None) -> Recorder:
        recorder = Recorder(frozenset(layers), layers[-1])
        forward(model, recorder, {"input_ids": part}, cache)
        return recorder

    whole = read(tokens, None)  # what goes wrong here is no matter of chunks
    _check_tokens(model, whole, 0, 8)
    try:
        cache = ChunkCache(model.config, offload=False)
        first, second = read(tokens[:, :4], cache), read(tokens[:, 4:], cache)
    except _NOT_ITS_FAULT:
        raise
    except Exception as error:  # each architecture fails in its own way; the reason is kept
        return f"{type(model).__name__} doesn't go on from a cache ({type(error).__name__}: {error})"
    if alone := second.without_past():
        return _forgets(model, alone)
    if not has_state(model):
        return None
    last = layers[-1]
    one, before, after = (part.kept[last].key[:, :, -n:] for part, n in ((whole, 8), (first, 4), (second, 4)))
    eps = torch.finfo(one.dtype).eps
    rounding = max(float((one[:, :, :4] - before).abs().max()), min(eps, eps**0.5 / 64) * float(one.abs().max()))
    if not float((one[:, :, 4:] - after).abs().max()) <= 64 * rounding:
        return (
            f"{type(model).__name__} gives other keys by chunks than in one pass (layer {last}, of 8 tokens), so its "
            "linear layers don't go on from their state"
        )
    return None


def check_chunk(chunk: int | None, inputs: dict[str, Tensor]) -> None:
    """Refuse what cannot be read by chunks: `inputs` are what the model is called with."""
    if chunk is None:
        return
    if not isinstance(chunk, int) or chunk < 2:
        raise ValueError(f"chunk must be a number of tokens, 2 or more (one is a step of generation), got {chunk!r}")
    if "position_ids" in inputs and "attention_mask" not in inputs:
        # Without a mask and without a cache, transformers takes every other step for a new packed document.
        broken = (inputs["position_ids"].diff(dim=-1) != 1).nonzero()
        if len(broken):
            row, place = (int(x) for x in broken[0])
            raise ValueError(
                f"chunk: position_ids don't go up by one at [{row}, {place + 1}], which begins a new packed document, "
                "and with a cache documents see each other: give each a row of its own, or pass chunk=None"
            )


class Store:
    """What the chunks of one sequence kept, each joined to what those before it kept.

    Args:
        total: T, the tokens of all chunks.
        queries: are the queries (and log-sum-exp) of all chunks wanted, or those of the last one only?
        offload: keep them in CPU memory (pinned, where the model is on CUDA).

    Attributes:
        device: where the attention of the last chunk ran.
    """

    def __init__(self, total: int, *, queries: bool, offload: bool) -> None:
        self._total, self._queries, self._offload = total, queries, offload
        self._room: dict[tuple[int, str], Tensor] = {}
        self.device = _CPU

    def join(self, chunk: Chunk) -> dict[int, KeptLayer]:
        """The layers with all that they have kept so far. Takes them out of the chunk.

        Whoever holds on to the answer makes the next chunk keep its keys twice.
        """
        joined = {}
        for layer in list(chunk.kept):
            piece = chunk.kept.pop(layer)
            self.device = piece.query.device
            if chunk.cache is None and not self._offload:
                joined[layer] = piece
                continue
            piece.key = self._keys(layer, piece, chunk)
            if piece.value_norm is not None:
                piece.value_norm = self._write(layer, "value_norm", piece.value_norm, chunk.start)
            if self._queries:
                piece.query = self._write(layer, "query", piece.query, chunk.start, self._offload)
                piece.log_sum = self._log_sum(layer, piece, chunk.start)
            joined[layer] = piece
        return joined

    def _log_sum(self, layer: int, piece: KeptLayer, start: int) -> Tensor | None:
        """[B, H, N], or None if a chunk had none."""
        if piece.log_sum is None:
            self._room.pop((layer, "log_sum"), None)
        if piece.log_sum is None or (start > 0 and (layer, "log_sum") not in self._room):
            return None
        return self._write(layer, "log_sum", piece.log_sum, start)

    def _keys(self, layer: int, piece: KeptLayer, chunk: Chunk) -> Tensor:
        """[B, K, N, D]"""
        holder = None if chunk.cache is None else chunk.cache.holder(piece.key)
        if chunk.cache is not None and holder is not None:
            return chunk.cache.keys(holder)
        new = piece.key[:, :, chunk.start - chunk.stop :]
        return self._write(layer, "key", new, chunk.start, self._offload)

    def _write(self, layer: int, name: str, new: Tensor, start: int, offload: bool = False) -> Tensor:
        """[B, H, N, ..] what there is with [B, H, n, ..] behind it."""
        if (layer, name) not in self._room:
            shape = (*new.shape[:2], self._total, *new.shape[3:])
            self._room[layer, name] = (
                _room(new, self._total) if offload else torch.empty(shape, dtype=new.dtype, device=new.device)
            )
        if offload:
            return _fill(self._room[layer, name], new, start)
        room = self._room[layer, name][:, :, : start + new.shape[2]]
        room[:, :, start:] = new
        return room
