"""Queries and keys of chosen layers out of any transformers model that uses the attention interface.

How: for the length of one forward pass the model's configuration names an attention implementation of ours. It is
called in every softmax layer after rotary embedding and normalisation, keeps q and k of the chosen layers, and hands
over to the kernel that the model is really configured with. In the deepest chosen layer it ends the pass: neither the
layers above nor the LM head run. Afterwards the configuration is as it was; no hook or module is ever added.
`recording` does the same in forward passes that somebody else runs, and runs them to their end.

The mask function registered beside it keeps a description of the mask in place of a mask [N, N], and every tile of it
is evaluated when it is needed; so padding, sliding windows and packed documents hold in the rows as they hold in the
model.

Shapes: B rows of a batch, T their length with pads, N tokens of one trace, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowgraph.rows import AttentionRows, LayerQK

Layers = Literal["middle", "all"] | Sequence[int]

_NAME = "flowgraph"
_QUERY_CHUNK = 256
"""Queries at a time where a kernel needs an explicit mask, so that neither mask nor scores are [T, T]."""


@dataclass(frozen=True)
class _Mask:
    """What the model's mask looks like, and not the mask itself."""

    function: Callable[..., Tensor]
    padding: Tensor | None
    """[B, T] bool, False at pads."""
    use_vmap: bool
    offset: int
    kernel_mask: Any
    """The mask that the configured kernel wants, where that isn't an [N, N] tensor (flash, flex) or `is_made`."""
    is_made: bool = False
    """Is `kernel_mask` what the model itself would have made, whatever its kernel?"""

    @property
    def is_causal(self) -> bool:
        return self.function is causal_mask_function  # type: ignore[comparison-overlap]

    def tile(self, batch_size: int, start: int, stop: int, device: torch.device) -> Tensor:
        """[B, 1, stop - start, stop] bool, True where the query sees the key. Keys beyond `stop` are in the future."""
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=stop - start,
            kv_length=stop,
            q_offset=start + self.offset,
            mask_function=self.function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=device,
        )
        assert mask is not None
        return mask

    def visible(self, row: int, query: Tensor, key: Tensor) -> Tensor:
        """[r, n] bool for positions query [r] and key [n] of one row of the batch."""
        if self.use_vmap:
            tile = self.tile(row + 1, int(query[0]), int(query[-1]) + 1, query.device)[row, 0]
            return tile[query - query[0]][:, key]
        batch, head = query.new_full((1, 1), row), query.new_zeros(1, 1)
        return self.function(batch, head, query[:, None], key[None, :]).expand(len(query), len(key))


@dataclass
class _Layer:
    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    mask: _Mask


@dataclass(frozen=True)
class Capture:
    """Queries and keys of the chosen layers for a whole batch.

    Attributes:
        model: name of the model. layers: the numbers of the chosen layers, ascending.
    """

    model: str
    layers: list[int]
    _kept: list[_Layer] = field(repr=False)
    _batch: tuple[int, ...] | None = field(default=None, repr=False)
    """The rows of the batch that this is of; None: all."""

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
        """Where the queries and keys are, and with them all that is made from them."""
        return self._kept[0].query.device

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of the batch that the model saw."""
        query = self._kept[0].query
        return query.shape[0] if self._batch is None else len(self._batch), query.shape[2]

    def select(self, rows: Sequence[int]) -> Capture:
        """Some rows of the batch, as a batch of their own. Nothing is copied."""
        batch = range(self.shape[0]) if self._batch is None else self._batch
        return Capture(self.model, self.layers, self._kept, tuple(batch[row] for row in rows))

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
    ) -> AttentionRows:
        """The attention among some tokens of one row of the batch, as a stream of row blocks.

        Args:
            row: number of the row in the batch.
            positions: [N] int64, ascending: the positions of the trace's tokens in that row (no pads, one document).
            block: rows per block; default: as many as `flowgraph.rows.BLOCK_BYTES` holds.
            heads: layer number -> its query heads that take part; default: all heads of all chosen layers. The mean is
                over the heads, so a layer with more of them counts more.
        """
        if heads is not None and (not heads or not set(heads) <= set(self.layers)):
            raise ValueError(f"heads must be of some of the layers {self.layers}, got layers {sorted(heads)}")
        row = row if self._batch is None else self._batch[row]
        positions = positions.to(self.device)
        start, N = int(positions[0]), len(positions)
        # A slice is a view; only a trace with holes has to be copied.
        index: Any = slice(start, start + N) if int(positions[-1]) == start + N - 1 else positions
        tiles = {}
        layers = []
        for number, kept in zip(self.layers, self._kept, strict=True):
            if heads is not None and number not in heads:
                continue
            if not kept.mask.is_causal and id(kept.mask) not in tiles:
                tiles[id(kept.mask)] = _bind(kept.mask, row)
            layer = LayerQK(
                query=kept.query[row][:, index],
                key=kept.key[row][:, index],
                scaling=kept.scaling,
                softcap=kept.softcap,
                sink_logits=kept.sink_logits,
                visible=tiles.get(id(kept.mask)),
            )
            layers.append(layer if heads is None else layer.only(heads[number]))
        return AttentionRows(layers, positions, block)


def _bind(mask: _Mask, row: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: mask.visible(row, query, key)


def capture(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    layers: Layers = "middle",
) -> Capture:
    """Run the model up to the deepest chosen layer and keep the queries and keys of the chosen ones.

    The pass runs without gradients and in evaluation mode, on the attention kernel that the model is configured with.

    Args:
        model: a causal language model of transformers (also wrapped by PEFT, DDP or `torch.compile`).
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 at pads; default: no pads.
        position_ids: [B, T]; where it restarts at 0 within a row, a new packed document begins.
        layers: "middle" (the middle third of the softmax layers, `L // 3 .. 2 * L // 3`), "all", or layer numbers
            (negative ones count from the end).

    Raises:
        ValueError: the model doesn't use the attention interface, or a layer asked for by number has no softmax
            attention; the message lists what there is.
    """
    model = unwrap(model)
    input_ids = input_ids.to(_device_of(model))
    softmax_layers = softmax_layers_of(model, input_ids)
    chosen = choose_layers(softmax_layers, layers)
    inputs = model_inputs(input_ids, attention_mask, position_ids)
    packed = position_ids is not None and is_packed(position_ids, attention_mask)
    recorder = _Recorder(frozenset(chosen), chosen[-1], documents_of(inputs["position_ids"]) if packed else None)
    _forward(model, recorder, inputs)
    kept = [recorder.kept[layer] for layer in chosen]
    return Capture(_name_of(model), chosen, kept)


@contextmanager
def recording(
    model: nn.Module, *, layers: Layers = "middle", on_capture: Callable[[Capture], None] | None = None
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
        on_capture: called in the middle of each pass, as soon as its deepest chosen layer is reached, with what
            would have gone to the list; once it returns, nothing here holds that pass's queries and keys any more.
            An exception in it ends the pass.

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
    recorder = _Recorder(
        frozenset(chosen),
        chosen[-1],
        documents=None,
        members=frozenset(map(id, inner.modules())),
        finish=lambda kept: (on_capture or captures.append)(
            Capture(_name_of(inner), chosen, [kept[layer] for layer in chosen])
        ),
    )
    token = _RECORDER.set(recorder)
    try:
        with _our_implementation(inner, recorder):
            yield captures
    finally:
        _RECORDER.reset(token)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _name_of(model: Any) -> str:
    """The hub name, the last part of a path (nobody needs the folders of somebody's machine), or the class."""
    name = getattr(model.config, "_name_or_path", "")
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def softmax_layers_of(model: nn.Module, input_ids: Tensor) -> list[int]:
    """The numbers of the layers that call the attention interface, found by one forward pass of a few tokens.

    What a model *does* is the only reliable list: names of layer types differ between architectures. The answer is
    kept as long as the model lives.
    """
    model = unwrap(model)
    if model not in _SOFTMAX_LAYERS:
        recorder = _Recorder(wanted=frozenset(), last=None, documents=None)
        failure = None
        try:
            _forward(model, recorder, model_inputs(input_ids[:1, :4].to(_device_of(model)), None, None))
        except Exception as error:
            # A model that took our mask without calling our attention has tripped over the mask.
            if recorder.seen or not recorder.masks:
                raise
            failure = error
        if not recorder.seen:
            raise ValueError(
                f"model: {type(model).__name__} does not use the attention interface of transformers (as bloom, "
                "falcon, gptj, gpt_neo and codegen don't), so its queries and keys cannot be read. Use a model that "
                "does, or build the graph from attention of your own with TokenGraph.from_dense"
            ) from failure
        _SOFTMAX_LAYERS[model] = sorted(recorder.seen)
    return _SOFTMAX_LAYERS[model]


def choose_layers(softmax_layers: list[int], layers: Layers) -> list[int]:
    """Resolve `layers` against the layers that have softmax attention, ascending."""
    if layers == "middle":
        third = len(softmax_layers) // 3
        return softmax_layers[third : max(2 * len(softmax_layers) // 3, third + 1)]
    if layers == "all":
        return list(softmax_layers)
    if isinstance(layers, str) or not layers or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f'layers must be "middle", "all" or a list of layer numbers, got {layers!r}')
    depth = softmax_layers[-1] + 1
    numbers = sorted({layer + depth if layer < 0 else layer for layer in layers})
    if missing := [layer for layer in numbers if layer not in softmax_layers]:
        raise ValueError(
            f"layers {missing} have no softmax attention to read; layers of this model that have: {softmax_layers}"
        )
    return numbers


# --- the forward pass ------------------------------------------------------------------------------------------------

_SOFTMAX_LAYERS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_RECORDER: ContextVar[_Recorder | None] = ContextVar("flowgraph_recorder", default=None)


class _Done(Exception):
    """Raised in the deepest chosen layer to end the pass. Never leaves this module."""


@dataclass
class _Recorder:
    """What one pass is to keep and has kept."""

    wanted: frozenset[int]
    last: int | None
    documents: Tensor | None
    """[B, T] the number of the packed document that each position belongs to."""
    implementations: dict[int, str | None] = field(default_factory=dict)
    """id of a configuration -> the attention implementation that it really names."""
    masks: int = 0
    """How many masks the model has asked for."""
    seen: set[int] = field(default_factory=set)
    kept: dict[int, _Layer] = field(default_factory=dict)
    members: frozenset[int] = frozenset()
    """ids of the modules that are recorded: another model may share the configuration."""
    finish: Callable[[dict[int, _Layer]], None] | None = None
    """Where the pass is somebody else's: what takes the layers once `last` is reached. None: the pass ends there."""


def unwrap(model: nn.Module) -> Any:
    """The model itself inside `torch.compile` (an exception must not cross compiled code) and DDP."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def model_inputs(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor]:
    """What to call the model with, so that pads and packed documents are understood and nothing else is passed."""
    inputs = {"input_ids": input_ids}
    padded = attention_mask is not None and not bool(attention_mask.all())
    if attention_mask is not None and position_ids is None and _padded_right(attention_mask):
        return inputs  # no real token sees a pad, with or without a mask; and kernels are faster without
    if position_ids is not None:
        position_ids = position_ids.to(input_ids.device)
        if not is_packed(position_ids, attention_mask):
            inputs["position_ids"] = position_ids
        else:
            # transformers looks for packed documents only if there is no attention mask: each pad becomes its own.
            if padded:
                assert attention_mask is not None
                position_ids = position_ids.masked_fill(~attention_mask.to(position_ids.device).bool(), 0)
            return inputs | {"position_ids": position_ids}
    if padded:
        assert attention_mask is not None
        attention_mask = attention_mask.to(input_ids.device).long()
        inputs["attention_mask"] = attention_mask
        inputs.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0))
    return inputs


def _padded_right(attention_mask: Tensor) -> bool:
    """Are all pads behind the tokens of their row?"""
    real = attention_mask.bool()
    return not bool((real[:, 1:] & ~real[:, :-1]).any())


def is_packed(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Do the positions of real tokens restart within a row?"""
    restart = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        real = attention_mask.to(position_ids.device).bool()
        restart = restart & real[:, 1:] & real[:, :-1]
    return bool(restart.any())


def documents_of(position_ids: Tensor) -> Tensor:
    """[B, T] position ids -> [B, T] number of the packed document; a new one begins where they don't go up by one."""
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(-1)


@torch.no_grad()
def _forward(model: Any, recorder: _Recorder, inputs: dict[str, Tensor]) -> None:
    token = _RECORDER.set(recorder)
    try:
        with evaluation_mode(model), _our_implementation(model, recorder):
            model(**inputs, use_cache=False)
    except _Done:
        pass
    finally:
        _RECORDER.reset(token)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient checkpointing; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _our_implementation(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let every configuration in the model name our attention implementation, and give each its own name back.

    The private attribute is set directly: `set_attn_implementation` asks whether a model class supports an
    implementation, and ours is supported wherever the interface is.
    """
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    recorder.implementations = {key: config._attn_implementation_internal for key, config in configs.items()}
    if _NAME in recorder.implementations.values():
        raise RuntimeError("model: its attention is being read already, by an enclosing recording or another thread")
    try:
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = recorder.implementations[key]


def _active() -> _Recorder:
    recorder = _RECORDER.get()
    if recorder is None:
        raise RuntimeError('the attention implementation "flowgraph" works only inside capture or recording')
    return recorder


def _mask(config: Any, **arguments: Any) -> _Mask:
    """Registered mask function: keeps the description; makes a mask only for kernels that want their own kind."""
    recorder = _active()
    recorder.masks += 1
    if recorder.documents is not None:
        # Some models (gpt-oss) don't tell their mask about packed documents and would let them see each other.
        same_document = packed_sequence_mask_function(recorder.documents)
        arguments["mask_function"] = and_masks(arguments["mask_function"], same_document)
        arguments["allow_is_causal_skip"] = False
    implementation = recorder.implementations[id(config)]
    kernel_mask = None
    is_made = recorder.finish is not None
    if is_made or implementation not in (None, "eager", "sdpa"):
        # flash attention wants the mask of pads, flex attention a BlockMask: neither is [N, N].
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation or "eager")
        kernel_mask = make(config=config, **arguments) if make else None
    return _Mask(
        function=arguments["mask_function"],
        padding=arguments.get("attention_mask"),
        use_vmap=bool(arguments.get("use_vmap")),
        offset=int(arguments.get("q_offset", 0)),
        kernel_mask=kernel_mask,
        is_made=is_made,
    )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """Registered attention function: keeps q and k, then runs the kernel that the model is configured with."""
    recorder = _active()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    recorder.seen.add(layer)
    if not isinstance(attention_mask, _Mask):
        raise ValueError(
            f"{type(module).__name__} of layer {layer} did not take its mask from the mask interface of transformers; "
            "its attention cannot be read"
        )
    recorded = recorder.finish is None or id(module) in recorder.members
    if recorder.finish is not None and recorded:
        _check_pass(layer, query, key)
    if recorded and layer in recorder.wanted:
        scaling = arguments.get("scaling")
        recorder.kept[layer] = _Layer(
            query=query,
            key=key,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=arguments.get("softcap"),
            sink_logits=None if (sinks := arguments.get("s_aux")) is None else sinks.detach(),
            mask=attention_mask,
        )
    if recorded and layer == recorder.last:
        if recorder.finish is None:
            raise _Done
        kept, recorder.kept = recorder.kept, {}
        with torch.autocast(query.device.type, enabled=False):  # it is for the model, not for what is made of q and k
            recorder.finish(kept)
        del kept
    implementation = recorder.implementations[id(module.config)]
    return _run_kernel(implementation, module, query, key, value, attention_mask, arguments), None


def _check_pass(layer: int, query: Tensor, key: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recording works without gradients only: put torch.no_grad() around the pass, or take capture"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"layer {layer} was called with {query.shape[2]} queries for {key.shape[2]} keys: recording reads passes "
            "over whole sequences, no steps of generation"
        )


def _run_kernel(
    implementation: str | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: _Mask,
    arguments: dict[str, Any],
) -> Tensor:
    """[B, T, H, D] what the configured kernel gives."""
    if implementation in (None, "eager"):
        # The eager function belongs to the model's own file: there are sinks and soft caps in it.
        kernel: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
    if mask.is_made and implementation in (None, "eager", "sdpa"):
        return kernel(module, query, key, value, mask.kernel_mask, **arguments)[0]
    if implementation not in (None, "eager", "sdpa"):
        module.config._attn_implementation_internal = implementation  # flash kernels look at it
        try:
            return kernel(module, query, key, value, mask.kernel_mask, **arguments)[0]
        finally:
            module.config._attn_implementation_internal = _NAME
    if implementation == "sdpa" and mask.is_causal and mask.padding is None:
        return kernel(module, query, key, value, None, **arguments)[0]
    B, T = query.shape[0], query.shape[2]
    parts = []
    for start in range(0, T, _QUERY_CHUNK):
        stop = min(start + _QUERY_CHUNK, T)
        tile = mask.tile(B, start, stop, query.device)
        if implementation != "sdpa":
            lowest = torch.finfo(query.dtype).min
            tile = torch.zeros_like(tile, dtype=query.dtype).masked_fill_(~tile, lowest)
        out = kernel(module, query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], tile, **arguments)[0]
        parts.append(out)
    return torch.cat(parts, dim=1)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
