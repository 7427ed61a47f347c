"""RayScorer: a pool of Ray actors that scores rollouts, each with a model and weights of its own.

    samples -> chunks of a token budget, longest first -> whichever actor is free -> SampleScores, in order

It gives what a `flowgraph.rl.Scorer` in this process gives, and has the same methods. Ray starts the actors and
restarts those that die; this file hands out chunks with `ray.wait`, and says what becomes of one that is lost:

    first try     with its chunk. The actor dies, hangs or raises: every sample of the chunk gets a second one
    second try    alone. If that fails too, this sample is uniform, flagged "failed" and counted; the others are not

Weights are pulled, not pushed: every call carries the version of the weights that it has to be scored with, and an
actor that has other ones, since it was restarted or missed a refresh, takes these over first. So a score never comes
from weights older than the last `refresh`. docs/scorer.md has the costs.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowgraph.rl.baselines import NEED_HEADS
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.samples import Sample
from flowgraph.rl.scorer import Credits, SampleScore, Scorer, chunks

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError('flowgraph.adapters.ray needs Ray: pip install "flowgraph-llm[ray]"') from error

logger = logging.getLogger(__name__)

Load = Callable[[], tuple[Any, Any]]

CHUNKS_PER_WORKER = 2
"""So many at least, if there are enough samples: the actors finish together, and a lost chunk costs less."""


class RayScorer(Credits):
    """Scores rollouts on Ray actors.

    Uses the Ray that this process is connected to; if it isn't, connects to `address`, by default to the cluster that
    RAY_ADDRESS names or that runs on this machine, and starts a Ray of its own if there is none.

    Args:
        load: returns (model, tokenizer) on their device; called once in every actor, and again when it is restarted.
            It travels there by cloudpickle, so its module must exist on the nodes, or be the main program.
        config: a `FlowConfig`; default: `FlowConfig()`.
        workers: number of actors.
        num_cpus, num_gpus: what Ray reserves for each, fractions too. Ray shows an actor its own GPUs only, and sets
            the number of its threads to `num_cpus`.
        timeout: seconds that one chunk may take; an actor that takes longer is killed and restarted.
        start_timeout: seconds that an actor may take to be there, with its model and the latest weights.
        address: of the cluster, as `ray.init` takes it; of no effect if Ray is initialised already.
        ray_options: more for the actors, as `ray.remote` takes it: resources, scheduling_strategy, runtime_env, ...

    Raises:
        RuntimeError: no actor could be started; says what `load` raised, or why its model can't be traced.

    Example:
        >>> with RayScorer(load, FlowConfig(gain=1.5), workers=4, num_gpus=1) as scorer:
        ...     scored = scorer.credits(input_ids, response_mask, attention_mask=attention_mask)
        ...     scorer.refresh(policy.state_dict())
    """

    def __init__(
        self,
        load: Load,
        config: FlowConfig | None = None,
        *,
        workers: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
        timeout: float = 600.0,
        start_timeout: float = 600.0,
        address: str | None = None,
        ray_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(load):
            raise TypeError(f"load must be a function that returns (model, tokenizer), got {type(load).__name__}")
        if not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a whole number >= 1, got {workers!r}")
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not seconds > 0:
                raise ValueError(f"{name} must be > 0 seconds, got {seconds}")
        self.config = FlowConfig() if config is None else config
        if self.config.scorer is not None:
            raise ValueError("config.scorer is for trainers that hold their policy; here `load` makes the model")
        if self.config.score in NEED_HEADS and self.config.heads is None:
            raise ValueError(
                f'score="{self.config.score}" needs config.heads here, from `flowgraph.rl.calibrate`: each actor would '
                "find heads of its own"
            )
        self.timeout, self.start_timeout = timeout, start_timeout
        self._versions = itertools.count(1)
        self._weights = _Weights(0, None)
        self._up: set[int] = set()
        """Actors that were ready when last heard of."""
        self._preparing: dict[int, Any] = {}
        """Actor -> reference of its call of `prepare` that is under way."""
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False)
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, **(ray_options or {}), "max_restarts": -1}
        actor: Any = ray.remote(_Worker).options(**options)
        self._actors: list[Any] = [actor.remote(load, self.config) for _ in range(workers)]
        self._start(load, num_cpus, num_gpus)

    # --- scores -------------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> list[SampleScore]:
        """Score samples; one that can't be scored costs no other, and nothing that happens to an actor raises."""
        self._check_open()
        if not samples:
            return []
        found: dict[int, SampleScore] = {}
        waiting = deque(self._chunks(samples))
        tried: set[int] = set()
        idle: list[int] = []
        running = dict(self._prepare(actor) for actor in range(len(self._actors)))
        no_actor = ""
        while len(found) < len(samples):
            while idle and waiting:
                chunk = waiting.popleft()
                ref, task = self._submit(idle.pop(), chunk, [samples[number] for number in chunk])
                running[ref] = task
            if not running:
                break
            for ref, late in _next(running):
                task = running.pop(ref)
                scores, why = self._outcome(ref, task, late)
                if not task.chunk and not late:
                    del self._preparing[task.actor]
                if why is None:
                    self._up.add(task.actor)
                    idle.append(task.actor)
                    found |= zip(task.chunk, scores or [], strict=True)
                    continue
                self._up.discard(task.actor)
                if not task.chunk:
                    no_actor = why  # out of the game until the next call
                    continue
                again = [number for number in task.chunk if number not in tried]
                for number in set(task.chunk).difference(again):
                    found[number] = SampleScore.blank(samples[number], "failed", f"{why} (second try, alone)")
                tried.update(again)
                waiting.extend([number] for number in again)  # at the end: what kills an actor comes last
                running |= dict([self._prepare(task.actor)])
        self._up.difference_update(self._preparing)
        for number in range(len(samples)):
            if number not in found:
                why = f"no actor of the pool is ready: {no_actor}"
                found[number] = SampleScore.blank(samples[number], "failed", why)
        return [found[number] for number in range(len(samples))]

    def _chunks(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Numbers of samples, long ones first."""
        lengths = [len(one) for one in samples]
        share = sum(lengths) // (CHUNKS_PER_WORKER * len(self._actors))
        budget = max(1, min(self.config.max_batch_tokens, share))
        return list(chunks(lengths, budget))[::-1]

    def _prepare(self, actor: int) -> tuple[Any, _Task]:
        """Ask an actor to have the latest weights; Ray holds the call back until it has (re)started."""
        # A call that is under way will do: `score` brings the latest weights anyway. A new one each time would keep all
        # weights in the object store for as long as Ray has no room for the actor.
        if actor not in self._preparing:
            self._preparing[actor] = self._actors[actor].prepare.remote(self._weights)
        ref = self._preparing[actor]
        return ref, _Task(actor, [], self.start_timeout, time.monotonic())

    def _submit(self, actor: int, chunk: list[int], samples: list[Sample]) -> tuple[Any, _Task]:
        ref = self._actors[actor].score.remote(samples, self._weights)
        return ref, _Task(actor, chunk, self.timeout, time.monotonic())

    def _outcome(self, ref: Any, task: _Task, late: bool) -> tuple[list[SampleScore] | None, str | None]:
        """(scores, None), or (None, why there are none); an actor that hangs is restarted."""
        what = f"{len(task.chunk)} samples" if task.chunk else "getting ready"
        if late:
            limit = f"timeout={task.limit:g}" if task.chunk else f"start_timeout={task.limit:g}"
            logger.warning("actor %d: %s took longer than %s s; it is restarted", task.actor, what, limit)
            self._restart(task.actor)
            return None, f"the actor took longer than {limit} s"
        try:
            return ray.get(ref), None
        except RayError as error:
            logger.warning("actor %d: %s: %s", task.actor, what, error)
            return None, _why(error)

    def _restart(self, actor: int) -> None:
        ray.kill(self._actors[actor], no_restart=False)

    # --- weights ------------------------------------------------------------------------------------------------------

    def refresh(self, weights: Mapping[str, Tensor] | nn.Module | str | Path) -> None:
        """Give all actors the weights of a newer policy, and wait for them.

        Args:
            weights: a state dict, whole tensors on any device, or a model with the same parameters: goes into Ray's
                object store once, and from there once to each node. Or the folder of a checkpoint of transformers that
                every node can see; leave it as it is until the next refresh: an actor that is restarted reads it.

        Raises:
            ValueError: names the weights that are missing, unknown or of another shape. All actors keep what they had.
            OSError, SafetensorError: the folder is not there, or its files are not whole. The same holds.
            RuntimeError: no actor could be reached.
        """
        self._check_open()
        newer = _Weights(next(self._versions), _source(weights))
        # One that is not there now takes them over when it is.
        asked = sorted(self._up) or range(len(self._actors))
        errors = self._ask(asked, newer)
        for actor, error in errors.items():
            if error is None:
                self._up.add(actor)
                continue
            if isinstance(error, RayTaskError):
                # Those that took the newer weights already go back to the old ones with their next call.
                raise error.cause from error
            logger.warning("actor %d: refreshing weights: %s", actor, error)
            self._up.discard(actor)
            if isinstance(error, TimeoutError):
                self._restart(actor)
        if not self._up:
            raise RuntimeError(f"no actor of the pool took the weights over: {_why(next(iter(errors.values())))}")
        self._weights = newer

    def _ask(self, actors: Iterable[int], weights: _Weights) -> dict[int, Any]:
        """Have actors take weights over: actor -> what went wrong, or None."""
        refs = {self._actors[actor].prepare.remote(weights): actor for actor in actors}
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=self.start_timeout)
        errors: dict[int, Any] = {
            refs[ref]: TimeoutError(f"not ready after start_timeout={self.start_timeout:g} s") for ref in late
        }
        self._preparing |= {actor: ref for ref, actor in refs.items()}
        for ref in done:
            del self._preparing[refs[ref]]
            try:
                errors[refs[ref]] = ray.get(ref)
            except RayError as error:
                errors[refs[ref]] = error
        return errors

    # --- life ---------------------------------------------------------------------------------------------------------

    def _start(self, load: Load, num_cpus: float, num_gpus: float) -> None:
        """Wait for the actors; some may come later, or not at all, but not none."""
        workers, total = len(self._actors), ray.cluster_resources()
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        asks = f"{workers} actors ask for {num_cpus:g} CPU, {num_gpus:g} GPU each, the cluster has {has} in all"
        if workers * num_cpus > total.get("CPU", 0) or workers * num_gpus > total.get("GPU", 0):
            logger.warning("%s: waiting for more", asks)
        errors = self._ask(range(workers), self._weights)
        self._up = {actor for actor, error in errors.items() if error is None}
        if not self._up:
            self.close()
            error = next(iter(errors.values()))
            function = load.func if isinstance(load, partial) else load
            name = getattr(function, "__qualname__", repr(function))
            if isinstance(error, TimeoutError):
                raise RuntimeError(f"no actor is ready: load={name} takes longer, or Ray has no room; {error}; {asks}")
            raise RuntimeError(f"no actor could be started with load={name}: {_why(error)}") from error
        for actor in errors.keys() - self._up:
            logger.warning("actor %d of %d could not be started: %s", actor, workers, _why(errors[actor]))

    def close(self) -> None:
        """End the actors. Ray itself goes on until the process ends or `ray.shutdown()`."""
        actors, self._actors = self._actors, []
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor)

    def __enter__(self) -> RayScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._actors:
            raise RuntimeError("this RayScorer is closed; make another one")

    def __repr__(self) -> str:
        return f"RayScorer({len(self._up)} of {len(self._actors)} actors ready, weights {self._weights.version})"


@dataclass(frozen=True)
class _Weights:
    """What a score is to be taken with.

    Attributes:
        version: no two are the same, not even of those that were refused.
        source: None: as `load` gave them; else a folder, or a reference to what `_flat` makes of a state dict.
    """

    version: int
    source: Any


class _Task(NamedTuple):
    """What an actor is at: a chunk (numbers of samples), or getting ready (none)."""

    actor: int
    chunk: list[int]
    limit: float
    began: float

    @property
    def left(self) -> float:
        """Seconds until it is late."""
        return self.began + self.limit - time.monotonic()


class _Worker:
    """The actor. Its constructor can't fail, so that Ray's restarts don't end at a `load` that fails once."""

    def __init__(self, load: Load, config: FlowConfig) -> None:
        self.load, self.config = load, config
        self.scorer: Scorer | None = None
        self.version: int | None = None
        self.lost = False

    @ray.method(max_task_retries=-1)
    def prepare(self, weights: _Weights) -> None:
        """Have a model with these weights."""
        if self.lost:
            os._exit(1)  # Ray starts another process and calls again
        self._take_over(weights)

    def score(self, samples: list[Sample], weights: _Weights) -> list[SampleScore]:
        """Score samples with these weights."""
        scorer = self._take_over(weights)
        try:
            found = scorer.score(samples)
        except RuntimeError as error:
            self.lost = _device_is_lost(error)
            raise
        # A part of a batch would travel with all of the batch's memory.
        return [replace(one, scores=one.scores.clone(), mask=one.mask.clone()) for one in found]

    def _take_over(self, weights: _Weights) -> Scorer:
        if self.scorer is not None and self.version == weights.version:
            return self.scorer
        if self.scorer is None or weights.source is None:
            self.scorer, self.version = None, None
            scorer = Scorer(*_loaded(self.load), self.config)
            scorer.check()
            self.scorer = scorer
        if isinstance(weights.source, str):
            self.scorer.refresh(weights.source)
        elif weights.source is not None:
            self.scorer.refresh(_tensors(ray.get(weights.source)))
        self.version = weights.version
        return self.scorer


def _loaded(load: Load) -> tuple[Any, Any]:
    pair = load()
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], nn.Module):
        raise TypeError(f"load must return (model, tokenizer), got {type(pair).__name__}")
    return pair


def _next(running: Mapping[Any, _Task]) -> list[tuple[Any, bool]]:
    """Wait for the next of these: (reference, whether it is late and not done)."""
    patience = max(0.0, min(task.left for task in running.values()))
    done, rest = ray.wait(list(running), timeout=patience)
    return [(ref, False) for ref in done] + [(ref, True) for ref in rest if running[ref].left <= 0]


def _why(error: Any) -> str:
    """One line. An actor's death in words of ours: Ray's name an id, and a warning should come once."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "the actor died"
    return str(error).strip().splitlines()[-1]


def _device_is_lost(error: RuntimeError) -> bool:
    """After an error on a GPU every later call of the process fails, too."""
    return any(f"{name} error" in str(error) for name in ("CUDA", "HIP"))


def _source(weights: Mapping[str, Tensor] | nn.Module | str | Path) -> Any:
    if isinstance(weights, str | Path):
        # Actors have another working directory. What is no folder here may be one there.
        return str(Path(weights).absolute()) if Path(weights).is_dir() else str(weights)
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a state dict, a model or a folder, got {type(weights).__name__}")
    return ray.put(_flat(weights))


def _flat(weights: Mapping[str, Tensor]) -> dict[str, tuple[Any, torch.dtype, torch.Size]]:
    """Bytes, dtype and shape of each tensor.

    Ray copies the memory of numpy arrays once and shares it with all actors of a node; tensors it would pickle.
    Arrays have no bfloat16, hence the bytes.
    """
    seen: dict[Any, Any] = {}  # a tied output head travels once
    flat = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"weights[{name!r}] must be a tensor, got {type(value).__name__}")
        if hasattr(value, "full_tensor"):
            raise ValueError(f"weights[{name!r}] is a part (DTensor) of a sharded model: gather the state dict first")
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in seen:
            seen[key] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        flat[name] = (seen[key], value.dtype, value.shape)
    return flat


def _tensors(flat: Mapping[str, tuple[Any, torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    """The inverse of `_flat`, on the memory of the object store: read it only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return {name: torch.from_numpy(raw).view(dtype).view(shape) for name, (raw, dtype, shape) in flat.items()}
