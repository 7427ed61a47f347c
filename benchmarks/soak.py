"""`python -m benchmarks.soak`: hours of scoring: is memory flat, the rate steady, every count exact? And two workers?

A tiny random model scores short rows, of which one in a hundred has to be set aside, in this process, by the job of
`flowgraph score` as it is; folder after folder until the time is over, and the last one is finished. Resident memory is
read every second. Growth is the median of the last quarter of the time over that of the second quarter: what the
first quarter takes is warm-up. The rate is that of both halves. Each folder is read in the end: every row once.

Then the rate of one and of two processes over the same rows, by turns; reported is the ratio of the better of each.

The result goes to benchmarks/results/soak.json with machine, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import RESULTS, machine
from flowgraph.adapters import engines, scoring
from tests.jobs import NAN, assert_whole, job_of, responses, write_rows


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Notes memory and rows done, every second."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, float]] = []
        self.rows = 0.0
        self._over = threading.Event()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1):
            self.samples.append((time.perf_counter() - self._began, resident(), self.rows))

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def rows_of(count: int) -> list[Any]:
    rows: list[Any] = responses(count)
    for k in range(50, count, 100):
        rows[k]["response"] = NAN + rows[k]["response"]
    return rows


def soak(source: Path, count: int, minutes: float) -> dict[str, Any]:
    """Score a file again and again; what memory, rate and counts did."""
    torch.set_num_threads(1)
    watch, folders = Watch(), 0
    until = time.perf_counter() + 60 * minutes
    out = source.with_name("out")

    def advance(rows: float) -> None:
        watch.rows += rows

    while not folders or time.perf_counter() < until:
        job = job_of(source, out, shard_rows=1000)
        done = engines.score(job, engines.Engine(device="cpu"), scoring.Tally(count), advance=advance)
        assert (done["rows"], done["written"] + done["failed"]) == (count, count)
        assert done["failed"] == len(range(50, count, 100))
        assert_whole(out, source)
        shutil.rmtree(out)
        folders += 1
    watch.close()
    return summary(watch.samples) | {"folders": folders, "rows": folders * count}


def summary(samples: list[tuple[float, int, float]]) -> dict[str, Any]:
    """Memory and rate over the course of the samples (seconds, bytes, rows done)."""
    quarter = len(samples) // 4
    early, late = (
        statistics.median(one[1] for one in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    )
    half = samples[len(samples) // 2]
    rates = [half[2] / half[0], (samples[-1][2] - half[2]) / (samples[-1][0] - half[0])]
    return {
        "seconds": round(samples[-1][0], 1),
        "memory_mb": [round(early / 2**20, 1), round(late / 2**20, 1)],
        "memory_growth": round(late / early - 1, 4),
        "memory_mb_by_tenth": [
            round(
                statistics.median(one[1] for one in samples[k * len(samples) // 10 : (k + 1) * len(samples) // 10])
                / 2**20
            )
            for k in range(10)
        ],
        "rows_per_second_by_half": [round(rate, 1) for rate in rates],
    }


def workers(source: Path, count: int, repeats: int) -> dict[str, Any]:
    """Rows per second of one and of two processes, loading not counted."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for number in rates:
            rates[number].append(_rate(source, count, number))
    best = {number: max(found) for number, found in rates.items()}
    return {
        "rows_per_second": {str(k): [round(r, 1) for r in v] for k, v in rates.items()},
        "ratio": round(best[2] / best[1], 2),
    }


def _rate(source: Path, count: int, number: int) -> float:
    """Each process has the job to itself, in a folder of its own, and begins when all have loaded."""
    context = multiprocessing.get_context("spawn")
    gate, times = context.Barrier(number), context.Queue()
    running = [context.Process(target=_work, args=(source, k, gate, times)) for k in range(number)]
    for one in running:
        one.start()
    found = [times.get() for _ in running]
    for one in running:
        one.join()
        shutil.rmtree(source.with_name(f"out{running.index(one)}"))
    return number * count / (max(end for _, end in found) - min(begin for begin, _ in found))


def _work(source: Path, number: int, gate: Any, times: Any) -> None:
    torch.set_num_threads(1)
    job = job_of(source, source.with_name(f"out{number}"), shard_rows=200)
    job.out.mkdir()
    worker = scoring.Worker(job)
    gate.wait()
    began = time.time()
    for _ in worker.run(job.manifest.shards):
        pass
    times.put((began, time.time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--most-growth", type=float, default=0.02)
    parser.add_argument("--worker-rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="of the rates of workers; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = write_rows(Path(name) / "in" / "in.jsonl", rows_of(given.rows))
        found = soak(source, given.rows, given.minutes)
        print(json.dumps(found), flush=True)
        few = write_rows(Path(name) / "few" / "in.jsonl", rows_of(given.worker_rows))
        scaling = workers(few, given.worker_rows, given.repeats) if given.repeats else None
    result = {
        "benchmark": "soak",
        "machine": machine() | {"model": "a tiny random Llama over bytes, float32"},
        "soak": found,
        "workers": scaling,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"memory grew by {found['memory_growth']:.1%}; wrote {given.out}")
    if found["memory_growth"] > given.most_growth:
        raise SystemExit(f"memory grew by more than {given.most_growth:.0%}")


if __name__ == "__main__":
    main()
