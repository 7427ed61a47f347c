"""`python -m benchmarks.gpu.worker DEVICE`: measures the cases that come in, one line of JSON each.

A process of its own, since a kernel that fails may take the device's context with it: then the next case gets a new
one. What it says first is what it runs on, and after each answer that it is ready for another request. Standard output
is for answers alone; whatever else is printed goes to the errors.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from datetime import datetime, timezone
from importlib import import_module
from typing import Any

import torch


def about(device: torch.device) -> dict[str, Any]:
    """The machine."""
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "card": "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "model": "random weights, bfloat16",
    }
    for name in ("torch", "transformers", "torch_geometric", "triton", "torch_scatter", "cupy"):
        try:
            found[name] = import_module(name).__version__
        except ImportError:
            found[name] = "absent"
        except Exception as error:  # built for another torch or another CUDA: the cases that need it will say so
            found[name] = f"unusable: {type(error).__name__}: {str(error)[:200]}"
    if card is not None:
        found |= {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError as error:
        return f"unknown: {error}"


def answer(request: dict[str, Any], device: torch.device, benches: dict[str, Any]) -> dict[str, Any]:
    """What came of one case: measured, skipped or failed."""
    from benchmarks.gpu.plan import Case
    from benchmarks.gpu.present import Absent
    from benchmarks.gpu.stages import Bench, run

    case = Case(*request["case"])
    bench = benches.setdefault("bench", Bench(device, request["seed"]))
    bench.seed = request["seed"]
    try:
        return run(bench, case)
    except Absent as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # said in the result, and the next case goes on
        traceback.print_exc()
        bench.release()
        return {"failed": f"{type(error).__name__}: {str(error)[:1000]}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(sys.argv[1])

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    say(about(device))
    benches: dict[str, Any] = {}
    for line in sys.stdin:
        say(answer(json.loads(line), device, benches))
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where the context is gone: the process ends
        say({"ready": True})


if __name__ == "__main__":
    main()
