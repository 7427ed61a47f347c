"""Sparse mode: edges and pools, read once; reach is that of the full attention, and credits hardly move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from flowgraph import DenseRows, Threshold, TokenGraph, TopK, Tracer, exact_flow, trace_flow
from flowgraph.capture import capture
from flowgraph.rows import RowBlock
from flowgraph.sparse import sparse_graph
from tests.graphs import attention, graphs, mask_of
from tests.models import VOCABULARY, tiny
from tests.test_exact import dense


class Once:
    """Rows that come but once, the first ones first, as from a model that runs meanwhile."""

    once = True

    def __init__(self, W: Tensor, block: int) -> None:
        self.num_tokens, self._rows = len(W), DenseRows(W, block)

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        assert not last_first
        return self._rows.blocks()


ORDERS = pytest.mark.parametrize("order", [DenseRows, Once])


def roles(N: int, prompt: int, sinks: int = 3) -> dict[str, Any]:
    place = torch.arange(N)
    return {"prompt_mask": place < prompt, "answer_mask": (place >= N - sinks - 1) & (place < N - 1)}


@given(graph=graphs(), block=st.sampled_from([1, 5, 100]), absorb=st.booleans(), cut=st.sampled_from([0.0, 0.3, 0.99]))
def test_reach_is_that_of_all_the_attention(graph: TokenGraph, block: int, absorb: bool, cut: float) -> None:
    masks: dict[str, Any] = {name: graph[name] for name in ("prompt_mask", "answer_mask", "question_mask")}
    ours = sparse_graph(DenseRows(dense(graph), block), absorb_at_prompt=absorb, edges=Threshold(cut), **masks)
    reach = trace_flow(ours, absorb_at_prompt=absorb).reach
    full = trace_flow(graph, "reference", absorb_at_prompt=absorb).reach
    # Weights over sixteen decades, which no attention has, may leave a column to rows that hardly count.
    torch.testing.assert_close(reach, full, rtol=1e-6, atol=1e-9 * float(full.max().clamp(min=1e-300)))


@ORDERS
def test_nothing_is_lost_and_all_flow_is_absorbed(order: Any) -> None:
    graph = sparse_graph(order(attention(300, 3), 64), edges=TopK(4), **roles(300, 80))
    rows = torch.zeros(300, dtype=torch.float64).index_add(0, graph.edge_index[1], graph.edge_weight)
    torch.testing.assert_close(rows + graph.self_weight + graph.modelled, torch.ones(300, dtype=torch.float64))
    flow = trace_flow(graph)
    assert float(flow.injected) == pytest.approx(1) and float(flow.absorbed) == pytest.approx(1)
    assert int(torch.bincount(graph.edge_index[1]).max()) == 4


@ORDERS
def test_all_edges_kept_is_the_exact_flow(order: Any) -> None:
    W = attention(90, 5)
    graph = sparse_graph(order(W, 32), edges=Threshold(0.0), **roles(90, 20))
    assert graph.num_pools == 0
    torch.testing.assert_close(trace_flow(graph).flow, exact_flow(DenseRows(W), **roles(90, 20)).flow)


@ORDERS
def test_blocks_do_not_matter(order: Any) -> None:
    W = attention(200, 6)
    first, second = (sparse_graph(order(W, block), **roles(200, 50)) for block in (13, 200))
    assert torch.equal(first.edge_index, second.edge_index)
    if order is DenseRows:
        assert torch.equal(first.pool_index, second.pool_index)
        torch.testing.assert_close(first.pool_weight, second.pool_weight, rtol=1e-9, atol=1e-12)
    else:  # what stands in for reach looks ahead by a block
        assert spearmanr(trace_flow(first).flow, trace_flow(second).flow).statistic > 0.9


@ORDERS
@pytest.mark.parametrize("sinks", [[], [5], [0, 40, 99], [99]])
def test_sinks_may_be_anywhere_or_missing(order: Any, sinks: list[int]) -> None:
    masks: dict[str, Any] = {"prompt_mask": torch.arange(100) < 30, "answer_mask": mask_of(100, *sinks)}
    flow = trace_flow(sparse_graph(order(attention(100), 32), edges=Threshold(0.05), **masks))
    full = exact_flow(DenseRows(attention(100)), **masks)
    assert float(flow.injected) == pytest.approx(float(full.injected))
    assert torch.equal(flow.reach > 0, full.reach > 0)


@ORDERS
def test_the_same_rows_give_the_same_bits(order: Any) -> None:
    W = attention(150, 8, dtype=torch.float32)
    first, second = (sparse_graph(order(W, 64), **roles(150, 40)) for _ in range(2))
    for name in ("edge_index", "edge_weight", "pool_index", "pool_weight", "dropped"):
        assert torch.equal(first[name], second[name])


@ORDERS
def test_nan_is_named(order: Any) -> None:
    W = attention(50)
    W[20, 3] = torch.nan
    with pytest.raises(ValueError, match=r"W\[20, 3\] = nan"):
        sparse_graph(order(W, 16), **roles(50, 10))


def test_traced_in_sparse_mode_and_streamed_by_chunks() -> None:
    model = tiny("llama").double()
    ids = torch.randint(0, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(1))
    masks: dict[str, Any] = {"prompt_mask": (torch.arange(300) < 60)[None], "sink_mask": mask_of(300, 297, 298)[None]}
    exact, sparse, streamed = (
        Tracer(model, mode=mode, chunk=chunk, max_tokens=300).from_ids(ids, **masks)[0]
        for mode, chunk in (("exact", None), ("sparse", None), ("sparse", 64))
    )
    torch.testing.assert_close(sparse.reach, exact.reach, rtol=1e-6, atol=0)
    for trace in (sparse, streamed):
        assert trace.graph.rule == "weight > 0.00390625, the rest in pools"
        assert spearmanr(trace.throughput, exact.throughput).statistic > 0.99
        assert float(trace.flow.absorbed) == pytest.approx(1)
    kept = capture(model, ids).rows(0, torch.arange(300))
    again = sparse_graph(kept, prompt_mask=masks["prompt_mask"][0], answer_mask=masks["sink_mask"][0])
    torch.testing.assert_close(trace_flow(again).flow, sparse.flow.flow)


def test_a_trace_is_streamed_or_not_whatever_else_is_in_the_batch() -> None:
    model = tiny("llama").double()
    ids = torch.randint(0, VOCABULARY, (3, 200), generator=torch.Generator().manual_seed(1))
    real, place = torch.ones(3, 200, dtype=torch.bool), torch.arange(200).expand(3, 200)
    real[1, 60:], real[2, 30:40] = False, False  # short; and with a gap between prompt and response
    masks: dict[str, Any] = {"prompt_mask": (place < 30) & real, "sink_mask": (place == 58) | (place == 197) & real}
    tracer = Tracer(model, mode="sparse", chunk=32)
    together = tracer.from_ids(ids, real.long(), position_ids=place, **masks)
    for row in range(3):
        one: dict[str, Any] = {name: mask[row : row + 1] for name, mask in masks.items()}
        alone = tracer.from_ids(ids[row : row + 1], real[row : row + 1].long(), position_ids=place[:1], **one)[0]
        torch.testing.assert_close(together[row].flow.flow, alone.flow.flow, rtol=1e-9, atol=1e-12)


def test_long_traces_are_sparse_by_default_and_exact_where_attention_is_kept() -> None:
    model = tiny("llama")
    ids = torch.randint(0, VOCABULARY, (1, 2100), generator=torch.Generator().manual_seed(1))
    masks: dict[str, Any] = {"prompt_mask": (torch.arange(2100) < 60)[None], "sink_mask": mask_of(2100, 2098)[None]}
    # every key gets about 1/1000 of the attention here: no edge is over 1/256, and pools carry nearly all
    sparse = Tracer(model, max_tokens=4096).from_ids(ids, **masks)[0]
    exact = Tracer(model, max_tokens=4096, keep_attention=True).from_ids(ids, **masks)[0]
    assert sparse.graph.num_pools > 0 and exact.flow.solver == "exact"
    assert spearmanr(sparse.throughput, exact.throughput).statistic > 0.99


@pytest.mark.slow
@ORDERS
def test_credits_of_real_text_keep_their_order(order: Any, smollm2: Any, gsm8k: Any) -> None:
    """The goal: Spearman >= 0.98 and 95 % of the top 40 %, with at most 32 edges and 16 numbers per token."""
    model, tokenizer = smollm2
    text = "\n\n".join(f"Question: {one['question']}\nAnswer: {one['response']}" for one in gsm8k if one["correct"])
    for begin, N in ((0, 3000), (60_000, 4000)):
        ids = tokenizer(text[begin : begin + 6 * N], return_tensors="pt").input_ids[:, :N]
        rows = capture(model, ids).rows(0, torch.arange(N))
        W = torch.cat([torch.nn.functional.pad(block, (0, N - block.shape[1])) for _, block in rows.blocks()])
        masks = roles(N, 300, sinks=4)
        true = exact_flow(DenseRows(W, 256), **masks).throughput
        graph = sparse_graph(order(W, 256), **masks)
        ours = trace_flow(graph).throughput
        credit = ~masks["prompt_mask"] & ~masks["answer_mask"] & (torch.arange(N) < N - 1)
        count = int(0.4 * int(credit.sum()))
        best, found = (set(x[credit].topk(count).indices.tolist()) for x in (true, ours))
        assert spearmanr(true[credit], ours[credit]).statistic >= 0.98
        assert len(best & found) / count >= 0.95
        assert graph.num_edges <= 32 * N and graph.pool_index.shape[1] <= 16 * N
