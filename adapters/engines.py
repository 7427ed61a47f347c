"""A job of scoring from begin to end, by one of two engines: processes of this machine, or Ray Data.

    prepare(IN, OUT) -> Manifest, new or the one to go on with -> score(job) -> every shard once -> counts, checked

A shard is done when its file is there. So an engine may try one again, after a death or beside a straggler, and the
result is the same; and the end of a job is read from its folder, not from what the workers said. Neither engine
schedules anything itself: that is what `concurrent.futures` and Ray Data are for.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flowgraph.adapters.inputs import SHARD_BYTES, Shard, fingerprint, plan, same_place, sources
from flowgraph.adapters.scoring import Job, Tally, Worker, device_is_lost
from flowgraph.adapters.shards import DOING, Manifest, clear, finished, known, locked, sweep

ENGINES = ("local", "ray")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """Where a job runs.

    Attributes:
        name: "local" or "ray".
        workers: processes (local: 1 is this one) or actors, each with a model of its own.
        device: of the workers; "auto" gives each its own GPU, where there are any.
        address: of the Ray cluster; None as in `ray.init`. gpus, cpus: what Ray reserves for each actor.
    """

    name: str = "local"
    workers: int = 1
    device: str = "auto"
    address: str | None = None
    gpus: float = 0
    cpus: float = 1

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def default_workers(engine: str, device: str) -> int:
    """One per GPU of this machine for the engine "local", if it was not told which; else one."""
    import torch

    return max(1, torch.cuda.device_count()) if engine == "local" and device in ("auto", "cuda") else 1


def prepare(
    source: Path,
    out: Path,
    settings: Mapping[str, Any],
    *,
    how: str = "quick",
    shard_rows: int = 1000,
    shard_bytes: int = SHARD_BYTES,
    max_row_bytes: int = 1 << 24,
    overwrite: bool = False,
) -> tuple[Manifest, bool]:
    """The plan for a folder of scores, and whether it is the one that the folder has.

    Args:
        how: as in `fingerprint`. overwrite: start anew where OUT is of another job.

    Raises:
        ValueError: IN is empty or unreadable, OUT is something else or of another job; says what differs.
    """
    before = known(out)
    if same_place(source, out):
        raise ValueError(f"IN and OUT are the same, or one is in the other: {source}, {out}")
    found = sources(source)
    cut = {"shard_rows": shard_rows, "shard_bytes": shard_bytes, "max_row_bytes": max_row_bytes, "fingerprint": how}
    inputs = {one.name: fingerprint(one, how) for one in found}
    manifest = Manifest({**settings, **cut}, inputs, [])
    if before is not None and not overwrite:
        if changes := before.changes(manifest):
            more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise ValueError(
                f"OUT: {out} was begun otherwise ({'; '.join(changes[:5])}{more}); go on with the same options and "
                "files, give another OUT, or start anew with --overwrite"
            )
        return before, True
    shards = plan(found, rows=shard_rows, most_bytes=shard_bytes, max_row_bytes=max_row_bytes)
    return Manifest(manifest.settings, manifest.inputs, shards), False


def score(
    job: Job,
    engine: Engine,
    tally: Tally,
    *,
    advance: Callable[[float], None] = lambda rows: None,
    load: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Do what is left of a job, and check that all of it is there.

    Args:
        tally: counts along. advance: hears of rows of the input when they are done, or were done before.
        load: (tracer, chat) for a worker in this process; default: the job's own model.

    Returns:
        "rows", "written", "failed", "tokens" and "flags" (flag -> rows) of the whole job.

    Raises:
        ValueError: another run is at work in the folder.
        OSError: a file can't be read or written, in time; a shard is not there at the end.
        RuntimeError: workers die without anything being done.
    """
    out, shards = job.out, job.manifest.shards
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        before = known(out)
        if before is not None and job.overwrite:
            clear(out)
            before = None
        if before is not None and before.digest != job.manifest.digest:
            raise ValueError(f"OUT: another job has begun in {out} meanwhile")
        if before is None:
            job.manifest.write(out)
        sweep(out)
        todo = []
        for shard in shards:
            about = finished(out, shard, job.manifest.digest)
            if about is None:
                todo.append(shard)
            else:
                tally.add_shard(about)
                advance(shard.rows)
        tally.begin()
        if todo:
            run = _local if engine.name == "local" else _ray
            for about in run(job, engine, todo, tally, advance, load):
                tally.add_shard(about)
                advance(about["shard"]["rows"])
        done = _check(job)
        sweep(out)  # a worker that was ended in the middle of a file leaves its hidden one
        job.manifest.write(out, done)
        shutil.rmtree(out / DOING, ignore_errors=True)
    return done


def _check(job: Job) -> dict[str, Any]:
    """Counts of all shards, from their files."""
    total = Tally(job.manifest.rows)
    missing = []
    until = time.monotonic() + 10  # another machine's rename may show a little later
    for shard in job.manifest.shards:
        about = finished(job.out, shard, job.manifest.digest)
        while about is None and time.monotonic() < until:
            time.sleep(0.2)
            about = finished(job.out, shard, job.manifest.digest)
        if about is None:
            missing.append(shard.number)
        else:
            total.add_shard(about)
    if missing:
        raise OSError(f"{len(missing)} parts of {job.out} are missing, the first is {missing[0]}; run it again")
    counts = {name: getattr(total, name) for name in ("written", "failed", "tokens")}
    return {"rows": job.manifest.rows, **counts, "flags": dict(total.flags)}


# ------------------------------------------------------------------------- processes


def _local(
    job: Job, engine: Engine, todo: Sequence[Shard], tally: Tally, advance: Callable[[float], None], load: Any
) -> Iterator[dict[str, Any]]:
    if engine.workers > 1:
        yield from _processes(job, engine, todo)
        return

    def heard(rows: float, results: Sequence[Any]) -> None:
        tally.add_results(rows, results)
        advance(rows)

    worker = Worker(job, engine.device, None if load is None else load())
    tally.begin()  # without the time to load
    for _ in worker.run(todo, heard):  # counted already, row by row
        pass
    return


def _processes(job: Job, engine: Engine, todo: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """Several workers of this machine. Where one dies all are started anew, and unfinished shards tried again."""
    context = multiprocessing.get_context("spawn")
    left = {shard.number: shard for shard in todo}
    fruitless = 0
    while left:
        devices = context.Queue()
        for device in _devices(engine):
            devices.put(device)
        groups = _groups(list(left.values()), engine.workers)
        before = len(left)
        with ProcessPoolExecutor(engine.workers, context, _start, (job, devices)) as pool:
            futures: list[Future[list[dict[str, Any]]]] = []
            try:
                futures += (pool.submit(_score, group) for group in groups)
                for future in as_completed(futures):
                    for about in future.result():
                        left.pop(about["shard"]["number"])
                        yield about
            except BrokenProcessPool:
                fruitless = 0 if len(left) < before else fruitless + 1
                if fruitless == 5:
                    raise RuntimeError(
                        "workers die, five times without finishing anything; is there too little memory?"
                    ) from None
                _LOG.warning("a worker died; %d shards are tried again", len(left))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise


def _groups(shards: list[Shard], workers: int) -> list[list[Shard]]:
    """A few shards together, of which a worker reads the next while it traces one."""
    size = max(1, min(4, len(shards) // (4 * workers)))
    return [shards[k : k + size] for k in range(0, len(shards), size)]


def _devices(engine: Engine) -> list[str]:
    """One per worker."""
    import torch

    count = torch.cuda.device_count()
    if engine.device not in ("auto", "cuda") or not count:
        return [engine.device] * engine.workers
    return [f"cuda:{k % count}" for k in range(engine.workers)]


_WORKER: list[Worker] = []


def _start(job: Job, devices: Any) -> None:
    """In a new process: the worker, which ends with the process that wants it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; the end of the pool, where another worker died
        signal.signal(number, _stop)
    _hush()
    _WORKER.append(Worker(job, devices.get(timeout=60)))


def _stop(number: int, frame: Any) -> None:
    for worker in _WORKER:
        worker.abandon()
    os._exit(128 + number)


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _score(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    return list(_or_die(_WORKER[0].run(shards)))


def _or_die(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """End this process with its device: whoever started it starts another, that gets the device anew."""
    try:
        yield from shards
    except RuntimeError as error:
        if device_is_lost(error):
            os._exit(1)
        raise


def _hush() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# ------------------------------------------------------------------------- Ray


class _Actor:
    """What Ray Data keeps a pool of: a worker, that takes blocks of shards."""

    def __init__(self, job: Job, device: str) -> None:
        _hush()
        self.worker = Worker(job, device)

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        shards = [Shard(**json.loads(text)) for text in block["shard"]]
        for about in _or_die(self.worker.run(shards)):
            yield {"about": [json.dumps(about)]}


def _ray(
    job: Job, engine: Engine, todo: Sequence[Shard], tally: Tally, advance: Callable[[float], None], load: Any
) -> Iterator[dict[str, Any]]:
    """A data set of shards, mapped by a pool of actors. Ray starts dead actors anew and tries their block again."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "flowgraph-llm[ray]"') from error
    if not ray.is_initialized():
        ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    groups = _groups(list(todo), engine.workers)
    items = [{"shard": json.dumps(shard.to_dict())} for group in groups for shard in group]
    found = ray.data.from_items(items, override_num_blocks=len(groups)).map_batches(
        _Actor,
        fn_constructor_args=(
            Job(**{**vars(job), "manifest": Manifest(job.manifest.settings, job.manifest.inputs, [])}),
            engine.device,
        ),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=engine.workers),
        num_cpus=engine.cpus,
        num_gpus=engine.gpus,
    )
    try:
        for row in found.iter_rows():
            yield json.loads(row["about"])
    except ray.exceptions.RayTaskError as error:
        # As it was raised in the actor: a full disk, a file that has changed.
        raise error.cause if isinstance(error.cause, Exception) else error from None
