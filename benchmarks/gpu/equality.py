"""Every kernel against its slow twin, on the device, with inputs that are new in every run.

A check has a name, an error and the error that is allowed. What may differ: rounding of float32 sums, so 1e-5 of a
weight and 1e-4 of a credit; and nothing at all in what edges there are and in the bits of two equal runs.

Shapes: N tokens, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch

from benchmarks.gpu.plan import SOLVES, Case
from benchmarks.gpu.present import Absent, need_solver, need_triton
from benchmarks.gpu.shapes import SHAPES, ids_of, masks_of
from flowgraph import TokenGraph, Tracer, trace_flow
from flowgraph.capture import capture, recording
from flowgraph.exact import exact_flow
from flowgraph.kernels import attend
from flowgraph.rows import AttentionRows, BlockedRows, DenseRows, LayerQK
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import Threshold, sparsify
from flowgraph.sums import Groups

if TYPE_CHECKING:
    from benchmarks.gpu.stages import Bench

WEIGHT, CREDIT, LOG_SUM = 1e-5, 1e-4, 1e-3
"""Allowed: of a weight, as it is; of a credit, relative; of torch's own log-sum-exp, a relative error of its row."""

BY_VALUE = ("bfloat16", "several layers")
"""Kinds of layers that are weighed by value norms too: each takes seconds to compile."""

SWEPT = (*BY_VALUE, "8 heads per key", "window", "soft cap")
"""Kinds that are swept in exact mode."""


class Check(NamedTuple):
    """`error` is NaN where there is no number to compare: then it is not equal."""

    name: str
    error: float
    allowed: float

    @property
    def equal(self) -> bool:
        return self.error <= self.allowed


class Draw:
    """Random layers and matrices on the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.random = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, device=self.device)

    def layer(
        self, N: int, heads: int = 4, key_heads: int = 2, D: int = 64, dtype: str = "bfloat16", **more: Any
    ) -> LayerQK:
        """Laid out in memory as models do it."""
        number = getattr(torch, dtype)
        query, key = self.normal(N, heads, D).to(number), self.normal(N, key_heads, D).to(number)
        norms = self.normal(heads, N).abs() + 0.1
        return LayerQK(query.transpose(0, 1), key.transpose(0, 1), scaling=2 * D**-0.5, value_norm=norms, **more)

    def attention(self, N: int) -> Tensor:
        """[N, N] rows that sum to 1, some weights of which stand out."""
        future = torch.ones(N, N, device=self.device).triu(1).bool()
        return (3 * self.normal(N, N)).masked_fill(future, -torch.inf).softmax(-1)

    def graph(self, N: int) -> TokenGraph:
        masks = {name: mask[0].to(self.device) for name, mask in masks_of(N).items()}
        return TokenGraph.from_dense(
            self.attention(N), prompt_mask=masks["prompt_mask"], answer_mask=masks["sink_mask"], threshold=0.01
        )


def check(bench: Bench, case: Case) -> dict[str, Any]:
    """All checks of a kind, as lists of name, error and what is allowed; those that failed are named once more."""
    checks = list(CHECKS[case.what](bench, case, Draw(bench.device, bench.seed)))
    found: dict[str, Any] = {
        "measured": {"checks": len(checks), "largest_error": max((one.error for one in checks), default=0.0)},
        "checks": [one._asdict() for one in checks],
    }
    if wrong := [one for one in checks if not one.equal]:
        found["failed"] = "; ".join(f"{one.name}: {one.error:.1e}, allowed {one.allowed:.0e}" for one in wrong)
    return found


# --- rows and what is made of them ------------------------------------------------------------------------------------


def kinds(draw: Draw, N: int) -> dict[str, list[LayerQK]]:
    """Layers of every kind that the kernels know."""

    def window(query: Tensor, key: Tensor) -> Tensor:
        return query[:, None] - key[None, :] < N // 3

    def documents(query: Tensor, key: Tensor) -> Tensor:
        return (query[:, None] >= N // 2) == (key[None, :] >= N // 2)

    more: dict[str, dict[str, Any]] = {
        "bfloat16": {},
        "float16": {"dtype": "float16"},
        "float32": {"dtype": "float32"},
        "head size 128": {"D": 128},
        "odd head size": {"D": 13},
        "8 heads per key": {"heads": 8, "key_heads": 1},
        "window": {"visible": window},
        "documents": {"visible": documents},
        "soft cap": {"softcap": 2.0},
        "sinks": {"sink_logits": draw.normal(4)},
    }
    found = {name: [draw.layer(N, **options)] for name, options in more.items()}
    known = draw.layer(N)
    found["log-sum-exp given"] = [replace(known, log_sum=dense_log_sum(known).float())]
    found["several layers"] = [draw.layer(N), draw.layer(N, softcap=2.0, visible=window), draw.layer(N)]
    return found


def in_float64(layer: LayerQK) -> LayerQK:
    return replace(layer, query=layer.query.double(), key=layer.key.double(), log_sum=None)


def dense_log_sum(layer: LayerQK) -> Tensor:
    """[H, N] float64, causal."""
    query, key = layer.query.double(), layer.key.double()
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).mT * layer.scaling
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).logsumexp(-1)


def log_sum_of(layer: LayerQK) -> Tensor | None:
    """[H, N] as the model's own attention gives it; None where it gives none."""
    query, key = layer.query[None], layer.key[None]
    log_sum = attend(query, key, key, is_causal=True, scale=layer.scaling, enable_gqa=True)[1]
    return None if log_sum is None else log_sum[0]


def joined(rows: BlockedRows) -> Tensor:
    """[N, N]"""
    W = torch.zeros(rows.num_tokens, rows.num_tokens, dtype=torch.float64)
    for start, weight in rows.blocks():
        W[start : start + len(weight), : weight.shape[1]] = weight.cpu().double()
    return W


def pairs(bench: Bench, N: int, draw: Draw) -> Iterator[tuple[str, AttentionRows, AttentionRows]]:
    """(name, rows by Triton, rows by torch in float64) of every kind of layer and of weight."""
    need_triton(bench.device)
    positions = torch.arange(N, device=bench.device)
    for name, layers in kinds(draw, N).items():
        for weights in ("attention", "value_norm") if name in BY_VALUE else ("attention",):
            block = max(16, N // 3)
            ours = AttentionRows(layers, positions, block, weights, backend="triton")
            twin = AttentionRows([in_float64(one) for one in layers], positions, block, weights, backend="torch")
            yield f"{name}, {weights}", ours, twin


def rows(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    for name, ours, twin in pairs(bench, case.tokens, draw):
        yield Check(name, float((joined(ours) - joined(twin)).abs().max()), WEIGHT)


def edges(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    need_triton(bench.device)
    for threshold in (0.0, 1 / 256, 0.05, 0.5):
        W = draw.attention(case.tokens)
        by_kernel = DenseRows(W, max(16, case.tokens // 3))
        by_kernel.backend = "triton"
        ours, twin = (sparsify(one, Threshold(threshold)) for one in (by_kernel, DenseRows(W)))
        same = ours.edge_index.shape == twin.edge_index.shape and bool((ours.edge_index == twin.edge_index).all())
        off = float((ours.edge_weight - twin.edge_weight).abs().sum()) if same else torch.nan
        yield Check(f"edges over {threshold:g}", off, 0.0)
        yield Check(f"what is dropped below {threshold:g}", float((ours.dropped - twin.dropped).abs().max()), WEIGHT)


def roles(N: int, device: torch.device) -> dict[str, Any]:
    masks = {name: mask[0].to(device) for name, mask in masks_of(N).items()}
    return {"prompt_mask": masks["prompt_mask"], "answer_mask": masks["sink_mask"]}


def relative(ours: Tensor, twin: Tensor) -> float:
    """The largest relative error; infinite where one is 0 and the other isn't."""
    ours, twin = ours.detach().cpu().double(), twin.detach().cpu().double()
    off = torch.where(ours == twin, 0, (ours - twin).abs() / twin.abs())
    return float(off.max())


def sweeps(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    """Exact mode."""
    N = case.tokens
    for name, ours, twin in pairs(bench, N, draw):
        if not name.startswith(SWEPT):
            continue
        flow, slow = (exact_flow(one, **roles(N, bench.device)) for one in (ours, twin))
        yield Check(f"reach: {name}", relative(flow.reach, slow.reach), CREDIT)
        yield Check(f"flow: {name}", relative(flow.flow, slow.flow), CREDIT)


def sparse(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    """Sparse mode; a weight at the threshold may fall to either side, which moves a little flow."""
    N = case.tokens
    for name, ours, twin in pairs(bench, N, draw):
        if not name.startswith(SWEPT):
            continue
        graphs = (sparse_graph(one, **roles(N, bench.device)) for one in (ours, twin))
        flow, slow = (trace_flow(graph).throughput.double() for graph in graphs)
        yield Check(f"misplaced: {name}", float((flow - slow).abs().sum() / slow.sum() / 2), 1e-3)


def long_sums(draw: Draw) -> Iterator[Check]:
    """Sums over more edges than a tile of CUB's holds, from other places in memory: the same bits. A batch of small
    graphs doesn't show it; the first token of a long trace has such sums."""
    edges = 5003
    for name in ("float32", "float64"):
        values = draw.normal(edges).to(getattr(torch, name))
        alone = Groups.by(torch.zeros(edges, dtype=torch.int64, device=draw.device), 1).sum(values)
        for before in (1, 2, 3):
            token = (torch.arange(before + edges, device=draw.device) >= before).long()
            found = Groups.by(token, 2).sum(torch.cat([values[:before], values]))
            yield Check(f"bits of a long sum: {name}, after {before}", _differ(found[1:], alone), 0)


def solvers(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    """Each solver that is there against the dense one; alone and in a batch, and twice: the same bits."""
    yield from long_sums(draw)
    graphs = [draw.graph(N) for N in (case.tokens, 2, case.tokens // 2 + 1, case.tokens)]
    batch = Batch.from_data_list(graphs)
    twin = trace_flow(batch, "reference")
    for what in SOLVES:
        solver, backend = what.split(" ")
        try:
            need_solver(batch, solver, backend)
        except Absent:
            continue
        solve = partial(trace_flow, solver=solver, backend=backend)
        flow, again = solve(batch), solve(batch)
        yield Check(f"reach: {what}", relative(flow.reach, twin.reach), CREDIT)
        yield Check(f"flow: {what}", relative(flow.flow, twin.flow), CREDIT)
        yield Check(f"nothing is lost: {what}", float(flow.unabsorbed.abs().max()), CREDIT)
        yield Check(f"bits of two runs: {what}", _differ(flow.flow, again.flow), 0)
        alone = torch.cat([solve(graph).flow for graph in graphs])
        yield Check(f"bits alone and in a batch: {what}", _differ(flow.flow, alone), 0)


def log_sum_exp(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    """What torch's own kernels give, and what of it a recorded pass holds."""
    for D in (64, 128):
        layer = draw.layer(case.tokens, D=D)
        found = log_sum_of(layer)
        off = torch.nan if found is None else float((found.double() - dense_log_sum(layer)).abs().max())
        yield Check(f"attend, head size {D}", off, LOG_SUM)
    shape, N = SHAPES[case.shape], case.tokens
    model, ids = bench.model(shape), ids_of(shape, N, bench.seed).to(bench.device)
    with recording(model) as captures:
        bench.forward(model, ids)
    for layer in captures[0].rows(0, torch.arange(N))._layers:
        off = torch.nan if layer.log_sum is None else float((layer.log_sum.double() - dense_log_sum(layer)).abs().max())
        yield Check("recorded", off, LOG_SUM)


def bits(bench: Bench, case: Case, draw: Draw) -> Iterator[Check]:
    """Credits of one capture, twice, for each mode and backend."""
    need_triton(bench.device)
    shape, N = SHAPES[case.shape], case.tokens
    model, ids = bench.model(shape), ids_of(shape, N, bench.seed)
    captured = capture(model, ids)
    for mode in ("sparse", "exact", "edges"):
        for backend in ("triton", "torch"):
            tracer = Tracer(model, mode=mode, backend=backend)
            one, two = (tracer.from_ids(ids, **masks_of(N), captured=captured)[0] for _ in range(2))
            yield Check(f"{mode}, {backend}", _differ(one.throughput, two.throughput), 0)


def _differ(one: Tensor, two: Tensor) -> float:
    """How many numbers differ."""
    return float((one != two).sum())


CHECKS: dict[str, Callable[[Bench, Case, Draw], Iterator[Check]]] = {
    "rows": rows,
    "edges": edges,
    "sweeps": sweeps,
    "sparse": sparse,
    "solvers": solvers,
    "log-sum-exp": log_sum_exp,
    "bits": bits,
}
