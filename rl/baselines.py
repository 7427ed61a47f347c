r"""The rival signals of flow, each as one score per token, so that anyone can ask whether flow helps.

    Baseline(name, model)(input_ids, attention_mask, spans) -> scores -> weights_from_scores -> weights

A score is at least 0, the higher the more credit, and 0 where it is not defined. Attention `A[t, s]` is what token `t`
pays to the earlier token `s`; `R` are the response tokens; `p_t` is the distribution that predicts token `t`, which the
model gives at the position before it.

    name               score                                                       rule it comes with
    uniform            0: no token stands out, and every rule gives weight 1       any
    random             a number in (0, 1] from the seed and the token ids          "top", 0.4
    entropy            H_t = -sum_v p_t(v) log p_t(v)                              "keep", 0.2, per batch; or "top", 0.4
    future_attention   FAI_s = mean over t in R, s + 10 <= t <= s + 100, A[t, s]   "top", 0.4
    windowed_distance  |WAAD_t - WAAD_(t+1)|, WAAD_t = sum_s A[t, s] min(t-s, 10)  "top", 0.4
    coupled            the bonus by FAI and WAAD together, see `coupled_bonus`     "proportional"
    answer_attention   mean over the sinks a > s of A[a, s]                        "top", 0.4
    gradient_norm      |d log p_t / d logits| = sqrt(1 - 2 p_t + sum_v p_t(v)^2)   "top", 0.4
    rollout            what the sinks have of s by attention through all layers    "top", 0.4
    routes             the same, by what attention writes                          "top", 0.4
    gradient_input     |sum of (d log p(answer) / d embedding_s) * embedding_s|    "top", 0.4
    recency            (s + 1) / N: the later, the higher                          "top", 0.4

Reach and throughput, the scores of flow itself, come from `flowgraph.credit`; the formulas of the last four, with their
sources, are in `flowgraph.rl.attributions`.

Sources. Entropy: arXiv 2506.01939, which trains only on the 20 % of a batch's tokens with the highest entropy. FAI,
WAAD and their coupling: arXiv 2510.13554, definitions 4.1 and 4.2 and section 5.2, by its second version (in the first,
FAI ends at s + 50). A is the mean of the global heads for FAI and of the local heads for WAAD: the 30 % with the
longest and the shortest mean attention distance, of five evenly spaced layers of the middle third. The same paper
amplifies the top 40 % by a gradient too, without a formula: the one here is ours. So is attention to the answer, which
reads the layers and heads that flow reads.

What these sources leave open, and what is done here:
    * WAAD of the last response token, and at the end of each run of response tokens, has no successor: score 0.
    * FAI divides by the rows that there are, of 91 at most; tokens without any (the last ten): score 0.
    * 30 % of the heads are rounded down, to one head at least. Ties go to the earlier layer and head.
    * Distances and horizons count the tokens of the trace, so that pads change nothing.

Shapes: B rows of a batch, T their length with pads, N tokens of one trace, V size of the vocabulary, m rows of a block,
n columns of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowgraph.capture import (
    Capture,
    Layers,
    capture,
    choose_layers,
    evaluation_mode,
    model_inputs,
    softmax_layers_of,
    unwrap,
)
from flowgraph.credit import weights_from_scores
from flowgraph.rl.attributions import gradient_input, layer_rows, recency, rollout, routes
from flowgraph.rows import Rows
from flowgraph.spans import Spans

_NUM_LAYERS = 5
_MAX_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in float32."""

# --- one score per token ----------------------------------------------------------------------------------------------


class Baseline:
    """One rival signal, as a score for every token of a batch.

    Args:
        name: one of `BASELINES`.
        model: a causal language model, as for `capture`; it is left as it was.
        layers: "middle" or "all" (five evenly spaced ones for the scores of local and global heads, all of them for
            "answer_attention"), or layer numbers, taken as they are. "rollout" and "routes" always go through all.
        heads: the local and the global heads, from `calibrate` or from an earlier run; default: calibrated on the first
            batch. Once known they stay, whatever becomes of the model. Give them where runs have to compare.
        seed: of "random".

    Example:
        >>> scores = Baseline("entropy", model)(input_ids, attention_mask, spans)  # one [N] per row
        >>> weights_from_scores(scores[0], spans[0].credit_mask, "keep", top=0.2)
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        layers: Layers = "middle",
        heads: HeadGroups | None = None,
        seed: int = 0,
    ) -> None:
        if name not in BASELINES:
            raise ValueError(f"name must be one of {', '.join(map(repr, BASELINES))}, got {name!r}")
        self.name, self.model, self.layers, self.heads, self.seed = name, model, layers, heads, seed

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, spans: Sequence[Spans]) -> list[Tensor]:
        """Scores of the tokens of each row.

        Args:
            input_ids: [B, T] int64, one trace per row. attention_mask: [B, T], 0 at pads; None: no pads.
            spans: one per row, over its N real tokens. Read are `response_mask` (R, tool output included if it is),
                `answer_mask` (the sinks), `answer_tokens` (by "gradient_input") and `credit_mask` (the tokens among
                which "coupled" chooses).

        Returns:
            One float32 tensor [N] per row, on the CPU.

        Raises:
            ValueError: names the row whose spans don't fit; or the model can't be read, as in `capture` or, for
                "routes", as there.
        """
        batch = _Batch.of(input_ids, attention_mask, spans)
        return [score.float().cpu() for score in BASELINES[self.name](self, batch)]

    def _calibrated(self, batch: _Batch) -> HeadGroups:
        if self.heads is None:
            self.heads = calibrate(self.model, batch.ids, batch.attention_mask, batch.spans, layers=self.layers)
        return self.heads


@dataclass(frozen=True)
class _Batch:
    ids: Tensor
    attention_mask: Tensor | None
    spans: Sequence[Spans]
    positions: list[Tensor]
    """One [N] per row: where its real tokens stand, on the CPU."""

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor | None, spans: Sequence[Spans]) -> _Batch:
        real = _real(ids, attention_mask)
        if len(spans) != len(ids):
            raise ValueError(f"spans must have one entry per row of input_ids, {len(ids)}, got {len(spans)}")
        positions = [row.nonzero().flatten() for row in real.cpu()]
        for row, (place, found) in enumerate(zip(positions, spans, strict=True)):
            if len(place) != len(found.response_mask):
                raise ValueError(
                    f"spans of row {row} are over {len(found.response_mask)} tokens, but attention_mask marks "
                    f"{len(place)} there as real"
                )
        return cls(ids, attention_mask, spans, positions)

    def capture(self, model: nn.Module, layers: Layers) -> Capture:
        return capture(model, self.ids, self.attention_mask, layers=layers)

    def alone(self) -> Iterator[Tensor]:
        """The ids [N] of each row, without its pads."""
        return (ids[place.to(ids.device)] for ids, place in zip(self.ids, self.positions, strict=True))


def _real(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T] bool, True at real tokens."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids must be whole numbers [B, T], got {list(ids.shape)} {ids.dtype}")
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be [B, T] = {list(ids.shape)} like input_ids, got {list(attention_mask.shape)}"
        )
    return attention_mask.to(ids.device).bool()


def _uniform(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    return (torch.zeros(len(place)) for place in batch.positions)


def _random(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    ids = batch.ids.cpu()
    return (random_scores(ids[row, place], baseline.seed) for row, place in enumerate(batch.positions))


def _entropy(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    entropy = predictions(baseline.model, batch.ids, batch.attention_mask).entropy.cpu()
    return (entropy[row, place] for row, place in enumerate(batch.positions))


def _gradient_norm(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    norm = predictions(baseline.model, batch.ids, batch.attention_mask).gradient_norm.cpu()
    return (norm[row, place] for row, place in enumerate(batch.positions))


def _future_attention(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    heads = by_layer(baseline._calibrated(batch).global_heads)
    captured = batch.capture(baseline.model, list(heads))
    for row, (place, spans) in enumerate(zip(batch.positions, batch.spans, strict=True)):
        yield future_attention(captured.rows(row, place, heads=heads), spans.response_mask)


def _windowed_distance(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    heads = by_layer(baseline._calibrated(batch).local_heads)
    captured = batch.capture(baseline.model, list(heads))
    for row, (place, spans) in enumerate(zip(batch.positions, batch.spans, strict=True)):
        waad = windowed_distance(captured.rows(row, place, heads=heads), spans.response_mask)
        yield variation(waad, spans.response_mask)


def _coupled(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    groups = baseline._calibrated(batch)
    local, far = by_layer(groups.local_heads), by_layer(groups.global_heads)
    captured = batch.capture(baseline.model, sorted({*local, *far}))
    for row, (place, spans) in enumerate(zip(batch.positions, batch.spans, strict=True)):
        waad = windowed_distance(captured.rows(row, place, heads=local), spans.response_mask)
        influence = future_attention(captured.rows(row, place, heads=far), spans.response_mask)
        yield coupled_bonus(waad, variation(waad, spans.response_mask), influence, spans.credit_mask)


def _answer_attention(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    captured = batch.capture(baseline.model, baseline.layers)
    for row, (place, spans) in enumerate(zip(batch.positions, batch.spans, strict=True)):
        yield answer_attention(captured.rows(row, place), spans.answer_mask)


def _rollout(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    captured = batch.capture(baseline.model, "all")
    for row, (place, spans) in enumerate(zip(batch.positions, batch.spans, strict=True)):
        yield rollout(layer_rows(captured, row, place), spans.answer_mask)


def _routes(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    for ids, spans in zip(batch.alone(), batch.spans, strict=True):
        yield routes(baseline.model, ids, spans.answer_mask)


def _gradient_input(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    for row, (ids, spans) in enumerate(zip(batch.alone(), batch.spans, strict=True)):
        if spans.answer_mask.any() and not spans.answer_tokens.any():
            raise ValueError(
                f"spans of row {row} have sinks but no answer_tokens, the tokens whose log-probability "
                '"gradient_input" takes: give answer_tokens to locate, not sink_mask'
            )
        yield gradient_input(baseline.model, ids, spans.answer_tokens)


def _recency(baseline: Baseline, batch: _Batch) -> Iterable[Tensor]:
    return (recency(len(place)) for place in batch.positions)


BASELINES: dict[str, Callable[[Baseline, _Batch], Iterable[Tensor]]] = {
    "uniform": _uniform,
    "random": _random,
    "entropy": _entropy,
    "future_attention": _future_attention,
    "windowed_distance": _windowed_distance,
    "coupled": _coupled,
    "answer_attention": _answer_attention,
    "gradient_norm": _gradient_norm,
    "rollout": _rollout,
    "routes": _routes,
    "gradient_input": _gradient_input,
    "recency": _recency,
}
NEED_HEADS = ("future_attention", "windowed_distance", "coupled")
"""Those that read local or global heads, and calibrate them if none are given."""

# --- formulas: attention; what they return is float64 and on the CPU, wherever the rows are ---------------------------


def windowed_distance(rows: Rows, response_mask: Tensor, window: int = 10) -> Tensor:
    """WAAD [N]: how far each response token looks back, distances clipped to `window`; 0 at other tokens.

    Args:
        rows: attention of the local heads. response_mask: [N] bool.
    """
    out = _zeros(rows, response_mask)
    for t, weight in _rows_of(rows, response_mask):
        s = torch.arange(weight.shape[1], device=t.device)
        out[t.cpu()] = (weight * (t[:, None] - s).clamp(max=window)).sum(1).cpu().double()
    return out


def variation(waad: Tensor, response_mask: Tensor) -> Tensor:
    """[N] |WAAD_t - WAAD_{t+1}| where t and t + 1 are response tokens, else 0."""
    both = response_mask[:-1] & response_mask[1:]
    return F.pad((waad[:-1] - waad[1:]).abs() * both, (0, 1))


def future_attention(rows: Rows, response_mask: Tensor, first: int = 10, last: int = 100) -> Tensor:
    """FAI [N]: the mean attention that a token gets from the response tokens `first` to `last` tokens later.

    Args:
        rows: attention of the global heads. response_mask: [N] bool, the tokens whose rows count. A token of the prompt
            has a score too, if the response begins near enough.
    """
    total = _zeros(rows, response_mask)
    count = torch.zeros_like(total)
    for t, weight in _rows_of(rows, response_mask):
        reached = slice(max(0, int(t[0]) - last), weight.shape[1])
        distance = t[:, None] - torch.arange(reached.start, reached.stop, device=t.device)
        inside = (distance >= first) & (distance <= last)
        total[reached] += (weight[:, reached] * inside).sum(0).cpu().double()
        count[reached] += inside.sum(0).cpu()
    return total / count.clamp(min=1)


def answer_attention(rows: Rows, sink_mask: Tensor) -> Tensor:
    """[N] the mean attention that a token gets from the sinks [N] bool after it; 0 everywhere if there are none.

    What a sink pays to itself is left out, as it is in a graph.
    """
    out = _zeros(rows, sink_mask)
    for t, weight in _rows_of(rows, sink_mask):
        s = torch.arange(weight.shape[1], device=t.device)
        out[: len(s)] += (weight * (s < t[:, None])).sum(0).cpu().double()
    return out / sink_mask.sum().clamp(min=1)


def coupled_bonus(
    waad: Tensor,
    changes: Tensor,
    influence: Tensor,
    mask: Tensor,
    *,
    top: float = 0.4,
    neighbourhood: int = 3,
    back: float = 0.5,
) -> Tensor:
    """[N] the share of the bonus `gain - 1` that a token gets by arXiv 2510.13554, equation 19 (18 in version 1).

    The `top` tokens by FAI are anchors, with share 1. An anchor is dominated if its WAAD is low and one of the
    `neighbourhood` tokens before it has a high variation: it keeps 1 - back, and the one of these with the highest
    variation, its introduction, gets `back`. With rule "proportional" the weights are the paper's, 1 + (gain - 1) times
    the share, in every trace that has an anchor with its whole bonus.

    Open in the paper, and here: "low" and "high" are at most and at least the median over the mask; `back` (its alpha)
    is 0.5; the neighbourhood, there 1, 2 or 3, is 3; an introduction that serves several anchors gets its share once;
    one that is an anchor itself has at most the whole bonus.

    Args:
        waad: [N]. changes: [N], its `variation`. influence: [N], FAI. mask: [N] bool, the tokens that take part.
    """
    if not mask.any():
        return torch.zeros_like(waad)
    anchors = weights_from_scores(influence, mask, "top", top=top, gain=2.0) == 2
    before = F.pad(changes.masked_fill(~mask, -1), (neighbourhood, 0), value=-1)[:-1].unfold(0, neighbourhood, 1)
    strongest = before.argmax(1)  # the first of equals
    low = waad <= waad[mask].median()
    high = before.amax(1) >= changes[mask].median()
    dominated = anchors & low & high
    bonus = anchors.to(waad) - back * dominated
    introductions = (torch.arange(len(waad)) - neighbourhood + strongest)[dominated].unique()
    bonus[introductions] += back
    return bonus.clamp(max=1)


def attention_distance(rows: Rows, response_mask: Tensor) -> tuple[float, int]:
    """(sum over the response tokens t of sum_s A[t, s] (t - s), number of response tokens)."""
    total = 0.0
    for t, weight in _rows_of(rows, response_mask):
        s = torch.arange(weight.shape[1], device=t.device)
        total += float((weight * (t[:, None] - s)).sum())
    return total, int(response_mask.sum())


def _zeros(rows: Rows, mask: Tensor) -> Tensor:
    if mask.shape != (rows.num_tokens,) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [N] = [{rows.num_tokens}], got {list(mask.shape)} {mask.dtype}")
    return torch.zeros(rows.num_tokens, dtype=torch.float64)


def _rows_of(rows: Rows, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(t [m], the attention [m, n] that the tokens t pay) for the tokens of the mask, the last block first.

    Last first, so that the stream ends where the mask begins: nobody computes the rows of the prompt.
    """
    if not mask.any():
        return
    begin = int(mask.nonzero()[0])
    for start, weight in rows.blocks(last_first=True):
        t = start + mask[start : start + len(weight)].nonzero().flatten().to(weight.device)
        if len(t):
            yield t, weight[t - start]
        if start <= begin:
            return


# --- local and global heads -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadGroups:
    """The heads that look at what is near and those that look far back, as pairs (layer, head), ascending."""

    local_heads: tuple[tuple[int, int], ...]
    global_heads: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name in ("local_heads", "global_heads"):
            heads = getattr(self, name)
            if not heads or not all(len(pair) == 2 and min(pair) >= 0 for pair in heads):
                raise ValueError(f"{name} must be pairs (layer, head), at least one, got {heads!r}")

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Plain lists, for files and logs."""
        return {name: [list(pair) for pair in getattr(self, name)] for name in ("local_heads", "global_heads")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Sequence[int]]]) -> HeadGroups:
        """What `to_dict` gave."""
        if set(values) != {"local_heads", "global_heads"}:
            raise ValueError(f"values must have the keys local_heads and global_heads, got {sorted(values)}")
        pairs = {name: tuple((int(layer), int(head)) for layer, head in heads) for name, heads in values.items()}
        return cls(**pairs)


def calibrate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    spans: Sequence[Spans],
    *,
    layers: Layers = "middle",
    share: float = 0.3,
) -> HeadGroups:
    """Find the local and the global heads: those with the shortest and the longest mean attention distance.

        d(head) = mean over the response tokens t, of all rows, of sum_s A_head[t, s] (t - s)

    Args:
        input_ids, attention_mask, spans, layers: as for a `Baseline`; of the spans, `response_mask` is read.
        share: of all heads of these layers, for each group.

    Raises:
        ValueError: fewer than two heads, or no response token in any row.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be in (0, 0.5], got {share}")
    batch = _Batch.of(input_ids, attention_mask, spans)
    captured = batch.capture(model, _five(model, input_ids, layers))
    heads = [(layer, head) for layer, number in captured.num_heads.items() for head in range(number)]
    if len(heads) < 2:
        raise ValueError(f"layers {captured.layers} have one head only: local and global heads need at least two")
    if not any(bool(found.response_mask.any()) for found in spans):
        raise ValueError("spans have no response token in any row: there is nothing to calibrate heads on")

    def distance(pair: tuple[int, int]) -> float:
        sums = [
            attention_distance(captured.rows(row, place, heads={pair[0]: [pair[1]]}), found.response_mask)
            for row, (place, found) in enumerate(zip(batch.positions, spans, strict=True))
        ]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    ordered = sorted(heads, key=distance)
    count = max(1, math.floor(round(share * len(heads), 6)))
    return HeadGroups(tuple(sorted(ordered[:count])), tuple(sorted(ordered[-count:])))


def _five(model: nn.Module, input_ids: Tensor, layers: Layers) -> Layers:
    """Five evenly spaced layers of a range of them; numbers are taken as they are."""
    if not isinstance(layers, str):
        return layers
    chosen = choose_layers(softmax_layers_of(model, input_ids), layers)
    steps = min(_NUM_LAYERS, len(chosen))
    return [chosen[round(step * (len(chosen) - 1) / max(steps - 1, 1))] for step in range(steps)]


def by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Pairs (layer, head) as `Capture.rows` takes heads: layer -> its heads, in the order in which they came."""
    return {layer: [head for of, head in heads if of == layer] for layer in sorted({layer for layer, _ in heads})}


# --- formulas: chance and predictions ---------------------------------------------------------------------------------


def random_scores(token_ids: Tensor, seed: int = 0) -> Tensor:
    """[N] numbers in (0, 1] that depend on the seed and the ids [N] alone: the same in any batch, in any order."""
    text = f"{seed}:{','.join(map(str, token_ids.tolist()))}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
    return 1 - torch.rand(len(token_ids), generator=generator)


def token_entropy(logp: Tensor) -> Tensor:
    """[...] entropy in nats of log-probabilities [..., V]; -inf is allowed."""
    return torch.special.entr(logp.exp()).sum(-1)


def logit_gradient_norm(logp: Tensor, token: Tensor) -> Tensor:
    """[...] the norm of d log p(token) / d logits, for log-probabilities [..., V] and tokens [...].

    The gradient is onehot(token) - p, so the norm is sqrt(1 - 2 p(token) + sum_v p(v)^2): near 0 for a sure token, up
    to sqrt(2) for a surprise. Taken from the gradient itself, since that sum cancels where p is near 1.
    """
    gradient = logp.exp()
    at = token[..., None]
    gradient.scatter_(-1, at, torch.expm1(logp.gather(-1, at)))
    return gradient.norm(dim=-1)


class Predictions(NamedTuple):
    """How the model predicted each token from those before it; [B, T], 0 at pads and at the first token of a row."""

    entropy: Tensor
    gradient_norm: Tensor
    logp: Tensor


@torch.no_grad()
def predictions(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, temperature: float = 1.0
) -> Predictions:
    """Entropy, gradient norm and log-probability of every token, in one forward pass without gradients.

    What stands at [b, t] belongs to token t and comes from the logits at the real token before it. The backbone runs
    once; the model's own way from there to logits (soft caps, scales, biases and all) runs in slices over tokens, so
    that logits [B, T, V] never exist. The model is in evaluation mode meanwhile, and back in its own afterwards.

    Args:
        input_ids: [B, T] int64, one trace per row. attention_mask: [B, T], 0 at pads; None: no pads.
        temperature: the logits are divided by it; that of sampling, if the entropies are to be those of sampling.

    Raises:
        ValueError: the model has no backbone apart from its head.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    whole, backbone = _parts(model)
    ids = input_ids.to(next(whole.parameters()).device)
    real = _real(ids, attention_mask)
    last_real = torch.where(real, torch.arange(ids.shape[1], device=ids.device), -1).cummax(1).values
    before = F.pad(last_real[:, :-1], (1, 0), value=-1)  # where the last real token before each position stands
    row, column = (real & (before >= 0)).nonzero(as_tuple=True)
    token = ids[row, column]
    with evaluation_mode(whole):
        output = backbone(**model_inputs(ids, attention_mask, None), use_cache=False)
        hidden = output.last_hidden_state[row, before[row, column]]
        slices = max(1, _MAX_LOGITS // whole.config.get_text_config().vocab_size)
        parts = []
        for begin in range(0, len(token), slices):
            chosen = token[begin : begin + slices]
            logits = _logits(whole, backbone, output, hidden[None, begin : begin + slices], chosen[None])[0]
            logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
            at_token = logp.gather(-1, chosen[:, None])[:, 0]
            parts.append(torch.stack([token_entropy(logp), logit_gradient_norm(logp, chosen), at_token]))
    out = torch.zeros(3, *ids.shape, dtype=parts[0].dtype if parts else torch.float32, device=ids.device)
    if parts:
        out[:, row, column] = torch.cat(parts, dim=1)
    return Predictions(*out)


def _parts(model: nn.Module) -> tuple[Any, Any]:
    """(the causal language model without wrappers, its backbone)."""
    whole = unwrap(model)
    if hasattr(whole, "get_base_model"):  # PEFT; its layers are inside what this returns
        whole = whole.get_base_model()
    backbone = getattr(whole, "base_model", whole)
    if backbone is whole:
        raise ValueError(f"model: {type(whole).__name__} has no backbone apart from its head; pass a causal LM")
    return whole, backbone


def _logits(whole: Any, backbone: Any, output: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """[1, m, V] what the model makes of hidden states [1, m, D] that its backbone has given."""
    given = type(output)(**{**output, "last_hidden_state": hidden})
    with _backbone_gives(backbone, given) as calls:
        logits = whole(input_ids=ids, use_cache=False).logits
    if len(calls) != 1 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: {type(whole).__name__} does not make its logits from one pass of its base_model, so they can't be "
            "computed in slices"
        )
    return logits


@contextmanager
def _backbone_gives(backbone: Any, output: Any) -> Iterator[list[None]]:
    """For one call of the whole model its backbone doesn't run: it returns what it has computed before."""
    calls: list[None] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return output

    own = vars(backbone).get("forward")  # accelerate puts one there
    backbone.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del backbone.forward
        else:
            backbone.forward = own
