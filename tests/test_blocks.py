"""Block-Jacobi: what the terms add up to, how many there are, and where floats end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import TokenGraph, blocks, trace_flow
from flowgraph.blocks import BlockJacobi
from tests.graphs import attention, chain, mask_of, random_graph


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 8)
    monkeypatch.setattr(blocks, "SLICE", 3)


def system(N: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense [N, N], edges [2, E], weights [E] and right-hand side [N]."""
    M = attention(N, seed).tril(-1)
    target, source = M.nonzero().T
    draw = torch.Generator().manual_seed(seed)
    return M, torch.stack([source, target]), M[target, source], torch.rand(N, generator=draw, dtype=torch.float64)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("N", [1, 7, 8, 9, 61])
def test_it_solves_triangular_systems(N: int, backward: bool) -> None:
    M, edges, weight, rhs = system(N, N)
    M = M.T if backward else M
    x, rounds = BlockJacobi(backward=backward)(edges, weight, rhs, torch.zeros(N, dtype=torch.int64))
    torch.testing.assert_close(x, torch.linalg.solve(torch.eye(N).double() - M, rhs), rtol=1e-11, atol=0)
    assert 1 <= int(rounds) <= (N + 7) // 8


def test_edges_in_any_order() -> None:
    _, edges, weight, rhs = system(300, 0)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    batch = torch.zeros(300, dtype=torch.int64)
    for backward in (False, True):
        layer = BlockJacobi(backward=backward)
        x, y = layer(edges, weight, rhs, batch)[0], layer(edges[:, order], weight[order], rhs, batch)[0]
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_blocks_take_fewer_rounds_than_hops() -> None:
    graph = random_graph(1000, seed=4, threshold=0.002)
    ours, hops, truth = (trace_flow(graph, solver) for solver in ("blocks", "scatter", "reference"))
    torch.testing.assert_close(ours.flow, truth.flow, rtol=1e-9, atol=1e-30)
    torch.testing.assert_close(ours.reach, truth.reach, rtol=1e-9, atol=1e-30)
    assert int(ours.iterations) < 0.6 * int(hops.iterations)


@pytest.mark.usefixtures("small")
def test_it_stops_by_a_bound_on_the_error() -> None:
    graph = random_graph(300, seed=2)
    exact = trace_flow(graph, "reference")
    rounds = []
    for tol in (1e-1, 1e-3, 1e-6):
        flow = trace_flow(graph, "blocks", tol=tol)
        assert float(((flow.reach - exact.reach).abs() / exact.reach.clamp(min=1e-300)).max()) <= tol
        rounds.append(int(flow.iterations))
    assert rounds == sorted(set(rounds))


@pytest.mark.usefixtures("small")
def test_max_hops_shows_in_what_is_not_absorbed() -> None:
    flow = trace_flow(chain(40, 0.5, torch.float64), "blocks", max_hops=2)
    # Two rounds back from the answer lie 3 of 6 blocks: the question is not among them.
    assert int(flow.iterations) == 2 and float(flow.injected) == 0
    assert int((flow.reach > 0).sum()) == 1 + 8 + 8
    part = trace_flow(random_graph(90), "blocks", max_hops=2)
    assert 0.01 < float(part.unabsorbed) < 1 and float(part.injected) == pytest.approx(1)


@pytest.mark.usefixtures("small")
def test_bits_do_not_depend_on_the_batch() -> None:
    several = [random_graph(70, 1), chain(500, 0.1, torch.float64), random_graph(5, 2), random_graph(333, 3)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 1, 1]):
        together = trace_flow(Batch.from_data_list([several[n] for n in order]), "blocks")
        for n, one in zip(order, together, strict=True):
            alone = trace_flow(several[n], "blocks")
            for name in ("log_reach", "flow", "transition", "iterations"):
                assert torch.equal(getattr(one, name), getattr(alone, name))


def line(*weights: float) -> TokenGraph:
    """A chain of any weights."""
    graph = chain(len(weights), 1.0, torch.float64)
    graph.edge_weight = torch.tensor(weights, dtype=torch.float64)
    return graph


@pytest.mark.parametrize(
    "weights",
    [
        (1e-160, 1e-160, 1e200, 1e160),  # the inverse loses its digits, reach does not
        (1e-200, 1e-200, 1e-200),
        (1e150, 1e150, 1e150),  # infinite
        (1e300, 1e-300, 1e300, 1e-300),
        (1e-300,) * 7,
    ],
    ids=str,
)
def test_numbers_that_floats_do_not_hold(weights: tuple[float, ...]) -> None:
    ours, truth = trace_flow(line(*weights), "blocks"), trace_flow(line(*weights), "reference")
    torch.testing.assert_close(ours.log_reach, truth.log_reach, rtol=1e-12, atol=1e-12)
    assert (ours.flow == 1).all() and float(ours.absorbed) == 1


@pytest.mark.usefixtures("small")
def test_a_path_that_is_lost_beside_one_that_is_not() -> None:
    """Both lead from token 0 to the answer: one of weight 1e-240, one of 1e-400, in the inverse, times 1e200."""
    edges = torch.tensor([[0, 1, 0, 2], [1, 2, 8, 8]])
    weight = torch.tensor([1e-200, 1e-200, 1e-240, 1e200], dtype=torch.float64)
    graph = TokenGraph.from_edges(edges, weight, prompt_mask=mask_of(9, 0), answer_mask=mask_of(9, 8))
    ours, truth = trace_flow(graph, "blocks"), trace_flow(graph, "reference")
    torch.testing.assert_close(ours.log_reach, truth.log_reach, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.flow, truth.flow, rtol=1e-9, atol=0)
