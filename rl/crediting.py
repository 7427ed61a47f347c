"""Crediting: one training step of any trainer, from its rollouts and advantages to a factor per token.

    A'[i, t] = factor[i, t] * A[i, t]

An adapter takes ids and masks out of its trainer's layout into lists without pads, asks for the factors, and
multiplies them into the advantages where the trainer keeps them. Everything else is here, once: which responses are
scored at all, weights, warm-up, signs, normalisation, and what there is to log.

    token ids, masks -> Scorer.credits (responses with an advantage only) -> schedule -> shape_advantages -> factors

What is defined: an advantage of 0, or of a sign that is not weighted, is not scored, its factors are 1; so are those of
a response without tokens to train on, without an answer, without flow, or that could not be scored, which is counted;
tool output keeps factor 1.

Shapes: S samples, N_i tokens of sample i: prompt and response, no pads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowgraph.options import Options
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.monitor import Monitor
from flowgraph.rl.samples import Jagged, Sample, samples_of
from flowgraph.rl.scorer import Credits, SampleScore, Scored, warn_of
from flowgraph.rl.shaping import shape_advantages, warmed

COUNTED = ("no_answer", "cut_off", "no_flow", "empty", "failed")
"""Flags whose share among the responses with an advantage is logged."""
_AFTER_SCORING = ("rule", "top", "gain", "temperature", "witnesses")
_SCORING = (*(option.name for option in fields(Options) if option.name not in _AFTER_SCORING), "seed", "heads")
"""Options that a score depends on: the scorer goes by its own."""
_SAID = {"score": "score_name"}
"""Option -> what to compare in its place, where two values may mean the same."""


class Factors(Sequence[Tensor]):
    """The factors of S samples, [N_i] float32 on the CPU each.

    Attributes:
        weights: [N_i] each, before `signs` and `normalize`, after warm-up. masks: the tokens that may get credit.
        counts: "samples", "scored" (those with an advantage that is weighted) and, among these, one number per flag of
            `COUNTED`.
        means: what `monitor` says of this step.
        seconds: how long it took.
        failed: sample -> why it has no credits.
    """

    def __init__(
        self,
        factors: list[Tensor],
        weights: list[Tensor],
        masks: list[Tensor],
        counts: Mapping[str, int],
        means: Mapping[str, float],
        seconds: float,
        failed: Mapping[int, str],
    ) -> None:
        self._factors = factors
        self.weights, self.masks = weights, masks
        self.counts, self.means, self.seconds, self.failed = dict(counts), dict(means), seconds, dict(failed)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._factors[index]

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def metrics(self) -> dict[str, float]:
        """For any logger: shares and means as "flow/..."."""
        found = {"scored": self.counts["scored"] / max(self.counts["samples"], 1), "seconds": self.seconds}
        if self.counts["scored"]:
            found |= {name: self.counts[name] / self.counts["scored"] for name in COUNTED}
        return {f"flow/{name}": float(value) for name, value in (found | self.means).items()}

    def __repr__(self) -> str:
        return f"Factors({len(self)} samples, {self.counts['scored']} scored, {len(self.failed)} failed)"


class Crediting:
    """Gives the rollouts of training steps their factors.

    Args:
        scorer: a `Scorer`, or anything else with its `credits`.
        config: default: the scorer's own. Another one may differ in what comes after the scores (`rule`, `gain`,
            `signs`, `per`, ...).

    Raises:
        ValueError: a config that names other scores than those which the scorer gives.
    """

    def __init__(self, scorer: Credits, config: FlowConfig | None = None) -> None:
        self.scorer = scorer
        self.config = scorer.config if config is None else config
        for name in _SCORING:
            wanted, given = (_said(config, name) for config in (self.config, scorer.config))
            if wanted != given:
                raise ValueError(
                    f"config has {name}={wanted!r}, but the scorer was made with {name}={given!r} and goes by that; "
                    "give both the same"
                )
        self.monitor = Monitor()

    def factors(
        self,
        token_ids: Jagged,
        response_mask: Jagged,
        advantages: Sequence[float | Tensor],
        *,
        step: int = 0,
        trained_mask: Jagged | None = None,
        truncated: Sequence[bool] | Tensor | None = None,
        rewards: Sequence[float] | Tensor | None = None,
        entropy: Jagged | None = None,
        scored: Scored | None = None,
    ) -> Factors:
        """Factors of one step.

        Args:
            token_ids: S tensors [N_i]: prompt and response without pads.
            response_mask: S masks [N_i] of the response; holes after its first token are tool output.
            advantages: S numbers, or tensors [N_i] (read where the response is trained on).
            step: the trainer's step, counted from 0, for warm-up and annealing.
            trained_mask: S masks [N_i], response tokens that have a loss; default: all of the response.
            truncated: [S] the response was cut off before its end.
            rewards: [S] for the log; default: the advantages.
            entropy: S tensors [N_i], of the policy's prediction of each token, for "entropy_overlap" in the log.
            scored: credits of all S samples, if they were taken before; they are weighted anew.

        Raises:
            ValueError: names the argument and the sample.
        """
        began = time.perf_counter()
        samples = samples_of(
            token_ids, response_mask, tool_mask=_tools(response_mask, trained_mask), truncated=truncated
        )
        trained = [one.response_mask & ~one.tool_mask for one in samples]
        signed = [_signs(number, *pair) for number, pair in enumerate(_pairs(advantages, trained))]
        if rewards is not None and len(rewards) != len(samples):
            raise ValueError(f"rewards must have one entry per sample, {len(samples)}, got {len(rewards)}")

        if entropy is not None and [len(one) for one in entropy] != [len(one) for one in samples]:
            raise ValueError(f"entropy must be {len(samples)} tensors [N_i], as long as token_ids each")

        blank = [n for n, one in enumerate(samples) if not trained[n].any() and _moves(advantages[n])]
        wanted = {"both": (-1, 1), "positive": (1,), "negative": (-1,)}[self.config.signs]
        chosen = [n for n, sign in enumerate(signed) if any((sign == one).any() for one in wanted)]
        found = self._scored([samples[n] for n in chosen], None if scored is None else [scored.one(n) for n in chosen])
        part = self.config.part(step)
        factors = [torch.ones(len(one)) for one in samples]
        weights = [torch.ones(len(one)) for one in samples]
        masks = [torch.zeros(len(one), dtype=torch.bool) for one in samples]
        for place, n in enumerate(chosen):
            weights[n] = warmed(found.weights[place], part)
            masks[n] = found.masks[place] & trained[n]
            shaped = shape_advantages(
                signed[n][None],
                weights[n][None],
                trained[n][None],
                signs=self.config.signs,
                normalize=self.config.normalize,
            )[0]
            factors[n] = torch.where(signed[n] != 0, shaped * signed[n], 1)
        failed = {chosen[place]: why for place, why in found.failed.items()}
        warn_of(failed, stacklevel=2)
        flags = [flag for one in found.flags for flag in set(one)] + ["empty"] * len(blank)
        counts = {"samples": len(samples), "scored": len(chosen) + len(blank)}
        counts |= {name: flags.count(name) for name in COUNTED}
        means = self._monitor(samples, found, chosen, weights, masks, advantages, rewards, entropy)
        return Factors(factors, weights, masks, counts, means, time.perf_counter() - began, failed)

    def _scored(self, samples: list[Sample], known: list[SampleScore] | None) -> Scored:
        return Scored(samples, self.scorer.score(samples) if known is None else known, self.config)

    def _monitor(
        self,
        samples: list[Sample],
        found: Scored,
        chosen: list[int],
        weights: list[Tensor],
        masks: list[Tensor],
        advantages: Sequence[float | Tensor],
        rewards: Sequence[float] | Tensor | None,
        entropy: Jagged | None,
    ) -> dict[str, float]:
        seen = [(place, n) for place, n in enumerate(chosen) if place not in found.failed]
        if not seen:
            return {}
        length = max(len(samples[n]) for _, n in seen)
        text = [[*(found.text[place] or []), *[""] * length][:length] for place, _ in seen]
        whole = [_mean(advantages[n], masks[n]) if rewards is None else float(rewards[n]) for _, n in seen]
        return self.monitor(
            _padded([found.scores[place] for place, _ in seen]),
            _padded([weights[n] for _, n in seen]),
            _padded([masks[n] for _, n in seen]),
            text=None if found.text[seen[0][0]] is None else text,
            entropy=None if entropy is None else _padded([entropy[n].detach().cpu().float() for _, n in seen]),
            rewards=torch.tensor(whole),
            token_ids=_padded([samples[n].token_ids for _, n in seen]),
        )


def _said(config: FlowConfig, name: str) -> Any:
    """The value of an option, the same for all ways to say it."""
    value = getattr(config, _SAID.get(name, name))
    return list(value) if isinstance(value, tuple) else value


def _padded(values: list[Tensor]) -> Tensor:
    return pad_sequence(values, batch_first=True)


def _tools(response_mask: Jagged, trained_mask: Jagged | None) -> list[Tensor] | None:
    """Response tokens that are not trained on."""
    if trained_mask is None:
        return None
    if len(trained_mask) != len(response_mask):
        raise ValueError(f"trained_mask has {len(trained_mask)} rows, response_mask {len(response_mask)}")
    pairs = zip(response_mask, trained_mask, strict=True)
    return [torch.as_tensor(said).cpu().bool() & ~torch.as_tensor(trained).cpu().bool() for said, trained in pairs]


def _pairs(advantages: Sequence[float | Tensor], trained: list[Tensor]) -> list[tuple[float | Tensor, Tensor]]:
    if len(advantages) != len(trained):
        raise ValueError(f"advantages must have one entry per sample, {len(trained)}, got {len(advantages)}")
    return list(zip(advantages, trained, strict=True))


def _signs(number: int, advantage: float | Tensor, trained: Tensor) -> Tensor:
    """[N] -1, 0 or 1; 0 where nothing is trained."""
    values = torch.as_tensor(advantage).detach().cpu().float()
    if values.ndim and values.shape != trained.shape:
        raise ValueError(
            f"advantages[{number}] must be a number or [N] = {list(trained.shape)}, got {list(values.shape)}"
        )
    values = values.expand(trained.shape)
    if (bad := trained & ~torch.isfinite(values)).any():
        token = int(bad.nonzero()[0])
        raise ValueError(f"advantages[{number}] is {float(values[token])} at token {token}: expected a finite number")
    return values.sign().where(trained, 0)


def _moves(advantage: Any) -> bool:
    return bool((torch.as_tensor(advantage) != 0).any())


def _mean(advantage: float | Tensor, mask: Tensor) -> float:
    values = torch.as_tensor(advantage).detach().cpu().float().expand(mask.shape)
    return float(values[mask].mean()) if mask.any() else 0.0
