"""Scorer: rollouts in, token weights out, whatever their layout; what one bad rollout costs is itself alone.

    samples_of -> chunks of a token budget -> flow (or a baseline) -> scores -> weights_from_scores -> Scored

Each trace is by itself: the weights of a rollout are those it has alone, up to what the model's own forward pass
does with pads (about 1e-6 in float32). With the same queries and keys the scores are the same to the bit.

Shapes: S samples, N_i tokens of sample i (no pads), B rows of a chunk, T their length with pads.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowgraph.capture import Capture
from flowgraph.credit import weights_from_scores
from flowgraph.rl.baselines import BASELINES, NEED_HEADS, Baseline, calibrate
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.samples import Layout, Sample, samples_of
from flowgraph.spans import Spans, locate
from flowgraph.tracer import Tracer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleScore:
    """What is known of one sample.

    Attributes:
        scores: [N] float32 on the CPU, the throughput (reach, baseline); 0 if it could not be scored.
        mask: [N] bool, the tokens that may get credit.
        flags: "no_answer", "cut_off", "several_answers", "tail_answer", "no_flow"; "empty": there is no response;
            "failed": see `error`.
        text: the tokens as text; None without a tokenizer.
        error: why it could not be scored; None if it could.
    """

    scores: Tensor
    mask: Tensor
    flags: tuple[str, ...]
    text: list[str] | None = None
    error: str | None = None

    @classmethod
    def blank(cls, sample: Sample, flag: str, error: str | None = None) -> SampleScore:
        """Uniform: no token of the sample gets credit."""
        return cls(torch.zeros(len(sample)), torch.zeros(len(sample), dtype=torch.bool), (flag,), error=error)


class Scored(Sequence[Tensor]):
    """The weights of S samples, [N_i] float32 on the CPU each, in the order they came in.

    Attributes:
        weights, scores, masks: one tensor [N_i] per sample: what the loss is multiplied with, what it comes from, and
            the tokens that may get credit.
        flags: one tuple per sample, see `SampleScore`. failed: sample -> why its weights are uniform.
        text: per sample its tokens as text, or None.
    """

    def __init__(self, samples: Sequence[Sample], found: Sequence[SampleScore], config: FlowConfig) -> None:
        self._samples, self._found = list(samples), list(found)
        self.scores = [one.scores for one in found]
        self.masks = [one.mask for one in found]
        self.flags = [one.flags for one in found]
        self.text = [one.text for one in found]
        self.failed = {number: one.error for number, one in enumerate(found) if one.error is not None}
        self.weights = _weights(self.scores, self.masks, config)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self.weights[index]

    def __len__(self) -> int:
        return len(self.weights)

    def one(self, number: int) -> SampleScore:
        """All that is known of one sample."""
        return self._found[number]

    def to_layout(self, shape: tuple[int, int]) -> Tensor:
        """Weights [B, T] on the CPU, in the padded or packed layout that came in; 1 at pads."""
        out = torch.ones(shape)
        for sample, weights in zip(self._samples, self.weights, strict=True):
            out[sample.row, sample.positions] = weights
        return out

    def __repr__(self) -> str:
        return f"Scored({len(self)} samples, {len(self.failed)} failed)"


class Credits:
    """What every scorer can do, wherever it runs: `credits`, from the `score` of a subclass."""

    config: FlowConfig

    def score(self, samples: Sequence[Sample]) -> list[SampleScore]:
        """One `SampleScore` per sample, in order."""
        raise NotImplementedError

    def credits(
        self,
        token_ids: Layout,
        response_mask: Layout,
        *,
        attention_mask: Tensor | None = None,
        prompt_mask: Layout | None = None,
        tool_mask: Layout | None = None,
        position_ids: Tensor | None = None,
        truncated: Sequence[bool] | Tensor | None = None,
    ) -> Scored:
        """Token weights of rollouts in any layout.

        Args:
            token_ids: [B, T] padded left or right, with `attention_mask`; packed, with `position_ids`; or jagged: a
                list of [N_i], or a nested tensor. All masks have the same layout; bool, or 0 and 1.
            response_mask: the tokens that the model wrote. What stands before its first token is the prompt, holes
                after it are tool output: read, never credited.
            prompt_mask, tool_mask: to say it otherwise.
            truncated: [S] the response was cut off before its end.

        Raises:
            ValueError: arguments that don't fit each other. A sample that can't be scored raises nothing: its weights
                are 1, its flag "failed", the reason in `Scored.failed`.
        """
        samples = samples_of(
            token_ids,
            response_mask,
            attention_mask=attention_mask,
            prompt_mask=prompt_mask,
            tool_mask=tool_mask,
            position_ids=position_ids,
            truncated=truncated,
        )
        return Scored(samples, self.score(samples), self.config)

    def refresh(self, weights: Any) -> None:
        """Take over the weights of a newer policy."""
        raise NotImplementedError


class Scorer(Credits):
    """Scores rollouts with a model of this process: the policy itself, a copy of it, or a smaller one.

    Args:
        model: as for a `Tracer`. A smaller one must have the tokenizer of the policy.
        tokenizer: its tokenizer, in whose text answers are found.
        config: a `FlowConfig`; default: `FlowConfig()`.

    Raises:
        ValueError: no tokenizer.

    Example:
        >>> scored = Scorer(model, tokenizer).credits(input_ids, response_mask, attention_mask=attention_mask)
        >>> scored[0]                       # [N] weights of the first sample, over its real tokens
        >>> scored.to_layout(input_ids.shape)
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: FlowConfig | None = None) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer is None: answers are found in the text of responses; give that of the policy")
        self.model, self.tokenizer = model, tokenizer
        self.config = FlowConfig() if config is None else config
        self.tracer = Tracer(model, tokenizer, **self.config.options)
        self._baseline: Baseline | None = None
        if self.config.score in BASELINES:
            self._baseline = Baseline(
                self.config.score, model, layers=self.config.layers, heads=self.config.heads, seed=self.config.seed
            )

    def check(self) -> None:
        """Score six tokens, so that a model, a layer or an option that cannot work says so now, and not by samples.

        Raises:
            ValueError: what does not work.
        """
        ids, place = torch.arange(6) % self._words, torch.arange(6)
        baseline = self._baseline
        try:
            if baseline is None or (baseline.name in NEED_HEADS and baseline.heads is None):
                self.tracer.from_ids(ids[None], prompt_mask=(place < 2)[None], sink_mask=(place == 4)[None])
            else:
                spans = locate(ids, place < 2, tokenizer=self.tokenizer, answer_tokens=place == 4)
                baseline(ids[None].to(self._device), None, [spans])
        except ValueError as error:
            raise ValueError(f"{type(self.model).__name__} can't be traced: {error}") from error

    @property
    def _words(self) -> int:
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def score(self, samples: Sequence[Sample]) -> list[SampleScore]:
        """Score samples in chunks of `config.max_batch_tokens`; one that can't be scored costs no other."""
        found: dict[int, SampleScore] = {}
        words = self._words
        sound = []
        for number, sample in enumerate(samples):
            if not sample.response_mask.any():
                found[number] = SampleScore.blank(sample, "empty")
            elif not ((sample.token_ids >= 0) & (sample.token_ids < words)).all():
                # Found out here: on a GPU it would end the process.
                why = f"token_ids must be in 0..{words - 1}, the embeddings of the model"
                found[number] = SampleScore.blank(sample, "failed", why)
            elif (unread := self._without_answer(sample)) is not None:
                found[number] = unread
            else:
                sound.append(number)
        self._calibrate([samples[number] for number in sound])
        for chunk in chunks([len(samples[number]) for number in sound], self.config.max_batch_tokens):
            numbers = [sound[place] for place in chunk]
            some = [samples[number] for number in numbers]
            scores = isolated(some, partial(self._score_chunk, some))
            found |= zip(numbers, scores, strict=True)
        return [found[number] for number in range(len(samples))]

    def refresh(self, weights: Mapping[str, Tensor] | nn.Module | str | Path) -> None:
        """Take over the weights of a newer policy.

        Args:
            weights: a state dict, a model with the same parameters, or the folder of a checkpoint of transformers.

        Raises:
            ValueError: names the weights that are missing, unknown or of another shape; then nothing has changed.
            OSError, SafetensorError: the folder is not there, or its files are not whole; nothing has changed either.
        """
        if isinstance(weights, str | Path):
            weights = _of_checkpoint(self.model, Path(weights))
        given: Any = weights.state_dict() if isinstance(weights, nn.Module) else weights
        load_weights(self.model, given)

    def _without_answer(self, sample: Sample) -> SampleScore | None:
        """A response without an answer has no flow: it is not worth a forward pass. None for any other sample."""
        if self._baseline is not None or self.config.no_answer != "uniform":
            return None
        try:
            found = self._locate(sample)
        except ValueError:  # found again, and said, where it is traced
            return None
        if found.answer_mask.any():
            return None
        return SampleScore(
            torch.zeros(len(sample)), found.credit_mask, found.flags, self.tracer.pieces(sample.token_ids)
        )

    def _calibrate(self, samples: list[Sample]) -> None:
        """Find local and global heads once, for the baselines that need them, whatever the chunks and their order."""
        baseline = self._baseline
        if baseline is None or baseline.heads is not None or baseline.name not in NEED_HEADS or not samples:
            return
        longest = sorted(samples, key=lambda one: (-len(one), one.token_ids.tolist()))
        fitting = longest[: max(1, self.config.max_batch_tokens // len(longest[0]))][:8]
        for candidates in (fitting, *([one] for one in longest)):
            try:
                ids, real, spans = self._batch(candidates)
                baseline.heads = calibrate(self.model, ids, real, spans, layers=self.config.layers)
                return
            except ValueError:  # of a sample that can't be scored either, which then says why
                continue

    # --- one chunk ----------------------------------------------------------------------------------------------------

    def _score_chunk(self, chunk: list[Sample], places: list[int]) -> list[SampleScore]:
        samples = [chunk[place] for place in places]
        if self._baseline is not None:
            return self._score_baseline(self._baseline, samples)
        return trace_samples(self.tracer, samples)

    def _score_baseline(self, baseline: Baseline, samples: list[Sample]) -> list[SampleScore]:
        ids, real, spans = self._batch(samples)
        scores = baseline(ids, real, spans)
        return [
            SampleScore(score.float().cpu(), found.credit_mask, found.flags, self.tracer.pieces(one.token_ids))
            for one, score, found in zip(samples, scores, spans, strict=True)
        ]

    def _batch(self, samples: list[Sample]) -> tuple[Tensor, Tensor, list[Spans]]:
        """(ids [B, T], real [B, T], spans) of a chunk, where the model is."""
        spans = [self._locate(one) for one in samples]
        ids = _padded([one.token_ids for one in samples]).to(self._device)
        real = _padded([torch.ones(len(one), dtype=torch.bool) for one in samples]).to(self._device)
        return ids, real, spans

    def _locate(self, sample: Sample) -> Spans:
        config = self.config
        return locate(
            sample.token_ids,
            sample.prompt_mask,
            sample.response_mask & ~sample.tool_mask,  # rows of tool output say nothing of what the model looked at
            tokenizer=self.tokenizer,
            answer=config.answer,
            preset=config.preset,
            truncated=sample.truncated,
            no_answer=config.no_answer,
            tail_tokens=config.tail_tokens,
        )


def _padded(values: list[Tensor]) -> Tensor:
    """[B, T], pads (0 or False) on the right."""
    return pad_sequence(values, batch_first=True)


def isolated(samples: Sequence[Sample], score: Callable[[list[int]], list[SampleScore]]) -> list[SampleScore]:
    """Score samples together; if something in them can't be scored, each by itself: it costs no other.

    Args:
        score: places in `samples` -> their scores. Raises ValueError, or runs out of memory, if it can't.
    """

    def attempt(places: list[int]) -> list[SampleScore]:
        try:
            return score(places)
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(places) == 1:
                return [SampleScore.blank(samples[places[0]], "failed", str(error))]
        return [one for place in places for one in attempt([place])]

    return attempt(list(range(len(samples)))) if samples else []


def trace_samples(
    tracer: Tracer,
    samples: Sequence[Sample],
    lay_out: Callable[[list[Tensor]], Tensor] = _padded,
    captured: Capture | None = None,
) -> list[SampleScore]:
    """Trace samples in one batch.

    Args:
        lay_out: B tensors [N_i] -> [B, T], zeros elsewhere; default: pads on the right.
        captured: of a pass over the batch laid out like that; default: the tracer makes one.
    """
    traces = tracer.from_ids(
        lay_out([one.token_ids for one in samples]),
        lay_out([torch.ones(len(one), dtype=torch.bool) for one in samples]),
        lay_out([one.prompt_mask for one in samples]),
        response_mask=lay_out([one.response_mask | one.tool_mask for one in samples]),
        tool_mask=lay_out([one.tool_mask for one in samples]),
        truncated=[one.truncated for one in samples],
        captured=captured,
    )
    return [
        SampleScore(
            # Copies: a slice would keep the whole batch alive, and travel with it to other processes.
            trace.credit.scores.float().cpu().clone(),
            trace.graph.credit_mask.cpu().clone(),
            trace.flags,
            trace.text,
        )
        for trace in traces
    ]


def chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Places of samples, similar lengths together: each chunk at most `max_tokens` with its pads, or one sample."""
    chunk: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if chunk and (len(chunk) + 1) * lengths[place] > max_tokens:
            yield chunk
            chunk = []
        chunk.append(place)
    if chunk:
        yield chunk


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a state dict into a model in place, all of it or nothing.

    Weights that share their memory with another one (a tied output head) may be left out, as checkpoints do.

    Raises:
        ValueError: names what is missing, unknown or of another shape.
    """
    own = model.state_dict()
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name, value in own.items() if name not in weights and value.data_ptr() not in given]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems := _problems(missing, unknown, shapes):
        raise ValueError(f"weights don't fit {type(model).__name__}: {problems}")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _problems(missing: list[str], unknown: list[str], shapes: list[str]) -> str:
    """What of a state dict does not fit, in words; empty if all of it does."""
    return "; ".join(
        f"{what} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
        for what, names in (("missing:", missing), ("unknown:", unknown), ("other shape:", shapes))
        if names
    )


_MERGE = "save the merged model (`merge_and_unload` of PEFT)"


def _of_checkpoint(model: Any, folder: Path) -> nn.Module:
    """A model of the same class and configuration with the weights of a checkpoint, and no others.

    The class knows tied and renamed weights; the configuration a folder of weights need not have.
    """
    if not folder.is_dir():  # transformers would ask the hub for it
        raise FileNotFoundError(f"{folder} is no folder: expected a checkpoint of transformers")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has adapters of PEFT apart from what they adapt: {_MERGE}")
    found, said = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=model.dtype,
        ignore_mismatched_sizes=True,  # they are named below, with the others
        output_loading_info=True,
    )
    # transformers draws at random what a checkpoint lacks, so the model always looks whole.
    unknown = sorted(said["unexpected_keys"])
    shapes = [
        f"{name} {list(given)} instead of {list(wanted)}" for name, given, wanted in sorted(said["mismatched_keys"])
    ]
    missing = sorted(said["missing_keys"])
    if unknown and not missing and not shapes:
        # Such as the head of a critic: the model has all of its own.
        logger.warning("%s holds weights that the scorer has no place for: %s", folder, _problems([], unknown, []))
    elif problems := _problems(missing, unknown, shapes):
        apart = any(".base_layer." in name or ".lora_" in name for name in unknown)
        advice = f"; these are weights of PEFT with adapters apart: {_MERGE}" if apart else ""
        raise ValueError(f"{folder} doesn't fit {type(model).__name__}: {problems}{advice}")
    return found


def warn_of(failed: Mapping[int, str], stacklevel: int = 2) -> None:
    """Say why samples have no credits. The same text is shown once (Python's default filter)."""
    for why in failed.values():
        warnings.warn(f"no credits for a response, its weights stay 1: {why}", stacklevel=stacklevel + 1)


def _weights(scores: list[Tensor], masks: list[Tensor], config: FlowConfig) -> list[Tensor]:
    if not scores:
        return []
    how = {name: getattr(config, name) for name in ("rule", "top", "gain", "temperature", "per")}
    weights = weights_from_scores(_padded(scores), _padded(masks), **how)
    return [row[: len(one)] for row, one in zip(weights, scores, strict=True)]
