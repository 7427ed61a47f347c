"""A job of scoring from begin to end, by one of two engines: processes of this machine, or Ray Data.

    prepare(IN, OUT) -> Manifest, new or the one to go on with -> score(job) -> every shard once -> counts, checked

A shard is done when its file is there. So an engine may try one again, after a death or beside a straggler, and the
result is the same; and the end of a job is read from its folder, not from what the workers said. Neither engine
schedules anything itself: that is what `concurrent.futures` and Ray Data are for.
"""

from __future__ import annotations

import builtins
import contextlib
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
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flowgraph.adapters.inputs import SHARD_BYTES, Shard, fingerprint, plan, same_place, sources
from flowgraph.adapters.scoring import Job, Tally, Worker, device_is_lost, in_order
from flowgraph.adapters.shards import DOING, Manifest, clear, deaths, finished, is_ours, known, locked, pardon, sweep

ENGINES = ("local", "ray")
SHOWS_WITHIN = 90.0
"""Seconds in which a file that another machine has renamed shows here: NFS remembers for up to a minute that a name was
not there."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """Where a job runs.

    Attributes:
        name: "local" or "ray".
        workers: processes (local: 1 is this one) or actors, each with a model of its own; None: one per GPU that
            `device` leaves to choose from, of this machine or of the cluster, else one.
        device: of the workers; "auto" gives each its own GPU, where there are any.
        address: of the Ray cluster; None as in `ray.init`.
        gpus, cpus: what Ray reserves for each actor. gpus None: 1 where the cluster has any, 0 with another device. An
            actor without a reserved one sees all GPUs of its node, and takes the first.
    """

    name: str = "local"
    workers: int | None = 1
    device: str = "auto"
    address: str | None = None
    gpus: float | None = None
    cpus: float = 1

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def on_gpus(self) -> bool:
        """May the workers be spread over GPUs?"""
        return self.device in ("auto", "cuda")


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
    before = known(out) if not overwrite else None
    if overwrite:
        is_ours(out)
    if same_place(source, out):
        raise ValueError(f"IN and OUT are the same, or one is in the other: {source}, {out}")
    found = sources(source)
    cut = {"shard_rows": shard_rows, "shard_bytes": shard_bytes, "max_row_bytes": max_row_bytes, "fingerprint": how}
    inputs = {one.name: fingerprint(one, how) for one in found}
    manifest = Manifest({**settings, **cut}, inputs, [])
    if before is not None:
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
        SystemExit: SIGTERM came, see `in_order`.
    """
    out, shards = job.out, job.manifest.shards
    out.mkdir(parents=True, exist_ok=True)
    with in_order(), locked(out):
        if job.overwrite and is_ours(out):
            clear(out)
        before = known(out)
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
    until = time.monotonic() + SHOWS_WITHIN
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
    devices = _devices(engine)
    if len(devices) > 1:
        yield from _processes(job, devices, todo)
        return

    def heard(rows: float, results: Sequence[Any]) -> None:
        tally.add_results(rows, results)
        advance(rows)

    worker = Worker(job, engine.device, None if load is None else load())
    tally.begin()  # without the time to load
    for _ in worker.run(todo, heard):  # counted already, row by row
        pass
    return


DIE, DIE_SLOWLY = 5, 50
"""How often in a row workers may die without anything to show for it; and without a part that is finished, where each
death tells something of a row."""


def _processes(job: Job, devices: Sequence[str], todo: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """A worker on each of the devices. Where one dies all are started anew, and unfinished shards tried again."""
    context = multiprocessing.get_context("spawn")
    left = {shard.number: shard for shard in todo}
    fruitless = slow = 0
    while left:
        queue = context.Queue()
        for device in devices:
            queue.put(device)
        groups = _groups(list(left.values()), len(devices))
        before, noted = len(left), deaths(job.out)
        others = set(multiprocessing.active_children())
        broken = False
        with ProcessPoolExecutor(len(devices), context, _start, (job, queue)) as pool:
            futures: list[Future[list[dict[str, Any]]]] = []
            try:
                futures += (pool.submit(_score, group) for group in groups)
                for future in as_completed(futures):
                    for about in future.result():
                        left.pop(about["shard"]["number"])
                        yield about
            except BrokenProcessPool:
                broken = True
            except BaseException:
                # See `_stop`; else the end of the pool waits until they have done their shards. No future is cancelled:
                # the thread of a pool whose workers end would fail on one that is, and wait for none of them.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
        if not broken:
            continue
        # Only now, when the other workers have ended, too, and taken back their notes.
        slow = 0 if len(left) < before else slow + 1
        fruitless = 0 if len(left) < before or deaths(job.out) > noted else fruitless + 1
        if fruitless == DIE or slow == DIE_SLOWLY:
            raise RuntimeError(f"workers die, {slow} times without finishing a part; is there too little memory?")
        _LOG.warning("a worker died; %d shards are tried again", len(left))


def _groups(shards: list[Shard], workers: int) -> list[list[Shard]]:
    """A few shards together, of which a worker reads the next while it traces one."""
    size = max(1, min(4, len(shards) // (4 * workers)))
    return [shards[k : k + size] for k in range(0, len(shards), size)]


def _devices(engine: Engine) -> list[str]:
    """One per worker."""
    import torch

    count = torch.cuda.device_count() if engine.on_gpus else 0
    workers = engine.workers or max(1, count)
    if workers == 1 or not count:
        return [engine.device] * workers
    return [f"cuda:{k % count}" for k in range(workers)]


_WORKER: list[Worker | Exception] = []


def _start(job: Job, devices: Any) -> None:
    """In a new process: the worker, which ends with the process that wants it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; the end of the pool, where another worker died
        signal.signal(number, _stop)
    _hush()
    _WORKER.append(_worker(job, lambda: devices.get(timeout=60)))


def _worker(job: Job, device: Callable[[], str]) -> Worker | Exception:
    """Or why there is none: for a pool it would be one more process that died, and nobody would hear the reason."""
    try:
        return Worker(job, device())
    except Exception as error:
        return error


def _stop(number: int, frame: Any) -> None:
    _leave(128 + number)


def _follow(sentinel: int) -> None:
    wait([sentinel])
    _leave(1)


def _leave(code: int) -> None:
    """End this process, and blame no row."""
    try:
        for worker in _WORKER:
            if isinstance(worker, Worker):
                worker.abandon()
    finally:
        os._exit(code)


def _score(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    (worker,) = _WORKER
    if isinstance(worker, Exception):
        raise worker
    return list(_or_die(worker.run(shards)))


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
    """What Ray Data keeps a pool of: a worker, that takes groups of shards."""

    def __init__(self, job: Job, device: str) -> None:
        _hush()
        self.worker = _worker(job, lambda: device)

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """What is said of each shard, or the error that ends the job: Ray would put words of its own in its place."""
        try:
            if isinstance(self.worker, Exception):
                raise self.worker
            for text in block["shards"]:
                for about in _or_die(self.worker.run([Shard(**one) for one in json.loads(text)])):
                    yield {"said": [json.dumps(about)]}
        except Exception as error:
            yield {"said": [json.dumps({"error": _packed(error)})]}


def _packed(error: Exception) -> dict[str, Any]:
    """An exception in JSON: as the nearest of Python's own that has these words, or a RuntimeError with its name."""
    if isinstance(error, OSError) and error.errno is not None:
        file = [] if error.filename is None else [str(error.filename)]
        return {"kind": "OSError", "arguments": [error.errno, error.strerror, *file]}
    for kind in type(error).__mro__:
        if kind in (OSError, RuntimeError, TypeError, ValueError, ImportError, TimeoutError, FileNotFoundError):
            return {"kind": kind.__name__, "arguments": [str(error)]}
    return {"kind": "RuntimeError", "arguments": [f"{type(error).__name__}: {error}"]}


def _unpacked(about: Mapping[str, Any]) -> Exception:
    """What `_packed` was given."""
    error: Exception = getattr(builtins, about["kind"])(*about["arguments"])
    return error


def _ray(
    job: Job, engine: Engine, todo: Sequence[Shard], tally: Tally, advance: Callable[[float], None], load: Any
) -> Iterator[dict[str, Any]]:
    """A data set of shards, mapped by a pool of actors. Ray starts dead actors anew and tries their group again."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "flowgraph-llm[ray]"') from error
    if not ray.is_initialized():
        with _own_sigterm():
            ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    workers, gpus = _reserved(engine, ray.cluster_resources())
    pardon(job.out)  # within a run the death of an actor is seen; what an ended run left is nobody's fault
    # Actors have the working directory of their node, not that of this process.
    there = replace(
        job,
        manifest=Manifest(job.manifest.settings, job.manifest.inputs, []),
        sources={name: replace(one, path=os.path.abspath(one.path)) for name, one in job.sources.items()},
        out=job.out.absolute(),
    )
    groups = _groups(list(todo), workers)
    items = [{"shards": json.dumps([shard.to_dict() for shard in group])} for group in groups]
    found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor,
        fn_constructor_args=(there, engine.device),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(groups))),
        num_cpus=engine.cpus,
        num_gpus=gpus,
    )
    for row in found.iter_rows():
        said = json.loads(row["said"])
        if "error" in said:
            raise _unpacked(said["error"])
        yield said


def _reserved(engine: Engine, cluster: Mapping[str, float]) -> tuple[int, float]:
    """Workers, and GPUs of each, on a cluster of so many "CPU" and "GPU". Warns where they do not fit."""
    has = {name: cluster.get(name, 0) for name in ("CPU", "GPU")}
    gpus = engine.gpus if engine.gpus is not None else float(engine.on_gpus and has["GPU"] > 0)
    workers = engine.workers or max(1, int(has["GPU"] // gpus) if gpus else 1)
    if workers * gpus > has["GPU"] or workers * engine.cpus > has["CPU"]:
        _LOG.warning(
            "%d workers ask for %g CPU and %g GPU each, the cluster has %g CPU and %g GPU; what does not fit waits",
            *(workers, engine.cpus, gpus, has["CPU"], has["GPU"]),
        )
    return workers, gpus


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray has a handler of its own, which ends this process with another exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
