"""Measurements at one length, in a process of their own: `python -m benchmarks.cases TOKENS CASE ...`.

Prints a line of JSON per case as soon as it is done. Every round runs a plain forward pass and then each case, so that
what a case is compared with ran beside it; reported is the shortest run of each, and the highest peak of memory above
what was resident before the run (see measure.py).

    forward             a plain forward pass: sdpa, `logits_to_keep=1`, no cache
    exact, sparse, edges   FlowGraph end to end in that mode, from token ids to credits
    captured:MODE       the same without the pass: queries and keys come out of a forward pass that ran anyway
    eager               a forward pass with `output_attentions=True`: what reading attention costs without FlowGraph

and, without a length (0), what the machine can do and what the solvers make of it:

    bandwidth           bytes per second of a triad, a = b + s * c, on all threads
    solve               the two triangular solves on a graph of 32,768 tokens and about two million edges

A stage is what the named functions do themselves, without what they call of each other; so stages add up.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.text import tokens
from flowgraph import TokenGraph, Tracer, trace_flow
from flowgraph.capture import Capture, recording
from flowgraph.rows import BlockedRows
from flowgraph.smollm2 import load
from flowgraph.stream import StreamedRows

PROMPT = 400
ANSWER = 4
MODES = ("exact", "sparse", "edges")
WINDOW = 8192
"""Positions that SmolLM2 was trained on. Beyond, it runs all the same, and only time and memory mean something."""
SOLVED_TOKENS, SOLVED_EDGES = 32_768, 2_000_000
KEPT = Path("out/bench")
"""Graphs of long traces are left here, for the case "solve"."""

STAGES = {
    "capture": "capture",
    "sparsify": "edges",
    "sparse_graph": "edges and pools",
    "exact_flow": "sweeps",
    "trace_flow": "solve",
    "credit": "credit",
}
"""Functions that `Tracer` calls -> the stage they are. Reading rows is a stage of its own, so is building graphs."""


def prompt_of(num_tokens: int) -> int:
    """Tokens of the prompt: 400, or a third of a trace that is too short for it."""
    return min(PROMPT, num_tokens // 3)


def rounds(num_tokens: int, cases: list[str]) -> tuple[int, int]:
    """(rounds that don't count, rounds that do): many where there are goals, few where they take minutes."""
    if "eager" in cases:
        return 0, 2 if num_tokens <= 2048 else 1
    if num_tokens <= 2048:
        return 1, 3
    return 0, 2 if num_tokens <= 8192 and "edges" not in cases else 1


class Stopwatch:
    """Seconds by stage; a stage that begins within another one stops the other's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._credit()
        self._running.append(name)
        try:
            yield
        finally:
            self._credit()
            self._running.pop()

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def timed_steps(self, name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """For iterators: the clock runs while a step is worked out, not while somebody uses it."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps = function(*args, **kwargs)
            while True:
                with self.stage(name):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return call


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds of each stage of what `Tracer` does inside the block; the rest of it is "other"."""
    watch = Stopwatch()
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, new: Any) -> None:
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, new)

    # The modules: `flowgraph.stream` by name is the function.
    tracer, stream = import_module("flowgraph.tracer"), import_module("flowgraph.stream")
    try:
        for name, stage in STAGES.items():
            replace(tracer, name, watch.timed(stage, vars(tracer)[name]))
        replace(TokenGraph, "from_sparse", staticmethod(watch.timed("graph", TokenGraph.from_sparse)))
        # A stream runs the model while its rows are read.
        replace(stream, "passes", watch.timed_steps("capture", stream.passes))
        for kind in (BlockedRows, StreamedRows):
            replace(kind, "blocks", watch.timed_steps("rows", vars(kind)["blocks"]))
        with watch.stage("other"):
            yield watch.seconds
    finally:
        for owner, name, old in replaced:
            setattr(owner, name, old)


class Bench:
    """The model, one trace, and the work that can be done with them."""

    def __init__(self, num_tokens: int) -> None:
        self.model, tokenizer = load(torch.float32)
        self.num_tokens = num_tokens
        if num_tokens > WINDOW:
            self.model.config.max_position_embeddings = num_tokens
        prompt = prompt_of(num_tokens)
        self.ids = torch.tensor([tokens(tokenizer, num_tokens, prompt)[0]])
        place = torch.arange(num_tokens)[None]
        self.masks: dict[str, Any] = {"prompt_mask": place < prompt, "sink_mask": place >= num_tokens - ANSWER}
        self.captured: Capture | None = None
        self.recorded_seconds = 0.0
        self.notes: dict[str, Any] = {}
        with torch.no_grad():  # whatever is set up only once
            self.model(self.ids[:, :64], logits_to_keep=1, use_cache=False)

    def work(self, case: str) -> Callable[[], object]:
        """What the case is; raises where it can't be."""
        if case == "forward":
            return self.forward
        if case == "eager":
            self.check_room()
            return self.eager
        captured, _, mode = case.rpartition(":")
        if mode not in MODES or captured not in ("", "captured"):
            raise ValueError(
                f"case must be forward, eager, captured:MODE or a mode of {', '.join(MODES)}, got {case!r}"
            )
        traced = Tracer(self.model, mode=mode)
        if captured and self.captured is None:
            with recording(self.model) as captures:
                self.recorded_seconds = measure.run(self.forward).seconds
            self.captured = captures[0]
        return lambda: self.credits(traced, case, self.captured if captured else None)

    def forward(self) -> object:
        with torch.no_grad():
            return self.model(self.ids, logits_to_keep=1, use_cache=False)

    def eager(self) -> object:
        self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                return self.model(self.ids, logits_to_keep=1, use_cache=False, output_attentions=True)
        finally:
            self.model.set_attn_implementation("sdpa")

    def credits(self, traced: Tracer, case: str, captured: Capture | None) -> None:
        with stages() as seconds:
            trace = traced.from_ids(self.ids, **self.masks, captured=captured)[0]
        graph = trace.graph
        assert bool(torch.isfinite(trace.throughput).all()), f"{case}: throughput is not finite"
        self.notes = {"stages": dict(seconds), "num_edges": graph.num_edges, "edge_rule": graph.rule}
        if self.num_tokens >= WINDOW and case == "edges":
            keep_graph(graph)

    def check_room(self) -> None:
        """Refuse before the machine swaps: all maps, and three more of one layer while it is worked out."""
        config = self.model.config
        needed = (config.num_hidden_layers + 3) * config.num_attention_heads * self.num_tokens**2 * 4
        room = measure.available() - 2 * 10**9
        if needed > room:
            raise NoRoom(needed, room)
        measure.refuse_beyond(room + 10**9)


class NoRoom(Exception):
    """A case needs more memory than there is."""

    def __init__(self, needed: int, room: int) -> None:
        super().__init__(f"needs {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are left")
        self.needed = needed


def measure_all(num_tokens: int, cases: list[str]) -> Iterator[dict[str, Any]]:
    """One result per case, each as soon as it is known."""
    bench = Bench(num_tokens)
    skipped, counted = rounds(num_tokens, cases)
    forwards: list[measure.Run] = []
    works: dict[str, Callable[[], object]] = {}
    runs: dict[str, list[measure.Run]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for case in cases:
        try:
            works[case] = bench.work(case)  # what can't be is said before anything runs
        except Exception as error:  # said in the result, and the other cases go on
            yield failure(case, num_tokens, error)
    if not works:
        return
    for number in range(-skipped, counted):
        plain = measure.run(bench.forward)
        if number >= 0:
            forwards.append(plain)
        if number == counted - 1 and "forward" in works:
            yield {"case": "forward", "tokens": num_tokens} | summary(forwards)
        for case in [case for case in works if case != "forward"]:
            try:
                run = measure.run(works[case])
            except Exception as error:
                del works[case]
                yield failure(case, num_tokens, error)
                continue
            if number < 0:
                continue
            runs.setdefault(case, []).append(run)
            if run.seconds == min(runs[case]).seconds:
                notes[case] = bench.notes
            if number == counted - 1:
                yield {"case": case, "tokens": num_tokens} | compared(runs[case], forwards, notes[case], bench)


def failure(case: str, num_tokens: int, error: Exception) -> dict[str, Any]:
    failed = {"case": case, "tokens": num_tokens, "failed": f"{type(error).__name__}: {error}"}
    return failed | ({"needed_bytes": error.needed} if isinstance(error, NoRoom) else {})


def summary(runs: list[measure.Run]) -> dict[str, Any]:
    return {
        "seconds": min(run.seconds for run in runs),
        "seconds_each": [run.seconds for run in runs],
        "peak_bytes": max(run.peak_bytes for run in runs),
    }


def compared(
    runs: list[measure.Run], forwards: list[measure.Run], notes: dict[str, Any], bench: Bench
) -> dict[str, Any]:
    """A case beside the plain forward passes of its own process."""
    ours, plain = summary(runs), summary(forwards)
    result = ours | {
        "forward_seconds": plain["seconds"],
        "forward_seconds_each": plain["seconds_each"],
        "forward_peak_bytes": plain["peak_bytes"],
        "time_over_forward": ours["seconds"] / plain["seconds"],
        "peak_bytes_above_forward": ours["peak_bytes"] - plain["peak_bytes"],
    }
    if bench.recorded_seconds:
        result["recorded_forward_seconds"] = bench.recorded_seconds
    return result | notes


def keep_graph(graph: TokenGraph) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    held = {"edge_index": graph.edge_index.to(torch.int32), "edge_weight": graph.edge_weight.float()}
    torch.save(held | {"tokens": graph.num_nodes}, KEPT / f"graph-{graph.num_nodes}.pt")


def triad(num_floats: int = 2**26, repeat: int = 10) -> dict[str, Any]:
    """Bytes per second of a = b + s * c (STREAM's triad; the read of `a` that a write brings with it isn't counted)."""
    b, c = torch.rand(num_floats), torch.rand(num_floats)
    a = torch.empty_like(b)
    best = measure.seconds(lambda: torch.add(b, c, alpha=3.0, out=a), repeat)
    return {"case": "bandwidth", "tokens": 0, "seconds": best, "bytes_per_second": 3 * 4 * num_floats / best}


def solved_graph(num_tokens: int, num_edges: int) -> tuple[Tensor, Tensor, str]:
    """(edge_index [2, E], edge_weight [E], what it is): of real attention where a graph of that length was kept."""
    kept = max((torch.load(path) for path in KEPT.glob("graph-*.pt")), key=lambda graph: graph["tokens"], default=None)
    if kept is not None and kept["tokens"] == num_tokens:
        weight = kept["edge_weight"]
        heaviest = weight.topk(min(num_edges, len(weight))).indices.sort().values
        return kept["edge_index"].long()[:, heaviest], weight[heaviest], "the heaviest edges of a real trace"
    if kept is not None:
        degree = kept["edge_index"][1].long().bincount(minlength=kept["tokens"])
        degree = degree.repeat(-(-num_tokens // kept["tokens"]))[:num_tokens]
        degree = (degree * (num_edges / float(degree.sum()))).round().long()
        origin = f"random, with the edges per token of a real trace of {kept['tokens']:,} tokens, scaled"
    else:
        degree = torch.full((num_tokens,), num_edges // num_tokens)
        origin = f"random, {num_edges // num_tokens} edges into each token"
    torch.manual_seed(0)
    target = torch.repeat_interleave(torch.arange(num_tokens), degree.clamp(max=torch.arange(num_tokens)))
    both = (target * num_tokens + (torch.rand(len(target)) * target).long()).unique()
    target, source = both // num_tokens, both % num_tokens
    weight = torch.rand(len(target))
    total = torch.zeros(num_tokens).index_add_(0, target, weight)
    return torch.stack([source, target]), weight / total[target], origin


def solve(num_tokens: int = SOLVED_TOKENS, num_edges: int = SOLVED_EDGES, repeat: int = 20) -> dict[str, Any]:
    """The two triangular solves, and the whole of `trace_flow` around them."""
    from flowgraph.solve import Triangle

    edge_index, edge_weight, origin = solved_graph(num_tokens, num_edges)
    place = torch.arange(num_tokens)
    roles: dict[str, Any] = {"prompt_mask": place < prompt_of(num_tokens), "answer_mask": place >= num_tokens - ANSWER}
    graph = TokenGraph.from_edges(edge_index, edge_weight, **roles)
    flow = trace_flow(graph)
    source, target = graph.edge_index.numpy()
    triangle = Triangle(source, target, num_tokens)
    sinks = roles["answer_mask"].numpy()
    leaving = graph.edge_weight.double().numpy() * ~sinks[source]
    transition, injection = flow.transition.double().numpy(), flow.injection.double().numpy()
    backward = measure.seconds(lambda: triangle.solve(leaving, sinks.astype(float), backward=True), repeat)
    forward = measure.seconds(lambda: triangle.solve(transition, injection, backward=False), repeat)
    # Both solves read each edge's weight (float64) and source (int32), and read and write a number per token.
    moved = 2 * (graph.num_edges * (8 + 4) + num_tokens * (4 + 2 * 8))
    return {
        "case": "solve",
        "tokens": num_tokens,
        "num_edges": graph.num_edges,
        "graph": origin,
        "reach_seconds": backward,
        "flow_seconds": forward,
        "seconds": backward + forward,
        "bytes_moved": moved,
        "bytes_per_edge": moved / graph.num_edges,
        "trace_flow_seconds": measure.seconds(lambda: trace_flow(graph), 5),
    }


def main() -> None:
    num_tokens, cases = int(sys.argv[1]), sys.argv[2:]
    single: dict[str, Callable[[], dict[str, Any]]] = {"bandwidth": triad, "solve": solve}
    for case in [case for case in cases if case in single]:
        print(json.dumps(single[case]()), flush=True)
    rest = [case for case in cases if case not in single]
    if rest:
        for result in measure_all(num_tokens, rest):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
