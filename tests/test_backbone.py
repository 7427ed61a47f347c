"""Backbone, paths, hubs and width against brute force: all paths enumerated, all edges looked at cut by cut."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import Flow, Segments, TokenGraph, TopK, contract, exact_flow, trace_flow
from flowgraph.backbone import Backbone, backbone, hubs, paths, width
from flowgraph.rows import DenseRows
from tests.graphs import attention, chain, graphs, layered, mask_of, random_graph

By = Literal["edges", "tokens"]
BOTH: tuple[By, By] = ("edges", "tokens")
SHARES = (0.05, 0.3, 0.5, 0.9, 1.0)


def all_paths(flow: Flow, edge_mask: Tensor | None = None) -> dict[tuple[int, ...], float]:
    """Every path from a source to a sink along the edges, with its share, by walking all of them."""
    sinks, out = flow.graph.answer_mask.tolist(), {}
    step: dict[int, list[tuple[int, float]]] = {}
    for n, (source, target) in enumerate(flow.graph.edge_index.T.tolist()):
        if float(flow.transition[n]) > 0 and (edge_mask is None or edge_mask[n]):
            step.setdefault(source, []).append((target, float(flow.transition[n])))

    def walk(path: tuple[int, ...], share: float) -> None:
        if sinks[path[-1]]:
            out[path] = share
        else:
            for target, chance in step.get(path[-1], []):
                walk((*path, target), share * chance)

    for start in (flow.injection > 0).nonzero().flatten().tolist():
        walk((start,), float(flow.injection[start]))
    return out


def segments_of(graph: TokenGraph, size: int) -> Segments:
    """Runs of `size` tokens that mix no roles."""
    roles = (graph.answer_mask + 2 * graph.prompt_mask.long()).tolist()
    starts = [0]
    for token in range(1, len(roles)):
        if roles[token] != roles[token - 1] or token - starts[-1] >= size:
            starts.append(token)
    ptr = torch.tensor([*starts, len(roles)])
    return Segments(ptr, [""] * len(starts), [""] * len(starts))


def coarse_flow(num_tokens: int = 40, seed: int = 0) -> Flow:
    flow = trace_flow(random_graph(num_tokens, seed), "reference")
    return contract(flow, segments_of(flow.graph, 4))


def no_sinks() -> Flow:
    graph = random_graph(10)
    graph.answer_mask = torch.zeros(10, dtype=torch.bool)
    return trace_flow(graph)


def unreachable() -> Flow:
    """Sinks and sources, and no way between them."""
    return trace_flow(
        TokenGraph.from_edges(
            torch.tensor([[0, 3], [1, 4]]),
            torch.ones(2),
            prompt_mask=mask_of(5, 0),
            answer_mask=mask_of(5, 4),
        )
    )


def source_is_sink() -> Flow:
    """Token 0 injects and absorbs; token 1 goes on to token 3, by way of token 2 or not."""
    edges = torch.tensor([[0, 1, 1, 2], [2, 2, 3, 3]])
    weight = torch.tensor([0.5, 0.25, 0.5, 1.0], dtype=torch.float64)
    return trace_flow(TokenGraph.from_edges(edges, weight, prompt_mask=mask_of(4, 0, 1), answer_mask=mask_of(4, 0, 3)))


# --- backbone --------------------------------------------------------------------------------------------------------


def check_backbone(flow: Flow, share: float) -> Backbone:
    found = backbone(flow, share)
    kept = all_paths(flow, found.edge_mask)
    assert found.delivered == pytest.approx(math.fsum(kept.values()), abs=1e-12)
    total = math.fsum(all_paths(flow).values())
    assert found.available == pytest.approx(total, abs=1e-9)
    assert found.complete == (total >= share - 1e-9)
    assert found.delivered >= min(share, total) - 1e-9
    # Exactly what lies on a path is in it.
    edges = flow.graph.edge_index.T.tolist()
    used = {pair for path in kept for pair in itertools.pairwise(path)}
    assert {tuple(edges[n]) for n in found.edge_mask.nonzero().flatten().tolist()} == used
    assert found.nodes.nonzero().flatten().tolist() == sorted({token for path in kept for token in path})
    # The edge with least flow is needed: with the stronger ones alone, less than the share arrives.
    if found.num_edges:
        least = float(flow.edge_flow[found.edge_mask].min())
        stronger = flow.edge_flow > least
        assert math.fsum(all_paths(flow, stronger).values()) < min(share, found.available)
        # And it is a prefix: every stronger edge is in, or on no path.
        on_paths = {pair for path in all_paths(flow, stronger) for pair in itertools.pairwise(path)}
        assert on_paths <= used
    return found


@given(graph=graphs(max_tokens=11), share=st.sampled_from(SHARES))
def test_backbone_is_the_fewest_strongest_edges_that_deliver_the_share(graph: TokenGraph, share: float) -> None:
    check_backbone(trace_flow(graph, "reference"), share)


@given(graph=graphs())
def test_more_share_never_means_fewer_edges(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    found = [backbone(flow, share) for share in SHARES]
    for smaller, larger in itertools.pairwise(found):
        assert not (smaller.edge_mask & ~larger.edge_mask).any()
        assert smaller.delivered <= larger.delivered + 1e-12
    assert found[-1].delivered == pytest.approx(float(flow.injected), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_the_flow_can_be_asked_for(dtype: torch.dtype) -> None:
    found = backbone(trace_flow(random_graph(200, dtype=dtype)), 1.0)
    assert found.complete and found.delivered == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("share", SHARES)
def test_backbone_of_a_coarse_flow(share: float) -> None:
    assert check_backbone(coarse_flow(), share).complete


def test_backbone_says_when_the_listed_edges_do_not_suffice() -> None:
    graph = random_graph(30, seed=2)
    masks: dict[str, Any] = {"prompt_mask": graph.prompt_mask, "answer_mask": graph.answer_mask}
    flow = exact_flow(DenseRows(attention(30, seed=2)), edges=TopK(2), **masks)
    listed = math.fsum(all_paths(flow).values())
    assert 0.1 < listed < 0.9
    enough, short = check_backbone(flow, listed / 2), check_backbone(flow, 0.95)
    assert enough.complete and not short.complete
    assert short.delivered == pytest.approx(listed) and "asked for 95.0%" in repr(short)


def test_backbone_of_nothing_is_empty() -> None:
    for flow in (no_sinks(), unreachable()):
        found = backbone(flow)
        assert (found.num_edges, found.num_nodes, found.delivered, found.complete) == (0, 0, 0.0, False)


def test_a_source_that_is_a_sink_delivers_at_once() -> None:
    flow = source_is_sink()
    found = check_backbone(flow, 0.5)
    assert (found.num_edges, found.delivered, found.nodes.tolist()) == (0, 0.5, [True, False, False, False])
    assert check_backbone(flow, 0.7).nodes.tolist() == [True, True, False, True]


def test_backbone_of_a_chain_is_the_chain() -> None:
    found = backbone(trace_flow(chain(400, 0.1)), 0.01)
    assert found.num_edges == 400 and found.delivered == pytest.approx(1)


def test_disconnected_parts_each_deliver_their_own() -> None:
    edges, weight = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.5, 0.25])
    masks: dict[str, Any] = {"prompt_mask": mask_of(5, 0, 1), "answer_mask": mask_of(5, 2, 3)}
    flow = trace_flow(TokenGraph.from_edges(edges, weight, **masks))
    assert backbone(flow, 0.5).edge_mask.tolist() == [True, False]
    assert backbone(flow, 0.6).edge_mask.tolist() == [True, True]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        backbone(trace_flow(random_graph(5)), share)


def test_a_batch_is_refused() -> None:
    flow = trace_flow(Batch.from_data_list([random_graph(8), random_graph(9)]))
    for ask in (backbone, paths, hubs, width):
        with pytest.raises(ValueError, match="batch of 2 graphs"):
            ask(flow)
        assert ask(flow[1]) is not None


# --- paths -----------------------------------------------------------------------------------------------------------


@given(graph=graphs(max_tokens=11), k=st.sampled_from([1, 3, 10, 5000]))
def test_paths_are_the_most_probable_of_all(graph: TokenGraph, k: int) -> None:
    flow = trace_flow(graph, "reference")
    everything = all_paths(flow)
    found = paths(flow, k)
    assert len(found) == min(k, len(everything)) == len({path.tokens for path in found})
    for path, best in zip(found, sorted(everything.values(), reverse=True), strict=False):
        assert path.share == pytest.approx(everything[path.tokens], rel=1e-9)
        assert path.share == pytest.approx(best, rel=1e-9)
    if k >= len(everything):
        assert found.share == pytest.approx(float(flow.injected), rel=1e-9)


def test_paths_of_a_coarse_flow() -> None:
    flow = coarse_flow()
    everything = all_paths(flow)
    found = paths(flow, 50)
    assert [path.share for path in found] == pytest.approx(sorted(everything.values(), reverse=True)[:50])
    assert found.share < 1 and f"{found.share:.3%}" in repr(found)


def test_equal_paths_beyond_number() -> None:
    """8^30 paths, all the same: any ten of them will do, and soon."""
    flow = trace_flow(layered(30, 8))
    found = paths(flow, 10)
    assert len({path.tokens for path in found}) == 10
    assert [path.log_share for path in found] == pytest.approx([-30 * math.log(8)] * 10)


def test_long_paths_do_not_underflow() -> None:
    assert paths(trace_flow(chain(400, 0.1)))[0].share == pytest.approx(1, rel=1e-3)
    flow = trace_flow(layered(600, 5))
    best = paths(flow, 1)[0]
    assert best.share == 0 and best.log_share == pytest.approx(-600 * math.log(5)) and len(best.tokens) == 600


def test_no_paths_where_nothing_flows() -> None:
    assert paths(no_sinks()) == [] == paths(unreachable())
    assert paths(unreachable()).share == 0


def test_a_source_that_is_a_sink_is_a_path_of_one() -> None:
    assert [(path.tokens, path.share) for path in paths(source_is_sink())] == [
        ((0,), 0.5),
        ((1, 3), pytest.approx(1 / 3)),
        ((1, 2, 3), pytest.approx(1 / 6)),
    ]


def test_many_edges_take_seconds() -> None:
    """Half a million edges."""
    draw = torch.Generator().manual_seed(1)
    N, degree = 8192, 64
    target = torch.arange(1, N).repeat_interleave(degree)
    source = (torch.rand(len(target), generator=draw) * target).long()
    edges = torch.unique(torch.stack([source, target]), dim=1)
    weight = torch.rand(edges.shape[1], generator=draw) / degree
    prompt = torch.arange(N) < 100
    graph = TokenGraph.from_edges(edges, weight, prompt_mask=prompt, answer_mask=mask_of(N, N - 2, N - 1))
    flow = trace_flow(graph)
    begin = time.process_time()
    found = paths(flow, 10)
    assert len(found) == 10 and backbone(flow, 0.5).complete and len(width(flow, "tokens")) == N - 1
    assert time.process_time() - begin < 60


# --- hubs ------------------------------------------------------------------------------------------------------------


@given(graph=graphs(max_tokens=16))
def test_hubs_by_hand(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    found = hubs(flow, 4)
    expected = sorted(range(len(flow.flow)), key=lambda t: (-float(flow.throughput[t]), t))
    assert [hub.token for hub in found] == [t for t in expected if flow.throughput[t] > 0][:4]
    edges = list(zip(*graph.edge_index.tolist(), flow.edge_flow.tolist(), strict=True))
    for hub in found:
        assert hub.throughput == float(flow.throughput[hub.token])
        into = {i: phi for i, k, phi in edges if k == hub.token and phi > 1e-150}
        out = {k: phi for i, k, phi in edges if i == hub.token and phi > 1e-150}
        for side, count, fan, distance in (
            (into, hub.edges_in, hub.fan_in, hub.distance_in),
            (out, hub.edges_out, hub.fan_out, hub.distance_out),
        ):
            assert count == len(side)
            if not side:
                assert fan == 0 and math.isnan(distance)
                continue
            total = sum(side.values())
            assert fan == pytest.approx(1 / sum((phi / total) ** 2 for phi in side.values()))
            assert distance == pytest.approx(sum(phi * abs(t - hub.token) for t, phi in side.items()) / total)


def test_hubs_of_layers_are_as_wide_as_the_layers() -> None:
    flow = trace_flow(layered(4, 6))
    for hub in hubs(flow, 100):
        assert hub.fan_in == pytest.approx(0 if hub.token < 6 else 6)
        assert hub.fan_out == pytest.approx(6 if hub.token < 18 else 0)


def test_hubs_among_given_tokens() -> None:
    flow = trace_flow(random_graph(30))
    mask = flow.graph.credit_mask
    assert {hub.token for hub in hubs(flow, 100, mask)} <= set(mask.nonzero().flatten().tolist())
    with pytest.raises(ValueError, match=r"mask must be a bool tensor \[N\] = \[30\]"):
        hubs(flow, 5, mask[:4])
    with pytest.raises(ValueError, match="k must be"):
        hubs(flow, 0)


def test_no_hubs_where_nothing_flows() -> None:
    assert hubs(no_sinks()) == []


# --- width -----------------------------------------------------------------------------------------------------------


def slow_width(flow: Flow, by: str) -> Tensor:
    """Cut by cut, edge by edge."""
    out = []
    edges = list(zip(*flow.graph.edge_index.tolist(), flow.edge_flow.tolist(), strict=True))
    for cut in range(len(flow.flow) - 1):
        crossing: dict[object, list[float]] = {}
        for i, k, phi in edges:
            if i <= cut < k and phi > 1e-150:
                crossing.setdefault((i, k) if by == "edges" else i, []).append(phi)
        shares = [math.fsum(part) for part in crossing.values()]
        out.append(math.fsum(shares) ** 2 / math.fsum(x**2 for x in shares) if shares else 0.0)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("by", BOTH)
@given(graph=graphs())
def test_width_at_every_cut(by: By, graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    torch.testing.assert_close(width(flow, by), slow_width(flow, by), rtol=1e-9, atol=0)


@pytest.mark.parametrize("by", BOTH)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9, 17, 33])
def test_width_at_sizes_about_powers_of_two(by: By, size: int) -> None:
    flow = trace_flow(random_graph(size), "reference")
    torch.testing.assert_close(width(flow, by), slow_width(flow, by), rtol=1e-12, atol=0)


def test_width_of_known_shapes() -> None:
    assert width(trace_flow(chain(9, 0.5))).tolist() == [1.0] * 9
    flow = trace_flow(layered(3, 4))
    # Between the layers all 16 edges of one pair of layers, sent by 4 tokens.
    assert float(width(flow)[3]) == pytest.approx(16) and float(width(flow, "tokens")[3]) == pytest.approx(4)


def test_width_of_coarse_flows_and_of_nothing() -> None:
    flow = coarse_flow()
    for by in BOTH:
        torch.testing.assert_close(width(flow, by), slow_width(flow, by))
        assert width(no_sinks(), by).tolist() == [0.0] * 9
    with pytest.raises(ValueError, match="by must be"):
        width(flow, "heads")  # type: ignore[arg-type]
