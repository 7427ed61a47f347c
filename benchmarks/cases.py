"""One measurement per process: `python -m benchmarks.cases CASE TOKENS` prints a JSON line.

Peaks are the kernel's own high-water mark of resident memory (Linux: /proc/self/status, VmHWM, reset before the part
that is measured), so each case gets a process of its own. Times are the median of `repeat` runs after one warm-up.

    forward       a plain forward pass, `logits_to_keep=1`: what every other case is compared with
    edges         FlowGraph end to end, mode="edges": capture, rows, edges, graph, both solves, credit
    exact         FlowGraph end to end, mode="exact": capture, two sweeps over the rows, credit
    eager         a forward with `output_attentions=True`: what reading attention costs without FlowGraph
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from flowgraph import Tracer
from flowgraph.capture import capture
from flowgraph.credit import credit
from flowgraph.flow import trace_flow
from flowgraph.graph import TokenGraph
from flowgraph.smollm2 import load
from flowgraph.sparsify import sparsify

PROMPT = 200
ANSWER = 4

TEXT = (
    "A baker makes {a} loaves in the morning and {b} in the afternoon. She sells {c} of them for {d} dollars each.\n"
    "First, the loaves: {a} + {b} = {e}. After the sale {e} - {c} = {f} are left, and the till holds {c} * {d} = {g}.\n"
)


def reasoning(tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """[1, num_tokens] ids of arithmetic in words, different in each line: text as repetitive as real reasoning."""
    lines = []
    for n in range(num_tokens // 40 + 1):
        a, b, c, d = 10 + n % 37, 5 + n % 23, 3 + n % 11, 2 + n % 7
        lines.append(TEXT.format(a=a, b=b, c=c, d=d, e=a + b, f=a + b - c, g=c * d))
    ids = tokenizer("".join(lines), return_tensors="pt").input_ids
    assert ids.shape[1] >= num_tokens
    return ids[:, :num_tokens]


def reset_peak() -> int:
    """Set the high-water mark back to what is resident now; returns that, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak() -> int:
    """Bytes resident at the highest point since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Median time of `repeat` runs, after one that doesn't count."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(work: Callable[[], object]) -> int:
    """Bytes that `work` needs on top of what was resident before."""
    before = reset_peak()
    work()
    return peak() - before


def measure(case: str, num_tokens: int) -> dict[str, Any]:
    """Time and peak memory of one case; for "edges" also of each stage, and of the plain forward beside it."""
    repeat = 3 if num_tokens <= 2048 else 1
    model, tokenizer = load(torch.float32)
    ids = reasoning(tokenizer, num_tokens)
    place = torch.arange(num_tokens)[None]
    prompt, sinks = place < PROMPT, place >= num_tokens - ANSWER

    def forward() -> object:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False)

    def eager() -> object:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False, output_attentions=True)

    def credits() -> object:
        return Tracer(model, mode=case).from_ids(ids, prompt_mask=prompt, sink_mask=sinks)

    work = {"forward": forward, "eager": eager, "edges": credits, "exact": credits}[case]
    result: dict[str, Any] = {"case": case, "tokens": num_tokens, "peak_bytes_above_model": memory(work)}
    result["seconds"] = seconds(work, repeat)
    if case != "forward":
        model.set_attn_implementation("sdpa")
        result["forward_seconds"] = seconds(forward, repeat)
        result["time_over_forward"] = result["seconds"] / result["forward_seconds"]
    if case == "edges":
        captured = capture(model, ids)
        edges = sparsify(captured.rows(0, place[0]))
        roles = {"prompt_mask": prompt[0], "answer_mask": sinks[0]}
        graph = TokenGraph.from_sparse(edges, **roles)
        flow = trace_flow(graph)
        result["num_edges"] = graph.num_edges
        result["stages"] = {
            "capture": seconds(lambda: capture(model, ids), repeat),
            "rows": seconds(lambda: [None for _ in captured.rows(0, place[0]).blocks()], repeat),
            "rows_and_edges": seconds(lambda: sparsify(captured.rows(0, place[0])), repeat),
            "graph": seconds(lambda: TokenGraph.from_sparse(edges, **roles), repeat),
            "flow_scipy": seconds(lambda: trace_flow(graph, "scipy"), repeat),
            "flow_scatter": seconds(lambda: trace_flow(graph, "scatter"), repeat),
            "credit": seconds(lambda: credit(flow), repeat),
        }
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
