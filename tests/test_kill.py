"""A job that is killed at any moment and run again: no row lost, none twice, finished work kept."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill
from flowgraph.adapters import shards
from tests.jobs import contents, job_of, score, write_rows

POINTS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("kill") / "in.jsonl", kill.rows_of(24))


@pytest.fixture(scope="module")
def alone(source: Path) -> tuple[dict[str, bytes], float]:
    """Contents of the folder of an undisturbed run, and how long it takes."""
    kill.end_of(kill.process(source, source.parent / "warm"))
    began = time.perf_counter()
    assert kill.end_of(kill.process(source, source.parent / "alone")) == 0
    return contents(source.parent / "alone"), time.perf_counter() - began


@pytest.mark.parametrize("point", range(POINTS))
def test_killed_at_a_random_point(source: Path, alone: tuple[dict[str, bytes], float], point: int) -> None:
    out = source.parent / f"out{point}"
    expected, seconds = alone
    delay = random.Random(point).uniform(point, point + 1) * seconds / POINTS
    kill.kill_once("local", source, out, delay)
    kill.check(source, out, expected)


CALLS = ("fsync", "replace")


def run_until(source: Path, out: Path, call: int, after: bool) -> None:
    """The job, in a process that kills itself before or after its n-th call that makes something last."""
    count = 0

    def deadly(real: Any) -> Any:
        def function(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = real(*args)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return function

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    score(job_of(source, out, shard_rows=4, reproducible=True))
    os._exit(77)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_call_that_makes_something_last(tmp_path: Path, after: bool) -> None:
    """fsync and rename of manifest, notes, rows set aside and parts, one after the other, in a job of three parts."""
    source = write_rows(tmp_path / "in.jsonl", kill.rows_of(10))
    job = job_of(source, tmp_path / "alone", shard_rows=4, reproducible=True)
    score(job)
    expected = contents(tmp_path / "alone")
    for call in range(1, 100):
        out = tmp_path / f"out{call}"
        one = kill._CONTEXT.Process(target=run_until, args=(source, out, call, after))
        one.start()
        code = kill.end_of(one)
        if code == 77:
            break
        assert code == -signal.SIGKILL
        score(job_of(source, out, shard_rows=4, reproducible=True))
        kill.check(source, out, expected)
    assert call > 20, "there are that many of them"


def test_a_row_that_kills_its_process_is_set_aside_at_last(tmp_path: Path) -> None:
    from tests.jobs import KILLS, responses

    rows = responses(6)
    rows[3]["response"] = KILLS + rows[3]["response"]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out"
    ends: list[int] = []
    while not ends or (ends[-1] != 0 and len(ends) < 9):
        ends.append(kill.end_of(kill.process(source, out)))
    assert ends == [-signal.SIGKILL] * 3 + [0]
    (failed,) = shards.read_failed(out)
    assert (failed["line"], "2 processes died" in failed["reason"]) == (4, True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)  # whether or not somebody still reads a file of it


@pytest.mark.parametrize("left", [0, 4, 8, 12, 20, 28])
def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path, left: int) -> None:
    """Wherever the space ends, in the manifest, a part, its rows set aside: the rest is done once there is room."""
    source, out, ballast = write_rows(tmp_path / "in.jsonl", kill.rows_of(12)), small_disk / "out", small_disk / "rest"
    score(job_of(source, tmp_path / "alone", shard_rows=4, reproducible=True))
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, ballast.stat().st_size - left * 1024)
    with pytest.raises(OSError, match="No space left on device"):
        score(job_of(source, out, shard_rows=4, reproducible=True))
    ballast.unlink()
    score(job_of(source, out, shard_rows=4, reproducible=True))
    kill.check(source, out, contents(tmp_path / "alone"))


# ------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with kill.cluster() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ray worker", "ray driver"])
@pytest.mark.parametrize("part", [0.1, 0.4, 0.7])
def test_killed_on_ray(
    source: Path, alone: tuple[dict[str, bytes], float], address: str, way: str, part: float
) -> None:
    out = source.parent / f"{way} {part}"
    expected, seconds = alone
    kill.kill_once(way, source, out, part * seconds, address)
    kill.check(source, out, expected)
