"""Contraction keeps every unit of flow, and with tokens as segments it changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import (
    Flow,
    Segments,
    TokenGraph,
    TopK,
    Tracer,
    backbone,
    certify,
    checkpoints,
    contract,
    credit,
    exact_flow,
    hubs,
    measures,
    paths,
    removal,
    split,
    trace_flow,
    width,
)  # fmt: skip
from flowgraph.rows import DenseRows
from tests.graphs import attention, chain, graphs, mask_of, random_graph
from tests.written import ANSWERS, TOKENIZER, ids, marked, policy, written_by_hand


def cut_at(graph: TokenGraph, *starts: int) -> Segments:
    """Segments that begin at these tokens, and where roles change."""
    roles = graph.answer_mask + 2 * graph.prompt_mask.long()
    change = (roles[1:] != roles[:-1]).nonzero().flatten() + 1
    ptr = torch.tensor(sorted({0, *starts, *change.tolist(), int(graph.num_nodes)}))
    return Segments(ptr, [""] * (len(ptr) - 1), ["response"] * (len(ptr) - 1))


def dense_flow(flow: Flow) -> Tensor:
    """[N, N] flow from row to column, slowly."""
    out = torch.zeros(flow.graph.num_nodes, flow.graph.num_nodes, dtype=torch.float64)
    for (source, target), value in zip(flow.graph.edge_index.T.tolist(), flow.edge_flow.tolist(), strict=True):
        out[source, target] += value
    return out


@given(graphs(), st.data())
def test_flows_add_up(graph: TokenGraph, data: st.DataObject) -> None:
    flow = trace_flow(graph, "reference")
    N = int(graph.num_nodes)
    segments = cut_at(graph, *data.draw(st.sets(st.integers(1, N - 1), max_size=6)))
    coarse = contract(flow, segments)
    assert coarse.graph.validate() and coarse.graph.num_nodes == len(segments)
    member = torch.nn.functional.one_hot(segments.index, len(segments)).double()
    wanted = member.T @ dense_flow(flow) @ member
    torch.testing.assert_close(dense_flow(coarse), wanted - wanted.diag().diag())
    torch.testing.assert_close(coarse.graph.internal_flow, wanted.diag())
    torch.testing.assert_close(coarse.injection, member.T @ flow.injection)
    # Conservation: what comes in goes out, at every segment that is no sink.
    out = dense_flow(coarse).sum(1)
    inner = ~coarse.graph.answer_mask
    torch.testing.assert_close(coarse.flow[inner], out[inner])
    torch.testing.assert_close(coarse.flow[~inner].sum()[None], flow.absorbed)
    torch.testing.assert_close(coarse.throughput, 2 * coarse.flow)


@given(graphs())
def test_tokens_as_segments_change_nothing(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    coarse = contract(flow, cut_at(graph, *range(1, int(graph.num_nodes))))
    assert torch.equal(coarse.graph.edge_index, graph.edge_index)
    for name in ("flow", "throughput", "edge_flow", "injection", "reach", "log_reach"):
        ours, theirs = getattr(coarse, name), getattr(flow, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)
    flows = flow.flow[graph.edge_index[0]] > 0
    torch.testing.assert_close(coarse.transition, flow.transition * flows)
    for name in ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask"):
        assert torch.equal(coarse.graph[name], graph[name]), name
    torch.testing.assert_close(coarse.graph.edge_weight, graph.edge_weight)


@given(graphs(), st.data())
def test_in_two_steps_as_in_one(graph: TokenGraph, data: st.DataObject) -> None:
    flow = trace_flow(graph, "reference")
    N = int(graph.num_nodes)
    few = data.draw(st.sets(st.integers(1, N - 1), max_size=3))
    more = few | data.draw(st.sets(st.integers(1, N - 1), max_size=5))
    at_once, fine = contract(flow, cut_at(graph, *few)), contract(flow, cut_at(graph, *more))
    starts = {int(start): n for n, start in enumerate(cut_at(graph, *more).ptr)}
    ptr = torch.tensor([starts[int(start)] for start in cut_at(graph, *few).ptr])
    again = contract(fine, Segments(ptr, [""] * (len(ptr) - 1), [""] * (len(ptr) - 1)))
    torch.testing.assert_close(dense_flow(again), dense_flow(at_once))
    torch.testing.assert_close(again.flow, at_once.flow)
    torch.testing.assert_close(again.graph.internal_flow + 0, at_once.graph.internal_flow - _inner(fine, ptr))


def _inner(fine: Flow, ptr: Tensor) -> Tensor:
    """What had moved within the finer segments already."""
    index = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr[1:] - ptr[:-1])
    return torch.zeros(len(ptr) - 1, dtype=torch.float64).index_add_(0, index, fine.graph.internal_flow.double())


def test_reach_of_a_segment_is_the_visits_that_enter_it() -> None:
    """Walks from the sinks, all of them, on a graph small enough to write them down."""
    W = attention(7, seed=3).tril(-1)
    graph = TokenGraph.from_dense(W, prompt_mask=mask_of(7, 0, 1), answer_mask=mask_of(7, 6))
    segments = cut_at(graph, 2, 4)
    coarse = contract(trace_flow(graph, "reference"), segments)
    index = segments.index.tolist()
    visits = [0.0] * len(segments)

    def walk(token: int, chance: float) -> None:
        for earlier in range(token):
            step = chance * float(W[token, earlier])
            if index[earlier] != index[token]:
                visits[index[earlier]] += step
            walk(earlier, step)

    walk(6, 1.0)
    visits[-1] = 1.0
    torch.testing.assert_close(coarse.reach, torch.tensor(visits, dtype=torch.float64))


def test_reach_beyond_any_float() -> None:
    graph = chain(400, 0.1)
    coarse = contract(trace_flow(graph), cut_at(graph, 100, 200))
    assert coarse.reach[0] == 0 and coarse.log_reach[0] == pytest.approx(400 * math.log(0.1), rel=1e-4)


def test_what_exact_flow_does_not_list_stays_a_remainder() -> None:
    graph = random_graph(30)
    W = torch.zeros(30, 30, dtype=torch.float64)
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight
    flow = exact_flow(DenseRows(W), prompt_mask=graph.prompt_mask, answer_mask=graph.answer_mask, edges=TopK(3))
    segments = cut_at(graph, 5, 12, 20)
    coarse, full = contract(flow, segments), contract(trace_flow(graph, "reference"), segments)
    assert coarse.unlisted_inflow.sum() > 0
    out = dense_flow(coarse).sum(1) + coarse.unlisted_outflow
    inner = ~coarse.graph.answer_mask
    torch.testing.assert_close(coarse.flow[inner], out[inner])
    assert (dense_flow(coarse) <= dense_flow(full) + 1e-12).all() and (coarse.flow >= full.flow - 1e-12).all()


@given(graphs(), st.booleans(), st.sampled_from([3, 1000]), st.data())
def test_from_rows_as_from_all_edges(graph: TokenGraph, absorb: bool, block: int, data: st.DataObject) -> None:
    flow = trace_flow(graph, "reference", absorb_at_prompt=absorb)
    N = int(graph.num_nodes)
    segments = cut_at(graph, *data.draw(st.sets(st.integers(1, N - 1), max_size=6)))
    W = torch.zeros(N, N, dtype=torch.float64)
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight
    read = contract(flow, segments, DenseRows(W, block), absorb_at_prompt=absorb)
    listed = contract(flow, segments)
    for name in ("flow", "injection", "reach", "throughput"):
        torch.testing.assert_close(getattr(read, name), getattr(listed, name), rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(dense_flow(read), dense_flow(listed), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(read.graph.internal_flow, listed.graph.internal_flow, rtol=1e-9, atol=1e-12)
    assert torch.equal(read.graph.edge_index, listed.graph.edge_index)


def test_rows_leave_no_remainder_of_an_exact_flow() -> None:
    W = attention(40, seed=8)
    prompt, sinks = torch.arange(40) < 12, mask_of(40, 38)
    flow = exact_flow(DenseRows(W), prompt_mask=prompt, answer_mask=sinks, edges=TopK(2))
    full = trace_flow(TokenGraph.from_dense(W, prompt_mask=prompt, answer_mask=sinks), "reference")
    segments = cut_at(flow.graph, 5, 20, 30)
    coarse = contract(flow, segments, DenseRows(W, 7))
    torch.testing.assert_close(dense_flow(coarse), dense_flow(contract(full, segments)))
    assert coarse.unlisted_inflow.sum() == 0 == coarse.unlisted_outflow.sum() == coarse.graph.dropped.sum()
    with pytest.raises(ValueError, match="rows are over 8 tokens, the flow over 40"):
        contract(flow, segments, DenseRows(W[:8, :8]))


def test_a_trace_that_kept_its_attention() -> None:
    token_ids = torch.tensor([ids("?;", end=False) + marked(3, 2)])
    prompt = torch.arange(token_ids.shape[1])[None] < 2
    options: dict[str, Any] = {"preset": "paper", "answer": ANSWERS, "mode": "exact", "edges": TopK(1)}
    (kept,) = Tracer(policy(), TOKENIZER, keep_attention=True, **options).from_ids(token_ids, prompt_mask=prompt)
    (gone,) = Tracer(policy(), TOKENIZER, **options).from_ids(token_ids, prompt_mask=prompt)
    assert kept.contract("words").unlisted_inflow.sum() == 0 < gone.contract("words").unlisted_inflow.sum()
    with pytest.raises(ValueError, match="trace it with keep_attention=True"):
        gone.rows()


def test_a_sparse_trace_that_kept_its_attention_contracts_what_its_flow_took() -> None:
    token_ids = torch.tensor([ids("?;", end=False) + marked(3, 2)])
    options: dict[str, Any] = {"mode": "edges", "edges": TopK(2), "keep_attention": True, "answer": ANSWERS}
    prompt = torch.arange(token_ids.shape[1])[None] < 2
    (trace,) = Tracer(policy(), TOKENIZER, **options).from_ids(token_ids, prompt_mask=prompt)
    segments = trace.segments("words")
    assert torch.equal(trace.contract(segments).flow, contract(trace.flow, segments).flow)
    assert float(trace.contract(segments).flow.max()) <= 1 + 1e-5
    with pytest.raises(ValueError, match="contract it without rows"):
        contract(trace.flow, segments, trace.rows())


def test_bad_input() -> None:
    graph = random_graph(30)
    flow = trace_flow(graph)
    with pytest.raises(ValueError, match="segments are over 4 tokens, the flow over 30"):
        contract(flow, Segments(torch.tensor([0, 2, 4]), ["", ""], ["", ""]))
    with pytest.raises(ValueError, match=r"segment 1 \('b'\) holds sinks and other tokens; pass sink_mask"):
        contract(flow, Segments(torch.tensor([0, 10, 30]), ["a", "b"], ["", ""]))
    both = trace_flow(Batch.from_data_list([graph, graph]))
    with pytest.raises(ValueError, match="a batch of 2 graphs; contract them one by one"):
        contract(both, cut_at(graph))


def test_a_batch_of_coarse_graphs_is_a_pyg_batch() -> None:
    graph = random_graph(30)
    coarse = contract(trace_flow(graph), split(["a. "] * 30, "words", sink_mask=graph.answer_mask))
    batch = Batch.from_data_list([coarse.graph, coarse.graph])
    assert batch.validate() and batch.num_nodes == 2 * coarse.graph.num_nodes


def test_a_trace_contracts_by_its_text() -> None:
    prompt, response = ids("?;", end=False), marked(3, 2)
    token_ids = torch.tensor([prompt + response])
    tracer = Tracer(written_by_hand(), TOKENIZER, preset="paper", answer=ANSWERS)
    (trace,) = tracer.from_ids(token_ids, prompt_mask=torch.arange(token_ids.shape[1])[None] < 2)
    segments = trace.segments("words")
    assert segments.names == ["?;", "aaa@bb=", "7", "<eos>"] and segments.kinds[2] == "answer"
    coarse = trace.contract("words")
    assert coarse.flow.tolist() == pytest.approx([1, 1, 1, 0])
    assert torch.equal(trace.contract(segments).edge_flow, coarse.edge_flow)
    (bare,) = Tracer(written_by_hand()).from_ids(
        token_ids, prompt_mask=torch.arange(token_ids.shape[1])[None] < 2, sink_mask=token_ids == token_ids[0, -2]
    )
    with pytest.raises(ValueError, match="has no text to divide"):
        bare.segments()
    for function in FUNCTIONS_OF_FLOWS:
        with pytest.raises(TypeError, match=r"flow must be a Flow, got Trace; pass its \.flow"):
            function(trace)
        with pytest.raises(TypeError, match=r"got TokenGraph; trace_flow\(graph\) gives one"):
            function(trace.graph)


FUNCTIONS_OF_FLOWS: list[Callable[[Any], object]] = [
    backbone, paths, hubs, width, certify, measures, credit,
    lambda it: contract(it, Segments(torch.tensor([0, 1]), [""], [""])), lambda it: removal(it, [[0]]),
]  # fmt: skip


def test_what_is_printed_can_be_read() -> None:
    flow = trace_flow(chain(3, 0.5))
    assert repr(flow) == "Flow(4 nodes, 3 edges, 1 injected, 1 absorbed, solver 'scipy')"
    both = trace_flow(Batch.from_data_list([chain(3, 0.5)] * 2))
    assert repr(both) == "Flow(2 graphs, 8 nodes, 6 edges, 2 injected, 2 absorbed, solver 'scipy')"
    assert repr(paths(flow)) == "Paths(1 path with 100.000% of the flow)\n  Path(100%: 0 -> 1 -> 2 -> 3)"
    coarse = contract(flow, Segments(torch.tensor([0, 1, 3, 4]), ["Q?", "It's so.", "A"], [""] * 3))
    assert repr(paths(coarse)[0]) == """Path(100%: 'Q?' -> "It's so." -> 'A')"""
    many = paths(trace_flow(random_graph(30)), 12)
    assert len(repr(many).splitlines()) == 12 and repr(many).endswith("\n  ...")
    assert repr(checkpoints(coarse, backbone(coarse), max_cut=1)) == (
        "Checkpoints(3 cuts, smallest of 1 node, all up to 1 node listed)"
    )
    lone = checkpoints(coarse, backbone(coarse), max_cut=1, limit=1)
    assert repr(lone) == "Checkpoints(1 cut, smallest of 1 node, all up to 0 nodes listed)"
    assert repr(certify(flow)) == (
        "Certificate(listed 100.0%, modelled 0.0%, lost 0.0%; reach within 0, flow within 0; "
        "overlap of the top tokens 100.0%)"
    )
