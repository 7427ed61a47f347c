"""Certificates: mass adds up, what is called a bound holds, and estimates come near."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import DenseRows, Mass, Threshold, TokenGraph, TopK, Tracer, exact_flow, sparsify, trace_flow
from flowgraph.certificate import Certificate, Witnesses, certify
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import EdgeRule
from tests.graphs import attention, graphs, mask_of
from tests.models import VOCABULARY, tiny
from tests.test_exact import dense
from tests.test_sparse import Once, roles

RULES = st.sampled_from([Threshold(0.02), Threshold(0.3), TopK(1), TopK(3), Mass(0.7)])


def holds(certificate: Certificate, ours: Any, true: Any) -> None:
    slack = 1e-7
    assert ((ours.reach - true.reach).abs() <= certificate.reach_bound * (1 + slack) + slack).all()
    assert ((ours.flow - true.flow).abs() <= certificate.flow_bound * (1 + slack) + slack).all()


@given(graph=graphs(), rule=RULES, kind=st.sampled_from(["edges", DenseRows, Once]), absorb=st.booleans())
def test_the_true_error_is_under_the_bounds(graph: TokenGraph, rule: EdgeRule, kind: Any, absorb: bool) -> None:
    W = dense(graph)
    W = W / W.sum(1, keepdim=True).clamp(min=1)  # bounds are for attention, whose rows sum to at most 1
    masks: dict[str, Any] = {name: graph[name] for name in ("prompt_mask", "answer_mask", "question_mask")}
    if kind == "edges":
        ours = TokenGraph.from_sparse(sparsify(DenseRows(W), rule), **masks)
    else:
        ours = sparse_graph(kind(W, 8), edges=rule, absorb_at_prompt=absorb, **masks)
    flow = trace_flow(ours, absorb_at_prompt=absorb)
    holds(certify(flow, absorb_at_prompt=absorb), flow, exact_flow(DenseRows(W), absorb_at_prompt=absorb, **masks))


@pytest.mark.parametrize("kind", ["edges", DenseRows, Once])
def test_the_true_error_is_under_the_bounds_on_longer_traces(kind: Any) -> None:
    for seed in range(6):
        W, masks = attention(200, seed, sharpness=1 + seed % 3), roles(200, 60)
        true = exact_flow(DenseRows(W), **masks)
        for cut in (1e-4, 1e-3, 1e-2):
            if kind == "edges":
                ours = TokenGraph.from_dense(W, threshold=cut, **masks)
            else:
                ours = sparse_graph(kind(W, 64), edges=Threshold(cut), **masks)
            flow = trace_flow(ours)
            certificate = certify(flow)
            holds(certificate, flow, true)
            if kind == "edges" and cut == 1e-4:  # and it says something
                assert float(certificate.reach_bound.max()) < 0.1 and float(certificate.flow_bound.max()) < 1
            if kind is DenseRows:
                assert float(certificate.reach_bound.max()) < 1e-6


def test_bounds_hold_with_a_sink_inside_a_run() -> None:
    W = torch.zeros(8, 8, dtype=torch.float64)
    for later, earlier, weight in ((2, 0, 0.5), (4, 2, 0.25), (5, 3, 0.25), (7, 4, 0.4), (7, 5, 0.4)):
        W[later, earlier] = weight
    masks: dict[str, Any] = {"prompt_mask": mask_of(8, 0), "answer_mask": mask_of(8, 3, 7)}
    flow, true = (
        trace_flow(sparse_graph(DenseRows(W), edges=Threshold(0.3), **masks)),
        exact_flow(DenseRows(W), **masks),
    )
    assert float((flow.flow - true.flow).abs().max()) == pytest.approx(0.5)
    holds(certify(flow), flow, true)


def test_bounds_hold_where_a_threshold_cuts_a_source_off() -> None:
    W = torch.zeros(12, 12, dtype=torch.float64)
    W[1, 0], W[11, 1] = 0.3, 0.5
    masks: dict[str, Any] = {"prompt_mask": torch.arange(12) < 10, "answer_mask": mask_of(12, 11)}
    flow, true = trace_flow(TokenGraph.from_dense(W, threshold=0.4, **masks)), exact_flow(DenseRows(W), **masks)
    holds(certify(flow), flow, true)


def test_mass_adds_up() -> None:
    graph = sparse_graph(DenseRows(attention(100), 32), edges=TopK(3), **roles(100, 30))
    certificate = certify(trace_flow(graph))
    whole = certificate.listed + certificate.modelled + certificate.lost + graph.self_weight
    torch.testing.assert_close(whole, torch.ones(100, dtype=torch.float64))
    assert float(certificate.lost.max()) == 0 and float(certificate.modelled.sum()) > 1
    cut = certify(trace_flow(TokenGraph.from_dense(attention(100), threshold=0.05, **roles(100, 30))))
    assert float(cut.modelled.max()) == 0 and float(cut.lost.sum()) > 1
    assert sum(cut.summary()[f"{kind}_share"] or 0 for kind in ("listed", "modelled", "lost")) == pytest.approx(1)


def test_nothing_dropped_is_certified_as_exact() -> None:
    W, masks = attention(80), roles(80, 20)
    for flow in (trace_flow(TokenGraph.from_dense(W, **masks)), exact_flow(DenseRows(W), **masks)):
        summary = certify(flow).summary()
        assert (summary["reach_bound"], summary["flow_bound"], summary["flow_error"]) == (0, 0, 0)
        assert summary["top_overlap"] == 1 and summary["lost_share"] == 0


@pytest.mark.parametrize("kind", [DenseRows, Once])
def test_estimates_come_near_the_truth(kind: Any) -> None:
    near = []
    for seed in range(5):
        W, masks = attention(400, seed, sharpness=2.0), roles(400, 100)
        witnesses = Witnesses.of(torch.arange(400) < 399)
        flow = trace_flow(sparse_graph(kind(W, 64), edges=TopK(8), witnesses=witnesses, **masks))
        true = exact_flow(DenseRows(W), **masks)
        certificate = certify(flow, witnesses)
        credit = flow.graph.credit_mask
        count = -(-int(credit.sum()) * 4 // 10)
        best, found = (set(one.flow[credit].topk(count).indices.tolist()) for one in (true, flow))
        assert certificate.flow_error is not None and certificate.top_overlap is not None
        ratio = float((flow.flow - true.flow).norm() / certificate.flow_error.norm())
        near.append((certificate.top_overlap - len(best & found) / count, ratio))
    assert max(abs(difference) for difference, _ in near) < 0.08
    ratios = [ratio for _, ratio in near]
    assert min(ratios) > 0.1 and max(ratios) < 3


def test_witnesses_are_rows_and_columns_of_the_attention() -> None:
    W = attention(120, dtype=torch.float32)
    for kind in (DenseRows, Once):
        witnesses = Witnesses.of(torch.arange(120) < 100, count=7)
        sparse_graph(kind(W, 32), witnesses=witnesses, **roles(120, 30))
        tokens, past = witnesses.tokens, W.tril(-1)
        assert tokens.tolist() == sorted(set(tokens.tolist())) and int(tokens.max()) < 100
        assert torch.equal(witnesses.rows, past[tokens]) and torch.equal(witnesses.columns, past[:, tokens].T)


def test_the_same_seed_gives_the_same_estimate() -> None:
    witnesses = Witnesses.of(torch.ones(90, dtype=torch.bool))
    flow = trace_flow(sparse_graph(DenseRows(attention(90), 32), edges=TopK(2), witnesses=witnesses, **roles(90, 20)))
    first, second, other = (certify(flow, witnesses, seed=seed) for seed in (0, 0, 1))
    assert first.flow_error is not None and second.flow_error is not None and other.flow_error is not None
    assert torch.equal(first.flow_error, second.flow_error) and not torch.equal(first.flow_error, other.flow_error)


def test_what_cannot_be_certified_is_refused() -> None:
    graph = TokenGraph.from_dense(attention(40), **roles(40, 10))
    with pytest.raises(ValueError, match="batch of 2 graphs"):
        certify(trace_flow(Batch.from_data_list([graph, graph])))
    with pytest.raises(ValueError, match="witnesses are of a trace of 50 tokens"):
        certify(trace_flow(graph), Witnesses.of(torch.ones(50, dtype=torch.bool)))


def test_every_trace_has_one() -> None:
    model = tiny("llama")
    ids = torch.randint(0, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(1))
    masks: dict[str, Any] = {"prompt_mask": (torch.arange(200) < 60)[None], "sink_mask": mask_of(200, 197, 198)[None]}
    for mode in ("edges", "sparse", "exact"):
        trace = Tracer(model, mode=mode).from_ids(ids, **masks)[0]
        summary = trace.certificate.summary()
        assert summary["lost_share"] == 0 and summary["top_overlap"] is not None
        assert trace.certificate is trace.certificate

    def shares(of: Tensor) -> float:
        return float(of.sum())

    sparse = Tracer(model, mode="sparse").from_ids(ids, **masks)[0].certificate
    assert shares(sparse.modelled) > 0
