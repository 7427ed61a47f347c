"""Run the fuzzers: by hand, and from tests/fuzz/test_readers.py for a few seconds.

    python -m tests.fuzz.run --inputs 1000000 --seconds 3600 --out benchmarks/results/fuzz.json
    python -m tests.fuzz.run --only graphml json --seed 7 --seconds 60
    python -m tests.fuzz.run --engine atheris --seconds 600        # pip install atheris (Linux)

A finding is an exception that no reader declares, a broken law, an input that takes longer than `SLOW` seconds, or one
that asks for more than `MEMORY` bytes. Findings are told apart by their kind and by the line they come from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

ENGINES = ("mutate", "atheris")
SLOW = 2.0
"""Seconds of the processor for one input of up to 64 KiB: others on the machine do not count."""
MEMORY = 2 << 30
"""Bytes that one input may take beside what the process holds already."""


class TookTooLong(BaseException):
    """Not an Exception: no reader may catch it."""


@dataclass
class Tally:
    """What became of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)
    """What and where -> what it said and the first input that did it, as Python writes it; at most 2,000 characters."""


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Refuse this process more than `MEMORY` bytes on top of its own."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.is_file():
        pages = int(status.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TookTooLong(f"one input took longer than {SLOW} seconds")


def try_one(target: Any, data: bytes, folder: Path, tally: Tally) -> None:
    """Give one input to a target and write down what happened.

    One that takes too long has a second try: the timer counts all threads of the process, so the first may have paid
    for the work of another, or for what is done once.
    """
    from tests.fuzz.targets import DECLARED

    begun = time.process_time()
    try:
        try:
            _timed(target, data, folder)
        except TookTooLong:
            begun = time.process_time()
            _timed(target, data, folder)
        tally.accepted += 1
    except DECLARED as error:
        if not str(error).strip():
            tally.findings.setdefault(f"{type(error).__name__} that says nothing, {_where(error)}", repr(data)[:2000])
    except (Exception, TookTooLong) as error:
        tally.findings.setdefault(f"{type(error).__name__} {_where(error)}", f"{str(error)[:200]!r} by {data!r}"[:2000])
    finally:
        tally.inputs += 1
        tally.slowest = max(tally.slowest, time.process_time() - begun)


def _timed(target: Any, data: bytes, folder: Path) -> None:
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        target.run(data, folder)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _where(error: BaseException) -> str:
    """The innermost line of this project in a traceback."""
    root = str(Path(__file__).absolute().parents[2])
    ours = [
        place for place in traceback.extract_tb(error.__traceback__)
        if place.filename.startswith(root) and "/.venv" not in place.filename
    ]  # fmt: skip
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "at ?"


def fuzz(name: str, *, seed: int, seconds: float, inputs: int) -> Tally:
    """Mutate for `seconds` or `inputs`, whichever ends first."""
    from tests.fuzz.mutate import Mutator
    from tests.fuzz.targets import targets

    target, tally = targets()[name], Tally()
    with _ready() as folder:
        begun = time.perf_counter()
        for data in target.seeds:
            try_one(target, data, folder, tally)
        mutate = Mutator(target.seeds, target.words, seed)
        while tally.inputs < inputs and time.perf_counter() - begun < seconds:
            try_one(target, mutate(), folder, tally)
        tally.seconds = time.perf_counter() - begun
    return tally


@contextlib.contextmanager
def _ready() -> Iterator[Path]:
    handler = signal.signal(signal.SIGPROF, _stop)
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shm) as folder, warnings.catch_warnings(), bounded_memory():
        warnings.simplefilter("ignore")
        try:
            yield Path(folder)
        finally:
            signal.signal(signal.SIGPROF, handler)


def fuzz_with_atheris(name: str, *, seed: int, seconds: float, inputs: int, out: Path) -> None:
    """Let libFuzzer choose by coverage of flowgraph, networkx, yaml. It ends this process, so `out` gets the tally."""
    atheris: Any = import_module("atheris")

    with atheris.instrument_imports(include=["flowgraph", "networkx.readwrite", "yaml"]):
        from tests.fuzz.targets import targets

        target = targets()[name]
    tally, begun = Tally(), time.perf_counter()
    ready = _ready()
    folder = ready.__enter__()

    def one(data: bytes) -> None:
        try_one(target, data, folder, tally)
        tally.seconds = time.perf_counter() - begun
        if tally.seconds >= seconds or tally.inputs >= inputs or tally.inputs % 2000 == 0:
            out.write_text(json.dumps(vars(tally)))

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    words = folder / "words"
    lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in target.words if word)
    words.write_text("\n".join(lines) + "\n")
    limits = [f"-runs={inputs}", f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, f"-dict={words}", "-verbosity=0", "-rss_limit_mb=0", str(corpus)], one)
    atheris.Fuzz()


def _write(name: str, out: Path, limits: dict[str, Any]) -> None:
    out.write_text(json.dumps(vars(fuzz(name, **limits))))


def _in_a_process(name: str, engine: str, **limits: Any) -> Tally:
    """Readers in C may take the process down with them: that is a finding too, and the next target goes on."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tally.json"
        if engine == "atheris":  # instruments what it imports, so it needs an interpreter that has imported nothing
            options = [part for key, value in limits.items() for part in (f"--{key}", str(value))]
            command = [sys.executable, "-m", "tests.fuzz.run", "--engine", engine, "--only", name, "--one", str(out)]
            code = subprocess.run([*command, *options], stdout=subprocess.DEVNULL, check=False).returncode
        else:
            process = multiprocessing.get_context("fork").Process(target=_write, args=(name, out, limits))
            process.start()
            process.join()
            code = process.exitcode or 0
        tally = Tally(**json.loads(out.read_text())) if out.is_file() else Tally()
    if code or not tally.inputs:
        tally.findings[f"the process ended with {code}"] = f"--seed {limits['seed']}"
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all targets")
    parser.add_argument("--seconds", type=float, default=3600, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of targets")
    parser.add_argument("--out", type=Path, help="counts and findings as JSON")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        fuzz_with_atheris(given.only[0], seed=given.seed, seconds=given.seconds, inputs=given.inputs, out=given.one)
        return 0
    from tests.fuzz.targets import targets

    names = given.only or list(targets())
    if unknown := set(names) - set(targets()):
        parser.error(f"no targets: {', '.join(sorted(unknown))}; there are: {', '.join(targets())}")
    tallies: dict[str, Tally] = {}
    left, begun = given.inputs, time.perf_counter()
    for done, name in enumerate(names):
        # A target that is done early leaves its part to those that follow.
        seconds = (given.seconds - (time.perf_counter() - begun)) / (len(names) - done)
        inputs = -(-left // (len(names) - done))
        one = _in_a_process(name, given.engine, seed=given.seed, seconds=max(seconds, 1.0), inputs=inputs)
        left -= one.inputs
        tallies[name] = one
        print(
            f"{name:18} {one.inputs:9,} inputs  {one.accepted:8,} accepted  {one.seconds:7.1f} s  "
            f"slowest {one.slowest:.3f} s",
            flush=True,
        )
        for what, data in one.findings.items():
            print(f"    FOUND {what}\n          {data[:300]}")
    total = sum(tally.inputs for tally in tallies.values())
    findings = sum(len(tally.findings) for tally in tallies.values())
    print(f"{total:,} inputs, {findings} findings; seed {given.seed}, engine {given.engine}")
    if given.out:
        about = {"engine": given.engine, "seed": given.seed, "inputs": total, "findings": findings}
        about |= {"python": platform.python_version(), "seconds": round(time.perf_counter() - begun, 1)}
        given.out.write_text(
            json.dumps(about | {"targets": {name: vars(one) for name, one in tallies.items()}}, indent=1) + "\n"
        )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
