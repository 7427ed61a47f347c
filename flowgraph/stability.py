r"""How much to trust a picture: the same trace under other choices, and how far its credits stay what they were.

A tracer's choices are varied, one at a time, and each trace is compared with the tracer's own (the default):

    edges       thresholds 1/64, 1/256, 1/1024, and exact
    layers      the early, middle and late third, all, and each layer of the default by itself
    heads       random halves of the heads of the default's layers
    preset      the other one
    answer      each other finder; `same_answer` says if it finds the same
    question    the tokens of the user's messages, or all of the prompt

    spearman    rank correlation of the scores over the tokens that may get credit (in both, where answers differ)
    overlap     of the tokens with the `top` highest scores, the share that both have; by chance it is `top`

`layer_agreement` is the mean rank correlation between any two layers of the default, each traced by itself;
`head_agreement` that between a random half of the heads and the other half. NaN: no answer, no flow, nothing to rank.

The model runs once: a variant is a `Tracer` with other options over the same queries and keys (of all softmax layers,
which have to fit into memory). Traces of at most 2,048 tokens keep the attention of the default as one matrix.

Shapes: N tokens, V variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from flowgraph.answers import FINDERS
from flowgraph.capture import Capture, Layers, capture, choose_layers, softmax_layers_of
from flowgraph.compare import mean_interval, plain
from flowgraph.credit import weights_from_scores
from flowgraph.options import LONG
from flowgraph.rows import BlockedRows, DenseRows
from flowgraph.spans import PRESETS, conversation, encode_messages, encode_text, question_of_messages
from flowgraph.sparsify import Threshold
from flowgraph.trace import Trace
from flowgraph.tracer import Messages, Tracer

THRESHOLDS = (64, 256, 1024)
GROUPS = ("edges", "layers", "heads", "preset", "answer", "question")
Heads = Mapping[int, Sequence[int]]
"""Layer -> its query heads that take part."""


@dataclass(frozen=True)
class Variant:
    """One other choice and what became of the credits.

    Attributes:
        group: of `GROUPS`. name: within it.
        spearman, overlap: with the default, NaN where there is nothing to compare.
        same_answer: are the answer's tokens the same? None: no answer was found.
    """

    group: str
    name: str
    spearman: float
    overlap: float
    same_answer: bool | None


@dataclass(frozen=True)
class Stability:
    """One trace under all variants.

    Attributes:
        tokens: N. mask_tokens: how many of them may get credit.
        answer, flags: of the default's trace. Without an answer there is no variant.
        top: the share of tokens that `overlap` is about. layers: of the default.
        layer_agreement, head_agreement: NaN if there is only one layer, or one head, or their group wasn't asked for.
    """

    tokens: int
    mask_tokens: int
    answer: str | None
    flags: tuple[str, ...]
    top: float
    layers: list[int]
    layer_agreement: float
    head_agreement: float
    variants: list[Variant]

    def __getitem__(self, name: str) -> Variant:
        """A variant by its name."""
        found = [one for one in self.variants if one.name == name]
        if not found:
            raise KeyError(f"no variant {name!r}; there are {', '.join(one.name for one in self.variants)}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: None for NaN."""
        return plain(asdict(self))


def stability(
    tracer: Tracer,
    prompt: str | Messages | Tensor,
    response: str | Messages | Tensor | None = None,
    *,
    truncated: bool = False,
    question_mask: Tensor | None = None,
    answer_tokens: Tensor | None = None,
    groups: Sequence[str] = GROUPS,
    halves: int = 4,
    seed: int = 0,
) -> Stability:
    """Trace a response under every variant of a tracer's choices.

    Args:
        tracer: what it does is the default.
        prompt, response, truncated: as in `Tracer.__call__`; or both as token ids [P] and [R].
        question_mask, answer_tokens: [P + R] bool, for token ids, as in `Tracer.from_ids`. With `answer_tokens` no
            other finder is tried.
        groups: which choices to vary.
        halves: random divisions of the heads into two halves; each half is a variant. seed: of these.

    Raises:
        ValueError: as in `Tracer`, or an unknown group.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"groups holds {unknown[0]!r}; there are {', '.join(GROUPS)}")
    if halves < 1:
        raise ValueError(f"halves must be at least 1, got {halves}")
    given = {"question_mask": question_mask, "answer_tokens": answer_tokens}
    study = _Study(tracer, _encode(tracer, prompt, response, given), truncated)
    return study.run(study.capture("all" if "layers" in groups else tracer.options.layers), groups, halves, seed)


def layer_agreement(
    tracer: Tracer,
    prompt: str | Messages | Tensor,
    response: str | Messages | Tensor | None = None,
    *,
    truncated: bool = False,
    question_mask: Tensor | None = None,
    answer_tokens: Tensor | None = None,
) -> float:
    """Mean rank correlation between any two of the tracer's layers, each traced by itself. Arguments: `stability`."""
    given = {"question_mask": question_mask, "answer_tokens": answer_tokens}
    study = _Study(tracer, _encode(tracer, prompt, response, given), truncated)
    study.capture(tracer.options.layers)
    return _agreement([study.scores({layer: heads}) for layer, heads in study.heads.items()])


def summarize(found: Sequence[Stability], *, seed: int = 0) -> list[dict[str, Any]]:
    """Many traces, one row per variant, and one each for the agreement of layers and of heads, where there is any.

    Returns:
        Rows of group, name; n, the traces that have a number; spearman and overlap, each as (mean, low, high) with the
        bootstrap interval over traces; same_answer, the share of traces where the answer is the same. The halves of
        heads are one row, of each trace their mean.

    Raises:
        ValueError: there is no trace.
    """
    if not found:
        raise ValueError("found is empty: there is no trace to summarize")
    rows: dict[tuple[str, str], list[list[Variant]]] = {}
    for one in found:
        of_trace: dict[tuple[str, str], list[Variant]] = {}
        for variant in one.variants:
            name = "random half" if variant.group == "heads" else variant.name
            of_trace.setdefault((variant.group, name), []).append(variant)
        for key, variants in of_trace.items():
            rows.setdefault(key, []).append(variants)

    def row(group: str, name: str, spearman: Sequence[float], overlap: Sequence[float], same: float) -> dict[str, Any]:
        return {
            "group": group,
            "name": name,
            "n": sum(value == value for value in spearman),
            "spearman": mean_interval(spearman, seed=seed),
            "overlap": mean_interval(overlap, seed=seed),
            "same_answer": same,
        }

    table = []
    for (group, name), traces in rows.items():
        spearman = [_mean([variant.spearman for variant in variants]) for variants in traces]
        overlap = [_mean([variant.overlap for variant in variants]) for variants in traces]
        same = _mean([float(variants[0].same_answer is True) for variants in traces])
        table.append(row(group, name, spearman, overlap, same))
    for name in ("layer_agreement", "head_agreement"):
        values = [getattr(one, name) for one in found]
        if any(value == value for value in values):  # else their group was not asked for
            table.append(row("agreement", name, values, [], float("nan")))
    return table


# ------------------------------------------------------------------------- one study


class _Encoded(NamedTuple):
    """A trace as `Tracer.from_ids` takes it."""

    ids: Tensor
    """[1, N]."""
    masks: dict[str, Tensor]
    """[1, N] each; without `question_mask`."""
    asked: Callable[[], Tensor] | None
    """Gives [1, N] the question proper, where there is more to the prompt."""
    is_asked: bool
    """Is that the default's question?"""


def _encode(
    tracer: Tracer,
    prompt: str | Messages | Tensor,
    response: str | Messages | Tensor | None,
    given: Mapping[str, Tensor | None],
) -> _Encoded:
    masks = {name: mask[None] for name, mask in given.items() if mask is not None}
    question, of_user = masks.pop("question_mask", None), tracer.options.question == "user"
    if isinstance(prompt, Tensor):
        if not isinstance(response, Tensor):
            raise ValueError(f"response must be token ids [R] like prompt, got {type(response).__name__}")
        if of_user and question is None:
            raise ValueError('question="user" needs question_mask here: ids do not say what the user wrote')
        ids = torch.cat([prompt, response])
        masks["prompt_mask"] = (torch.arange(len(ids)) < len(prompt))[None]
        return _Encoded(ids[None], masks, None if question is None else lambda: question, question is not None)
    if masks or question is not None:
        raise ValueError(
            f"{next(name for name in given if given[name] is not None)} goes with token ids, not with text"
        )
    if tracer.tokenizer is None:
        raise ValueError("text needs a tokenizer: Tracer(model, tokenizer); or pass token ids")
    if isinstance(response, Tensor) or (isinstance(prompt, str) and response is None):
        raise ValueError(f"response must be text like prompt, got {type(response).__name__}")
    asked = None
    if isinstance(prompt, str):
        if of_user:
            raise ValueError('question="user" needs chat messages as prompt, got a text')
        encoded = encode_text(tracer.tokenizer, prompt, cast(str, response))
    else:
        messages, first = conversation(prompt, response)
        encoded = encode_messages(tracer.tokenizer, messages, first)

        def asked() -> Tensor:
            return question_of_messages(tracer.tokenizer, messages, encoded, first)[None]

    masks = {"prompt_mask": encoded.prompt_mask[None], "response_mask": encoded.response_mask[None]}
    return _Encoded(encoded.token_ids[None], masks, asked, of_user)


class _Part:
    """Some layers and heads of a capture, in place of a `Capture`: what `Tracer.from_ids` asks of one."""

    def __init__(self, whole: Capture, heads: Heads) -> None:
        self.model, self.device, self.shape = whole.model, whole.device, whole.shape
        self.layers = sorted(heads)
        self._whole, self._heads = whole, heads
        self._dense: DenseRows | None = None

    def rows(self, row: int, positions: Tensor, weights: str = "attention", backend: str = "auto") -> BlockedRows:
        rows = self._whole.rows(row, positions, heads=self._heads, weights=weights, backend=backend)
        if rows.num_tokens > LONG:
            return rows
        if self._dense is None:  # several variants read the default's: its queries and keys are multiplied once
            N = rows.num_tokens
            blocks = [torch.nn.functional.pad(block, (0, N - block.shape[1])) for _, block in rows.blocks()]
            self._dense = DenseRows(torch.cat(blocks))
        return self._dense


class _Scores(NamedTuple):
    """What is kept of a trace: its edges would fill the memory. All [N], on the CPU."""

    scores: Tensor
    mask: Tensor
    sinks: Tensor
    answer: Tensor


class _Study:
    """The traces of one response."""

    def __init__(self, tracer: Tracer, encoded: _Encoded, truncated: bool) -> None:
        self.tracer, self.encoded, self.truncated = tracer, encoded, truncated

    def capture(self, layers: Layers) -> Trace:
        """Run the model; the trace of the default, which has `heads`."""
        ids, model = self.encoded.ids, self.tracer.model
        self._captured = capture(model, ids, layers=layers, values=self.tracer.options.weights == "value_norm")
        self.softmax = softmax_layers_of(model, ids)
        own = choose_layers(self.softmax, self.tracer.options.layers)
        self.heads = {layer: range(self._captured.num_heads[layer]) for layer in own}
        self._own = _Part(self._captured, self.heads)
        return self._trace(None)

    def _trace(self, heads: Heads | None, is_asked: bool | None = None, **options: Any) -> Trace:
        """By some heads, by default those of the default; and with other options."""
        part = self._own if heads is None else _Part(self._captured, heads)
        ids, masks, asked, is_asked_by_default = self.encoded
        is_asked = is_asked_by_default if is_asked is None else is_asked
        question = {"question_mask": asked()} if is_asked and asked is not None else {}
        options = vars(self.tracer.options) | {"layers": part.layers} | options
        options |= {"question": "user" if is_asked else "prompt", "keep_attention": False}
        tracer = Tracer(self.tracer.model, self.tracer.tokenizer, **options)
        given: dict[str, Any] = {**masks, **question, "truncated": [self.truncated], "captured": part}
        return tracer.from_ids(ids, **given)[0]

    def scores(self, heads: Heads | None = None, **options: Any) -> _Scores:
        return _scores(self._trace(heads, **options))

    def run(self, default: Trace, groups: Sequence[str], halves: int, seed: int) -> Stability:
        own, top = _scores(default), self.tracer.options.top
        found: dict[str, dict[str, _Scores]] = {group: {} for group in groups}
        if own.sinks.any():
            for group, name, scores in self._variants(default, groups, halves, seed):
                found[group][name] = scores
        single = [scores for name, scores in found.get("layers", {}).items() if name.startswith("layer ")]
        both = [list(found.get("heads", {}).values())[half:][:2] for half in range(0, 2 * halves, 2)]
        return Stability(
            tokens=len(default),
            mask_tokens=int(own.mask.sum()),
            answer=default.answer,
            flags=default.flags,
            top=top,
            layers=list(self.heads),
            layer_agreement=_agreement(single),
            head_agreement=_mean([_agreement(pair) for pair in both]),
            variants=[
                Variant(group, name, _spearman(own, scores), _overlap(own, scores, top), _same(own, scores))
                for group in groups
                for name, scores in found[group].items()
            ],
        )

    def _variants(
        self, default: Trace, groups: Sequence[str], halves: int, seed: int
    ) -> Iterator[tuple[str, str, _Scores]]:
        if "edges" in groups:
            for part in THRESHOLDS:
                yield "edges", f"1/{part}", self.scores(mode="edges", edges=Threshold(1 / part))
            yield "edges", "exact", self.scores(mode="exact", edges=None, solver="auto")
        if "layers" in groups:
            for name, heads in self._bands():
                yield "layers", name, self.scores(heads)
        if "heads" in groups:
            for name, heads in self._halves(halves, seed):
                yield "heads", name, self.scores(heads)
        if "preset" in groups:
            for preset in PRESETS:
                if preset != self.tracer.options.preset:
                    yield "preset", preset, self.scores(preset=preset)
        if "answer" in groups and "answer_tokens" not in self.encoded.masks and self.tracer.tokenizer is not None:
            for finder in FINDERS:
                if finder != default.spans.finder:
                    yield "answer", finder, self.scores(answer=finder, no_answer="uniform")
        if "question" in groups and self.encoded.asked is not None:
            is_asked = not self.encoded.is_asked
            yield "question", "user" if is_asked else "prompt", self.scores(is_asked=is_asked)

    def _bands(self) -> Iterator[tuple[str, Heads]]:
        """Bands and single layers that are not the default's own."""
        layers = self.softmax
        middle = choose_layers(layers, "middle")
        first = layers.index(middle[0])
        bands = {
            "early third": layers[:first],
            "middle third": middle,
            "late third": layers[first + len(middle) :],
            "all layers": layers,
        } | {f"layer {layer}": [layer] for layer in self.heads}
        for name, band in bands.items():
            if band and band != list(self.heads):
                yield name, {layer: range(self._captured.num_heads[layer]) for layer in band}

    def _halves(self, count: int, seed: int) -> Iterator[tuple[str, Heads]]:
        """The heads of all layers of the default, divided at random."""
        heads = [(layer, head) for layer, range_ in self.heads.items() for head in range_]
        draw = np.random.default_rng(seed)
        for number in range(1, count + 1) if len(heads) > 1 else ():
            order = draw.permutation(len(heads)).tolist()
            for side, chosen in (("a", order[: len(heads) // 2]), ("b", order[len(heads) // 2 :])):
                half: dict[int, list[int]] = {}
                for place in sorted(chosen):
                    half.setdefault(heads[place][0], []).append(heads[place][1])
                yield f"half {number}{side}", half


# ------------------------------------------------------------------------- two traces


def _scores(trace: Trace) -> _Scores:
    credit = trace.credit
    return _Scores(credit.scores.cpu(), credit.mask.cpu(), trace.graph.answer_mask.cpu(), trace.spans.answer_tokens)


def _spearman(one: _Scores, other: _Scores) -> float:
    mask = one.mask & other.mask
    x, y = one.scores[mask].double().numpy(), other.scores[mask].double().numpy()
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def _overlap(one: _Scores, other: _Scores, top: float) -> float:
    mask = one.mask & other.mask
    x, y = (weights_from_scores(scores, mask, "top", top=top, gain=2.0) > 1 for scores in (one.scores, other.scores))
    most = max(int(x.sum()), int(y.sum()))
    return int((x & y).sum()) / most if x.any() and y.any() else float("nan")


def _same(one: _Scores, other: _Scores) -> bool | None:
    return torch.equal(one.answer, other.answer) if other.sinks.any() else None


def _agreement(scores: Sequence[_Scores]) -> float:
    """Mean rank correlation of any two."""
    return _mean([_spearman(*pair) for pair in combinations(scores, 2)])


def _mean(values: Sequence[float]) -> float:
    """NaN left out; NaN if there is nothing else."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
