"""`python -m benchmarks.gpu`: all that is to be known of FlowGraph on a GPU, in runs of some minutes that go on from
each other.

What is measured, and in which order, is in plan.py; how, in stages.py; what is expected of an H100, in predict.py.
There is no network in it: models have random weights of real shapes, made on the device. Every result is in the file as
soon as it is known. No case begins after the deadline; the same command run again goes on where the last one stopped. A
case that fails, hangs or takes the process with it is in the file too, and the next one runs; the exit code is then 1.

    --minutes 8    no case begins later
    --out FILE     default: benchmarks/results/gpu-<card>.json; for a CPU out/bench/gpu-cpu.json
    --only X ...   only cases whose name contains X, anew: "equality", "sparse triton", "@8192"
    --retry        measure anew what failed or was skipped
    --fresh        measure everything anew
    --tables       measure nothing; write the section of docs/gpu.md from benchmarks/results/gpu-*.json
    --device cpu   a trial of the script: Triton's interpreter, a tiny model; says nothing of speed
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu import page
from benchmarks.gpu.plan import Case, plan
from benchmarks.run import RESULTS, Store, commit

CASE_SECONDS, START_SECONDS = 110.0, 110.0
"""Longer than that nothing takes that works, but the longest traces; and a run of 8 minutes is over in 10."""

ERRORS = Path("out/bench/gpu-errors.txt")


class Gone(Exception):
    """The worker's process has ended, or was ended because it took too long; with what it said last."""


class Worker:
    """A process that measures cases (worker.py).

    Args:
        device: "cuda" or "cpu".
        command: what to run in place of it.

    Attributes:
        about: the machine, as it says.

    Raises:
        Gone: it doesn't start.
    """

    def __init__(self, device: str, command: Sequence[str] = ()) -> None:
        ERRORS.parent.mkdir(parents=True, exist_ok=True)
        command = command or [sys.executable, "-m", "benchmarks.gpu.worker", device]
        # On a CPU kernels run in Triton's interpreter, which has to be said before anything imports it.
        environment = {"HF_HUB_OFFLINE": "1"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
        with ERRORS.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
            )
        self.about = self._read(START_SECONDS)

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Gone: there is none within `limit` seconds, or at all.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # said by what is read
        return self._read(limit)

    def is_alive(self) -> bool:
        """Is it ready for another request? It says so when a case has left the device as it was."""
        try:
            return bool(self._read(START_SECONDS)["ready"])
        except Gone:
            return False

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        over = threading.Event()

        def end() -> None:
            over.set()
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        if over.is_set():
            raise Gone(f"nothing came within {limit:.0f} s")
        raise Gone(f"exit {code}: {ERRORS.read_text().strip().rpartition(chr(10))[2][-300:]}")


def limit_of(case: Case) -> float:
    """Seconds after which a case is given up: a long trace may take three times what is expected of it.

    It runs once to compile, once alone and once traced, on a model that is made first.
    """
    expected = case.expected if case.stage == "long" else {}
    return max(CASE_SECONDS, 60 + 3 * sum(expected.get(name, 0.0) for name in ("forward_seconds", "seconds")))


def left(store: Store, cases: list[Case], only: Sequence[str] = (), retry: bool = False) -> list[Case]:
    """The cases that are still to be measured, in their order."""
    if only:
        return [case for case in cases if any(part in case.key for part in only)]
    anew = {*keys_of(store, "failed"), *keys_of(store, "skipped")} if retry else set()
    return [case for case in cases if not store.has(case.key) or case.key in anew]


def keys_of(store: Store, kind: str) -> list[str]:
    """The cases that "failed" or were "skipped"."""
    return [f"{one['case']}@{one['tokens']}" for one in store.content["results"] if kind in one]


def measure(
    store: Store,
    cases: list[Case],
    deadline: float,
    start: Callable[[], Worker],
    seed: int | None = None,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measure cases one after the other, each result into the file at once, until the deadline.

    A case that may take longer than others begins earlier or, in the next run, first.

    Args:
        deadline: on the clock `now`. start: makes a worker.
    """
    worker: Worker | None = None
    code = store.content["machine"].get("commit") if cases else ""
    try:
        for number, case in enumerate(cases):
            if now() >= deadline - (limit_of(case) - CASE_SECONDS if number else 0):
                print(f"the time is over; {len(cases) - number} cases are left: run the same command again")
                return
            request = {"case": list(case), "seed": secrets.randbelow(2**31) if seed is None else seed}
            began = now()
            try:
                worker = worker or start()
                found = worker.ask(request, limit_of(case))
            except Gone as gone:
                found = {"failed": str(gone)}
            store.put(
                {"case": case.name, "tokens": case.tokens, "stage": case.stage, "what": case.what, "shape": case.shape}
                | found
                | {"expected": case.expected, "took_seconds": now() - began, "seed": request["seed"]}
                | {"commit": code, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            )
            print(f"[{number + 1}/{len(cases)}] {case.key}: {said(found)}")
            if worker is not None and not worker.is_alive():
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()


def said(found: dict[str, Any]) -> str:
    """A result in one line."""
    for kind in ("failed", "skipped"):
        if kind in found:
            return f"{kind}: {found[kind]}"
    return ", ".join(f"{name} {value:.4g}" for name, value in found["measured"].items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later (default: 8)")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--only", nargs="+", default=[], metavar="X", help="only cases whose name contains X, anew")
    parser.add_argument("--retry", action="store_true", help="measure anew what failed or was skipped")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--tables", action="store_true", help="measure nothing; tables from the files as they are")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["real", "tiny"], help="default: tiny on a CPU, else real")
    parser.add_argument("--seed", type=int, help="of what is random; default: another one for each case")
    parser.add_argument("--commit", help="where the checkout has no git")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log of it is up to date
    if options.tables:
        page.write_page()
        return 0
    cases = plan(options.shape or ("tiny" if options.device == "cpu" else "real"))
    if options.only and not any(part in case.key for case in cases for part in options.only):
        parser.error(f"--only {' '.join(options.only)}: no case has that in its name")
    deadline = time.monotonic() + 60 * options.minutes
    try:
        first = Worker(options.device)
    except Gone as gone:
        tried = "--device cpu --shape tiny tries the script out without a GPU"
        parser.exit(2, f"no work on {options.device}: {gone}\n{tried}\n")
    about = first.about | {"commit": options.commit or known_commit()}
    store = Store(options.out or default_path(about), options.fresh)
    before = store.content.setdefault("machine", about)
    if before["card"] != about["card"]:
        first.close()
        parser.exit(2, f"{store.path} is of {before['card']}, this is {about['card']}: another --out, or --fresh\n")
    store.content["machine"] = about
    waiting = [first]
    todo = left(store, cases, options.only, options.retry)
    measure(store, todo, deadline, lambda: waiting.pop() if waiting else Worker(options.device), options.seed)
    for one in waiting:
        one.close()
    if store.path.parent == RESULTS:
        page.write_page()
    print(page.report(store.content))
    return 1 if keys_of(store, "failed") else 0


def known_commit() -> str:
    """Of the checkout, where it has git."""
    try:
        return commit() or "unknown"
    except FileNotFoundError:
        return "unknown"


def default_path(about: dict[str, Any]) -> Path:
    """Results of a CPU are a trial, and no results."""
    if about["device"] == "cpu":
        return Path("out/bench/gpu-cpu.json")
    name = re.sub(r"[^a-z0-9]+", "-", about["card"].lower()).strip("-")
    return RESULTS / f"gpu-{name}.json"


if __name__ == "__main__":
    sys.exit(main())
