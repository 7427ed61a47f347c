"""Exact mode: two sweeps over streamed rows equal the dense reference, whatever the blocks and the listed edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowgraph import DenseRows, Flow, KeptRows, Mass, Threshold, TokenGraph, TopK, Tracer, exact_flow, trace_flow
from flowgraph.sparsify import EdgeRule
from tests.graphs import attention, graphs, mask_of, random_graph
from tests.models import VOCABULARY, tiny


def dense(graph: TokenGraph) -> Tensor:
    """[N, N] the matrix of a graph, diagonal included."""
    W = torch.diag(graph.self_weight.double())
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight.double()
    return W


def exact(graph: TokenGraph, block: int = 7, **options: Any) -> Flow:
    masks = {name: graph[name] for name in ("prompt_mask", "answer_mask", "question_mask")}
    return exact_flow(DenseRows(dense(graph), block=block), **masks, **options)


def close(a: Tensor, b: Tensor, rtol: float = 1e-10, atol: float = 1e-280) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(graph=graphs(), block=st.sampled_from([1, 2, 5, 100]), absorb=st.booleans())
def test_equals_the_reference(graph: TokenGraph, block: int, absorb: bool) -> None:
    ours = exact(graph, block, absorb_at_prompt=absorb)
    theirs = trace_flow(graph, "reference", absorb_at_prompt=absorb)
    for name in ("reach", "flow", "throughput", "injection", "injected", "absorbed"):
        close(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.reach > 0, theirs.reach > 0)


def test_attention_that_requires_gradients_gives_none() -> None:
    graph = random_graph(20)
    W = dense(graph).requires_grad_()
    flow = exact_flow(DenseRows(W), prompt_mask=graph.prompt_mask, answer_mask=graph.answer_mask)
    assert not any(x.requires_grad for x in (flow.reach, flow.flow, flow.edge_flow, flow.graph.edge_weight))


@given(
    graph=graphs(), block=st.sampled_from([1, 2, 5, 100]), absorb=st.booleans(), kept=st.sampled_from([None, 0, 200])
)
def test_rows_that_are_summed_up_give_the_same_flow(
    graph: TokenGraph, block: int, absorb: bool, kept: int | None
) -> None:
    """As kernels do it, from squares and sums alone; here with their slow twins. With and without a list of edges."""
    masks: dict[str, Any] = {name: graph[name] for name in ("prompt_mask", "answer_mask", "question_mask")}
    plain = DenseRows(dense(graph), block=block)
    summed = DenseRows(dense(graph), block=block)
    summed.backend = "triton"
    for rule in (TopK(2), TopK(0)):
        theirs = exact_flow(plain, edges=rule, absorb_at_prompt=absorb, **masks)
        rows = summed if kept is None else KeptRows(summed, kept)
        ours = exact_flow(rows, edges=rule, absorb_at_prompt=absorb, **masks)
        for name in ("reach", "flow", "injection", "absorbed", "unlisted_inflow", "unlisted_outflow"):
            # Flow that a sum has lost to rounding is not listed either, and what is left of it is 1e-16 of the whole.
            close(getattr(ours, name), getattr(theirs, name), atol=1e-15 if "unlisted" in name else 1e-280)
        assert torch.equal(ours.graph.edge_index, theirs.graph.edge_index)
        close(ours.graph.dropped, theirs.graph.dropped, atol=1e-13 * float(dense(graph).max()))
        close(ours.graph.self_weight, theirs.graph.self_weight)
        assert ours.graph.rule == theirs.graph.rule


def test_no_edges_at_all_are_a_list_too() -> None:
    graph = random_graph(60, seed=4)
    flow, full = exact(graph, edges=TopK(0)), trace_flow(graph, "reference")
    assert flow.graph.num_edges == 0 and flow.graph.rule == "by flow: top 0 per token"
    close(flow.flow, full.flow)
    close(flow.injection + flow.unlisted_inflow, full.flow)
    close(torch.where(graph.answer_mask, flow.flow, flow.unlisted_outflow), full.flow)


@pytest.mark.parametrize("rule", [TopK(1), TopK(3), Threshold(1e-3), Threshold(0.0), Mass(0.5)], ids=str)
def test_listed_and_unlisted_edges_conserve_the_flow_together(rule: EdgeRule) -> None:
    graph = random_graph(60, seed=4)
    flow, full = exact(graph, edges=rule), trace_flow(graph, "reference")
    zero = torch.zeros(60, dtype=torch.float64)
    source, target = flow.graph.edge_index
    inflow = flow.injection + zero.scatter_add(0, target, flow.edge_flow) + flow.unlisted_inflow
    outflow = zero.scatter_add(0, source, flow.edge_flow) + flow.unlisted_outflow
    close(inflow, full.flow)
    close(torch.where(graph.answer_mask, flow.flow, outflow), full.flow)
    # the listed edges are those of the full graph, chosen by what they carry there
    by_edge = {(i, k): n for n, (i, k) in enumerate(zip(*graph.edge_index.tolist(), strict=True))}
    place = torch.tensor([by_edge[i, k] for i, k in zip(source.tolist(), target.tolist(), strict=True)])
    close(flow.edge_flow, full.edge_flow[place])
    close(flow.transition, full.transition[place])
    assert torch.equal(flow.graph.edge_weight, graph.edge_weight[place])
    carried = torch.zeros(60, 60, dtype=torch.float64)
    carried[graph.edge_index[1], graph.edge_index[0]] = full.edge_flow
    assert int(rule.keep(carried).sum()) == len(place)
    assert flow.graph.rule == f"by flow: {rule}"
    if str(rule) == "all edges":
        assert float(flow.unlisted_inflow.sum()) == 0 == float(flow.unlisted_outflow.sum())


def test_what_rows_lose_is_kept() -> None:
    graph = exact(random_graph(50), edges=TopK(2)).graph
    kept = torch.zeros(50, dtype=torch.float64).scatter_add(0, graph.edge_index[1], graph.edge_weight)
    close(kept + graph.self_weight + graph.dropped, torch.ones(50, dtype=torch.float64))


def test_float32_rows_are_summed_in_float64() -> None:
    graph = random_graph(400, seed=9, dtype=torch.float32)
    ours, theirs = exact(graph, block=64), trace_flow(graph, "reference")
    close(ours.flow.double(), theirs.flow.double(), rtol=1e-6)


def test_reach_beyond_float64_is_refused_with_the_way_out() -> None:
    N = 400
    W = torch.diag(torch.full((N - 1,), 0.1, dtype=torch.float64), -1)
    with pytest.raises(ValueError, match=r"beyond what exact sweeps in float64 can hold; .*trace_flow"):
        exact_flow(DenseRows(W), prompt_mask=mask_of(N, 0), answer_mask=mask_of(N, N - 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_mask": mask_of(9, 8)}, r"answer_mask must be a bool tensor of shape \[N\] = \[12\], got \[9\]"),
        ({"prompt_mask": torch.ones(12)}, r"prompt_mask must be a bool tensor"),
        ({"question_mask": mask_of(12, 7)}, r"token 7 is in question_mask but not in the prompt"),
    ],
)
def test_bad_masks_are_named(changes: dict[str, Any], message: str) -> None:
    masks = {"prompt_mask": mask_of(12, 0, 1, 2), "answer_mask": mask_of(12, 10)} | changes
    with pytest.raises(ValueError, match=message):
        exact_flow(DenseRows(attention(12)), **masks)


def test_nan_is_named() -> None:
    W = attention(12)
    W[5, 2] = torch.nan
    for backend in ("torch", "triton"):
        rows = DenseRows(W, block=4)
        rows.backend = backend
        with pytest.raises(ValueError, match=r"W\[5, 2\] = nan"):
            exact_flow(rows, prompt_mask=mask_of(12, 0), answer_mask=mask_of(12, 10))


# --- in the tracer ---------------------------------------------------------------------------------------------------

T = 40


def inputs() -> dict[str, Any]:
    place = torch.arange(T).expand(2, T)
    ids = torch.randint(3, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "prompt_mask": place < 12, "answer_tokens": (place >= 35) & (place < 37)}


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_exact_credits_equal_those_of_all_edges(name: str) -> None:
    model = tiny(name)
    exactly = Tracer(model, mode="exact").from_ids(**inputs())
    by_edges = Tracer(model, mode="edges", edges=Threshold(0.0)).from_ids(**inputs())
    assert exactly.flow.solver == "exact" and by_edges.flow.solver == "scipy"
    close(exactly.flow.throughput, by_edges.flow.throughput, rtol=1e-5, atol=1e-9)
    assert torch.equal(exactly.weights, by_edges.weights)
    assert all(trace.graph.rule == "by flow: top 32 per token" for trace in exactly)


def test_auto_goes_by_length_and_each_trace_has_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowgraph.options.LONG", 30)
    model, given_ids = tiny("llama"), inputs()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :12] = 0
    given_ids["prompt_mask"] = (torch.arange(T) < 20) & mask.bool()
    traces = Tracer(model).from_ids(**given_ids, attention_mask=mask)
    assert ["in pools" in trace.graph.rule for trace in traces] == [True, False]
    kept = Tracer(model, keep_attention=True).from_ids(**given_ids, attention_mask=mask)
    assert [trace.flow.solver for trace in kept] == ["exact", "scipy"] and kept.flow.solver == "exact+scipy"
    alone = Tracer(model, mode="edges").from_ids(**given_ids, attention_mask=mask)
    assert torch.equal(kept.weights, alone.weights) and torch.equal(traces.weights[1], alone.weights[1])
    assert Tracer(model, edges=TopK(4)).from_ids(**given_ids).flow.solver == "scipy"
    assert Tracer(model, solver="scatter").from_ids(**given_ids).flow.solver == "scatter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, 'mode must be "auto", "edges", "sparse" or "exact"'),
        ({"weights": "norm"}, 'weights must be "attention" or "value_norm"'),
        ({"chunk": 1}, 'chunk must be "auto", None or a number of tokens >= 2'),
        ({"mode": "exact", "solver": "scipy"}, "of its own"),
    ],
)
def test_bad_modes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracer(tiny("llama"), **options)
