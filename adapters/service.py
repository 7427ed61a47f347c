"""Credits for trainers whose controller has no model at hand: a scorer with weights of its own, from a configuration.

    configuration (mapping, file, or the file named by FLOWGRAPH_CONFIG)
      -> ServiceConfig -> a Scorer in this process, or Ray actors -> Service, a Crediting that refreshes itself

A file in YAML, TOML or JSON, or the same keys in the trainer's own configuration:

    model: Qwen/Qwen3-4B          # a name or a folder; the policy's starting point, or a smaller one of its family
    workers: 1                    # 0: in this process; n: that many Ray actors
    gpus_per_worker: 1
    refresh_from: /ckpt/actor     # where the trainer leaves checkpoints of transformers; the newest one is taken over
    flow:                         # a FlowConfig
      gain: 1.5
      answer: "boxed"

Shapes: see `flowgraph.rl.crediting`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flowgraph.rl.baselines import NEED_HEADS
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.crediting import Crediting, Factors
from flowgraph.rl.scorer import Credits, Scorer

logger = logging.getLogger(__name__)

ENVIRONMENT = "FLOWGRAPH_CONFIG"
SETTLED_SECONDS = 30.0
"""A checkpoint counts as complete if none of its files has changed for so long."""
_STABLE, _INDEX = "STABLE", ".safetensors.index.json"


@dataclass(frozen=True)
class ServiceConfig:
    """Which model scores, and where it runs.

    Attributes:
        model: name or folder of the model that is traced, with the tokenizer of the policy.
        tokenizer: name or folder; None: as `model`.
        dtype: "auto" (as it was saved), "float32", "bfloat16", ... device: "auto" (a GPU if this process sees one),
            "cpu", "cuda:0", ... Ray gives an actor its own GPUs.
        workers: 0: in this process; n: so many Ray actors, each with its own copy.
        gpus_per_worker, cpus_per_worker: what Ray reserves for each.
        timeout: seconds for one chunk of rollouts on an actor.
        refresh_from: a folder in which the trainer leaves checkpoints of transformers, at any depth. Before a step the
            newest complete one is taken over. None: the scorer stays as it is; "flow/scorer_age" in the log shows it.
        trust_remote_code: run the Python code that comes with the model. Nothing but True turns this on.
        flow: the `FlowConfig`.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    workers: int = 0
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    timeout: float = 600.0
    refresh_from: str | None = None
    trust_remote_code: bool = False
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be the name or folder of a model, got {reprlib.repr(self.model)}")
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else None
        if self.dtype != "auto" and not isinstance(dtype, torch.dtype):
            raise ValueError(
                f'dtype must be "auto" or a dtype of torch such as "bfloat16", got {reprlib.repr(self.dtype)}'
            )
        for name in ("tokenizer", "refresh_from"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a name or folder, got {reprlib.repr(getattr(self, name))}")
        if not isinstance(self.trust_remote_code, bool):
            raise ValueError(
                f"trust_remote_code must be true or false, not a text or a number, got "
                f"{reprlib.repr(self.trust_remote_code)}"
            )
        if not isinstance(self.device, str):
            raise ValueError(f"device must be text such as cuda:0, got {reprlib.repr(self.device)}")
        for name in ("workers", "gpus_per_worker", "cpus_per_worker", "timeout"):
            value = getattr(self, name)
            kind = int if name == "workers" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number, got {reprlib.repr(value)}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.gpus_per_worker and not self.workers:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}, but workers is 0: set workers too")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be > 0 seconds, got {self.timeout}")
        if self.flow.scorer is not None:
            raise ValueError("flow.scorer is for trainers that hold their policy; here `model` names the scorer")
        if self.flow.score in NEED_HEADS and self.flow.heads is None:
            raise ValueError(
                f'flow.score="{self.flow.score}" needs flow.heads here, from `flowgraph.rl.calibrate`: each rank or '
                "actor would find heads of its own"
            )

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path | None = None) -> ServiceConfig:
        """From a mapping, a file (.yaml, .yml, .toml, .json), or the file that FLOWGRAPH_CONFIG names.

        Raises:
            ValueError: no configuration, an unknown key, or a value that does not fit; it says where it came from.
        """
        where = "the configuration of flowgraph"
        if source is None:
            source = os.environ.get(ENVIRONMENT)
            if not source:
                raise ValueError(
                    f"no configuration of credits: give one, or set {ENVIRONMENT} to a YAML, TOML or JSON file with "
                    "at least `model`"
                )
        if isinstance(source, str | Path):
            where, source = str(source), _load_file(Path(source))
        known = {one.name: str(one.type) for one in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in source.items():
            if name not in known:
                raise ValueError(f"{where}: {name} is no key; there are: {', '.join(known)}")
            values[name] = value
        if "model" not in values:
            raise ValueError(f"{where}: model is missing, the name or folder of the model that scores")
        try:
            for name, kind in known.items():
                if isinstance(values.get(name), str) and kind in ("int", "float"):
                    values[name] = int(values[name]) if kind == "int" else float(values[name])
            if not isinstance(values.get("flow"), FlowConfig):
                flow = values.get("flow") or {}
                if not isinstance(flow, Mapping):
                    raise ValueError(f"flow must hold options of credits, got {type(flow).__name__}")
                values["flow"] = FlowConfig.from_dict(flow)
            return cls(**values)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from error

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer), on their device and in evaluation mode."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        # False, and not left out: transformers would ask on standard input whether to run the code of the repository.
        how = {"trust_remote_code": self.trust_remote_code}
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, **how)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(self.tokenizer or self.model, **how)

    def scorer(self) -> Credits:
        """The scorer in this process, or the pool of actors.

        Raises:
            ValueError, RuntimeError: a model or an option that can't be traced, in this process or in the actors.
        """
        if not self.workers:
            scorer = Scorer(*self.load(), self.flow)
            scorer.check()
            return scorer
        from flowgraph.adapters.ray import RayScorer

        return RayScorer(
            partial(ServiceConfig.load, self),
            self.flow,
            workers=self.workers,
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker,
            timeout=self.timeout,
        )


class Service(Crediting):
    """A `Crediting` that makes its scorer, and takes over new checkpoints before a step.

    Raises:
        ValueError, RuntimeError: a scorer that can't work, or a checkpoint below `refresh_from` that does not fit it.
    """

    def __init__(self, config: ServiceConfig) -> None:
        super().__init__(config.scorer(), config.flow)
        self.service = config
        self._loaded: tuple[float, Path] | None = None
        self._born: int | None = 0
        """The step at which the scorer got its weights; None: before the first step, whose number is not known yet."""
        if self.refresh_if_newer(None) and self._loaded is not None:
            logger.warning(
                "refresh_from: %s was there before this run; the scorer has its weights. If the run does not go on "
                "from it, name another folder",
                self._loaded[1],
            )

    def factors(self, *args: Any, step: int = 0, **kwargs: Any) -> Factors:
        """As `Crediting.factors`; the metrics have "flow/scorer_age" too, steps since the scorer got its weights."""
        self.refresh_if_newer(step)
        if self._born is None:
            self._born = step
        found = super().factors(*args, step=step, **kwargs)
        found.means["scorer_age"] = float(max(0, step - self._born))
        return found

    def refresh_if_newer(self, step: int | None) -> bool:
        """Take over the newest complete checkpoint below `refresh_from`, if it is newer than the last one.

        One that cannot be read, such as a half-written one, is logged and left for the next step.

        Args:
            step: the trainer's; None: before the first one.

        Raises:
            ValueError: its weights don't fit the scorer. Names the folder and the weights.
        """
        if self.service.refresh_from is None:
            return False
        newest = _newest(Path(self.service.refresh_from))
        # Trainers overwrite folders, so its name alone does not say it; and they delete the newest ones, too.
        if newest is None or (self._loaded is not None and newest <= self._loaded):
            return False
        try:
            self.scorer.refresh(newest[1])
        except (OSError, SafetensorError) as error:
            logger.warning(
                "refresh_from: %s cannot be read (%s); the scorer keeps its weights, the next step tries again",
                newest[1],
                error,
            )
            return False
        except ValueError as error:
            raise ValueError(f"refresh_from={self.service.refresh_from}: {error}") from error
        self._loaded, self._born = newest, step
        return True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest folder below (or at) `folder` with a complete checkpoint of a language model; None if there is none.

    A checkpoint is a folder of safetensors, all that its index names, with a config.json, or with the file STABLE that
    prime-rl puts beside them when they are complete. Critics and reward models, which trainers leave beside their
    policy, are passed over by what their config.json says.
    """
    newest = _newest(folder)
    return None if newest is None else newest[1]


def _newest(folder: Path) -> tuple[float, Path] | None:
    """When the newest checkpoint was written, and its folder."""
    found = []
    for place in [Path(root) for root, _, names in os.walk(folder) if any(n.endswith(".safetensors") for n in names)]:
        try:
            files = [one for one in place.iterdir() if one.suffix in (".safetensors", ".json") or one.name == _STABLE]
            names = {one.name for one in files}
            if not all(_has_shards(one, names) for one in files if one.name.endswith(_INDEX)):
                continue
            if _STABLE in names or ("config.json" in names and _is_language_model(place / "config.json")):
                latest = max(one.stat().st_mtime for one in files)
                if _STABLE in names or time.time() - latest >= SETTLED_SECONDS:
                    found.append((latest, place))
        except FileNotFoundError:  # the trainer deletes old checkpoints while this looks
            continue
    return max(found, default=None)


def _has_shards(index: Path, names: set[str]) -> bool:
    """Are all files there that an index names, or the one that goes before an index?"""
    if "model.safetensors" in names:
        return True
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return names.issuperset(wanted)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # half written
        return False


def _is_language_model(config: Path) -> bool:
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError, RecursionError):  # half written
        return False
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    return not any(name.endswith(("Classification", "RewardModel", "ForScore")) for name in names)


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    # Every open bracket may yet be a key, and the parser looks at all of them for each character.
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ValueError(f"more than {_MOST_BRACKETS} brackets [ and {{")
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # A few aliases of aliases stand for more text than memory holds, once they are shown in a message.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: *{event.anchor} is an alias; write it out")
    return yaml.safe_load(text)


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise ValueError("TOML needs Python 3.11; write it as YAML or JSON") from error
    return tomllib.loads(text)


_PARSERS: dict[str, Callable[[str], Any]] = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": json.loads}
MOST_BYTES = 1 << 16
"""A larger configuration is refused."""
_MOST_BRACKETS = 128

_SERVICES: dict[str, Service] = {}


def crediting(source: ServiceConfig | Mapping[str, Any] | str | Path | None = None) -> Service:
    """The `Service` of a configuration: made at the first call, the same one in every later call of this process."""
    config = source if isinstance(source, ServiceConfig) else ServiceConfig.read(source)
    key = repr(config)
    if key not in _SERVICES:
        _SERVICES[key] = Service(config)
    return _SERVICES[key]


def _load_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is no file: expected the configuration of credits in YAML, TOML or JSON")
    if path.suffix not in _PARSERS:
        raise ValueError(f"{path} must end in {', '.join(_PARSERS)}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MOST_BYTES}")
    try:
        values = _PARSERS[path.suffix](path.read_text(encoding="utf-8"))
    except Exception as error:  # the parsers raise what they like, such as IndexError for an empty number
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold keys and values, with at least `model`; got {type(values).__name__}")
    return values
