"""Pools: rectangles of rank one that keep the mass of every row, and weighted columns, of what became no edge."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import DenseRows, Threshold, TokenGraph, measures, trace_flow
from flowgraph.pools import PoolBuilder, Pools, expand
from flowgraph.sparse import sparse_graph
from tests.graphs import attention, mask_of


def matrix(pools: Pools, N: int) -> Tensor:
    """[N, N] what the pools stand for."""
    (token, pool), collects = pools.index, pools.collects
    M = int(pool.max()) + 1 if pool.numel() else 0
    shares, paid = torch.zeros(M, N, dtype=torch.float64), torch.zeros(N, M, dtype=torch.float64)
    shares[pool[collects], token[collects]] = pools.weight[collects].double()
    paid[token[~collects], pool[~collects]] = pools.weight[~collects].double()
    return paid @ shares


def halves(R: Tensor, weight: Tensor, cuts: list[int], kinds: Tensor) -> Tensor:
    """[N, N] the slow twin: halve the trace again and again, and put rank one in place of each rectangle."""
    out = torch.zeros_like(R)
    size = 1
    while size < len(R):
        for begin in range(0, len(R), 2 * size):
            middle, end = begin + size, min(begin + 2 * size, len(R))
            edges = [begin, *(cut for cut in cuts if begin < cut < middle), middle]
            for a, b in pairwise(edges):
                for kind in (0, 1):
                    rows = torch.arange(middle, max(middle, end))
                    rows = rows[kinds[rows] == kind]
                    part = R[rows, a:b]
                    paid, got = part.sum(1), weight[rows] @ part
                    if got.sum() > 0:
                        out[rows, a:b] = torch.outer(paid, got / got.sum())
        size *= 2
    return out


@st.composite
def rests(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int], Tensor]:
    N = draw(st.integers(1, 150))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    R = torch.rand(N, N, generator=random, dtype=torch.float64).tril(-1)
    R = R * (torch.rand(N, N, generator=random) < draw(st.sampled_from([0.02, 0.5, 1.0])))
    weight = torch.rand(N, generator=random, dtype=torch.float64) + 1e-3
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=3))) if N > 1 else []
    kinds = (torch.rand(N, generator=random) < 0.2).long() * draw(st.integers(0, 1))
    return R, weight, cuts, kinds


def build(R: Tensor, weight: Tensor, cuts: list[int], kinds: Tensor, block: int, last_first: bool = False) -> Pools:
    builder = PoolBuilder(len(R), cuts, kinds, R.device)
    starts = range(0, len(R), block)
    for start in reversed(starts) if last_first else starts:
        stop = min(start + block, len(R))
        builder.add(start, R[start:stop, :stop], weight[start:stop])
    return builder.pools(torch.float64)


@given(rest=rests(), block=st.sampled_from([1, 7, 64, 100, 256]), last_first=st.booleans())
def test_equal_the_halving_by_hand_in_any_order_and_blocks(
    rest: tuple[Tensor, Tensor, list[int], Tensor], block: int, last_first: bool
) -> None:
    R, weight, cuts, kinds = rest
    pools = build(R, weight, cuts, kinds, block, last_first)
    torch.testing.assert_close(matrix(pools, len(R)), halves(R, weight, cuts, kinds), rtol=1e-10, atol=1e-12)


@given(rest=rests())
def test_rows_keep_their_mass_and_columns_their_weighted_mass(rest: tuple[Tensor, Tensor, list[int], Tensor]) -> None:
    R, weight, cuts, kinds = rest
    V = matrix(build(R, weight, cuts, kinds, 64), len(R))
    torch.testing.assert_close(V.sum(1), R.sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight @ V, weight @ R, rtol=1e-10, atol=1e-12)
    assert torch.equal(V.triu(0), torch.zeros_like(V))


def test_a_token_has_at_most_one_link_of_each_size_and_part() -> None:
    R = torch.rand(1000, 1000, dtype=torch.float64).tril(-1)
    pools = build(R, torch.ones(1000, dtype=torch.float64), [300], torch.zeros(1000).long(), 256)
    assert len(pools.weight) <= 1000 * 11
    shares = torch.zeros(int(pools.index[1].max()) + 1, dtype=torch.float64)
    shares.index_add_(0, pools.index[1][pools.collects], pools.weight[pools.collects])
    torch.testing.assert_close(shares, torch.ones_like(shares))


def test_blocks_of_float32_are_added_up_in_float64() -> None:
    R = torch.rand(200, 200, generator=torch.Generator().manual_seed(2)).tril(-1)
    weight = torch.rand(200, dtype=torch.float64) + 1e-3
    single, double = (build(one, weight, [70], torch.zeros(200).long(), 64) for one in (R, R.double()))
    assert torch.equal(single.index, double.index) and torch.equal(single.weight, double.weight)


def test_nothing_left_means_no_pools() -> None:
    zeros = torch.zeros(50, 50, dtype=torch.float64)
    pools = build(zeros, torch.ones(50, dtype=torch.float64), [10], torch.zeros(50).long(), 16)
    assert pools.index.shape == (2, 0)


def test_weights_too_small_for_the_dtype_leave_no_broken_pool() -> None:
    R = torch.full((8, 8), 1e-60, dtype=torch.float64).tril(-1)
    R[7, 0] = 0.5
    builder = PoolBuilder(8, [], None, R.device)
    builder.add(0, R, torch.ones(8, dtype=torch.float64))
    pools = builder.pools(torch.float32)
    V = matrix(pools, 8)
    assert float(V.sum()) == 0.5 and bool((pools.weight > 0).all())


def pooled(N: int = 120, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> TokenGraph:
    place = torch.arange(N)
    roles: dict[str, Any] = {"prompt_mask": place < N // 4, "answer_mask": (place >= N - 4) & (place < N - 1)}
    rows = DenseRows(attention(N, seed, dtype=dtype), block=50)
    return sparse_graph(rows, edges=Threshold(0.03), **roles, **options)


def test_expanded_graphs_run_forward_in_time_and_are_sorted() -> None:
    graph = pooled()
    nodes = expand(graph.edge_index, graph.edge_weight, graph.pools)
    source, target = nodes.edge_index
    assert (source < target).all()
    key = target * 10_000 + source
    assert (key[1:] > key[:-1]).all()
    assert torch.equal(nodes.edge_index[:, nodes.edges], nodes.tokens[graph.edge_index])
    assert torch.equal(nodes.edge_weight[nodes.links], graph.pool_weight)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("solver", ["scipy", "scatter"])
def test_solvers_agree_on_graphs_with_pools(solver: str, absorb: bool) -> None:
    graph = pooled(absorb_at_prompt=absorb)
    ours = trace_flow(graph, solver, absorb_at_prompt=absorb)
    theirs = trace_flow(graph, "reference", absorb_at_prompt=absorb)
    for name in ("reach", "flow", "edge_flow", "transition", "unlisted_inflow", "unlisted_outflow"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-14)


def test_the_flow_is_that_of_the_matrix_of_edges_and_pools() -> None:
    graph = pooled()
    W = torch.zeros(120, 120, dtype=torch.float64)
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight
    whole = TokenGraph.from_dense(
        W + matrix(graph.pools, 120), prompt_mask=graph.prompt_mask, answer_mask=graph.answer_mask
    )
    ours, theirs = trace_flow(graph), trace_flow(whole, "reference")
    torch.testing.assert_close(ours.reach, theirs.reach, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.flow, theirs.flow, rtol=1e-10, atol=0)


def test_what_comes_into_a_token_goes_out_of_it() -> None:
    graph = pooled()
    flow, zeros = trace_flow(graph), torch.zeros(120, dtype=torch.float64)
    source, target = graph.edge_index
    into = flow.injection + zeros.index_add(0, target, flow.edge_flow) + flow.unlisted_inflow
    out = zeros.index_add(0, source, flow.edge_flow) + flow.unlisted_outflow
    torch.testing.assert_close(into, flow.flow)
    torch.testing.assert_close(torch.where(graph.answer_mask, flow.flow, out), flow.flow)
    assert float(flow.unlisted_inflow.sum()) > 0.1 and float(flow.absorbed) == pytest.approx(1)
    # an answer token pays on to nobody
    assert float(flow.unlisted_outflow[graph.answer_mask].abs().max()) == 0


def test_a_batch_is_its_graphs_in_any_order_with_pools_or_without() -> None:
    plain = TokenGraph.from_dense(attention(30), prompt_mask=torch.arange(30) < 9, answer_mask=mask_of(30, 28))
    graphs = [pooled(120, 1), plain, pooled(70, 2), pooled(200, 3)]
    alone = [trace_flow(graph) for graph in graphs]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1], [1, 1, 2]):
        batch = Batch.from_data_list([graphs[n] for n in order])
        batch.validate()
        flow = trace_flow(batch)
        assert batch.num_pools == sum(graphs[n].num_pools for n in order)
        for place, n in enumerate(order):
            for name in ("reach", "flow", "edge_flow", "unlisted_inflow", "unlisted_outflow", "absorbed"):
                torch.testing.assert_close(getattr(flow[place], name), getattr(alone[n], name), rtol=1e-12, atol=1e-16)
            assert torch.equal(batch[place].pool_index, graphs[n].pool_index)
            assert torch.equal(flow[place].graph.pool_weight, graphs[n].pool_weight)


def test_pools_are_saved(tmp_path: Any) -> None:
    graph = pooled()
    graph.save(tmp_path / "g.safetensors")
    again = TokenGraph.load(tmp_path / "g.safetensors")
    for name in ("pool_index", "pool_weight", "pool_collects", "pool_shape", "dropped"):
        assert torch.equal(again[name], graph[name])
    assert torch.equal(trace_flow(again).flow, trace_flow(graph).flow)


def test_tables_have_no_room_for_pools_and_say_so() -> None:
    from flowgraph.adapters.exports import Tables

    with pytest.raises(ValueError, match="the graph had pools"):
        Tables.of(pooled()).graph()


def test_measures_of_distance_are_of_all_the_flow_or_missing() -> None:
    found = measures(trace_flow(pooled()))
    assert float(found["unlisted_share"]) > 0.1 and not torch.isnan(found["path_length_mean"]).any()
    for name in ("distance_mean", "width_mean", "local_share"):
        assert torch.isnan(found[name]).all()


def test_tokens_and_edges_are_counted_without_pools() -> None:
    graph = pooled()
    assert graph.num_nodes == 120 and graph.num_edges == len(graph.edge_weight)
    torch.testing.assert_close(graph.modelled, graph.dropped, rtol=1e-9, atol=1e-12)
    listed = torch.zeros(120, dtype=torch.float64).index_add(0, graph.edge_index[1], graph.edge_weight)
    torch.testing.assert_close(listed + graph.self_weight + graph.modelled, torch.ones(120, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: replace(p, weight=torch.where(p.collects, 50 * p.weight, p.weight)), "they must sum to 1"),
        (lambda p: replace(p, weight=p.weight.long() + 1), "must be"),
        (lambda p: replace(p, shape=p.shape * torch.nan), "must be"),
        (lambda p: replace(p, weight=-p.weight), "weights must be finite and above 0"),
        (lambda p: replace(p, weight=p.weight[:-1]), "pool_index, pool_weight, pool_collects and pool_shape must be"),
        (lambda p: replace(p, collects=~p.collects), "must collect from earlier tokens"),
        (lambda p: replace(p, index=p.index + 500), "names a token or pool that does not exist"),
        (lambda p: replace(p, index=torch.stack([p.index[0], p.index[1].max() - p.index[1]])), "must be numbered"),
        (lambda p: replace(p, collects=torch.ones_like(p.collects)), "must collect from earlier tokens"),
        (lambda p: twice(p, collecting=False), "occurs twice; add up its weights"),  # found by fuzzing: flow below 0
        (lambda p: twice(p, collecting=True), "occurs twice; add up its weights"),
    ],
)
def test_broken_pools_are_refused(change: Any, says: str) -> None:
    graph = pooled()
    with pytest.raises(ValueError, match=says):
        TokenGraph.from_edges(
            graph.edge_index,
            graph.edge_weight,
            prompt_mask=graph.prompt_mask,
            answer_mask=graph.answer_mask,
            pools=change(graph.pools),
        )


def twice(pools: Pools, collecting: bool) -> Pools:
    """One of the links in two halves."""
    link = int((pools.collects == collecting).nonzero()[-1])
    order = torch.cat([torch.arange(len(pools.weight)), torch.tensor([link])])
    weight = pools.weight[order].clone()
    weight[[link, -1]] /= 2
    return replace(pools, index=pools.index[:, order], weight=weight, collects=pools.collects[order])


def test_a_pool_of_one_graph_that_pays_to_another_is_refused() -> None:
    batch: Any = Batch.from_data_list([pooled(70, 1), pooled(70, 2)])
    link = int((~batch.pool_collects & (batch.pool_index[0] == 69)).nonzero()[0])
    batch.pool_index[0, link] = 139 - 1
    with pytest.raises(ValueError, match=f"pool link number {link} joins token 138 to a pool of another graph"):
        batch.validate()
