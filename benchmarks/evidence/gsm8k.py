"""`python -m benchmarks.evidence.gsm8k`: `flowgraph faithful` with SmolLM2 on GSM8K, as docs/evidence.md shows it.

The rows are the reference solutions to odd-numbered problems (choices are made on even ones), one per problem, in an
order that a fixed seed gives. Three runs, each a folder of benchmarks/results/evidence; a second start goes on:

    gsm8k            the top 20 % hidden, restatements of the answer left out of the choice; with regeneration
    gsm8k-restated   the same with restatements that may be chosen; fewer signals and traces
    gsm8k-curves     all shares, both ends, deletion and insertion; fewer signals and traces
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.evidence.choices import solutions_file
from benchmarks.evidence.recall import RESULTS
from flowgraph.adapters.evidence.faithful import SHARES, FaithfulConfig, faithful

FEW = ("flow", "flow/paper", "reach", "answer_attention", "gradient_input", "recency", "entropy", "future_attention")
RUNS: dict[str, FaithfulConfig] = {
    "gsm8k": FaithfulConfig(limit=100, regenerate=20, curves=0),
    "gsm8k-restated": FaithfulConfig(signals=FEW, restated="include", limit=50, regenerate=0, curves=0),
    "gsm8k-curves": FaithfulConfig(
        signals=FEW, shares=SHARES, ends=("top", "bottom"), limit=20, regenerate=0, curves=20
    ),
}


def rows_of(source: Path) -> list[dict[str, Any]]:
    """Reference solutions to odd-numbered problems."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["problem"] % 2 and row["source"] == "reference"]
    Random(0).shuffle(kept)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=solutions_file(), help="as benchmarks.study takes it")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from flowgraph.smollm2 import load

    torch.set_num_threads(1)
    model, tokenizer = load()
    for name in options.runs:

        def say(line: Any, name: str = name) -> None:
            steps = {step: round(seconds, 1) for step, seconds in line.get("seconds", {}).get("steps", {}).items()}
            print(name, line.get("line"), line.get("reason", steps), flush=True)

        faithful(
            model, tokenizer, rows_of(options.source), options.out / name, RUNS[name], name="SmolLM2-135M-Instruct",
            plot=False, advance=say,
        )  # fmt: skip


if __name__ == "__main__":
    main()
