"""FlowConfig: how a trainer gets its credits; the one place where all of it is named and checked."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

from flowgraph.credit import check_rule
from flowgraph.options import Options
from flowgraph.rl.baselines import BASELINES, HeadGroups
from flowgraph.rl.shaping import Signs, schedule
from flowgraph.sparsify import Mass, Threshold, TopK


@dataclass(frozen=True)
class FlowConfig(Options):
    """How a trainer gets its credits: the `Options` of a `Tracer`, and what is done with the weights.

    `score` may also name a baseline of `flowgraph.rl.BASELINES` ("random", "entropy", ...): it then goes through the
    same recipe as flow, so that runs differ in nothing else.

    Attributes:
        witnesses: of `Options`; here 0, since a trainer asks for no estimates.
        signs: the advantages that are weighted: "both", only "positive" or only "negative".
        normalize: divide the weights of a response by their mean, so that its share of the update keeps its size.
        per: "sequence": a rule looks at each response by itself; "batch": at all tokens of the step at once.
        warmup_steps: steps over which the weights go linearly from 1 to what `gain` makes of them.
        anneal_after, anneal_steps: from that step on they go linearly back to 1, over so many steps; None: never.
        max_batch_tokens: tokens, pads included, of one forward pass for credits. A longer response goes alone.
        seed: of the baseline "random".
        heads: local and global heads of the baselines that need them; None: calibrated once, on the longest responses
            of the first call of each scorer. Give them where runs have to compare, or several processes to agree.
        scorer: the model or `Scorer` that traces; None: the policy itself. Another one must have the same tokenizer.
            Only for trainers that hold their policy in the same process (TRL).
        refresh_steps: copy the policy's weights into `scorer` every so many steps; 0: never.
        reuse: take credits in the forward pass that computes old log-probabilities where the trainer has one.
    """

    witnesses: int = 0
    signs: Signs = "both"
    normalize: bool = False
    per: str = "sequence"
    warmup_steps: int = 0
    anneal_after: int | None = None
    anneal_steps: int = 0
    max_batch_tokens: int = 16384
    seed: int = 0
    heads: HeadGroups | None = None
    scorer: Any = field(default=None, repr=False)
    refresh_steps: int = 0
    reuse: bool = True

    scores: ClassVar[tuple[str, ...]] = (*Options.scores, *BASELINES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signs not in get_args(Signs):
            raise ValueError(f"signs must be one of {list(get_args(Signs))}, got {self.signs!r}")
        check_rule(self.rule, self.top, self.gain, self.temperature, self.per)
        schedule(0, self.warmup_steps, self.anneal_after, self.anneal_steps)
        if self.question != "prompt":
            raise ValueError(f'question must be "prompt", got {self.question!r}: a trainer keeps ids, not messages')
        for name, least in (("max_batch_tokens", 1), ("refresh_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.refresh_steps and self.scorer is None:
            raise ValueError(f"refresh_steps is {self.refresh_steps}, but there is no scorer to refresh; pass one")

    @property
    def options(self) -> dict[str, Any]:
        """The fields of `Options`, by name, for a `Tracer`; a baseline needs no tracer of its own."""
        values = {option.name: getattr(self, option.name) for option in fields(Options)}
        return values | ({"score": "auto"} if self.score in BASELINES else {})

    def part(self, step: int) -> float:
        """How much of the gain holds at a step, counted from 0: warm-up and annealing."""
        return schedule(step, self.warmup_steps, self.anneal_after, self.anneal_steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowConfig:
        r"""Make one of what YAML, JSON or a command line can say.

        Numbers and truth values may be text. `answer` may be "re:" and a regular expression ("re:Result: (\S+)").
        `edges` may be a rule with its number: {"top_k": 32}, {"threshold": 0.004} or {"mass": 0.9}. `layers` may be
        "middle", "all" or numbers.

        Raises:
            ValueError: an unknown key, or a value that cannot be read as what its key takes.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping of options, got {type(values).__name__}")
        known = {option.name: str(option.type) for option in fields(cls) if option.name != "scorer"}
        read = {}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name} is no option of credits; there are: {', '.join(sorted(known))}")
            read[name] = _READERS.get(name, _plain)(name, value, known[name])
        return cls(**read)


def _plain(name: str, value: Any, kind: str) -> Any:
    text = "str" in kind or kind == "Signs"
    if not isinstance(value, str):
        wanted = str if text else bool if "bool" in kind else Integral if "int" in kind else Real
        is_none = value is None and "None" in kind
        if not is_none and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise ValueError(f"{name} must be {kind}, got {reprlib.repr(value)}")
        if isinstance(value, int) and abs(value) >= 2**63:  # a trainer's counts and seeds are of 64 bits
            raise ValueError(f"{name} must fit 64 bits, got {reprlib.repr(value)}")
        return value
    if text:
        return value
    if value.lower() in ("none", "null") and "None" in kind:
        return None
    try:
        if "bool" in kind:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return _plain(name, int(value), kind) if "int" in kind else float(value)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {kind}, got {reprlib.repr(value)}") from None


def _answer(name: str, value: Any, kind: str) -> Any:
    if not (isinstance(value, str) and value.startswith("re:")):
        return value
    try:
        return re.compile(value.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} is no regular expression: {reprlib.repr(value)}: {error}") from error


def _edges(name: str, value: Any, kind: str) -> Any:
    rules: dict[str, Any] = {"threshold": Threshold, "top_k": TopK, "mass": Mass}
    if value is None or hasattr(value, "keep"):
        return value
    if not (isinstance(value, Mapping) and len(value) == 1 and (rule := next(iter(value))) in rules):
        raise ValueError(f"{name} must be one of {', '.join(rules)} with its number, as {{'top_k': 32}}; got {value!r}")
    number = value[rule]
    try:
        return rules[rule](int(number) if rule == "top_k" else float(number))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} has {rule} {reprlib.repr(number)}: {error}") from error


def _layers(name: str, value: Any, kind: str) -> Any:
    if value in ("middle", "all"):
        return value
    try:
        return [int(layer) for layer in (value.strip("[]").split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{name} must be "middle", "all" or layer numbers, got {reprlib.repr(value)}') from None


def _heads(name: str, value: Any, kind: str) -> Any:
    try:
        return HeadGroups.from_dict(value) if isinstance(value, Mapping) else value
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold lists of [layer, head]: {error}") from error


_READERS = {"heads": _heads, "answer": _answer, "edges": _edges, "layers": _layers}
