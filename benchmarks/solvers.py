"""Times of all solvers and libraries on some batches: what `solver="auto", backend="auto"` goes by.

    python -m benchmarks.solvers            on a CPU -> benchmarks/results/solvers.json (a quarter of an hour)
    python -m benchmarks.solvers --device cuda --out benchmarks/results/solvers-cuda.json

Every combination that can run here solves the same batch by `trace_flow`; they take turns, and of each the shortest
time counts, so that a machine with other work spoils no comparison. `ratio` is a time over the fastest of its batch.
What is not installed, or is no fair run (Triton's interpreter), is listed with the reason. First all are compared with
SciPy's flow: no time is written down for a wrong result.

The graphs are made up like attention: half of a token's edges lead to near tokens, the others anywhere, every token
reads the first one, weights fall off like a power law, and rows sum to 0.9.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch

from benchmarks.run import RESULTS, machine
from flowgraph import TokenGraph, trace_flow
from flowgraph.rows import DenseRows
from flowgraph.solve import LIBRARIES_OF, choose
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import Threshold

BUDGET = 25.0
"""Seconds that one combination may take on one batch, warm-up included; a slower one is timed once."""

MOST_DENSE = 4096
"""Tokens up to which the dense reference is tried."""


def attention_like(num_tokens: int, per_token: int, seed: int) -> TokenGraph:
    """A graph of about so many edges into each token."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.arange(1, num_tokens).repeat_interleave(per_token)
    number = torch.arange(per_token).repeat(num_tokens - 1)
    chance = torch.rand(len(target), generator=draw)
    near = target - 1 - (chance * 64).long()
    source = torch.where(number % 2 == 0, near, (chance * target).long())
    source = torch.where(number == 0, 0, source.clamp(min=0))
    key = (target * num_tokens + source).unique()
    source, target = key % num_tokens, key // num_tokens
    weight = torch.rand(len(key), generator=draw).clamp(min=1e-3) ** 4
    total = torch.zeros(num_tokens).index_add_(0, target, weight)
    place = torch.arange(num_tokens)
    return TokenGraph.from_edges(
        torch.stack([source, target]),
        0.9 * weight / total[target],
        prompt_mask=place < num_tokens // 4,
        answer_mask=(place >= num_tokens - 12) & (place < num_tokens - 2),
    )


def pooled(num_tokens: int, seed: int) -> TokenGraph:
    """A graph as sparse mode makes it, with the rest of its attention in pools."""
    draw = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(num_tokens, num_tokens, generator=draw)
    W = scores.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -torch.inf).softmax(-1)
    place = torch.arange(num_tokens)
    return sparse_graph(
        DenseRows(W),
        edges=Threshold(1 / 256),
        prompt_mask=place < num_tokens // 4,
        answer_mask=(place >= num_tokens - 12) & (place < num_tokens - 2),
    )


BATCHES: dict[str, Callable[[], list[TokenGraph]]] = {
    "64 graphs of 1,024 tokens, 32 edges each": lambda: [attention_like(1024, 32, seed) for seed in range(64)],
    "1 graph of 32,768 tokens, 32 edges each": lambda: [attention_like(32768, 32, 0)],
    "8 graphs of 1,024 tokens with pools": lambda: [pooled(1024, seed) for seed in range(8)],
    "1 graph of 512 tokens, all edges": lambda: [attention_like(512, 512, 0)],
}


def combinations(device: torch.device, num_tokens: int) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """(solver, backend) of all that is timed, and the others with the reason."""
    timed, skipped = [], []
    for solver, libraries in LIBRARIES_OF.items():
        for backend in libraries:
            try:
                choose(solver, backend, device)
                if backend == "triton" and device.type == "cpu":
                    raise ValueError("Triton's interpreter says nothing about time")
                if solver == "reference" and num_tokens > MOST_DENSE:
                    raise ValueError(f"dense: not tried above {MOST_DENSE:,} tokens")
            except (ImportError, ValueError) as error:
                skipped.append({"solver": solver, "backend": backend, "skipped": str(error)})
            else:
                timed.append((solver, backend))
    return timed, skipped


def measure(batch: Batch, names: list[tuple[str, str]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each, by turns, after one run that is compared with the first's flow."""
    truth = trace_flow(batch.cpu(), "scipy").flow
    device = batch.edge_weight.device
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in names}
    found = []
    for number in range(rounds + 1):
        for name, times in seconds.items():
            if sum(times) > BUDGET:
                continue
            start = time.perf_counter()
            flow = trace_flow(batch, *name)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
            if number == 0:
                error = float(((flow.flow.cpu() - truth).abs() / truth.clamp(min=1e-30)).max())
                if not error < 1e-3:
                    raise SystemExit(f"{'/'.join(name)}: flow is off by {error:.1e}. No time is worth printing.")
                found.append({"error": error, "hops": int(flow.iterations.max())})
            if number > 0 or took > BUDGET:
                times.append(took)
    fastest = min(min(times) for times in seconds.values())
    return [
        {
            "solver": name[0],
            "backend": name[1],
            "seconds": min(times),
            "ratio": min(times) / fastest,
            "runs": len(times),
        }
        | more
        for (name, times), more in zip(seconds.items(), found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    about = {name: value for name, value in machine().items() if name not in ("model", "transformers")}
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    content: dict[str, Any] = {"device": device.type, "machine": about, "results": []}
    for title, make in BATCHES.items():
        graphs = make()
        batch = Batch.from_data_list(graphs).to(device)
        names, skipped = combinations(device, batch.num_nodes)
        size = {"batch": title, "tokens": batch.num_nodes, "edges": batch.edge_index.shape[1]}
        results = [size | one for one in [*measure(batch, names, options.rounds), *skipped]]
        content["results"] += results
        print(f"{title}: {size['edges']:,} edges")
        for one in sorted(results, key=lambda one: one.get("ratio", torch.inf)):
            said = one.get("skipped") or f"{1e3 * one['seconds']:9.1f} ms  x {one['ratio']:6.1f}  {one['hops']} hops"
            print(f"    {one['solver']}/{one['backend']}: {said}")
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
