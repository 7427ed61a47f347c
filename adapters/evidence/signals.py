r"""Signals: every score of a trace's tokens that the evidence compares, read from one trace on equal terms.

    scores_of(Reading(model, token_ids, Place.of(spans)), ["flow", "reach/paper", "answer_attention", "random"])

A signal is a function of a `Reading` and gives one number per token: float64 [N] on the CPU, at least 0, finite, the
higher the more important; 0 where it is not defined. A `Reading` runs the model once for attention (all layers, with
the norms of values) and once for predictions, whatever number of signals is asked for; only routes and gradient_input,
which need more of the model than that, run it themselves. No signal depends on which others were asked for, and the
same reading gives the same bits.

Names put what differs from the default behind a slash, in the order of the fields of `FlowSignal`:

    flow, reach, mix             throughput; reach; their geometric mean (docs/method.md, sections 1 to 3)
    answer_attention             mean attention from the rows where flow ends, so that no preset favours flow
    rollout, routes, gradient_input, recency            flowgraph/rl/attributions.py
    entropy, gradient_norm, future_attention, windowed_distance            flowgraph/rl/baselines.py
    random, random/1, random/2   chance, three seeds
    flashtrace                   what the caller brings along
    .../paper                    sinks are the answer tokens; else the positions that predict them
    .../value_norm               attention times the norm of what it moves; else bare attention
    .../sparse                   edges and pools; else all of the attention
    .../positions, .../shuffled, .../random_model       sanity checks, see `CONTROLS`

Shapes: N tokens of one trace without pads, r rows of a block, L layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowgraph.capture import Capture, Layers, capture, choose_layers
from flowgraph.exact import exact_flow
from flowgraph.flow import trace_flow
from flowgraph.interface import device_of
from flowgraph.options import Options
from flowgraph.rl.attributions import gradient_input, layer_rows, recency, rollout, routes
from flowgraph.rl.baselines import (
    HeadGroups,
    Predictions,
    answer_attention,
    by_layer,
    calibrate,
    future_attention,
    predictions,
    random_scores,
    variation,
    windowed_distance,
)
from flowgraph.rows import BlockedRows, DenseRows, KeptRows, RowBlock, check_kind
from flowgraph.spans import PRESETS, Spans, sinks_of
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import TopK

CONTROLS = ("positions", "shuffled", "random_model")
"""Rows that have lost what a signal is said to read; a signal that does as well on them reads something else.

"positions": a weight depends on the distance, and on whether the key is the token itself or the first token, and on
nothing else; see `by_position`. "shuffled": the weights of each row change places at random among the earlier tokens;
see `shuffled`. "random_model": the rows of `Reading.other`.
"""

LONGEST_CONTROL = 4096
"""Tokens of a trace whose rows can be rearranged: that takes all of them at once, 64 MiB."""

KEPT_ROWS = 4
"""Kinds of rows whose blocks a `Reading` holds on to, each as far as `KeptRows` does."""

_RATIO = 1.1
"""Distances within such a factor of each other share a weight in `by_position`."""

_T = TypeVar("_T")

# --- one trace --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """Where things stand in one trace. All masks are [N] bool on the CPU.

    Attributes:
        prompt_mask: the prompt, where flow starts. response_mask: what the model wrote.
        answer_tokens: the answer itself, s..e, whatever the preset.
        credit_mask: the tokens that may be chosen or credited.
    """

    prompt_mask: Tensor
    response_mask: Tensor
    answer_tokens: Tensor
    credit_mask: Tensor

    @classmethod
    def of(cls, spans: Spans) -> Place:
        return cls(spans.prompt_mask, spans.response_mask, spans.answer_tokens, spans.credit_mask)

    def spans(self) -> Spans:
        """The same as a baseline takes it: flow starts at the prompt and ends where the answer is predicted."""
        return Spans(
            prompt_mask=self.prompt_mask,
            question_mask=self.prompt_mask,
            response_mask=self.response_mask,
            answer_tokens=self.answer_tokens,
            answer_mask=sinks_of(self.answer_tokens),
            credit_mask=self.credit_mask,
            flags=(),
            answer_text=None,
            finder=None,
        )


class Reading:
    """One trace as every signal sees it. What is expensive is read when first asked for, once, and shared.

    Held are queries, keys and value norms of all layers (O(N) memory), the blocks of `KEPT_ROWS` kinds of rows, and the
    scores of solved flows.

    Args:
        model: a causal language model, as for `capture`; it is left as it was.
        token_ids: [N] int64, no pads.
        place: its masks.
        heads: the local and global heads of "future_attention" and "windowed_distance". Default: calibrated on this
            very trace, which costs a pass and differs from trace to trace; give those of `calibrate` over many traces
            where traces are compared.
        other: the same architecture with random weights, for the control "random_model".
        flashtrace: the signal of that name: a function of the reading, since the package has a way of its own to run a
            model.

    Raises:
        ValueError: `token_ids` or a mask has the wrong shape or dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        token_ids: Tensor,
        place: Place,
        *,
        heads: HeadGroups | None = None,
        other: nn.Module | None = None,
        flashtrace: Signal | None = None,
    ) -> None:
        if token_ids.dim() != 1 or token_ids.is_floating_point() or len(token_ids) < 2:
            raise ValueError(
                f"token_ids must be whole numbers [N] of one trace, N >= 2, got {list(token_ids.shape)} "
                f"{token_ids.dtype}"
            )
        for name in ("prompt_mask", "response_mask", "answer_tokens", "credit_mask"):
            mask = getattr(place, name)
            if mask.shape != token_ids.shape or mask.dtype != torch.bool or mask.device.type != "cpu":
                raise ValueError(
                    f"place.{name} must be bool [N] = [{len(token_ids)}] on the CPU, got {list(mask.shape)} "
                    f"{mask.dtype} on {mask.device}"
                )
        self.model, self.token_ids, self.place = model, token_ids.cpu(), place
        self.other, self.flashtrace = other, flashtrace
        self._heads = heads
        self._known: dict[Hashable, Any] = {}
        self._rows: dict[Hashable, BlockedRows] = {}

    def __len__(self) -> int:
        """N."""
        return len(self.token_ids)

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """What `compute` gives, computed the first time that anybody asks under this key."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def sinks(self, preset: str) -> Tensor:
        """[N] bool on the CPU: the tokens at which flow ends and from which attention to the answer is read."""
        return sinks_of(self.place.answer_tokens, preset)

    def rows(
        self,
        layers: Layers = "middle",
        weights: str = "attention",
        heads: Mapping[int, Sequence[int]] | None = None,
        *,
        first: str = "kept",
        control: str | None = None,
    ) -> BlockedRows:
        """Attention rows out of the one capture, as `Capture.rows` has them.

        Args:
            layers: "middle", "all" or layer numbers; not read where `heads` (layer number -> heads) are given.
            weights: "attention" or "value_norm".
            first: "dropped": nothing attends to the first token, and rows sum to less.
            control: one of `CONTROLS`, or None.
        """
        check_kind(weights)
        _choice("first", first, ("kept", "dropped"))
        chosen = None if heads is None else tuple((layer, tuple(some)) for layer, some in sorted(heads.items()))
        key = (_hashable(layers), weights, chosen, first, control)
        rows = self._rows.pop(key, None) or self._read(layers, weights, heads, first, control)
        self._rows[key] = rows  # as the latest
        for oldest in list(self._rows)[:-KEPT_ROWS]:
            del self._rows[oldest]
        return rows

    def _read(
        self,
        layers: Layers,
        weights: str,
        heads: Mapping[int, Sequence[int]] | None,
        first: str,
        control: str | None,
    ) -> BlockedRows:
        if control is not None:
            _choice("control", control, CONTROLS)
        captured = self.captured(of_other=control == "random_model")
        if heads is None:
            heads = {layer: range(captured.num_heads[layer]) for layer in choose_layers(captured.layers, layers)}
        rows: BlockedRows = captured.rows(0, torch.arange(len(self)), heads=heads, weights=weights)
        if first == "dropped":
            rows = _WithoutFirst(rows)
        if control in (None, "random_model"):
            return KeptRows(rows)
        if len(self) > LONGEST_CONTROL:
            raise ValueError(
                f"control={control!r} rearranges whole rows, which is for traces of at most {LONGEST_CONTROL} tokens, "
                f"got {len(self)}: leave longer traces out of sanity checks"
            )
        W = dense(rows)
        changed = by_position(W) if control == "positions" else shuffled(W, self.token_ids)
        return DenseRows(changed.to(captured.device))

    def captured(self, *, of_other: bool = False) -> Capture:
        """Queries, keys and value norms of all layers of the model (or of `other`)."""
        if of_other and self.other is None:
            raise ValueError(
                'control "random_model" needs a model of the same architecture with random weights: '
                "Reading(model, token_ids, place, other=...)"
            )
        model = self.other if of_other else self.model
        assert model is not None

        def read() -> Capture:
            # In chunks where a Tracer would go so: activations of a long trace take more memory than all that is kept.
            return capture(model, self.token_ids[None], layers="all", values=True, chunk=Options().chunk_of(len(self)))

        return self.once(("captured", of_other), read)

    def predictions(self) -> Predictions:
        """Entropy, gradient norm and log-probability of every token, each [1, N]."""
        return self.once("predictions", lambda: predictions(self.model, self.token_ids[None]))

    def heads(self) -> HeadGroups:
        """The local and the global heads: those given, or calibrated on this trace."""
        if self._heads is not None:
            return self._heads
        return self.once("heads", lambda: heads_of(self.model, [(self.token_ids, self.place.spans())]))


def heads_of(model: nn.Module, traces: Sequence[tuple[Tensor, Spans]]) -> HeadGroups:
    """The local and the global heads of a model, from the token ids [N] and spans of some traces."""
    ids = pad_sequence([token_ids for token_ids, _ in traces], batch_first=True)
    real = pad_sequence([torch.ones_like(token_ids) for token_ids, _ in traces], batch_first=True)
    device = device_of(model)
    return calibrate(model, ids.to(device), real.to(device), [spans for _, spans in traces])


def random_twin(model: Any, seed: int) -> nn.Module:
    """A model of the same configuration with random weights, as it would be before training: see `Reading.other`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = type(model)(model.config)
    like = next(model.parameters())
    return twin.to(device=like.device, dtype=like.dtype).eval()


Signal = Callable[[Reading], Tensor]
"""Gives the scores of a reading's tokens: float64 [N] on the CPU."""


def _hashable(layers: Layers) -> Hashable:
    return layers if isinstance(layers, str) else tuple(layers)


def _choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


# --- rows that have lost something ------------------------------------------------------------------------------------


class _WithoutFirst(BlockedRows):
    """Rows in which nothing attends to the first token. What it had is gone, as rows aren't scaled up: that would give
    its third of all attention to distant tokens, and ruin the short ways."""

    def __init__(self, rows: BlockedRows) -> None:
        self.num_tokens, self.starts, self._rows = rows.num_tokens, rows.starts, rows

    def block(self, start: int) -> RowBlock:
        weight = self._rows.block(start).weight.clone()
        weight[:, 0] = 0
        return RowBlock(start, weight)


def dense(rows: BlockedRows) -> Tensor:
    """[N, N] float32 or float64, on the CPU, where sums come out the same each time."""
    N = rows.num_tokens
    parts = [F.pad(weight.cpu(), (0, N - weight.shape[1])) for _, weight in rows.blocks()]
    return torch.cat(parts)


def by_position(W: Tensor) -> Tensor:
    """[N, N] rows that hold where the attention of W [N, N] (on the CPU) goes, and nothing of what stands there.

    A weight is the mean of all weights of the same kind: to the token itself; to the first token; to a token at this
    distance. Then each row is scaled to the sum that it had (1, but in models with sink logits). This keeps all that is
    common to the rows, the decay with distance and the pull of the first token; uniform rows would lose both, and be
    too easy to beat. A large distance occurs in a few rows only, and its mean alone would tell what the last rows,
    those of the answer, read: so distances within 10 % of each other share a weight, which is the mean of hundreds.
    """
    N = len(W)
    place = torch.arange(N)
    distance = place[:, None] - place
    # Counted from the largest distance down, so that the farthest group is not cut short.
    group = ((N - 1) / distance.clamp(min=1)).log().div(math.log(_RATIO)).floor().long() + 2
    group[:, 0] = 1
    group.fill_diagonal_(0)
    past = distance >= 0
    past[0, 0] = False  # both the first token and itself: it tells nothing about either
    total = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    count = total.clone()
    total.index_add_(0, group[past], W[past].double())
    count.index_add_(0, group[past], torch.ones_like(W[past]).double())
    typical = (total / count.clamp(min=1))[group] * (distance >= 0)
    scale = W.double().sum(1) / typical.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    out = typical * scale[:, None]
    out[0, 0] = W[0, 0]
    return out.to(W)


def shuffled(W: Tensor, token_ids: Tensor) -> Tensor:
    """[N, N] the weights of each row k of W [N, N] (on the CPU) in random order among its keys 0..k-1.

    The diagonal stays. The order depends on the token ids [N] alone. Lost are content and position alike; kept are how
    sharp each row is, and its sum.
    """
    digest = hashlib.sha256(f"shuffled:{','.join(map(str, token_ids.tolist()))}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    out = W.clone()
    for k in range(2, len(W)):
        out[k, :k] = W[k, torch.randperm(k, generator=generator)]
    return out


# --- signals that read rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowSignal:
    """Flow or reach of every token, as a `Tracer` with the same options gives them.

    Attributes:
        score: "flow" (throughput), "reach", or "mix": the geometric mean of both, each divided by its sum over
            `credit_mask`.
        preset: "flowgraph" or "paper": which rows stand for the answer.
        weights: "attention" or "value_norm".
        mode: "exact" or "sparse".
        layers: "middle", "all" or layer numbers.
        first: "kept", or "dropped": nothing attends to the first token, and rows are not scaled up for it.
        control: None, or one of `CONTROLS`.
    """

    score: str = "flow"
    preset: str = "flowgraph"
    weights: str = "attention"
    mode: str = "exact"
    layers: Layers = "middle"
    first: str = "kept"
    control: str | None = None

    def __post_init__(self) -> None:
        _choice("score", self.score, ("flow", "reach", "mix"))
        _choice("mode", self.mode, ("exact", "sparse"))
        _check_rows(self)

    def name(self) -> str:
        """The score and what differs from the defaults: "flow", "reach/value_norm/sparse"."""
        return _name(self.score, self)

    def __call__(self, reading: Reading) -> Tensor:
        flow, reach = reading.once(replace(self, score="mix"), lambda: self._solve(reading))
        if self.score == "mix":
            return mixed(flow, reach, reading.place.credit_mask)
        return (flow if self.score == "flow" else reach).clone()

    def _solve(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """(throughput [N], reach [N])."""
        rows = reading.rows(self.layers, self.weights, first=self.first, control=self.control)
        device = reading.captured(of_other=self.control == "random_model").device
        roles: dict[str, Any] = {
            "prompt_mask": reading.place.prompt_mask.to(device),
            "answer_mask": reading.sinks(self.preset).to(device),
        }
        if self.mode == "exact":
            flow = exact_flow(rows, edges=TopK(1), **roles)  # nobody looks at its edges
        else:
            flow = trace_flow(sparse_graph(rows, **roles))
        return flow.throughput.double().cpu(), flow.reach.double().cpu()


@dataclass(frozen=True)
class AttentionSignal:
    """The mean attention that a token gets from the rows that stand for the answer. Attributes as in `FlowSignal`."""

    preset: str = "flowgraph"
    weights: str = "attention"
    layers: Layers = "middle"
    first: str = "kept"
    control: str | None = None

    def __post_init__(self) -> None:
        _check_rows(self)

    def name(self) -> str:
        """As `FlowSignal.name`: "answer_attention", "answer_attention/value_norm"."""
        return _name("answer_attention", self)

    def __call__(self, reading: Reading) -> Tensor:
        rows = reading.rows(self.layers, self.weights, first=self.first, control=self.control)
        return answer_attention(rows, reading.sinks(self.preset))


_OfRows = FlowSignal | AttentionSignal


def _check_rows(signal: _OfRows) -> None:
    """Check what both kinds of signals say about rows, and make layer numbers hashable."""
    _choice("preset", signal.preset, PRESETS)
    check_kind(signal.weights)
    _choice("first", signal.first, ("kept", "dropped"))
    if signal.control is not None:
        _choice("control", signal.control, CONTROLS)
    object.__setattr__(signal, "layers", _hashable(signal.layers))


def _name(score: str, signal: _OfRows) -> str:
    layers = signal.layers if isinstance(signal.layers, str) else "layers_" + "_".join(map(str, signal.layers))
    parts = {
        "flowgraph": signal.preset,
        "attention": signal.weights,
        "exact": getattr(signal, "mode", "exact"),
        "middle": layers,
        "first_kept": f"first_{signal.first}",
    }
    changed = [part for default, part in parts.items() if part != default]
    return "/".join([score, *changed, *([signal.control] if signal.control else [])])


def shares(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [N] as shares of their sum over the mask [N]; all 0 if that is 0."""
    total = scores[mask].sum()
    return scores / total if total > 0 else torch.zeros_like(scores)


def mixed(flow: Tensor, reach: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean [N] of the shares of flow and reach."""
    return (shares(flow, mask) * shares(reach, mask)).sqrt()


# --- the others -------------------------------------------------------------------------------------------------------


def _entropy(reading: Reading) -> Tensor:
    return reading.predictions().entropy[0].double().cpu()


def _gradient_norm(reading: Reading) -> Tensor:
    return reading.predictions().gradient_norm[0].double().cpu()


def _future_attention(reading: Reading) -> Tensor:
    rows = reading.rows(heads=by_layer(reading.heads().global_heads))
    return future_attention(rows, reading.place.response_mask)


def _windowed_distance(reading: Reading) -> Tensor:
    rows = reading.rows(heads=by_layer(reading.heads().local_heads))
    return variation(windowed_distance(rows, reading.place.response_mask), reading.place.response_mask)


def _random(seed: int) -> Signal:
    return lambda reading: random_scores(reading.token_ids, seed).double()


def _rollout(preset: str) -> Signal:
    def both(reading: Reading, sinks: Tensor) -> Tensor:
        return rollout(layer_rows(reading.captured(), 0, torch.arange(len(reading))), sinks)

    return _by_preset("rollout", preset, both)


def _routes(preset: str) -> Signal:
    return _by_preset("routes", preset, lambda reading, sinks: routes(reading.model, reading.token_ids, sinks))


def _by_preset(name: str, preset: str, both: Callable[[Reading, Tensor], Tensor]) -> Signal:
    """A signal for which the sinks of all presets [S, N] cost little more than those of one."""

    def signal(reading: Reading) -> Tensor:
        sinks = torch.stack([reading.sinks(one) for one in PRESETS])
        scores = reading.once(name, lambda: both(reading, sinks))
        return scores[list(PRESETS).index(preset)].clone()

    return signal


def _gradient_input(reading: Reading) -> Tensor:
    return gradient_input(reading.model, reading.token_ids, reading.place.answer_tokens)


def _recency(reading: Reading) -> Tensor:
    return recency(len(reading))


def _flashtrace(reading: Reading) -> Tensor:
    if reading.flashtrace is None:
        raise ValueError(
            "signal 'flashtrace' needs a function that runs it: Reading(model, token_ids, place, flashtrace=...)"
        )
    return reading.flashtrace(reading).double().cpu()


def _signals() -> dict[str, Signal]:
    flows = [
        FlowSignal(score, preset, weights, mode)
        for score, preset, weights, mode in product(
            ("flow", "reach"), PRESETS, ("attention", "value_norm"), ("exact", "sparse")
        )
    ]
    attention = [AttentionSignal(), AttentionSignal(preset="paper"), AttentionSignal(weights="value_norm")]
    controls = [FlowSignal(score, control=control) for score in ("flow", "reach") for control in CONTROLS]
    real: list[_OfRows] = [*flows, FlowSignal("mix"), *attention]
    sane: list[_OfRows] = [*controls, AttentionSignal(control="random_model")]
    return {
        **{signal.name(): signal for signal in real},
        "rollout": _rollout("flowgraph"),
        "rollout/paper": _rollout("paper"),
        "routes": _routes("flowgraph"),
        "routes/paper": _routes("paper"),
        "gradient_input": _gradient_input,
        "entropy": _entropy,
        "gradient_norm": _gradient_norm,
        "future_attention": _future_attention,
        "windowed_distance": _windowed_distance,
        "recency": _recency,
        "random": _random(0),
        "random/1": _random(1),
        "random/2": _random(2),
        "flashtrace": _flashtrace,
        **{signal.name(): signal for signal in sane},
    }


SIGNALS: dict[str, Signal] = _signals()
"""Every signal that users may ask for, by name. Others are `FlowSignal`s and `AttentionSignal`s with other fields."""


def scores_of(reading: Reading, names: Sequence[str]) -> dict[str, Tensor]:
    """The scores [N] of the named signals.

    Raises:
        ValueError: an unknown name, a signal that lacks what it needs, or one whose scores break the laws at the top.
    """
    if unknown := [name for name in names if name not in SIGNALS]:
        raise ValueError(f"unknown signal {', '.join(map(repr, unknown))}; known are {', '.join(SIGNALS)}")
    return {name: _checked(name, SIGNALS[name](reading), len(reading)) for name in names}


def _checked(name: str, scores: Tensor, num_tokens: int) -> Tensor:
    if scores.shape != (num_tokens,):
        raise ValueError(f"signal {name!r} gave scores {list(scores.shape)}, not [N] = [{num_tokens}]")
    scores = scores.double().cpu()
    if not ((scores >= 0) & scores.isfinite()).all():
        at = int((~((scores >= 0) & scores.isfinite())).nonzero()[0])
        raise ValueError(f"signal {name!r} gave {float(scores[at])} at token {at}; scores must be finite and >= 0")
    return scores
