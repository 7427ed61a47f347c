"""`python -m benchmarks.evidence.budget`: how long `flowgraph faithful` takes, the top 20 %, without regeneration.

The solutions are those of benchmarks.evidence.gsm8k. The start of the workers, calibration and tables are part of the
time. The result goes to benchmarks/results/faithful.json with machine, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.evidence import gsm8k
from benchmarks.evidence.choices import solutions_file
from benchmarks.run import RESULTS, machine
from flowgraph.adapters.evidence.faithful import FaithfulConfig, faithful


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=solutions_file(), help="as benchmarks.study takes it")
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="a thread for each")
    parser.add_argument("--out", type=Path, default=RESULTS / "faithful.json")
    options = parser.parse_args()
    from flowgraph.smollm2 import load

    torch.set_num_threads(options.workers)
    model, tokenizer = load()
    config = FaithfulConfig(limit=options.traces, regenerate=0, curves=0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = faithful(
            model, tokenizer, gsm8k.rows_of(options.source), Path(folder), config, name="SmolLM2-135M-Instruct",
            plot=False, workers=options.workers,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    result = {
        "benchmark": "faithful",
        "machine": machine(),
        "traces": found["traces"],
        "signals": len(config.names()),
        "workers": options.workers,
        "seconds": round(seconds, 1),
        "seconds_per_trace": round(seconds / found["traces"], 2),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
