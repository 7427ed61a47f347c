"""A model's attention interface, read while the model runs: one forward pass, and what it is to keep.

How: for the length of one pass the model's configuration names an attention implementation of ours. It is called in
every softmax layer after rotary embedding and normalisation, keeps q and k of the wanted layers, and hands over to the
kernel that the model is really configured with; where that is sdpa, the log-sum-exp of the rows comes from the same
call. In the deepest wanted layer it ends the pass, unless the pass is somebody else's. Afterwards the configuration is
as it was; no hook or module is ever added.

The mask function registered beside it keeps a description of the mask in place of a mask [N, N], and every tile of it
is evaluated when it is needed; so padding, sliding windows and packed documents hold in the rows as they hold in the
model.

Shapes: B rows of a batch, T their length with pads, n tokens of one pass (T, or one chunk), N keys that they see, H
query heads, K key heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowgraph.kernels import log_sums
from flowgraph.values import output_gram, value_norms

_NAME = "flowgraph"
_QUERY_CHUNK = 256
"""Queries at a time where a kernel needs an explicit mask, so that neither mask nor scores are [T, T]."""


@dataclass(frozen=True, eq=False)
class Mask:
    """What the model's mask looks like, and not the mask itself."""

    function: Callable[..., Tensor]
    padding: Tensor | None
    """[B, T] bool, False at pads."""
    use_vmap: bool
    offset: int
    """The place of the pass's first token in the whole sequence: what the cache holds already."""
    kernel_mask: Any
    """The mask that the configured kernel wants, where that isn't an [N, N] tensor (flash, flex) or `is_made`."""
    is_made: bool = False
    """Is `kernel_mask` what the model itself would have made, whatever its kernel?"""

    @property
    def is_causal(self) -> bool:
        return self.function is causal_mask_function  # type: ignore[comparison-overlap]

    def sees_ahead(self, device: torch.device) -> bool:
        """May the first token of the first row see the one after it?"""
        place = torch.arange(2, device=device)
        return not self.is_causal and bool(self.function(place[0], place[0], place[0], place[1]))

    def tile(self, batch_size: int, start: int, stop: int, device: torch.device, first: int = 0) -> Tensor:
        """[B, 1, stop - start, stop - first] bool for the queries start .. stop - 1 and the keys first .. stop - 1.

        All are places in the whole sequence; True where the query sees the key. Keys beyond `stop` are in the future.
        """
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=stop - start,
            kv_length=stop - first,
            q_offset=start,
            kv_offset=first,
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

    def sees_only(self, row: int, positions: Tensor) -> bool:
        """Is every token that some positions [N] of a row see (ascending) one of them? Pads are seen by nobody."""
        last = int(positions[-1])
        others = torch.ones(last + 1, dtype=torch.bool, device=positions.device)
        others[positions] = False
        if self.padding is not None:
            others &= self.padding[row, : last + 1]
        if self.is_causal or not others.any():
            return not others.any()
        place = others.nonzero().flatten()
        parts = positions.split(_QUERY_CHUNK)
        return not any(self.visible(row, part, place[place <= part[-1]]).any() for part in parts)


@dataclass(eq=False)
class KeptLayer:
    """What is kept of one layer.

    Attributes:
        query: [B, H, n, D]. key: [B, K, N, D] all that the layer sees, the keys of these n tokens last.
        mask: which keys a query sees.
        log_sum: [B, H, n] log-sum-exp of each row's scores from the model's own attention call, or None.
        value_norm: [B, H, n] `||W_O^h v_i||`, or None: not asked for.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    mask: Mask
    log_sum: Tensor | None = None
    value_norm: Tensor | None = None


# --- the forward pass ------------------------------------------------------------------------------------------------

_SOFTMAX_LAYERS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_RECORDER: ContextVar[Recorder | None] = ContextVar("flowgraph_recorder", default=None)


_NAMING = Lock()
"""Held while configurations are looked at and named, so that two threads can't both find a model free."""
_CURE = "use a lock, or a copy of the model (copy.deepcopy) for each thread"


class ModelInUseError(RuntimeError):
    """Somebody else is reading the model's attention, now."""


class _Done(Exception):
    """Raised in the deepest wanted layer to end the pass. Never leaves this module."""


@dataclass
class Recorder:
    """What one pass is to keep and has kept."""

    wanted: frozenset[int]
    last: int | None
    documents: Tensor | None = None
    """[B, T] the number of the packed document that each position belongs to."""
    values: bool = False
    """Are value norms wanted?"""
    implementations: dict[int, str | None] = field(default_factory=dict)
    """id of a configuration -> the attention implementation that it really names."""
    masks: int = 0
    """How many masks the model has asked for."""
    seen: set[int] = field(default_factory=set)
    kept: dict[int, KeptLayer] = field(default_factory=dict)
    members: frozenset[int] = frozenset()
    """ids of the modules that are recorded: another model may share the configuration."""
    finish: Callable[[dict[int, KeptLayer]], None] | None = None
    """Where the pass is somebody else's: what takes the layers once `last` has run. None: the pass ends there."""
    grams: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> Gram matrices of its output projection, the same for all chunks of a capture."""

    def take(self) -> dict[int, KeptLayer]:
        """What was kept, and nothing is kept any more."""
        kept, self.kept = self.kept, {}
        return kept

    def without_past(self) -> list[int]:
        """The layers that saw no keys but those of the pass's own tokens."""
        return [layer for layer, kept in self.kept.items() if kept.key.shape[2] <= kept.query.shape[2]]


def softmax_layers_of(model: nn.Module, input_ids: Tensor) -> list[int]:
    """The numbers of the layers that call the attention interface, found by one forward pass of a few tokens.

    What a model *does* is the only reliable list: names of layer types differ between architectures. The answer is
    kept as long as the model lives.
    """
    model = unwrap(model)
    if model not in _SOFTMAX_LAYERS:
        recorder = Recorder(wanted=frozenset(), last=None)
        failure = None
        try:
            forward(model, recorder, model_inputs(input_ids[:1, :4].to(device_of(model)), None, None))
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


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its tokens."""
    return next(model.parameters()).device


def unwrap(model: nn.Module) -> Any:
    """The model itself inside `torch.compile` (an exception must not cross compiled code) and DDP, in any order."""
    while True:
        inner = getattr(model, "_orig_mod", model)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
        if inner is model:
            return model
        model = inner


def window_of(model: nn.Module) -> int | None:
    """How many tokens the model can see, by its configuration; None: it doesn't say."""
    config = unwrap(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None)


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
def forward(model: Any, recorder: Recorder, inputs: dict[str, Tensor], cache: Cache | None = None) -> None:
    """One pass up to the deepest wanted layer, in evaluation mode; `cache` holds the tokens before, and gets these."""
    past = {} if cache is None else {"past_key_values": cache}
    # In this order: who may not read the model leaves its mode alone, which somebody else has set.
    with read_by(recorder, model), evaluation_mode(model), suppress(_Done):
        model(**inputs, **past, use_cache=cache is not None)


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
def read_by(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Let every configuration in the model name our attention implementation, and give each its own name back.

    The private attribute is set directly: `set_attn_implementation` asks whether a model class supports an
    implementation, and ours is supported wherever the interface is.
    """
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    with _NAMING:
        recorder.implementations = {key: config._attn_implementation_internal for key, config in configs.items()}
        if _NAME in recorder.implementations.values():
            raise ModelInUseError(
                "model: its attention, or that of a model which shares its config, is being read already, by an "
                f"enclosing recording or another thread: {_CURE}"
            )
        for config in configs.values():
            config._attn_implementation_internal = _NAME
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)
        with _NAMING:
            for key, config in configs.items():
                config._attn_implementation_internal = recorder.implementations[key]


def _active() -> Recorder:
    recorder = _RECORDER.get()
    if recorder is None:
        raise ModelInUseError(f"model: another thread is tracing it, or one that shares its config: {_CURE}")
    return recorder


def _mask(config: Any, **arguments: Any) -> Mask:
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
    return Mask(
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
    if not isinstance(attention_mask, Mask):
        raise ValueError(
            f"{type(module).__name__} of layer {layer} did not take its mask from the mask interface of transformers; "
            "its attention cannot be read"
        )
    if recorder.last is None and attention_mask.sees_ahead(query.device):
        raise ValueError(
            f"model: in layer {layer}, {type(module).__name__} lets tokens see later ones, as encoders do (BERT "
            "without is_decoder=True); a trace needs a causal language model"
        )
    recorded = recorder.finish is None or id(module) in recorder.members
    if recorder.finish is not None and recorded:
        _check_pass(layer, query, key)
    wanted = recorded and layer in recorder.wanted
    if wanted:
        scaling = arguments.get("scaling")
        recorder.kept[layer] = KeptLayer(
            query=query,
            key=key,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=arguments.get("softcap"),
            sink_logits=None if (sinks := arguments.get("s_aux")) is None else sinks.detach(),
            mask=attention_mask,
            value_norm=_value_norm(recorder, module, layer, query, value) if recorder.values else None,
        )
    last = recorded and layer == recorder.last
    if last and recorder.finish is None:
        raise _Done
    implementation = recorder.implementations[id(module.config)]
    out, log_sum = _run_kernel(implementation, module, query, key, value, attention_mask, arguments, wanted)
    if wanted:
        recorder.kept[layer].log_sum = log_sum
    if last and recorder.finish is not None:
        with _without_autocast(query):
            recorder.finish(recorder.take())
    return out, None


@contextmanager
def _without_autocast(tensor: Tensor) -> Iterator[None]:
    """Autocast is for the model, not for what is made of its queries, keys and values."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield


def _value_norm(recorder: Recorder, module: nn.Module, layer: int, query: Tensor, value: Tensor) -> Tensor:
    """[B, H, n] of the tokens of this pass."""
    with _without_autocast(value):
        if layer not in recorder.grams:
            recorder.grams[layer] = output_gram(module, layer, query.shape[1], value.shape[-1])
        return value_norms(value[:, :, -query.shape[2] :], recorder.grams[layer])


def _check_pass(layer: int, query: Tensor, key: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recording works without gradients only: put torch.no_grad() around the pass, or take capture"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"layer {layer} was called with {query.shape[2]} queries for {key.shape[2]} keys: recording reads passes "
            "over whole sequences, no steps of generation and no prefixes in the cache (as of prefix tuning)"
        )


def _run_kernel(
    implementation: str | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    arguments: dict[str, Any],
    log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """[B, n, H, D] what the configured kernel gives, and [B, H, n] the log-sum-exp, if asked for and to be had."""
    if implementation in (None, "eager"):
        # The eager function belongs to the model's own file: there are sinks and soft caps in it.
        kernel: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation not in (None, "eager", "sdpa"):
        module.config._attn_implementation_internal = implementation  # flash kernels look at it
        try:
            return kernel(module, query, key, value, mask.kernel_mask, **arguments)[0], None
        finally:
            module.config._attn_implementation_internal = _NAME

    def run(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, listen: bool = log_sum, **changes: Any
    ) -> tuple[Tensor, Tensor | None]:
        listening: AbstractContextManager[list[Tensor | None]] = nullcontext([])
        if listen and implementation == "sdpa":
            listening = log_sums()
        with listening as heard:
            out = kernel(module, query, key, value, mask, **(arguments | changes))[0]
        # A single query may go as a group of heads.
        found = heard[0].reshape(query.shape[:3]) if len(heard) == 1 and heard[0] is not None else None
        return out, found

    if mask.is_made:
        return run(query, key, value, mask.kernel_mask)
    (B, _, n, _), N = query.shape, key.shape[2]
    if implementation == "sdpa" and mask.is_causal and mask.padding is None:
        if n == N:
            return run(query, key, value, None)
        # Every query sees all of the past: two calls without a mask, weighted by their sums.
        past, past_sum = run(query, key[:, :, :-n], value[:, :, :-n], None, listen=True, is_causal=False)
        own, own_sum = run(query, key[:, :, -n:], value[:, :, -n:], None, listen=True)
        if past_sum is not None and own_sum is not None:
            total = torch.logaddexp(past_sum, own_sum)
            out = past * (past_sum - total).exp().mT[..., None] + own * (own_sum - total).exp().mT[..., None]
            return out.to(past.dtype), total
    first = mask.offset + n - N  # a cache with a window has let go of the keys before
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for start in range(0, n, _QUERY_CHUNK):
        stop = min(start + _QUERY_CHUNK, n)
        tile = mask.tile(B, mask.offset + start, mask.offset + stop, query.device, first)
        if implementation != "sdpa":
            lowest = torch.finfo(query.dtype).min
            tile = torch.zeros_like(tile, dtype=query.dtype).masked_fill_(~tile, lowest)
        seen = N - n + stop
        out, found = run(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], tile)
        outs.append(out)
        if found is not None:
            sums.append(found)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2) if len(sums) == len(outs) else None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
