"""Queries and keys of chosen layers out of any transformers model that uses the attention interface.

`capture` runs the model itself, `recording` reads forward passes that somebody else runs; how they read is in
`flowgraph.interface`. A capture may also hold the log-sum-exp of the attention rows, where the model's own kernel gave
it, and the norms of what the tokens' values add (`flowgraph.values`).

For long traces `capture` can go by chunks of tokens, with the model's own cache: activations are then those of one
chunk, and what is kept grows with the trace: the queries and keys of the chosen layers, in CPU memory if asked for.
`flowgraph.stream` keeps no queries at all.

Shapes: B rows of a batch, T their length with pads, N tokens of one trace, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowgraph.chunks import Store, check_chunk, has_state, passes
from flowgraph.interface import (
    KeptLayer,
    Recorder,
    device_of,
    documents_of,
    evaluation_mode,
    is_packed,
    model_inputs,
    read_by,
    softmax_layers_of,
    unwrap,
)
from flowgraph.rows import AttentionRows, LayerQK

__all__ = [
    "Capture",
    "Layers",
    "capture",
    "choose_layers",
    "documents_of",
    "evaluation_mode",
    "is_packed",
    "model_inputs",
    "recording",
    "softmax_layers_of",
    "unwrap",
]

Layers = Literal["middle", "all"] | Sequence[int]


@dataclass(frozen=True, eq=False)
class Capture:
    """Queries and keys of the chosen layers for a whole batch.

    Attributes:
        model: name of the model. layers: the numbers of the chosen layers, ascending.
    """

    model: str
    layers: list[int]
    _kept: list[KeptLayer] = field(repr=False)
    _batch: tuple[int, ...] | None = field(default=None, repr=False)
    """The rows of the batch that this is of; None: all."""
    _place: torch.device | None = field(default=None, repr=False)
    """Where the model's attention ran; None: where the queries are."""

    def __post_init__(self) -> None:
        places = {str(kept.query.device): layer for layer, kept in zip(self.layers, self._kept, strict=True)}
        if len(places) > 1:
            where = ", ".join(f"layer {layer} on {place}" for place, layer in places.items())
            raise ValueError(
                f"the chosen layers lie on several devices ({where}), and their attention is averaged: choose layers "
                "of one device, or trace with a copy of the model that is on one"
            )

    @property
    def device(self) -> torch.device:
        """Where the model's attention ran, and where all that is made from queries and keys is made."""
        return self._place or self._kept[0].query.device

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of the batch that the model saw."""
        query = self._kept[0].query
        return query.shape[0] if self._batch is None else len(self._batch), query.shape[2]

    def select(self, rows: Sequence[int]) -> Capture:
        """Some rows of the batch, as a batch of their own. Nothing is copied."""
        batch = range(self.shape[0]) if self._batch is None else self._batch
        return replace(self, _batch=tuple(batch[row] for row in rows))

    @property
    def num_heads(self) -> dict[int, int]:
        """Layer number -> number of its query heads."""
        return {layer: kept.query.shape[1] for layer, kept in zip(self.layers, self._kept, strict=True)}

    def rows(
        self,
        row: int,
        positions: Tensor,
        block: int | None = None,
        heads: Mapping[int, Sequence[int]] | None = None,
        weights: str = "attention",
        backend: str = "auto",
    ) -> AttentionRows:
        """The attention among some tokens of one row of the batch, as a stream of row blocks.

        Args:
            row: number of the row in the batch.
            positions: [N] int64, ascending: the positions of the trace's tokens in that row (no pads, one document).
            block: rows per block; default: as many as `flowgraph.rows.BLOCK_BYTES` holds.
            heads: layer number -> its query heads that take part; default: all heads of all chosen layers. The mean is
                over the heads, so a layer with more of them counts more.
            weights: "attention", or "value_norm": attention times the norm of what the value adds, see
                `flowgraph.rows.AttentionRows`; for that the capture must hold `values`.
            backend: "auto", "torch" or "triton", as in `flowgraph.rows.AttentionRows`.
        """
        if heads is not None and (not heads or not set(heads) <= set(self.layers)):
            raise ValueError(f"heads must be of some of the layers {self.layers}, got layers {sorted(heads)}")
        row = row if self._batch is None else self._batch[row]
        start, N = int(positions[0]), len(positions)
        # A slice is a view; only a trace with holes has to be copied.
        index: Any = slice(start, start + N) if int(positions[-1]) == start + N - 1 else positions
        place = positions.to(self.device)
        masks = {id(kept.mask): kept.mask for kept in self._kept}
        visible = {key: None if mask.is_causal else partial(mask.visible, row) for key, mask in masks.items()}
        alone = {key: mask.sees_only(row, place) for key, mask in masks.items()}
        layers = []
        for number, kept in zip(self.layers, self._kept, strict=True):
            if heads is not None and number not in heads:
                continue
            mask = id(kept.mask)
            log_sum = kept.log_sum if alone[mask] else None  # of all tokens; the trace may have fewer
            layer = LayerQK(
                query=_tokens(kept.query, row, index),
                key=_tokens(kept.key, row, index),
                scaling=kept.scaling,
                softcap=kept.softcap,
                sink_logits=None if kept.sink_logits is None else kept.sink_logits.to(self.device),
                visible=visible[mask],
                log_sum=None if log_sum is None else _tokens(log_sum, row, index).to(self.device),
                value_norm=None if kept.value_norm is None else _tokens(kept.value_norm, row, index).to(self.device),
            )
            layers.append(layer if heads is None else layer.only(heads[number]))
        return AttentionRows(layers, place, block, weights, backend)


def _tokens(kept: Tensor, row: int, index: slice | Tensor) -> Tensor:
    """[H, N, ..] of [B, H, T, ..], where it is."""
    return kept[row][:, index if isinstance(index, slice) else index.to(kept.device)]


def capture(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    layers: Layers = "middle",
    values: bool = False,
    chunk: int | None = None,
    offload: bool = False,
) -> Capture:
    """Run the model up to the deepest chosen layer and keep the queries and keys of the chosen ones.

    The pass runs without gradients and in evaluation mode, on the attention kernel that the model is configured with.

    Args:
        model: a causal language model of transformers (also wrapped by PEFT for LoRA, DDP or `torch.compile`). Prompt
            and prefix tuning put tokens of their own before the input and are refused.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 at pads; default: no pads.
        position_ids: [B, T]; where it restarts at 0 within a row, a new packed document begins. Layers that are no
            softmax attention carry their state on into it (with a warning): hybrids want a row for each document.
        layers: "middle" (the middle third of the softmax layers, `L // 3 .. 2 * L // 3`), "all", or layer numbers
            (negative ones count from the end).
        values: also keep `||W_O^h v_i||`, the norm of what each head adds per unit of attention to each token, for
            rows with `weights="value_norm"`. What stands between attention and its output projection (the gates of
            Qwen3-Next and Qwen3.5) is left out.
        chunk: tokens per pass; each goes on from the model's own cache, so that the memory of activations is that of
            a chunk. The results are those of one pass, to rounding. Default: one pass over all. Whether a model goes
            on from its cache is found out once, by passes over eight tokens.
        offload: let queries and keys wait in CPU memory (pinned, where the model is on CUDA), with `chunk` also the
            cache of the layers that don't run. Row blocks bring back what they need.

    Raises:
        ValueError: the model doesn't use the attention interface, is not causal, or puts tokens of its own before the
            input; a layer asked for by number has no softmax attention (the message lists what there is); `chunk` with
            packed documents, or with a model that can't go on from its cache; `values` with an attention module that
            has no output projection to be found.
        RuntimeError: the model is being read already, by another thread or an enclosing `recording`.
    """
    model = unwrap(model)
    input_ids = input_ids.to(device_of(model))
    softmax_layers = softmax_layers_of(model, input_ids)
    chosen = choose_layers(softmax_layers, layers)
    inputs = model_inputs(input_ids, attention_mask, position_ids)
    packed = position_ids is not None and is_packed(position_ids, attention_mask)
    check_chunk(chunk, inputs)
    if packed:
        warn_of_neighbours(model)
    documents = documents_of(inputs["position_ids"]) if packed else None
    recorder = Recorder(frozenset(chosen), chosen[-1], documents, values)
    T = input_ids.shape[1]
    store = Store(T, queries=True, offload=offload)
    for one in passes(model, recorder, inputs, chunk, offload):
        kept = store.join(one)
        if one.stop < T:
            del kept  # or the next chunk keeps the keys twice
    return Capture(name_of(model), chosen, [kept[layer] for layer in chosen], _place=store.device)


@contextmanager
def recording(
    model: nn.Module,
    *,
    layers: Layers = "middle",
    on_capture: Callable[[Capture], None] | None = None,
    values: bool = False,
) -> Iterator[list[Capture]]:
    """Keep queries and keys of the forward passes that run anyway inside the block: no pass of our own.

        with torch.no_grad(), recording(policy) as captures:
            logits = policy(input_ids, attention_mask=attention_mask).logits
        Tracer(policy, tokenizer).from_ids(input_ids, attention_mask, prompt_mask, captured=captures[0])

    Every pass runs to its end, in the mode that the model is in, with the mask and the kernel that it would have had:
    its outputs are the same to the bit. Dropout that acts in the pass acts in what is captured too. A model under
    `torch.compile` is compiled anew: correct, but slow; read it with `capture`, which runs it uncompiled.

    Args:
        model: what `capture` takes; the passes may call it or anything that wraps it (DDP, PEFT, accelerate, FSDP2).
            Unless it was captured before, a pass over four tokens comes first, to see which layers have attention;
            where the model is sharded, all processes have to enter together.
        layers: as in `capture`.
        on_capture: called in the middle of each pass, as soon as its deepest chosen layer has run, with what would
            have gone to the list; once it returns, nothing here holds that pass's queries and keys any more.
            An exception in it ends the pass.
        values: as in `capture`.

    Yields:
        One `Capture` per pass, in their order; empty with `on_capture`.

    Raises:
        ValueError: as in `capture`; or, inside the block, a pass whose queries are not all of its tokens (a step of
            generation, or with prefixes in the cache).
        RuntimeError: inside the block, a pass with gradients (checkpointing would run it again in backward); or the
            model is being read already.
    """
    inner = unwrap(model)
    softmax_layers = softmax_layers_of(inner, torch.zeros(1, 4).long())
    chosen = choose_layers(softmax_layers, layers)
    captures: list[Capture] = []
    recorder = Recorder(
        frozenset(chosen),
        chosen[-1],
        values=values,
        members=frozenset(map(id, inner.modules())),
        finish=lambda kept: (on_capture or captures.append)(
            Capture(name_of(inner), chosen, [kept[layer] for layer in chosen])
        ),
    )
    with read_by(recorder, inner):
        yield captures


def warn_of_neighbours(model: nn.Module) -> None:
    """Packed documents see each other in layers that keep a state, and no mask of ours can part them there."""
    if has_state(model := unwrap(model)):
        warnings.warn(
            f"{type(model).__name__} has layers that are no softmax attention: they carry their state from one packed "
            "document into the next, so that traces depend on their neighbours; give each document a row of its own",
            stacklevel=3,
        )


def name_of(model: Any) -> str:
    """The hub name, the last part of a path (nobody needs the folders of somebody's machine), or the class."""
    name = getattr(model.config, "_name_or_path", "")
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def check_layers(layers: Layers) -> None:
    """Raise a ValueError unless it is a name for layers or numbers of some."""
    if isinstance(layers, str):
        fine = layers in ("middle", "all")
    else:
        fine = isinstance(layers, Sequence) and len(layers) > 0 and all(isinstance(layer, int) for layer in layers)
    if not fine:
        raise ValueError(f'layers must be "middle", "all" or a list of layer numbers, got {layers!r}')


def choose_layers(softmax_layers: list[int], layers: Layers) -> list[int]:
    """Resolve `layers` against the layers that have softmax attention, ascending."""
    check_layers(layers)
    if layers == "middle":
        third = len(softmax_layers) // 3
        return softmax_layers[third : max(2 * len(softmax_layers) // 3, third + 1)]
    if layers == "all":
        return list(softmax_layers)
    depth = softmax_layers[-1] + 1
    numbers = sorted({layer + depth if layer < 0 else layer for layer in layers})
    if missing := [layer for layer in numbers if layer not in softmax_layers]:
        raise ValueError(
            f"layers {missing} have no softmax attention to read; layers of this model that have: {softmax_layers}"
        )
    return numbers
