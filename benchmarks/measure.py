"""Seconds and bytes of one piece of work, on Linux; imports nothing of FlowGraph: other environments use it too.

Peaks are the kernel's own high-water mark of resident memory (/proc/self/status, VmHWM), set back just before the work.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


class Run(NamedTuple):
    """What a piece of work took."""

    seconds: float
    peak_bytes: int
    """At its highest point, above what was resident before it."""


def run(work: Callable[[], object]) -> Run:
    """Do the work once."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed must not hide what this one needs
    before = reset_peak()
    start = time.perf_counter()
    work()
    return Run(time.perf_counter() - start, peak() - before)


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Shortest of `repeat` runs: on a shared machine everything else only adds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def reset_peak() -> int:
    """Set the high-water mark back to what is resident now; returns that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("/proc/self/status", "VmRSS")


def peak() -> int:
    """Bytes resident at the highest point since `reset_peak`."""
    return _kilobytes("/proc/self/status", "VmHWM")


def available() -> int:
    """Bytes that this process can still take without swapping, containers' limits included."""
    free = [_kilobytes("/proc/meminfo", "MemAvailable")]
    for limit, used in CGROUPS:
        limit_file, used_file = Path("/sys/fs/cgroup", limit), Path("/sys/fs/cgroup", used)
        if limit_file.is_file() and limit_file.read_text().strip().isdigit():
            free.append(int(limit_file.read_text()) - int(used_file.read_text()))
    return min(free)


def refuse_beyond(extra: int) -> None:
    """From here on an allocation that would take more than `extra` bytes on top of the present ones fails."""
    limit = _kilobytes("/proc/self/status", "VmSize") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _kilobytes(path: str, field: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
