"""Rival signals that attribute an answer to the tokens before it, as the literature does: one score per token.

    rollout         attention, multiplied through all layers            Abnar & Zuidema 2020, arXiv 2005.00928
    routes          what attention writes, multiplied likewise          Ferrando & Voita 2024, arXiv 2403.00824
    gradient_input  gradient of log p(answer) times embedding           Simonyan 2013, arXiv 1312.6034; Shrikumar 2016,
                                                                        arXiv 1605.01713
    recency         how late a token stands: no signal, and hard to beat where late tokens restate the answer

The first two are products of one matrix per layer, rows summing to 1, read at the sinks: `v M_L .. M_2 M_1`. Only the
vector `v` [N] is carried, from the top layer down, and matrices come as blocks of rows, so nothing is [N, N].

Every score is float64 [N] on the CPU, at least 0. It is 0 everywhere if there are no sinks, or no answer.

Most of the time goes into the matrices, and several sets of sinks share them: sinks [S, N] give scores [S, N].

Shapes: N tokens of one trace (no pads), S sets of sinks, L layers, H query heads, K key heads, D head size of the
values, C width of the residual stream, r rows and n columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from flowgraph.capture import Capture
from flowgraph.interface import (
    KeptLayer,
    Recorder,
    device_of,
    evaluation_mode,
    forward,
    model_inputs,
    softmax_layers_of,
    unwrap,
)
from flowgraph.rows import TILE_BYTES, AttentionRows, LayerQK, RowBlock, Rows
from flowgraph.values import OUTPUT_PROJECTIONS, output_weight

_BLOCK = 64
"""Rows of a block of routes."""


def recency(num_tokens: int) -> Tensor:
    """[N] (position + 1) / N: the later, the higher."""
    return torch.arange(1, num_tokens + 1, dtype=torch.float64) / max(num_tokens, 1)


# --- rollout ----------------------------------------------------------------------------------------------------------


def rollout(rows: Iterable[Rows], sinks: Tensor) -> Tensor:
    """Attention rollout [N]: the share of each token in what the sinks hold, if layers mix what attention says.

        M_l = 0.5 A_l + 0.5 I, rows normalised;    rollout = mean over the sinks of the rows of M_L .. M_2 M_1

    The 0.5 stands for the residual stream (Abnar & Zuidema 2020, arXiv 2005.00928). The diagonal counts, so what a sink
    has of itself is among the scores; they sum to 1.

    Args:
        rows: the head mean `A_l` of each layer, all layers of the model, the TOP layer first. Read one after the other.
        sinks: [N] or [S, N] bool.

    Raises:
        ValueError: the rows are of another number of tokens, or lack those of a token that is reached.
    """
    share = _at(sinks)
    if not sinks.any():
        return share
    for number, layer in enumerate(rows):
        if layer.num_tokens != sinks.shape[-1]:
            raise ValueError(f"rows: number {number} is over {layer.num_tokens} tokens, sinks over {sinks.shape[-1]}")
        share = _carried(share, map(_with_identity, layer.blocks(last_first=True)))
    return share


def layer_rows(captured: Capture, row: int, positions: Tensor) -> Iterator[Rows]:
    """The rows of each layer of a capture by itself, the top layer first, as `rollout` takes them.

    Args:
        row, positions: as for `Capture.rows`.
    """
    for layer in reversed(captured.layers):
        yield captured.rows(row, positions, heads={layer: range(captured.num_heads[layer])})


def _with_identity(block: RowBlock) -> RowBlock:
    weight = block.weight.to(torch.float64, copy=True)
    weight[:, block.start :].diagonal().add_(1)
    return RowBlock(block.start, weight)


def _at(sinks: Tensor) -> Tensor:
    """[N] or [S, N] float64 the mean over the sinks, as weights of tokens."""
    if sinks.ndim not in (1, 2) or sinks.dtype != torch.bool:
        raise ValueError(f"sinks must be bool [N] or [S, N], got {list(sinks.shape)} {sinks.dtype}")
    return sinks.cpu().double() / sinks.cpu().sum(-1, keepdim=True).clamp(min=1)


def _carried(share: Tensor, blocks: Iterator[RowBlock]) -> Tensor:
    """`share` [N] or [S, N] times a matrix whose rows are normalised here; its blocks come last first.

    Rows before the first token that has a share are never computed.
    """
    out = torch.zeros_like(share)
    first = int(share.nonzero()[:, -1].min())
    for start, weight in blocks:
        r, stop = weight.shape
        here = share[..., start : start + r].to(weight.device)
        weight = weight.double()
        out[..., :stop] += ((here / weight.sum(1)) @ weight).cpu()
        if start <= first:
            return out
    raise ValueError(f"rows must have those of token {first}, which is reached from the sinks; they begin later")


# --- information-flow routes ------------------------------------------------------------------------------------------


@torch.no_grad()
def routes(model: nn.Module, token_ids: Tensor, sinks: Tensor, *, per_head: bool = False) -> Tensor:
    """Information-flow routes [N]: the share of each token in what the sinks hold, by what attention really writes.

        y_t = x_t + sum_s c_ts,    c_ts = sum_h a^h_ts W_O^h v^h_s
        importance of a part z of y_t:  max(0, |y_t|_1 - |y_t - z|_1), divided by the sum over the parts of y_t
        routes = mean over the sinks of the rows of M_L .. M_2 M_1,   M_l[t, s] = importance of c_ts (+ x_t if s = t)

    x is the residual stream before the attention of a layer and y after it (Ferrando & Voita 2024, arXiv 2403.00824). A
    feed-forward block splits into the residual and its own output, both at the same token, so it moves nothing between
    tokens. A bias of W_O is in y and is no part. A token none of whose parts is near y keeps what it has.

    What differs from the paper: this is the sum over all paths, where the paper prunes edges by a threshold and shows
    what is left; and c_ts is one part, where the paper's program takes what each head adds as a part, and adds up the
    importances over heads: `per_head` does that too, in H times the time for what is not the forward pass.

    One forward pass, of which x, y, queries, keys and values of all layers are kept, then about N^2 H C operations per
    layer, in tiles.

    Args:
        model: a causal language model of transformers; it is left as it was.
        token_ids: [N] int64. sinks: [N] or [S, N] bool. per_head: is a_ts W_O v_s of each head a part of its own?

    Raises:
        ValueError: the model can't be split like this: a layer without softmax attention, something between attention
            and the residual stream (the norm of Gemma 2, a gate), or no residual stream between attention and
            feed-forward block (Phi, Cohere).
    """
    share = _at(sinks)
    if token_ids.shape != sinks.shape[-1:] or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be whole numbers [{sinks.shape[-1]}], got {list(token_ids.shape)}")
    if not sinks.any():
        return share
    stop = int(sinks.nonzero()[:, -1].max()) + 1  # no sink sees what comes later
    reached = share[..., :stop]
    for layer in _attention_of(model, token_ids[:stop]):
        reached = _carried(reached, (layer.block(start, per_head) for start in reversed(range(0, stop, _BLOCK))))
    share[..., :stop] = reached
    return share


@dataclass(frozen=True)
class _Written:
    """What the attention of one layer adds to the residual stream of n tokens, and what it is made of.

    Attributes:
        before: x, [N, C]. added: sum_s c_ts + bias as the model computed it, [N, C]. value: [K, N, D].
        projection: `W_O^h`, [H, D, C]. bias: [C]. All float32 (float64 if the model is).
        heads: the attention of each of the H heads, in blocks of the same rows.
        tolerance: how far, relatively, the sum of the parts may be off. name: for messages.
    """

    before: Tensor
    added: Tensor
    value: Tensor
    projection: Tensor
    bias: Tensor
    heads: list[AttentionRows]
    tolerance: float
    name: str

    def block(self, start: int, per_head: bool) -> RowBlock:
        """Rows of M, not yet divided by their sums."""
        attention = self._attention(start)
        n = len(attention)
        self._check(attention, self.added[start:n])
        heads = 1 if per_head else len(self.heads)  # that make one part
        before = self.before[start:n]
        after = before + self.added[start:n]
        weight = torch.zeros_like(after[:, :1]).repeat(1, n)
        near = _Near(after)
        step = max(1, TILE_BYTES["cpu" if after.device.type == "cpu" else "other"] // (4 * after.numel()))
        for c in range(0, n, step):
            paid, per_unit = attention[c : c + step], self._per_unit(c, min(c + step, n))
            for some, writes in zip(paid.split(heads, dim=2), per_unit.split(heads, dim=1), strict=True):
                weight[:, c : c + step] += near.of(some, writes).T
        own = weight.diagonal(start)
        own += proximity(before, after)
        own.masked_fill_(weight.sum(1) == 0, 1)
        return RowBlock(start, weight)

    def _attention(self, start: int) -> Tensor:
        """[n, r, H] what the tokens of the block pay to all n tokens before its end, in each head."""
        return torch.stack([head.block(start).weight.T for head in self.heads], dim=-1)

    def _per_unit(self, start: int, stop: int) -> Tensor:
        """[n, H, C] what each head writes per unit of attention to the tokens start .. stop - 1."""
        H, D, C = self.projection.shape
        K = len(self.value)
        return (self.value[:, None, start:stop] @ self.projection.view(K, H // K, D, C)).flatten(0, 1).transpose(0, 1)

    def _check(self, attention: Tensor, added: Tensor) -> None:
        """The parts must add up to what the model has added, or they are not its parts."""
        (n, r, H), K = attention.shape, len(self.value)
        mixed = (attention.permute(2, 1, 0).reshape(K, -1, n) @ self.value[:, :n]).view(H, r, -1)
        error = float((torch.einsum("hrd,hdc->rc", mixed, self.projection) + self.bias - added).abs().max())
        if not error <= self.tolerance * float(added.abs().max()):
            raise ValueError(
                f"model: {self.name} adds something else to the residual stream than attention times values (off by "
                f"{error:.3g}; a gate before the output projection does that), so there are no routes to be had; "
                "use rollout"
            )


def proximity(part: Tensor, whole: Tensor) -> Tensor:
    """[...] max(0, |whole|_1 - |whole - part|_1) over the last dimension, of which `part` may have more before it.

    Written so that nothing cancels: elementwise |w| - |w - z| = min(s, 2 |w| - s), with s the z that points along w.
    Parts are small where a stream has a few huge numbers, and the difference of the two norms would be rounding.
    """
    along = part * torch.copysign(torch.ones_like(whole), whole)
    return torch.minimum(along, 2 * whole.abs() - along).sum(-1).clamp_(min=0)


class _Near:
    """`proximity` to the same tokens of many parts, each of which is a product: a sum of what heads write.

    As min(s, 2 |w| - s) is s - 2 max(0, s - |w|), a part is gone through in place, in memory that is used again: on a
    CPU fresh pages cost more than what is computed in them.

    Args:
        whole: w, [r, C].
    """

    def __init__(self, whole: Tensor) -> None:
        self.sign, self.size = torch.copysign(torch.ones_like(whole), whole), whole.abs()
        self._area = whole.new_empty(0)

    def of(self, paid: Tensor, writes: Tensor) -> Tensor:
        """[n, r] the proximity of the parts paid @ writes; paid: [n, r, h], writes: [n, h, C]."""
        shape = (len(paid), *self.sign.shape)
        if len(self._area) < math.prod(shape):
            self._area = self._area.new_empty(math.prod(shape))
        part = torch.bmm(paid, writes, out=self._area[: math.prod(shape)].view(shape))
        along = part.mul_(self.sign).sum(-1)
        beyond = part.sub_(self.size).clamp_(min=0).sum(-1)
        return along.sub_(beyond, alpha=2).clamp_(min=0)


def _attention_of(model: nn.Module, token_ids: Tensor) -> Iterator[_Written]:
    """Every layer of the model, the top one first, after one pass over the tokens [N]."""
    whole: Any = unwrap(model)
    layers = softmax_layers_of(whole, token_ids[None])
    if hasattr(whole, "get_base_model"):  # PEFT; its layers are inside what this returns
        whole = whole.get_base_model()
    depth = whole.config.get_text_config().num_hidden_layers
    if layers != list(range(depth)):
        raise ValueError(
            f"model: only the layers {layers} of {depth} of {type(whole).__name__} have softmax attention; routes go "
            "through all of them. Use rollout, which leaves the others out"
        )
    backbone = getattr(whole, "base_model", whole)
    blocks = _blocks_of(backbone, layers)
    # Plain layers in the cache, even for windows: they keep the values of all tokens.
    recorder, cache = Recorder(frozenset(layers), last=None), DynamicCache()
    with _streams(blocks) as streams:
        forward(backbone, recorder, model_inputs(token_ids[None].to(device_of(backbone)), None, None), cache)
    kept = recorder.take()
    for layer in reversed(layers):
        block, stream, found = blocks[layer], streams.pop(layer), kept.pop(layer)
        if not stream.joined or stream.before is None or stream.added is None:
            raise ValueError(
                f"model: in {block.name} nothing reads the sum of residual stream and attention output, so the "
                "attention is not simply added (a norm or a scale after it, or a feed-forward block beside it), and "
                "there are no routes to be had; use rollout"
            )
        values: Any = cache.layers[layer]
        yield _written(block, stream, found, values.values[0])


def _written(block: _Block, stream: _Stream, kept: KeptLayer, value: Tensor) -> _Written:
    """Args: value [K, N, D]."""
    assert stream.before is not None and stream.added is not None
    dtype = torch.float64 if kept.query.dtype == torch.float64 else torch.float32
    (H, N, _), D = kept.query.shape[1:], value.shape[-1]
    visible = None if kept.mask.is_causal else partial(kept.mask.visible, 0)
    log_sum = None if kept.log_sum is None else kept.log_sum[0]
    qk = LayerQK(kept.query[0], kept.key[0], kept.scaling, kept.softcap, kept.sink_logits, visible, log_sum)
    places = torch.arange(N, device=kept.query.device)
    nothing = torch.zeros(1, H * D, dtype=kept.query.dtype, device=value.device)
    return _Written(
        before=stream.before[0].to(dtype),
        added=stream.added[0].to(dtype),
        value=value.to(dtype),
        projection=output_weight(block.projection, H * D, block.name).to(dtype).view(H, D, -1),
        bias=block.projection.forward(nothing)[0].to(dtype),
        heads=[AttentionRows([qk.only([head])], places, _BLOCK) for head in range(H)],
        tolerance=max(1e-3, 16 * torch.finfo(kept.query.dtype).eps),
        name=block.name,
    )


class _Block(NamedTuple):
    """A decoder layer, its attention module, and the projection at the end of that."""

    name: str
    whole: nn.Module
    attention: nn.Module
    projection: Any


def _blocks_of(model: nn.Module, layers: list[int]) -> dict[int, _Block]:
    found: dict[int, list[_Block]] = {layer: [] for layer in layers}
    for whole in model.modules():
        for attention in whole.children():
            layer = getattr(attention, "layer_idx", None)
            ends = [end for name in OUTPUT_PROJECTIONS if isinstance(end := getattr(attention, name, None), nn.Module)]
            if isinstance(layer, int) and layer in found and len(ends) == 1:
                found[layer].append(_Block(f"layer {layer} ({type(whole).__name__})", whole, attention, ends[0]))
    for layer, blocks in found.items():
        if len(blocks) != 1:
            raise ValueError(
                f"model: layer {layer} must have one attention module with an output projection ("
                f"{', '.join(OUTPUT_PROJECTIONS)}); found {len(blocks)} in {type(model).__name__}. Use rollout"
            )
    return {layer: block for layer, (block,) in found.items()}


@dataclass
class _Stream:
    """Of one pass: the stream before attention and what attention adds, [1, N, C], and whether anyone reads the sum."""

    before: Tensor | None = None
    added: Tensor | None = None
    joined: bool = False


@contextmanager
def _streams(blocks: dict[int, _Block]) -> Iterator[dict[int, _Stream]]:
    """Listen to a pass by hooks, which are gone afterwards."""
    streams = {layer: _Stream() for layer in blocks}

    def entered(stream: _Stream, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.before = args[0] if args else kwargs["hidden_states"]

    def added(stream: _Stream, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        stream.added = output

    def read(stream: _Stream, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if stream.before is None or stream.added is None or not isinstance(given, Tensor):
            return
        if given.shape == stream.before.shape:
            both = stream.before + stream.added
            limit = 8 * torch.finfo(both.dtype).eps * both.abs().max()
            stream.joined |= bool((given - both).abs().max() <= limit)

    hooks = []
    try:
        for layer, block in blocks.items():
            stream = streams[layer]
            hooks.append(block.whole.register_forward_pre_hook(partial(entered, stream), with_kwargs=True))
            hooks.append(block.projection.register_forward_hook(partial(added, stream)))
            for child in block.whole.children():
                if child is not block.attention:
                    hooks.append(child.register_forward_pre_hook(partial(read, stream), with_kwargs=True))
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


# --- gradient x input -------------------------------------------------------------------------------------------------


def gradient_input(model: nn.Module, token_ids: Tensor, answer_tokens: Tensor) -> Tensor:
    """Gradient x input [N]: |sum over the width of (d log p(answer) / d embedding) * embedding|.

    log p(answer) is the sum of the log-probabilities of the answer's tokens, each given all tokens before it. To first
    order this is what scaling the embedding of a token changes (Simonyan et al. 2013, arXiv 1312.6034; Shrikumar et al.
    2016, arXiv 1605.01713). One forward and one backward pass, with the activations of all layers: the memory of a
    training step on the trace. 0 from the last token of the answer on.

    No parameter gets a gradient, and the model is left as it was; it runs in evaluation mode. Works under
    `torch.no_grad` and `torch.inference_mode`.

    Args:
        token_ids: [N] int64. answer_tokens: [N] bool, the answer itself, not the positions that predict it.

    Raises:
        ValueError: token 0 is one of the answer's: nothing predicts it.
    """
    if token_ids.ndim != 1 or answer_tokens.shape != token_ids.shape or answer_tokens.dtype != torch.bool:
        raise ValueError(
            "token_ids and answer_tokens must be [N] whole numbers and [N] bool, got "
            f"{list(token_ids.shape)} {token_ids.dtype} and {list(answer_tokens.shape)} {answer_tokens.dtype}"
        )
    out = torch.zeros(len(token_ids), dtype=torch.float64)
    places = answer_tokens.nonzero().flatten().tolist()
    if not places:
        return out
    if places[0] == 0:
        raise ValueError("answer_tokens marks token 0, which nothing predicts; give the tokens before the answer too")
    whole, last = unwrap(model), places[-1]
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(whole):
        embed = whole.get_input_embeddings()
        ids = token_ids[None, :last].to(next(embed.parameters()).device, copy=True)
        with torch.no_grad():
            embedding = embed(ids)
        embedding.requires_grad_()
        kept = last - places[0] + 1  # logits from the one that predicts the first token of the answer
        logits = whole(inputs_embeds=embedding, use_cache=False, logits_to_keep=kept).logits[0, -kept:]
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        at = torch.tensor(places, device=logp.device)
        answer = logp[at - places[0], token_ids.to(logp.device)[at]].sum()
        (gradient,) = torch.autograd.grad(answer, embedding)
    out[:last] = (gradient[0].double() * embedding[0].detach().double()).sum(-1).abs().cpu()
    return out
