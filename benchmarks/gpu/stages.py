"""What each stage does with a case: a function from (bench, case) to what it found.

    machine    what this card can do: matrix products, memory, powers of 2, launches
    equality   every kernel against its slow twin (benchmarks/gpu/equality.py)
    kernels    attention rows, and edges out of them, of a whole trace: queries and keys are given
    credits    credits out of a forward pass that runs anyway, against that pass alone
    solves     reach and flow of a batch of graphs, by every solver and library that there is
    scorer     a batch of rollouts through a `Scorer`, against a step of training
    tune       kernels once more, with other tiles and other blocks of rows
    long       one long trace by chunks of tokens, queries and keys on the card or in the memory of the host

All numbers are seconds, bytes, or counts per second; names say which. Shapes: N tokens, H query heads, K key heads, D
head size, L layers, r rows of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from benchmarks.gpu import equality
from benchmarks.gpu.clock import LONG, Clock
from benchmarks.gpu.plan import OFFLOAD, Case
from benchmarks.gpu.predict import CHUNK, SOLVED
from benchmarks.gpu.present import Absent, has_triton, need_solver, need_triton, solver_clock
from benchmarks.gpu.shapes import ANSWER, SHAPES, SHARPNESS, Shape, ids_of, masks_of, model_of, prompt_of
from flowgraph import TokenGraph, Tracer, trace_flow
from flowgraph.capture import recording
from flowgraph.rl import FlowConfig, Scorer
from flowgraph.rows import AttentionRows, LayerQK
from flowgraph.sparsify import Threshold, TopK, sparsify

Found = dict[str, Any]
"""`measured`: name -> number; `notes`: what else is worth knowing; `checks`: of equality."""

ROLLOUTS = 64


class Bench:
    """The device, and the model that the last case needed: one at a time.

    Args:
        seed: of whatever is random.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed, self.clock = device, seed, Clock(device)
        self._model: Any = None
        self._shape = ""

    @property
    def tiny(self) -> bool:
        """Is this a trial of the script, and no measurement?"""
        return self.device.type == "cpu"

    def model(self, shape: Shape) -> Any:
        if self._shape != shape.name:
            self.release()
            self._model, self._shape = model_of(shape, self.device, 2**20), shape.name
            self.forward(self._model, ids_of(shape, 64).to(self.device))
        return self._model

    def release(self) -> None:
        """Let go of the model."""
        self._model, self._shape = None, ""
        self.clock.clear()

    @torch.no_grad()
    def forward(self, model: Any, ids: Tensor) -> object:
        return model(ids, logits_to_keep=1, use_cache=False)


def run(bench: Bench, case: Case) -> Found:
    """Measure a case."""
    return STAGES[case.stage](bench, case)


# --- machine ----------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench, case: Case) -> Found:
    clock, device = bench.clock, bench.device
    size, numbers, repeat = (64, 2**16, 10) if bench.tiny else (8192, 2**29, 1000)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, small = torch.zeros(numbers, dtype=torch.bfloat16, device=device), torch.zeros(1, device=device)
    target = torch.empty_like(source)

    def launches() -> None:
        for _ in range(repeat):
            small.add_(1)

    works = {"matrix": lambda: left @ right, "memory": lambda: target.copy_(source), "launch": launches}
    took = clock.medians(works)
    found = {
        "matrix_per_second": 2 * size**3 / took["matrix"],
        "memory_per_second": 2 * 2 * numbers / took["memory"],
        "launch_seconds": took["launch"] / repeat,
    }
    if has_triton(device):
        from benchmarks.gpu.powers import powers

        found["powers_per_second"] = powers(clock, bench.tiny)
    return {"measured": found}


# --- kernels ----------------------------------------------------------------------------------------------------------


def layers_of(shape: Shape, num_tokens: int, device: torch.device, seed: int) -> list[LayerQK]:
    """Queries and keys as those of `model_of`: alike for the same word, a group of heads asks what its key says."""
    draw = torch.Generator(device).manual_seed(seed)
    ids = ids_of(shape, num_tokens, seed)[0].to(device)
    K, G, D = shape.key_heads, shape.heads // shape.key_heads, shape.head_size
    layers = []
    for _ in range(shape.chosen):
        words = torch.randn(int(ids.max()) + 1, K, D, generator=draw, device=device)
        key = (words * (SHARPNESS * D**-0.5) ** 0.5).bfloat16()[ids]  # [N, K, D], as models lay it out
        query = key.repeat_interleave(G, 1)
        layers.append(LayerQK(query.transpose(0, 1), key.transpose(0, 1), scaling=D**-0.5))
    return layers


def kernels(bench: Bench, case: Case) -> Found:
    """Rows alone, with the edges cut out of them, and where the log-sum-exp has to be worked out first."""
    bench.release()
    if case.what == "triton":
        need_triton(bench.device)
    return _kernels(bench, case, case.what, own=case.what == "triton")


def _kernels(bench: Bench, case: Case, backend: str, own: bool = False, block: int | None = None) -> Found:
    shape, N, device = SHAPES[case.shape], case.tokens, bench.device
    layers = layers_of(shape, N, device, bench.seed)
    given = [replace(one, log_sum=equality.log_sum_of(one)) for one in layers]

    def rows_of(layers: list[LayerQK]) -> AttentionRows:
        return AttentionRows(layers, torch.arange(N, device=device), backend=backend, block=block)

    rows = rows_of(given)
    tasks: dict[str, Callable[[], object]] = {
        "rows": lambda: read(rows),
        "edges": lambda: sparsify(rows, Threshold(1 / 256)),
    }
    if own:
        tasks["own"] = lambda: read(rows_of(layers))
    took = bench.clock.medians(tasks)
    found = {f"{name}_seconds": seconds for name, seconds in took.items()}
    scores = shape.chosen * shape.heads * N * (N + 1) / 2
    found["scores_per_second"] = scores / took["rows"]
    found["flop_per_second"] = 2 * shape.head_size * scores / took["rows"]
    listed = sparsify(rows, Threshold(1 / 256))
    notes: Found = {"edges_per_token": listed.edge_index.shape[1] / N, "rows_of_a_block": rows.starts.step}
    return {"measured": found, "notes": notes}


def read(rows: AttentionRows) -> None:
    """All of them, once."""
    for _ in rows.blocks():
        pass


def tune(bench: Bench, case: Case) -> Found:
    """What a tile or a number of rows per block other than the default does."""
    bench.release()
    need_triton(bench.device)
    from flowgraph import triton_rows

    kind, _, rest = case.what.partition(" ")
    if kind == "block":
        return _kernels(bench, case, "triton", block=int(rest))
    rows, columns, warps, stages = (int(number) for number in re.findall(r"\d+", rest))
    default = triton_rows.tile_for
    shape = SHAPES[case.shape]
    usual = default(256, shape.head_size, torch.bfloat16)
    triton_rows.tile_for = lambda *_: triton_rows.Tile(rows, columns, warps, stages)
    try:
        found = _kernels(bench, case, "triton")
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # of Triton: no such tile on this card
            raise Absent(str(error)) from error
        raise
    finally:
        triton_rows.tile_for = default
    found["notes"]["default"] = f"tile {usual.rows}x{usual.columns} warps {usual.warps} stages {usual.stages}"
    return found


# --- credits ----------------------------------------------------------------------------------------------------------


def _tracer(bench: Bench, case: Case, **options: Any) -> Tracer:
    mode, backend, *rest = case.what.split(" ")
    if backend == "triton":
        need_triton(bench.device)
    options |= {"mode": mode, "backend": backend, "edges": TopK(0) if rest else None}
    return Tracer(bench.model(SHAPES[case.shape]), max_tokens=case.tokens, witnesses=0, **options)


def credits_in_passing(bench: Bench, case: Case) -> Found:
    """Both in every round: the pass alone, and the pass whose queries and keys become credits."""
    tracer = _tracer(bench, case, chunk=None)
    shape, N = SHAPES[case.shape], case.tokens
    model, ids, masks = tracer.model, ids_of(shape, N, bench.seed).to(bench.device), masks_of(N)
    traced: dict[str, Any] = {}

    def plain() -> None:
        bench.forward(model, ids)

    def passing() -> None:
        traced.clear()
        with recording(model) as captures:
            bench.forward(model, ids)
        traced["trace"] = tracer.from_ids(ids, **masks, captured=captures.pop())[0]

    took = bench.clock.medians({"forward": plain, "with": passing})
    traced.clear()  # or it would count as held before
    peaks = {name: bench.clock.peak(work) for name, work in (("forward", plain), ("with", passing))}
    graph = traced["trace"].graph
    added = took["with"] - took["forward"]
    return {
        "measured": {
            "forward_seconds": took["forward"],
            "credits_seconds": added,
            "credits_over_forward": added / took["forward"],
            "forward_peak_bytes": peaks["forward"],
            "peak_bytes_above_forward": peaks["with"] - peaks["forward"],
        },
        "notes": {
            "edges_per_token": graph.num_edges / N,
            "absorbed": float(traced["trace"].flow.absorbed),
            "hops": int(traced["trace"].flow.iterations),
            "solver": traced["trace"].flow.solver,
            "longest_kernels": bench.clock.longest(passing),
        },
    }


def long(bench: Bench, case: Case) -> Found:
    """A trace with a pass of its own, by chunks, as `Tracer` does it where memory is short."""
    chunk = min(CHUNK, max(16, case.tokens // 4))
    offload = case.what.endswith(OFFLOAD)
    tracer = _tracer(bench, case._replace(what=case.what.removesuffix(OFFLOAD)), chunk=chunk, offload=offload)
    shape, N = SHAPES[case.shape], case.tokens
    ids, masks = ids_of(shape, N, bench.seed).to(bench.device), masks_of(N)
    few = min(N, 1024)
    tracer.from_ids(ids[:, :few], **masks_of(few))  # compiles what there is to compile

    def plain() -> None:
        bench.forward(tracer.model, ids)

    def traced() -> None:
        tracer.from_ids(ids, **masks)

    first, ours = bench.clock.run(plain), bench.clock.run(traced)
    took = {"forward": first.seconds, "traced": ours.seconds}
    if sum(took.values()) < LONG:
        took = bench.clock.medians({"forward": plain, "traced": traced})
    return {
        "measured": {
            "forward_seconds": took["forward"],
            "seconds": took["traced"],
            "time_over_forward": took["traced"] / took["forward"],
            "forward_peak_bytes": first.peak_bytes,
            "peak_bytes": ours.peak_bytes,
        },
        "notes": {"chunk": chunk},
    }


# --- solves -----------------------------------------------------------------------------------------------------------


def graph_of(num_tokens: int, per_token: int, device: torch.device, draw: torch.Generator) -> TokenGraph:
    """Edges into each token from so many places, half of them near: how far back is drawn evenly in logarithms.

    Rows sum to 0.8, as what a threshold keeps of attention does.
    """
    target = torch.arange(num_tokens, device=device).repeat_interleave(per_token)
    far = torch.rand(len(target), generator=draw, device=device)
    source = target - torch.exp(far * torch.log(target.clamp(min=1).float() + 1)).long().clamp(min=1)
    both = (target * num_tokens + source)[source >= 0].unique()
    target, source = both // num_tokens, both % num_tokens
    weight = torch.rand(len(both), generator=draw, device=device)
    total = torch.zeros(num_tokens, device=device).index_add_(0, target, weight)
    place = torch.arange(num_tokens, device=device)
    return TokenGraph.from_edges(
        torch.stack([source, target]),
        0.8 * weight / total[target],
        prompt_mask=place < prompt_of(num_tokens),
        answer_mask=place >= num_tokens - ANSWER,
    )


def solves(bench: Bench, case: Case) -> Found:
    """The whole of `trace_flow`, and what of it the solver itself takes: both passes."""
    bench.release()
    solver, backend = case.what.split(" ")
    graphs, per_token = (2, 8) if bench.tiny else SOLVED
    draw = torch.Generator(bench.device).manual_seed(bench.seed)
    batch = Batch.from_data_list([graph_of(case.tokens, per_token, bench.device, draw) for _ in range(graphs)])
    need_solver(batch, solver, backend)
    with solver_clock(bench.clock) as inside:
        flow = trace_flow(batch, solver, backend=backend)
        took = bench.clock.medians({"all": lambda: trace_flow(batch, solver, backend=backend)})
    return {
        "measured": {"seconds": inside.median, "trace_flow_seconds": took["all"]},
        "notes": {
            "graphs": graphs,
            "edges_per_token": batch.num_edges / batch.num_nodes,
            "hops": int(flow.iterations.max()),
            "peak_bytes": bench.clock.peak(lambda: trace_flow(batch, solver, backend=backend)),
        },
    }


# --- scorer -----------------------------------------------------------------------------------------------------------


def tokenizer_of(words: int) -> Any:
    """Of words "w0", "w1", ... with their numbers as ids, and "=" after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(words)} | {"=": words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def scorer(bench: Bench, case: Case) -> Found:
    mode, backend = case.what.split(" ")
    if backend == "triton":
        need_triton(bench.device)
    shape, N = SHAPES[case.shape], case.tokens
    count = 2 if bench.tiny else ROLLOUTS
    model = bench.model(shape)
    ids = ids_of(shape, N, bench.seed, count)
    words = int(ids.max()) + 1
    tokenizer = tokenizer_of(words)
    ids[:, -ANSWER - 1] = words  # "= w3 w9 w9 w5": the last statement of the response
    config = FlowConfig(mode=mode, backend=backend, answer=re.compile(r"=((?: w\d+)+)"), max_tokens=N)
    response = torch.arange(N).expand(count, N) >= prompt_of(N)
    ours = Scorer(model, tokenizer, config)
    ours.credits(ids[:1], response[:1])
    scored = ours.credits(ids[:1], response[:1])
    if scored.failed or scored.flags[0]:
        raise RuntimeError(f"a rollout has no credits: {scored.failed or scored.flags[0]}")
    took = bench.clock.seconds(lambda: ours.credits(ids, response))
    text = bench.clock.seconds(lambda: ours.tracer.pieces(ids[0]))
    found = {"seconds": took, "seconds_per_rollout": took / count}
    notes: Found = {"rollouts": count, "text_seconds_per_rollout": text}
    try:
        step = _step_seconds(bench, model, ids[:1].to(bench.device))
        found |= {"step_seconds_per_rollout": step, "share_of_step": took / count / step}
    except torch.OutOfMemoryError as error:
        notes["step"] = f"does not fit: {str(error)[:200]}"
    finally:
        bench.release()  # it has gradients now
    return {"measured": found, "notes": notes}


def _step_seconds(bench: Bench, model: Any, ids: Tensor) -> float:
    """Forward and backward of one rollout, with checkpoints; no optimizer."""
    model.gradient_checkpointing_enable()
    model.train()

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return bench.clock.medians({"step": step}, budget=2.0)["step"]


STAGES: dict[str, Callable[[Bench, Case], Found]] = {
    "machine": ceilings,
    "equality": equality.check,
    "kernels": kernels,
    "credits": credits_in_passing,
    "solves": solves,
    "scorer": scorer,
    "tune": tune,
    "long": long,
}
