"""Cuts against brute force over all paths, removal against reach recomputed densely, carriers against the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import Flow, TokenGraph, TopK, Tracer, capture, contract, exact_flow, trace_flow
from flowgraph.backbone import FlowArrays, backbone
from flowgraph.checkpoints import carriers, checkpoints, removal
from flowgraph.rows import DenseRows
from tests.graphs import attention, chain, graphs, layered, mask_of, random_graph
from tests.models import ARCHITECTURES, VOCABULARY, tiny
from tests.test_backbone import all_paths, coarse_flow, no_sinks, segments_of, source_is_sink, unreachable

module = import_module("flowgraph.checkpoints")  # in the package that name is the function


def all_cuts(walks: Iterable[tuple[int, ...]], largest: int) -> list[tuple[int, ...]]:
    """Every minimal set of up to `largest` nodes that all walks pass, by trying all sets."""
    ways = [set(walk) for walk in walks]
    nodes = sorted(set().union(*ways))
    found: list[tuple[int, ...]] = []
    for size in range(1, largest + 1):
        for group in itertools.combinations(nodes, size):
            is_cut = all(not way.isdisjoint(group) for way in ways)
            if is_cut and not any(set(smaller) <= set(group) for smaller in found):
                found.append(group)
    return found


def dense(graph: TokenGraph) -> Tensor:
    """[N, N] float64, the matrix of a graph."""
    W = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight.double()
    return W


def dense_reach(W: Tensor, sinks: Tensor, group: Iterable[int] = ()) -> Tensor:
    """[N] the definition, token by token; what is in the group has none."""
    reach = torch.zeros(len(W), dtype=torch.float64)
    for token in range(len(W) - 1, -1, -1):
        if token not in set(group):
            reach[token] = 1.0 if sinks[token] else W[:, token] @ reach
    return reach


def dense_removal(W: Tensor, graph: TokenGraph, group: Iterable[int]) -> tuple[float, float]:
    """(lost, flow) by the definitions."""
    before = dense_reach(W, graph.answer_mask)
    starts = graph.question_mask & (before > 0)
    after = dense_reach(W, graph.answer_mask, group)[starts]
    before = before[starts]
    return float(1 - after.sum() / before.sum()), float((1 - after / before).mean())


def diamond(arms: int, length: int) -> Flow:
    """From one token in `arms` separate chains of `length` tokens to one sink."""
    N = 2 + arms * length
    links = []
    for arm in range(arms):
        inner = [1 + arm + step * arms for step in range(length)]
        links += list(itertools.pairwise([0, *inner, N - 1]))
    graph = TokenGraph.from_edges(
        torch.tensor(links).T.contiguous(),
        torch.full((len(links),), 0.5, dtype=torch.float64),
        prompt_mask=mask_of(N, 0),
        answer_mask=mask_of(N, N - 1),
    )
    return trace_flow(graph)


# --- cuts ------------------------------------------------------------------------------------------------------------


def check(flow: Flow, share: float, **options: Any) -> None:
    bone = backbone(flow, share)
    walks = all_paths(flow, bone.edge_mask)
    found = checkpoints(flow, bone, 2, limit=10**6, **options)
    if not walks:
        assert (list(found), found.minimum, found.complete) == ([], 0, 2)
        return
    expected = all_cuts(walks, 2)
    assert [point.tokens for point in found] == expected
    assert found.complete == 2 and found.minimum == (len(expected[0]) if expected else 3)
    total = math.fsum(walks.values())
    starts, ends = {walk[0] for walk in walks}, {walk[-1] for walk in walks}
    for point in found:
        for token, part in zip(point.tokens, point.shares, strict=True):
            through = math.fsum(value for walk, value in walks.items() if token in walk)
            assert part == pytest.approx(through / total, abs=1e-9)
        assert sum(point.shares) >= 1 - 1e-9  # it is a cut
        assert point.trivial == (set(point.tokens) in (starts, ends))


@given(graph=graphs(max_tokens=10), share=st.sampled_from([0.1, 0.4, 0.7, 1.0]))
def test_all_cuts_of_one_and_two(graph: TokenGraph, share: float) -> None:
    check(trace_flow(graph, "reference"), share)


@given(graph=graphs(max_tokens=10), share=st.sampled_from([0.3, 1.0]))
def test_cuts_of_one_are_the_dominators_of_networkx(graph: TokenGraph, share: float) -> None:
    networkx = pytest.importorskip("networkx")
    flow = trace_flow(graph, "reference")
    bone = backbone(flow, share)
    if not bone.num_nodes:
        return
    net = networkx.DiGraph(graph.edge_index[:, bone.edge_mask].T.tolist())
    net.add_edges_from(("start", node) for node in (bone.nodes & (flow.injection > 0)).nonzero().flatten().tolist())
    net.add_edges_from((node, "end") for node in (bone.nodes & graph.answer_mask).nonzero().flatten().tolist())
    above = networkx.immediate_dominators(net, "start")
    dominators, node = [], above["end"]
    while node != "start":
        dominators.append((node,))
        node = above[node]
    assert [point.tokens for point in checkpoints(flow, bone, 1)] == dominators[::-1]


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_cuts_of_a_coarse_flow(share: float) -> None:
    check(coarse_flow(), share)


@pytest.mark.parametrize("flow", [no_sinks(), unreachable(), source_is_sink()], ids=["no sinks", "no way", "both"])
def test_cuts_where_little_or_nothing_flows(flow: Flow) -> None:
    for share in (0.3, 0.7, 1.0):
        check(flow, share)


def test_every_token_of_a_chain_is_a_checkpoint() -> None:
    flow = trace_flow(chain(400, 0.1))
    found = checkpoints(flow, backbone(flow), limit=1000)
    assert [point.tokens for point in found] == [(token,) for token in range(401)]
    for point in found:
        assert (point.shares, point.flow, point.lost) == ((1.0,), 1.0, 1.0)
    assert [point.tokens for point in found if point.trivial] == [(0,), (400,)]


def test_pairs_across_two_arms() -> None:
    flow = diamond(2, 3)
    found = checkpoints(flow, backbone(flow, 1.0))
    pairs = sorted((min(a, b), max(a, b)) for a in (1, 3, 5) for b in (2, 4, 6))
    assert [point.tokens for point in found] == [(0,), (7,), *pairs]
    assert all(point.shares == pytest.approx((0.5, 0.5)) for point in found[2:])


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("all_pairs", [True, False])
def test_the_smallest_cut_is_found_by_flow_where_pairs_are_not_enough(
    width: int, all_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAIRS_WORK", 3e8 if all_pairs else 0)
    flow = trace_flow(layered(5, width))
    found = checkpoints(flow, backbone(flow, 1.0), max_cut=3)
    layers = [tuple(range(start, start + width)) for start in range(0, 5 * width, width)]
    if width == 2 and all_pairs:
        assert [point.tokens for point in found] == layers and found.complete == 2
    elif width <= 3:
        assert len(found) == 1 and found[0].tokens in layers and found.complete == width - 1
    else:
        assert list(found) == [] and found.complete == 3
    assert found.minimum == width


@given(graph=graphs(max_tokens=10))
def test_the_smallest_cut_by_flow_is_no_larger_than_any(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    bone = backbone(flow, 1.0)
    if bone.num_nodes:
        walks = all_paths(flow, bone.edge_mask)
        net = module._Net.of(FlowArrays.of(flow), bone)
        cut = tuple(int(net.nodes[node]) for node in module._smallest_cut(net))
        expected = next(group for size in range(1, 9) for group in all_cuts(walks, size) if len(group) == size)
        assert len(cut) == len(expected) and all(not set(walk).isdisjoint(cut) for walk in walks)


def test_too_many_cuts_keep_those_with_most_flow() -> None:
    flow = diamond(2, 6)
    found = checkpoints(flow, backbone(flow, 1.0), limit=5)
    assert [len(point.tokens) for point in found] == [1, 1, 2, 2, 2, 2, 2] and found.complete == 1
    assert checkpoints(flow, backbone(flow, 1.0), limit=1).complete == 0
    strongest = checkpoints(trace_flow(random_graph(30)), backbone(trace_flow(random_graph(30)), 0.02), 1, limit=1)
    everything = checkpoints(trace_flow(random_graph(30)), backbone(trace_flow(random_graph(30)), 0.02), 1)
    assert strongest[0].flow == max(point.flow for point in everything)


def test_many_nodes_take_seconds() -> None:
    flow = trace_flow(random_graph(1500, seed=5))
    found = checkpoints(flow, backbone(flow, 0.5))
    assert found.complete == 2 and found.minimum == 2


# --- removal ---------------------------------------------------------------------------------------------------------


@given(graph=graphs(max_tokens=16), data=st.data())
def test_removal_is_what_a_dense_reach_says(graph: TokenGraph, data: st.DataObject) -> None:
    flow = trace_flow(graph, "reference")
    N = int(graph.num_nodes)
    groups = data.draw(st.lists(st.lists(st.integers(0, N - 1), max_size=4), min_size=1, max_size=4))
    if not bool(flow.injected):
        with pytest.raises(ValueError, match="no source of the flow reaches"):
            removal(flow, groups)
        return
    W = dense(graph)
    block = data.draw(st.sampled_from([1, 3, 100]))
    for found in (removal(flow, groups), removal(flow, groups, rows=DenseRows(W, block))):
        for group, lost, through in zip(groups, found.lost.tolist(), found.flow.tolist(), strict=True):
            assert (lost, through) == pytest.approx(dense_removal(W, graph, group), abs=1e-8)


@given(graph=graphs(max_tokens=16))
def test_without_one_token_its_own_flow_is_missing(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    if bool(flow.injected):
        found = removal(flow, [[token] for token in range(int(graph.num_nodes))])
        torch.testing.assert_close(found.flow, flow.flow, rtol=1e-8, atol=1e-10)


def test_without_all_sources_or_sinks_all_is_lost() -> None:
    flow = trace_flow(random_graph(20))
    groups = [mask.nonzero().flatten().tolist() for mask in (flow.graph.question_mask, flow.graph.answer_mask)]
    for rows in (None, DenseRows(attention(20), 4)):
        assert removal(flow, groups, rows=rows).lost.tolist() == pytest.approx([1, 1])
        some = removal(flow, [groups[0][:2], groups[1][:1], []], rows=rows).lost.tolist()
        assert 0 < some[0] < 1 and 0 < some[1] < 1 and some[2] == pytest.approx(0)


def test_removal_does_not_underflow() -> None:
    """Reach is 1e-400; one of two ways carries a third of it."""
    edges = torch.tensor([[*range(400), 400, 401, 400], [*range(1, 401), 401, 402, 402]])
    weight = torch.tensor([0.1] * 400 + [0.5, 0.5, 0.5], dtype=torch.float64)
    masks: dict[str, Any] = {"prompt_mask": mask_of(403, 0), "answer_mask": mask_of(403, 402)}
    found = removal(trace_flow(TokenGraph.from_edges(edges, weight, **masks)), [[401], [200]])
    assert found.lost.tolist() == pytest.approx([1 / 3, 1])


@pytest.mark.parametrize("absorb", [False, True])
def test_removal_from_the_full_rows_of_an_exact_flow(absorb: bool) -> None:
    graph, W = random_graph(40, seed=3), attention(40, seed=3)
    masks = {"prompt_mask": graph.prompt_mask, "answer_mask": graph.answer_mask}
    flow = exact_flow(DenseRows(W, 7), edges=TopK(2), absorb_at_prompt=absorb, **masks)
    bone = backbone(flow, 0.2)
    found = checkpoints(flow, bone, rows=DenseRows(W, 7))
    assert len(found)
    open_ = W.tril(-1) * ~(absorb & graph.prompt_mask)[:, None]
    for point in found:
        assert (point.lost, point.flow) == pytest.approx(dense_removal(open_, graph, point.tokens))
    listed = checkpoints(flow, bone)
    assert [a.tokens for a in listed] == [a.tokens for a in found]
    kept = dense(flow.graph)
    for point in listed:
        assert point.lost == pytest.approx(dense_removal(kept, graph, point.tokens)[0], abs=1e-6)


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_segment_takes_all_its_tokens_with_it(with_rows: bool) -> None:
    graph = random_graph(40, seed=1)
    flow = trace_flow(graph)
    segments = segments_of(graph, 4)
    coarse = contract(flow, segments)
    rows = DenseRows(attention(40, seed=1)) if with_rows else None
    found = checkpoints(coarse, backbone(coarse, 0.5), rows=rows, fine=(flow, segments))
    assert len(found)
    for point in found:
        tokens = [token for m in point.tokens for token in range(*segments.spans()[m])]
        assert (point.lost, point.flow) == pytest.approx(dense_removal(dense(graph), graph, tokens))


def test_what_does_not_fit_is_refused() -> None:
    flow, other = trace_flow(random_graph(20)), trace_flow(random_graph(21))
    segments = segments_of(flow.graph, 4)
    coarse = contract(flow, segments)
    W = attention(20)
    exact = exact_flow(DenseRows(W), prompt_mask=flow.graph.prompt_mask, answer_mask=flow.graph.answer_mask)
    for ask, message in (
        (lambda: checkpoints(flow, backbone(other)), "pass the flow that it was made of"),
        (lambda: checkpoints(flow, backbone(flow), 0), "max_cut and limit"),
        (lambda: checkpoints(flow, backbone(flow), rows=DenseRows(attention(21))), "rows are over 21 tokens"),
        (lambda: checkpoints(coarse, backbone(coarse), fine=(other, segments)), "segments are over 20 tokens"),
        (lambda: checkpoints(flow, backbone(flow), fine=(flow, segments)), "fine holds"),
        (lambda: removal(flow, [[0], [20]]), r"groups\[1\] holds node 20, there are 0..19"),
        (lambda: removal(exact, [[3]], rows=DenseRows(attention(20, seed=9))), "not the reach of the flow"),
        (lambda: removal(flow, [[3]], rows=DenseRows(torch.eye(20))), "no source reaches the answer in rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    both = trace_flow(Batch.from_data_list([random_graph(8), random_graph(9)]))
    with pytest.raises(ValueError, match="batch of 2 graphs"):
        checkpoints(both, backbone(both[0]))


# --- layers and heads ------------------------------------------------------------------------------------------------


def head_maps(model: Any, **inputs: Tensor) -> Tensor:
    """[L, B, H, T, T] float64, from `output_attentions`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return torch.stack([layer.double() for layer in attentions if layer is not None and layer.dim() == 4])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_carriers_are_the_attention_of_every_head(name: str) -> None:
    model = tiny(name)
    input_ids = torch.randint(3, VOCABULARY, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    captured = capture(model, input_ids, mask, layers="all")
    maps = head_maps(model, input_ids=input_ids, attention_mask=mask)[:, 1, :, 5:, 5:]
    positions = torch.arange(5, 24)
    edges = torch.tensor([[0, 3, 0, 9, 17], [1, 12, 18, 12, 18]])
    table = carriers(captured, 1, positions, edges)
    assert table.shape == (5, len(captured.layers), 4)
    wanted = torch.stack([maps[:, :, k, i] for i, k in edges.T.tolist()])
    torch.testing.assert_close(table, wanted, rtol=1e-4, atol=1e-6)
    (block,) = captured.rows(1, positions, block=19).blocks()
    torch.testing.assert_close(
        table.mean((1, 2)), block.weight[edges[1], edges[0]].double(), rtol=1e-5, atol=1e-8, msg=name
    )


def traced() -> Any:
    model = tiny("llama")
    ids = torch.randint(3, VOCABULARY, (1, 40))
    masks: dict[str, Any] = {"prompt_mask": (torch.arange(40) < 12)[None], "sink_mask": (torch.arange(40) > 36)[None]}
    return model, ids, Tracer(model).from_ids(ids, **masks)[0]


def test_carriers_of_a_backbone_add_up_to_its_weights() -> None:
    model, ids, trace = traced()
    captured = capture(model, ids)
    mask = backbone(trace.flow, 0.5).edge_mask
    table = carriers(captured, trace.row, trace.positions, trace.graph.edge_index[:, mask])
    torch.testing.assert_close(table.mean((1, 2)).float(), trace.graph.edge_weight[mask], rtol=1e-4, atol=1e-7)


def test_carriers_of_edges_between_segments() -> None:
    model, ids, trace = traced()
    segments = segments_of(trace.graph, 5)
    coarse = contract(trace.flow, segments)
    table = carriers(capture(model, ids), 0, trace.positions, coarse.graph.edge_index, segments)
    torch.testing.assert_close(table.mean((1, 2)).float(), coarse.graph.edge_weight, rtol=1e-4, atol=1e-7)


def test_carriers_refuse_what_is_no_edge() -> None:
    model, ids, trace = traced()
    captured = capture(model, ids)
    for edges in (torch.tensor([[3], [3]]), torch.tensor([[0], [40]]), torch.tensor([[-1], [2]])):
        with pytest.raises(ValueError, match=r"must lead forward among nodes 0\.\.39"):
            carriers(captured, 0, trace.positions, edges)
    with pytest.raises(ValueError, match=r"edges must be \[2, K\]"):
        carriers(captured, 0, trace.positions, torch.tensor([1, 2]))
    assert carriers(captured, 0, trace.positions, torch.empty(2, 0, dtype=torch.int64)).shape == (0, 2, 4)


def test_sets_are_taken_out_in_sweeps_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(30)
    flow, groups = trace_flow(graph, "reference"), [[token] for token in range(30)]
    at_once = removal(flow, groups)
    monkeypatch.setattr(module, "_NUMBERS", 7 * 30)
    for some in (removal(flow, groups), removal(flow, groups, rows=DenseRows(dense(graph), 8))):
        torch.testing.assert_close(some.lost, at_once.lost)
        torch.testing.assert_close(some.flow, at_once.flow)


def test_whether_the_prompt_absorbs_can_be_said() -> None:
    """Nothing of a flow over few edges need enter the prompt, although it may."""
    W = attention(20, seed=2)
    masks: dict[str, Any] = {"prompt_mask": torch.arange(20) < 6, "answer_mask": mask_of(20, 18)}
    few = TokenGraph.from_dense(W.masked_fill(torch.arange(20)[:, None] < 6, 0), **masks)
    found = removal(trace_flow(few, "reference"), [[3]], rows=DenseRows(W), absorb_at_prompt=False)
    assert float(found.lost) == pytest.approx(dense_removal(W, few, [3])[0])
    told = removal(trace_flow(few, "reference"), [[3]], rows=DenseRows(W))
    assert float(told.lost) != pytest.approx(float(found.lost))
