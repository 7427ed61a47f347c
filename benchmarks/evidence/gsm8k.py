"""`python -m benchmarks.evidence.gsm8k`: `flowgraph faithful` with SmolLM2 on GSM8K, as docs/evidence.md shows it.

The rows are the reference solutions to odd-numbered problems (choices are made on even ones), one per problem, in an
order that a fixed seed gives. Four runs, each a folder of benchmarks/results/evidence; a second start goes on:

    gsm8k            the top 20 % hidden, restatements of the answer left out of the choice; with regeneration
    gsm8k-restated   the same with restatements that may be chosen; fewer signals and traces
    gsm8k-curves     all shares, both ends, deletion and insertion; fewer signals and traces
    gsm8k-flashtrace the first traces of the first run again, with FlashTrace: its three scores are explained in
                     benchmarks/evidence/flashtrace.py, and it needs `make bench-flashtrace`
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.choices import solutions_file
from benchmarks.evidence.recall import RESULTS
from flowgraph.adapters.evidence.faithful import SHARES, FaithfulConfig, faithful
from flowgraph.adapters.evidence.signals import SIGNALS, Reading, Signal

FEW = ("flow", "flow/paper", "reach", "answer_attention", "gradient_input", "recency", "entropy", "future_attention")
RUNS: dict[str, FaithfulConfig] = {
    "gsm8k": FaithfulConfig(limit=100, regenerate=20, curves=0),
    "gsm8k-restated": FaithfulConfig(signals=FEW, restated="include", limit=50, regenerate=0, curves=0),
    "gsm8k-curves": FaithfulConfig(
        signals=FEW, shares=SHARES, ends=("top", "bottom"), limit=20, regenerate=0, curves=20
    ),
}
FLASHTRACE = "gsm8k-flashtrace"
THEIRS = ("flashtrace", "flashtrace/span", "flashtrace/predicting")
BESIDE = ("flow", "reach", "mix", "answer_attention")
PYTHON = Path(__file__).parents[2] / ".venv-flashtrace" / "bin" / "python"


class FlashTrace:
    """FlashTrace in a process of its own; the three scores of a reading's tokens, each as a signal."""

    def __init__(self, folder: Path) -> None:
        if not PYTHON.exists():
            raise FileNotFoundError(f"{PYTHON} is missing: make bench-flashtrace")
        command = [str(PYTHON), "-m", "benchmarks.evidence.flashtrace", str(folder)]
        self._process = subprocess.Popen(
            command, cwd=PYTHON.parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def signal(self, name: str) -> Signal:
        """The score of that name, of `THEIRS`."""
        return lambda reading: self._scores(reading, name)

    def _scores(self, reading: Reading, name: str) -> Tensor:
        ids, answer = reading.token_ids.tolist(), reading.place.answer_tokens.nonzero().flatten()
        asked = {"name": name, "ids": ids, "prompt": int(reading.place.prompt_mask.sum())}
        asked["answer"] = [int(answer[0]), int(answer[-1]) + 1]
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"FlashTrace ended with {self._process.wait()}; its own words are above")
        found = torch.tensor(json.loads(line), dtype=torch.float64)
        return torch.cat([found, found.new_zeros(len(ids) - len(found))])

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def rows_of(source: Path) -> list[dict[str, Any]]:
    """Reference solutions to odd-numbered problems."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["problem"] % 2 and row["source"] == "reference"]
    Random(0).shuffle(kept)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=solutions_file(), help="as benchmarks.study takes it")
    every = [*RUNS, FLASHTRACE]
    parser.add_argument("--runs", nargs="+", choices=every, default=every if PYTHON.exists() else list(RUNS))
    parser.add_argument("--traces", type=int, default=30, help="of the run with FlashTrace")
    parser.add_argument("--workers", type=int, default=1, help="processes; of the run with FlashTrace always 1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from flowgraph import smollm2

    torch.set_num_threads(max(1, options.workers))  # one for each
    model, tokenizer = smollm2.load()
    for name in options.runs:

        def say(line: Any, name: str = name) -> None:
            steps = {step: round(seconds, 1) for step, seconds in line.get("seconds", {}).get("steps", {}).items()}
            print(name, line.get("line"), line.get("reason", steps), flush=True)

        how: dict[str, Any] = {"name": "SmolLM2-135M-Instruct", "plot": False, "advance": say}
        rows, out = rows_of(options.source), options.out / name
        if name != FLASHTRACE:
            faithful(model, tokenizer, rows, out, RUNS[name], **how, workers=options.workers)
            continue
        theirs = FlashTrace(smollm2.folder())
        try:
            SIGNALS.update({one: theirs.signal(one) for one in THEIRS[1:]})
            config = FaithfulConfig(signals=(*BESIDE, *THEIRS), limit=options.traces, regenerate=0, curves=0)
            faithful(model, tokenizer, rows, out, config, **how, flashtrace=theirs.signal(THEIRS[0]))
        finally:
            theirs.close()


if __name__ == "__main__":
    main()
