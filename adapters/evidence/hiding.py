r"""What a trace is worth without some of its tokens: hide them from all that comes later, and read or write on.

    answer_logp    sum over the answer's tokens t of log p(token t | the earlier tokens that are not hidden)
    regenerate     the greedy continuation where the hidden tokens can't be seen
    curves         deletion and insertion curves (RISE, Petsiuk et al. 2018, arXiv 1806.07421) of such log-probabilities

Hidden from token s on means: in every layer and head the softmax of a later row t > s runs over the keys that are not
hidden. That needs no mask. Take the rows of the tokens that are not hidden, layer by layer from the embeddings up: each
is made from its own state and from the keys and values of visible tokens, which by induction are those of the sequence
from which the hidden tokens are *left out, with everybody else's position unchanged*. The rows of hidden tokens differ,
but nobody reads them. So hidden tokens are left out and `position_ids` get gaps: cheaper than a mask [N, N], and right
for every attention kernel and kind of position that the model takes from `position_ids`. An attention mask goes along
in every pass, since without one transformers takes gaps for the borders of packed documents.

It holds only if attention is all that moves information between tokens, and if nothing but the mask says who sees whom:
models with other layers (linear attention, convolutions) and with windows shorter than the trace are refused.

What all variants share, the tokens before the first that any of them hides, runs once; equal variants run once.

Shapes: N tokens of a trace, M variants, L answer tokens, P tokens of the shared prefix, m rows of a micro-batch, n
columns of it, V size of the vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flowgraph.capture import evaluation_mode, softmax_layers_of, unwrap
from flowgraph.interface import device_of

_MAX_LOGITS = 2**26
"""Logits that exist at a time: 256 MiB in float32."""


# --- which tokens ---------------------------------------------------------------------------------------------------


def pick(scores: Tensor, mask: Tensor, share: float, end: str = "top") -> Tensor:
    """[N] bool: the ceil(share * n) of the mask's n tokens with the highest or the lowest scores.

    Args:
        scores: [N], finite where the mask is True. mask: [N] bool. share: 0 .. 1.
        end: "top" or "bottom". Of equal scores the earlier token goes first at both ends.

    Raises:
        ValueError: names the argument.
    """
    if scores.ndim != 1 or mask.shape != scores.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"scores and mask must be [N] and [N] bool, got {list(scores.shape)} and {list(mask.shape)} {mask.dtype}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0 .. 1, got {share}")
    if end not in ("top", "bottom"):
        raise ValueError(f'end must be "top" or "bottom", got {end!r}')
    candidates = mask.nonzero().flatten()
    values = scores[candidates]
    if not values.isfinite().all():
        token = int(candidates[~values.isfinite()][0])
        raise ValueError(f"scores must be finite where mask is True, but token {token} has {float(scores[token])}")
    # Rounded first: 0.7 * 10 is 7.000000000000001 and must count as 7.
    count = math.ceil(round(share * len(candidates), 6))
    order = values.sort(descending=end == "top", stable=True).indices
    picked = torch.zeros_like(mask)
    picked[candidates[order[:count]]] = True
    return picked


def hideable(mask: Tensor, answer_tokens: Tensor) -> Tensor:
    """[N] bool: the tokens of the mask that `answer_logp` can hide: not the answer's, nor those that predict them.

    Args:
        mask, answer_tokens: [N] bool.
    """
    predicting = torch.zeros_like(answer_tokens)
    predicting[:-1] = answer_tokens[1:]
    return mask & ~answer_tokens & ~predicting


# --- the log-probability of the answer ------------------------------------------------------------------------------


@torch.no_grad()
def answer_logp(
    model: nn.Module,
    token_ids: Tensor,
    hidden: Tensor,
    answer_tokens: Tensor,
    *,
    max_batch_tokens: int | None = None,
) -> Tensor:
    """[M] float64, in nats: the log-probability of the answer with the hidden tokens invisible to all later ones.

    Args:
        model: a causal language model of transformers; it runs in evaluation mode and is left as it was.
        token_ids: [N] int64, one trace without pads.
        hidden: [M, N] bool, one variant per row. What lies behind the answer plays no part.
        answer_tokens: [N] bool, the tokens whose log-probabilities are summed.
        max_batch_tokens: tokens of a micro-batch, pads included and the shared prefix not; one variant at least. None:
            1024 on a CPU, whose cache they must fit, and 4096 elsewhere.

    Raises:
        ValueError: names the argument, variant and token: a variant hides a token of the answer, or one whose row
            predicts a token of the answer (it would have to be read); or the model moves information otherwise than by
            full softmax attention, see above.
    """
    ids, hidden = _trace(model, token_ids, hidden, len(token_ids))
    answer = _answer(answer_tokens, hidden)
    predicting = answer - 1
    variants, inverse = hidden[:, : int(answer[-1])].unique(dim=0, return_inverse=True)  # the last row predicts nothing
    reader = _Reader(unwrap(model), ids, variants, before=int(predicting[0]))
    most_rows = max(1, _MAX_LOGITS // (len(answer) * reader.vocabulary))
    most_tokens = max_batch_tokens or (1024 if ids.device.type == "cpu" else 4096)
    found = torch.empty(len(variants), dtype=torch.float64)
    with evaluation_mode(reader.model):
        for batch in reader.batches(most_tokens, most_rows=most_rows):
            columns = reader.columns(batch, predicting)  # [m, L]
            keep, place = columns.unique(return_inverse=True)
            logits = reader.read(batch, keep)[0][torch.arange(len(place), device=ids.device)[:, None], place]
            logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            at_token = logp.gather(-1, ids[answer].expand(len(place), -1)[..., None])[..., 0]
            found[batch.variants] = at_token.double().sum(1).cpu()
    return found[inverse.cpu()]


# --- what the model would have written ------------------------------------------------------------------------------


@torch.no_grad()
def regenerate(
    model: nn.Module,
    token_ids: Tensor,
    hidden: Tensor,
    start: int,
    *,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    max_batch_tokens: int = 8192,
) -> list[Tensor]:
    """M tensors of new ids, on the CPU: the greedy continuation of token_ids[:start] with the hidden tokens invisible.

    A continuation ends with the first of `stop_ids` or of the model's own end-of-sequence ids, which belongs to it, or
    after `new_tokens` tokens.

    Args:
        model, token_ids, hidden: as in `answer_logp`. What is hidden from `start` on plays no part.
        start: the cut, 1 .. N.
        max_batch_tokens: tokens of a micro-batch with what it may write, pads included and the shared prefix not; one
            variant at least.

    Raises:
        ValueError: as `answer_logp`; a variant hides token start - 1, whose row predicts the first new token.
    """
    if not 1 <= start <= len(token_ids):
        raise ValueError(f"start must be in 1 .. {len(token_ids)}, the number of token_ids, got {start}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    ids, hidden = _trace(model, token_ids, hidden, start + new_tokens)
    if hidden[:, start - 1].any():
        raise ValueError(
            f"hidden: variant {int(hidden[:, start - 1].nonzero()[0])} hides token {start - 1}, whose row predicts the "
            "first new token; leave it visible"
        )
    whole = unwrap(model)
    stops = torch.tensor(sorted({*stop_ids, *end_ids(whole)}), dtype=torch.long, device=ids.device)
    variants, inverse = hidden[:, :start].unique(dim=0, return_inverse=True)
    reader = _Reader(whole, ids, variants, before=start - 1)
    written: dict[int, Tensor] = {}
    with evaluation_mode(whole):
        for batch in reader.batches(max_batch_tokens, most_rows=len(variants), extra=new_tokens):
            texts = reader.write(batch, start, new_tokens, stops)
            written |= dict(zip(batch.variants.tolist(), texts, strict=True))
    return [written[variant].clone() for variant in inverse.tolist()]


def end_ids(model: Any) -> Collection[int]:
    """What ends a text of this model by its own configuration."""
    found = getattr(getattr(model, "generation_config", None) or model.config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else found


# --- curves ---------------------------------------------------------------------------------------------------------


def curves(
    model: nn.Module,
    token_ids: Tensor,
    scores: Mapping[str, Tensor],
    mask: Tensor,
    answer_tokens: Tensor,
    steps: int = 10,
    *,
    max_batch_tokens: int | None = None,
) -> dict[str, dict[str, list[float]]]:
    """For each signal, the answer's log-probability in nats as more and more of the mask is hidden or shown.

    "deletion" has steps + 1 values: the k-th with the k/steps of the mask's tokens hidden that score highest, so that a
    good signal falls early. "insertion": with all of the mask hidden but the k/steps that score highest, so that a good
    signal rises early. Both run between the same two numbers for all signals, nothing hidden and all of the mask
    hidden. "area" holds two numbers, that of deletion (lower is better) and of insertion (higher is better).

    Args:
        scores: signal -> [N]. mask: [N] bool, what may be hidden; see `hideable`. Others as in `answer_logp`.
    """
    names, mask = list(scores), mask.cpu()
    if not names or steps < 1:
        raise ValueError(f"curves need one signal and one step at least, got {len(names)} scores and steps {steps}")
    if (never := mask & ~hideable(mask, answer_tokens.cpu())).any():
        raise ValueError(
            f"mask has token {int(never.nonzero()[0])}, which belongs to the answer or predicts a token of it and "
            "can't be hidden; take hideable(mask, answer_tokens)"
        )
    top = torch.stack([pick(scores[name].cpu(), mask, k / steps) for name in names for k in range(steps + 1)])
    hidden = torch.cat([top, mask & ~top])
    logp = answer_logp(model, token_ids, hidden, answer_tokens, max_batch_tokens=max_batch_tokens)
    deletion, insertion = logp.reshape(2, len(names), steps + 1).tolist()
    return {
        name: {"deletion": fall, "insertion": rise, "area": [area(fall), area(rise)]}
        for name, fall, rise in zip(names, deletion, insertion, strict=True)
    }


def area(curve: Sequence[float]) -> float:
    """The area below a curve over 0 .. 1 with evenly spaced points, by the trapezoid rule: its mean height."""
    return float(torch.trapezoid(torch.tensor(curve, dtype=torch.float64), dx=1 / (len(curve) - 1)))


# --- passes ---------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Visible tokens behind the shared prefix, one variant per row, pads on the right."""

    variants: Tensor
    """[m], on the CPU."""
    positions: Tensor
    """[m, n] places in the trace; a pad repeats the last."""
    real: Tensor
    """[m, n] bool."""


class _Reader:
    """Passes over the visible tokens of variants, which go on from what they share.

    Args:
        variants: [M, T] bool, hidden tokens among the first T; different from each other. before: the shared prefix
            ends before this token, if not earlier.
    """

    def __init__(self, model: Any, ids: Tensor, variants: Tensor, *, before: int) -> None:
        self.model, self.ids, self.visible = model, ids, ~variants
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        hidden_by_any = variants.any(0).nonzero().flatten()
        self.prefix = min([before, *hidden_by_any[:1].tolist()])
        self.cache = DynamicCache()
        if self.prefix:
            with evaluation_mode(model):
                self._run(ids[None, : self.prefix], None, torch.ones(1, self.prefix), self.cache, 1)

    def batches(self, max_tokens: int, *, most_rows: int, extra: int = 0) -> Iterator[_Batch]:
        """All variants, the longest first: rows of like length need few pads. `extra`: tokens that rows will add."""
        lengths, order = self.visible[:, self.prefix :].sum(1).cpu().sort(descending=True, stable=True)
        begin = 0
        while begin < len(order):
            rows = min(most_rows, max(1, max_tokens // (int(lengths[begin]) + extra)))
            yield self._batch(order[begin : begin + rows])
            begin += rows

    def _batch(self, variants: Tensor) -> _Batch:
        visible = self.visible[variants.to(self.ids.device), self.prefix :]
        length = visible.sum(1)
        # Flash attention gets no mask where there are no pads, and takes the gaps of a single row for borders of packed
        # documents: such a row gets a pad.
        width = int(length.max()) + (len(variants) == 1)
        column = torch.arange(width, device=self.ids.device)
        order = (~visible).sort(dim=1, stable=True).indices  # visible tokens first, in their order
        positions = order.gather(1, column.minimum(length[:, None] - 1)) + self.prefix
        return _Batch(variants, positions, column < length[:, None])

    def columns(self, batch: _Batch, tokens: Tensor) -> Tensor:
        """[m, L] where tokens [L] of the trace, visible in all rows, stand in the rows."""
        visible = self.visible[batch.variants.to(self.ids.device), self.prefix :]
        return visible.cumsum(1)[:, tokens - self.prefix] - 1

    def read(self, batch: _Batch, keep: Tensor) -> tuple[Tensor, DynamicCache, Tensor]:
        """([m, K, V] logits of the columns [K], the cache of the rows behind it, its [m, P + n] attention mask)."""
        rows = len(batch.variants)
        cache = DynamicCache()
        kept: Any
        for layer, kept in enumerate(self.cache.layers):
            # A new cache copies what it is given: the shared one stays as it is.
            cache.update(kept.keys.expand(rows, -1, -1, -1), kept.values.expand(rows, -1, -1, -1), layer)
        mask = torch.cat([batch.real.new_ones(rows, self.prefix), batch.real], dim=1)
        return self._run(self.ids[batch.positions], batch.positions, mask, cache, keep), cache, mask

    def write(self, batch: _Batch, start: int, new_tokens: int, stops: Tensor) -> list[Tensor]:
        """One greedy continuation per row, on the CPU; rows that have ended leave the batch."""
        last = self.columns(batch, torch.tensor([start - 1], device=self.ids.device))  # [m, 1]
        keep, place = last.unique(return_inverse=True)
        logits, cache, mask = self.read(batch, keep)
        token = logits[torch.arange(len(place), device=place.device), place[:, 0]].argmax(-1)
        texts: list[list[int]] = [[] for _ in batch.variants]
        rows = torch.arange(len(texts), device=token.device)
        for position in range(start, start + new_tokens):
            for row, new in zip(rows.tolist(), token.tolist(), strict=True):
                texts[row].append(new)
            goes_on = ~torch.isin(token, stops)
            if not goes_on.any() or position == start + new_tokens - 1:
                break
            if not goes_on.all():
                rows, token, mask = rows[goes_on], token[goes_on], mask[goes_on]
                cache.batch_select_indices(goes_on.nonzero().flatten())
            mask = F.pad(mask, (0, 1), value=True)
            positions = torch.full_like(token, position)[:, None]
            token = self._run(token[:, None], positions, mask, cache, 1)[:, 0].argmax(-1)
        return [torch.tensor(text) for text in texts]

    def _run(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor, cache: DynamicCache, keep: Tensor | int
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask.to(ids.device).long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        kept = keep if isinstance(keep, int) else len(keep)
        if logits.shape[1] != kept:
            raise ValueError(
                f"model: {type(self.model).__name__} gave logits of {logits.shape[1]} tokens, but logits_to_keep "
                f"asked for {kept}"
            )
        return logits


# --- checks ---------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, token_ids: Tensor, hidden: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """token_ids [N] and hidden [M, N], checked, where the model is; and the model is checked for a text of `length`."""
    if token_ids.ndim != 1 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be whole numbers [N], got {list(token_ids.shape)} {token_ids.dtype}")
    if hidden.ndim != 2 or hidden.shape[1] != len(token_ids) or not len(hidden) or hidden.dtype != torch.bool:
        raise ValueError(
            f"hidden must be [M, N] bool with M >= 1 and N = {len(token_ids)}, got {list(hidden.shape)} {hidden.dtype}"
        )
    device = device_of(model)
    ids = token_ids.to(device)
    _check_model(unwrap(model), ids, length)
    return ids, hidden.to(device)


def _answer(answer_tokens: Tensor, hidden: Tensor) -> Tensor:
    """[L] the numbers of the answer's tokens, ascending; no variant hides one, nor the token before it."""
    if answer_tokens.shape != hidden.shape[1:] or answer_tokens.dtype != torch.bool:
        raise ValueError(
            f"answer_tokens must be [N] bool with N = {hidden.shape[1]}, got {list(answer_tokens.shape)} "
            f"{answer_tokens.dtype}"
        )
    answer = answer_tokens.to(hidden.device).nonzero().flatten()
    if not len(answer):
        raise ValueError("answer_tokens marks no token")
    if answer[0] == 0:
        raise ValueError("answer_tokens marks token 0, which no token predicts; start the answer later")
    for what, tokens in (("is a token of the answer", answer), ("predicts a token of the answer", answer - 1)):
        if hidden[:, tokens].any():
            variant, place = hidden[:, tokens].nonzero()[0].tolist()
            raise ValueError(
                f"hidden: variant {variant} hides token {int(tokens[place])}, which {what}; leave it visible "
                "(`hideable` tells which tokens can be hidden)"
            )
    return answer


def _check_model(model: Any, ids: Tensor, length: int) -> None:
    """Raises a ValueError where leaving tokens out is not the same as hiding them, in a text of `length` tokens."""
    name, config = type(model).__name__, model.config.get_text_config()
    parameters = inspect.signature(model.forward).parameters
    if missing := [one for one in ("position_ids", "past_key_values", "logits_to_keep") if one not in parameters]:
        raise ValueError(f"model: {name} takes no {', '.join(missing)}; hiding tokens needs them")
    softmax_layers = softmax_layers_of(model, ids[None])
    for number, layer in enumerate(DynamicCache(config=config).layers):  # the model's own idea of what its layers keep
        if number not in softmax_layers or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: layer {number} of {name} moves information otherwise than by softmax attention over its own "
                f"keys ({type(layer).__name__}), so tokens can't be hidden from later ones by leaving them out"
            )
        window = getattr(layer, "sliding_window", None)
        if window is not None and window <= length:  # one pad may stand between tokens
            raise ValueError(
                f"model: layer {number} of {name} has a window of {window} tokens, too short for the {length} of this "
                "text: what it reaches would depend on how many tokens are left out"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [one for one in rope.values() if isinstance(one, dict)] or [rope]:
        longest = kind.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind.get("rope_type") in ("dynamic", "longrope") and length > longest:
            raise ValueError(
                f"model: the positions of {name} change with the length of a pass beyond {longest} tokens "
                f"(rope_type {kind['rope_type']!r}), so the {length} of this text can't be read in several passes"
            )
