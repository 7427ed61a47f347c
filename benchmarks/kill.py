"""`python -m benchmarks.kill`: a job of scoring, killed with SIGKILL at random points and run again.

Each point has a folder of its own, and one run is left alone. A run is killed after a random part of the time that the
undisturbed one takes; what it has finished is noted; then the same job runs to its end. The folder must be equal to the
undisturbed one to the byte (the job is a reproducible one), with every row once, and what was finished must not have
been written again.

Three ways: "local", the process of the job; "ray worker", an actor of a pool of two; "ray driver", the process that
holds the job while the cluster goes on. 40 points by hand; tests/test_kill.py takes 6 of them.

The result goes to benchmarks/results/kill.json with machine, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, machine
from tests.jobs import NAN, assert_whole, contents, job_of, responses, score, write_rows

_OF_RAY = ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")
WAYS = ("local", "ray worker", "ray driver")
MINUTES = 10
"""For what takes seconds on a quiet machine."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.jobs"])  # what takes seconds is imported once for all processes


def rows_of(count: int) -> list[Any]:
    """Rows of which some have to be set aside."""
    rows: list[Any] = responses(count, _5=NAN)
    rows[count // 2] = '{"question": "q", "resp'
    return rows


def run(source: Path, out: Path, settings: dict[str, str], engine: dict[str, Any], how: dict[str, Any]) -> None:
    """The whole job, as a process of its own."""
    os.environ.update(settings)
    score(job_of(source, out, **how), **engine)


def engine_of(address: str | None) -> dict[str, Any]:
    return {} if address is None else {"name": "ray", "address": address, "workers": 2, "cpus": 0.5}


def process(source: Path, out: Path, address: str | None = None, workers: int | None = None, **how: Any) -> Any:
    """`run` in a process that has been started; on Ray, where there is an address.

    Args:
        how: more for `job_of`.
    """
    # The server that forks is older than the cluster, so what a child would inherit of it is handed on.
    settings = {name: os.environ[name] for name in _OF_RAY if name in os.environ}
    engine = engine_of(address) | ({} if workers is None else {"workers": workers})
    how = {"shard_rows": 4, "reproducible": True} | how
    one = _CONTEXT.Process(target=run, args=(source, out, settings, engine, how))
    one.start()
    return one


def end_of(one: Any) -> int:
    """The exit code of a process, which has minutes to end.

    Raises:
        TimeoutError: it has not ended; it is killed.
    """
    one.join(MINUTES * 60)
    if one.is_alive():
        one.kill()
        raise TimeoutError(f"{one.name} has not ended after {MINUTES} minutes")
    return one.exitcode


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inode, time of the last change) of every finished part."""
    found = {path.name: path.stat() for path in out.glob("part-*.parquet")}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def kill_once(way: str, source: Path, out: Path, delay: float, address: str | None = None) -> dict[str, Any]:
    """Start the job, kill what the way says after `delay` seconds, and see it through to its end.

    Returns:
        What was finished when it was killed, and whether anything was left to kill.
    """
    notes = source.parent / "workers"
    notes.unlink(missing_ok=True)
    driver = process(source, out, address if way.startswith("ray") else None)
    began = time.monotonic()
    # A job on Ray takes seconds until anything happens: its delay counts from its first worker on.
    while way != "local" and not _lines(notes):
        assert driver.is_alive(), f"the driver ended with {driver.exitcode} before it had a worker"
        assert time.monotonic() - began < 60 * MINUTES, f"no worker after {MINUTES} minutes"
        time.sleep(0.02)
    time.sleep(delay)
    alive = driver.is_alive()
    before = {}
    if way == "ray worker":
        try:
            os.kill(int(_lines(notes)[0]), signal.SIGKILL)
        except ProcessLookupError:
            alive = False
        code = end_of(driver)
        assert code == 0, f"the driver ended with {code}"
    else:
        driver.kill()
        end_of(driver)
        before = parts(out)
        code = end_of(process(source, out, address if way.startswith("ray") else None))
        assert code == 0, f"the second run ended with {code}"
    after = parts(out)
    assert {name: after[name] for name in before} == before, "finished parts were written again"
    finished = None if way == "ray worker" else len(before)  # there the same run goes on
    return {"way": way, "delay": round(delay, 3), "running": alive, "finished_before": finished}


def _lines(path: Path) -> list[str]:
    """Those that are written to their end."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def check(source: Path, out: Path, expected: dict[str, bytes]) -> int:
    """Number of files that are equal to the byte to those of the undisturbed folder: all of them, or it raises."""
    assert_whole(out, source)
    found = contents(out)
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    return sum(found[name] == expected[name] for name in found)


@contextmanager
def cluster(gpus: int = 0) -> Iterator[str]:
    """A Ray of this machine, by its address. It takes the number of GPUs for granted."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    started: Any = ray.init(
        address="local",
        num_cpus=2,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    try:
        yield started.address_info["gcs_address"]
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=28)
    parser.add_argument("--ray", type=int, default=12, help="half of them workers, half drivers")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill.json")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        source = write_rows(Path(name) / "in" / "in.jsonl", rows_of(given.rows))
        end_of(process(source, source.parent / "warm"))
        began = time.perf_counter()
        code = end_of(process(source, source.parent / "alone"))
        seconds = time.perf_counter() - began
        assert code == 0
        expected = contents(source.parent / "alone")
        points: list[dict[str, Any]] = []

        def point(way: str, delay: float, address: str | None = None) -> None:
            out = source.parent / f"out{len(points)}"
            points.append(kill_once(way, source, out, delay, address))
            points[-1]["equal_files"] = check(source, out, expected)
            print(json.dumps(points[-1]), flush=True)

        for _ in range(given.local):
            point("local", chance.uniform(0, seconds))
        if given.ray:
            with cluster() as address:
                for number in range(given.ray):
                    point(WAYS[1 + number % 2], chance.uniform(0, seconds / 2), address)
    result = {
        "benchmark": "kill",
        "machine": machine() | {"model": "a tiny random Llama over bytes, float32"},
        "rows": given.rows,
        "parts": len([name for name in expected if name.startswith("part-")]),
        "undisturbed_seconds": round(seconds, 2),
        "points": points,
        "killed_while_running": sum(one["running"] for one in points),
        "files": len(expected),
        "equal_to_the_byte": sum(one["equal_files"] == len(expected) for one in points),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(points)} points, {result['killed_while_running']} of them in a run; wrote {given.out}")


if __name__ == "__main__":
    main()
