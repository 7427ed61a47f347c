"""`make bench`: time and memory of credits against a plain forward and against eager attention, as one JSON file.

First the equality check: credits must equal a dense float64 computation, or no speed is printed. Then each case runs
in a process of its own (see cases.py). The result goes to benchmarks/results/cpu.json with machine, versions, commit.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flowgraph import TokenGraph, Tracer, trace_flow
from flowgraph.smollm2 import load

RESULTS = Path(__file__).parent / "results"
CASES = [
    ("forward", (1024, 2048, 4096)),
    ("edges", (1024, 2048, 4096)),
    ("exact", (1024, 2048, 4096)),
    ("eager", (1024, 2048)),
]


def check_equality(num_tokens: int = 300) -> float:
    """Largest relative error of throughput against eager attention, dense float64. Raises if it is not small."""
    from benchmarks.cases import reasoning

    model, tokenizer = load(torch.float32)
    ids = reasoning(tokenizer, num_tokens)
    place = torch.arange(num_tokens)
    roles = {"prompt_mask": place < 60, "answer_mask": place >= num_tokens - 4}
    trace = Tracer(model).from_ids(ids, prompt_mask=roles["prompt_mask"][None], sink_mask=roles["answer_mask"][None])[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    W = torch.stack([maps[layer][0].double() for layer in trace.graph.layers]).mean((0, 1))
    exact = trace_flow(TokenGraph.from_dense(W, **roles), "reference").throughput
    error = float(((trace.throughput.double() - exact).abs() / exact.clamp(min=1e-12)).max())
    if error > 1e-3:
        raise SystemExit(f"credits differ from the dense computation by {error:.1e}: no speed is worth printing")
    return error


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import scipy
    import torch_geometric
    import transformers

    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_geometric": torch_geometric.__version__,
        "scipy": scipy.__version__,
        "model": "SmolLM2-135M-Instruct, float32",
    }


def run_case(case: str, num_tokens: int) -> dict[str, Any]:
    """One case in a process of its own; what killed it, if something did."""
    command = [sys.executable, "-m", "benchmarks.cases", case, str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"case": case, "tokens": num_tokens, "failed": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: list[dict[str, Any]]) -> Table:
    """The results for people."""
    out = Table("case", "tokens", "seconds", "/ forward", "peak above model, MB")
    for one in results:
        if "failed" in one:
            out.add_row(one["case"], str(one["tokens"]), "failed", "", one["failed"][:60])
            continue
        ratio = f"{one['time_over_forward']:.2f}" if "time_over_forward" in one else ""
        megabytes = f"{one['peak_bytes_above_model'] / 1e6:,.0f}"
        out.add_row(one["case"], f"{one['tokens']:,}", f"{one['seconds']:.2f}", ratio, megabytes)
    return out


def main() -> None:
    console = Console()
    error = check_equality()
    console.print(f"equal to the dense computation: largest relative error {error:.1e}")
    results = []
    for case, lengths in CASES:
        for num_tokens in lengths:
            console.print(f"measuring {case} at {num_tokens:,} tokens")
            results.append(run_case(case, num_tokens))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cpu.json"
    path.write_text(json.dumps({"machine": machine(), "equality_error": error, "results": results}, indent=1) + "\n")
    console.print(table(results), f"written to {path}")


if __name__ == "__main__":
    main()
