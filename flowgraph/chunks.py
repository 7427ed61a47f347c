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
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache

from flowgraph.interface import KeptLayer, Recorder, device_of, forward

_CPU = torch.device("cpu")


class ChunkCache(DynamicCache):
    """The cache that a model of this configuration would use, between the chunks of one sequence.

    Args:
        offload: whatever it holds waits in CPU memory, and each layer's part comes to the model only while it is used.
    """

    def __init__(self, config: Any, offload: bool) -> None:
        super().__init__(config=config)
        self.offload_layers = offload
        self._given: dict[int, ref[Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.offload_layers and layer_idx < len(self.layers):
            _move(self.layers[layer_idx], key_states.device)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._given[layer_idx] = ref(keys)
        if self.offload_layers:
            _move(self.layers[layer_idx], _CPU)
        return keys, values

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


def _move(layer: Any, device: torch.device) -> None:
    # Not `layer.offload`: it doesn't wait for its copies.
    if layer.is_initialized:
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


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
        yield Chunk(0, T, recorder.take(), None)
        return
    cache = ChunkCache(model.config, offload)
    if any(getattr(cache, "is_linear", [True])):
        _check_state(model, recorder)
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        part = {name: x[:, (0 if name == "attention_mask" else start) : stop] for name, x in inputs.items()}
        forward(model, recorder, part, cache)
        if start and (alone := recorder.without_past()):
            raise ValueError(
                f"chunk: layers {alone} of {type(model).__name__} saw nothing but the tokens of their chunk, so the "
                "model doesn't go on from a cache: leave chunk out"
            )
        yield Chunk(start, stop, recorder.take(), cache)


def _check_state(model: Any, recorder: Recorder) -> None:
    """Refuse models whose linear layers begin anew with every chunk: not all go on, with more than one token at a time.

    Eight tokens are read in one pass and in two chunks. How far the keys of the first chunk differ, which has no state
    to go on from, says how much is rounding.
    """
    last = recorder.last
    assert last is not None
    tokens = torch.arange(8, device=device_of(model))[None]
    cache, keys = ChunkCache(model.config, offload=False), []
    for part, past in ((tokens, None), (tokens[:, :4], cache), (tokens[:, 4:], cache)):
        probe = Recorder(frozenset([last]), last)
        forward(model, probe, {"input_ids": part}, past)
        keys.append(probe.kept[last].key[:, :, -part.shape[1] :])
    whole, first, second = keys
    eps = torch.finfo(whole.dtype).eps
    rounding = max(float((whole[:, :, :4] - first).abs().max()), min(eps, eps**0.5 / 64) * float(whole.abs().max()))
    if not float((whole[:, :, 4:] - second).abs().max()) <= 64 * rounding:
        raise ValueError(
            f"chunk: {type(model).__name__} gives other keys by chunks than in one pass (layer {last}, of 8 tokens): "
            "its linear layers don't go on from their state. Leave chunk out"
        )


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
                "and with a cache documents see each other: give each a row of its own, or leave chunk out"
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
            device = _CPU if offload else new.device
            self._room[layer, name] = torch.empty(
                shape, dtype=new.dtype, device=device, pin_memory=offload and new.is_cuda
            )
        stop = start + new.shape[2]
        room = self._room[layer, name][:, :, :stop]
        room[:, :, start:] = new
        return room
