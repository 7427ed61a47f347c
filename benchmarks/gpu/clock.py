"""Seconds and bytes on a device: whoever is timed is waited for."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure

LONG = 10.0
"""Seconds of a round after which one more is enough."""

Task = Callable[[], object]


class Clock:
    """Args: device: "cuda" (the current one) or "cpu"."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back the memory that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, task: Task) -> float:
        """Of one run."""
        self.wait()
        start = time.perf_counter()
        task()
        self.wait()
        return time.perf_counter() - start

    def medians(self, tasks: Mapping[str, Task], budget: float = 3.0, most: int = 20) -> dict[str, float]:
        """Median seconds of each task, by turns: at least 3 rounds, up to `most` if they fit into `budget` seconds.

        A first round, in which kernels are compiled, is not counted. If it takes longer than `LONG`, one more is all.
        """
        if self.device.type == "cpu":  # a trial of the script
            budget, most = 0.0, 1
        first = sum(self.seconds(task) for task in tasks.values())
        times: dict[str, list[float]] = {name: [] for name in tasks}
        spent = 0.0
        for number in range(1 if first > LONG else most):
            if number >= 3 and spent > budget:
                break
            for name, task in tasks.items():
                times[name].append(self.seconds(task))
                spent += times[name][-1]
        return {name: median(several) for name, several in times.items()}

    def peak(self, task: Task) -> int:
        """Bytes at the highest point of one run, above what was held before it."""
        return self.run(task).peak_bytes

    def run(self, task: Task) -> measure.Run:
        """Seconds and peak of one run."""
        if self.device.type != "cuda":
            return measure.run(task)
        self.clear()
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        took = self.seconds(task)
        return measure.Run(took, torch.cuda.max_memory_allocated(self.device) - before)

    def longest(self, task: Task, count: int = 15) -> list[tuple[str, float, int]]:
        """(name, seconds, calls) of what took most time of one run: kernels, or operators on a CPU."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities, acc_events=True) as profiled:
            task()
            self.wait()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda one: -getattr(one, key))
        return [(one.key[:80], getattr(one, key) / 1e6, one.count) for one in events[:count] if getattr(one, key)]
