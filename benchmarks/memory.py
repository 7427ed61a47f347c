"""`python -m benchmarks.memory`: the peaks that flowgraph/memory.py predicts, against those that are measured.

SmolLM2 in float32 on the CPU, real text, one trace per process. The tracer has traced a short text before: what
libraries set up once is not counted. Measured is the high-water mark of resident memory above what was resident before
the trace (measure.py). The tracer has a budget, so malloc gives freed tensors back.

A line of JSON per case; all of them go to benchmarks/results/memory.json, with machine, versions and commit.

    --lengths N ...   other lengths than 1,024, 2,048 and 4,096
    --only X ...      only cases whose settings contain X: exact, chunk
    --out FILE        write there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.run import RESULTS, machine

LENGTHS = (1024, 2048, 4096)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "edges"},
    {"mode": "sparse"},
    {"mode": "sparse", "chunk": 1024},
    {"mode": "sparse", "weights": "value_norm"},
    {"mode": "exact"},
    {"mode": "exact", "chunk": 1024},
)
ONLY_AT = {"edges": 2048, "value_norm": 2048}
"""All edges of long traces are too many; what value norms add is the same at every length."""


def plan(lengths: tuple[int, ...] = LENGTHS) -> Iterator[tuple[int, dict[str, Any]]]:
    """(tokens, settings) of each case."""
    for num_tokens in lengths:
        for settings in SETTINGS:
            here = all(ONLY_AT.get(value, num_tokens) == num_tokens for value in settings.values())
            if here and settings.get("chunk", 0) < num_tokens:
                yield num_tokens, settings


def case(num_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One case, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", str(num_tokens), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{num_tokens} tokens, {settings}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return found


def measured(num_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The case itself, in this process."""
    from benchmarks.cases import Bench
    from flowgraph import Tracer
    from flowgraph.memory import plan

    bench = Bench(num_tokens)
    first = {name: mask[:, :256] for name, mask in bench.masks.items()}
    first["sink_mask"] = first["sink_mask"].clone()
    first["sink_mask"][:, -1] = True
    if first["prompt_mask"].all():
        first["prompt_mask"] = first["prompt_mask"].clone()
        first["prompt_mask"][:, 64:] = False
    budget = 10**15  # anything fits, and malloc gives freed tensors back
    Tracer(bench.model, **settings | {"chunk": None}, memory=budget).from_ids(bench.ids[:, :256], **first)
    tracer = Tracer(bench.model, **settings, memory=budget)
    peak = measure.run(partial(tracer.from_ids, bench.ids, **bench.masks)).peak_bytes
    predicted = plan(bench.model, num_tokens, tracer.options)
    return {
        "tokens": num_tokens,
        "settings": settings,
        "predicted_bytes": predicted.peak_bytes,
        "measured_bytes": peak,
        "ratio": predicted.peak_bytes / peak,
        "phase": predicted.largest,
        "parts": predicted.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", nargs="+", default=[], metavar="X")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--case", nargs=2, metavar=("TOKENS", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(int(options.case[0]), json.loads(options.case[1]))))
        return
    results = []
    for num_tokens, settings in plan(tuple(options.lengths)):
        if options.only and not any(part in json.dumps(settings) for part in options.only):
            continue
        results.append(case(num_tokens, settings))
        print(json.dumps(results[-1]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
