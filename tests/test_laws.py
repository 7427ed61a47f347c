"""The laws of reach, flow and credit, for every solver, on random and on adversarial graphs.

    FLOWGRAPH_SOLVERS="sweep scatter:torch_scatter" python -m pytest tests/test_laws.py

holds others to them, with fewer examples each: what needs Triton's interpreter or a library that is not always there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

import flowgraph
from flowgraph import Flow, TokenGraph, blocks, credit, layers
from tests.graphs import chain, graphs, layered, mask_of, random_graph

NAMED = tuple(os.environ.get("FLOWGRAPH_SOLVERS", "").split())
FAST = NAMED or ("scipy", "scatter", "blocks")
SOLVERS = NAMED or (*FAST, "reference")
if NAMED:
    settings.register_profile("named", deadline=None, max_examples=8)
    settings.load_profile("named")
solvers = pytest.mark.parametrize("solver", SOLVERS)
fast_solvers = pytest.mark.parametrize("solver", FAST)


def trace_flow(graph: TokenGraph, solver: str = "auto", **more: Any) -> Flow:
    """By a solver, or by "solver:backend"."""
    return flowgraph.trace_flow(graph, *solver.split(":"), **more)


@pytest.fixture(autouse=True, scope="module")
def _many_blocks() -> Iterator[None]:
    """Of 4 tokens each: the graphs here are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SIZE", 4)
        yield


def close(a: Tensor, b: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b.to(a), rtol=rtol, atol=atol)


def inflow_and_outflow(flow: Flow) -> tuple[Tensor, Tensor]:
    """[N] what comes in over edges and by injection, and what leaves over edges or is absorbed; summed in float64."""
    graph = flow.graph
    zero = torch.zeros(graph.num_nodes, dtype=torch.float64)
    edge_flow = flow.edge_flow.double()
    inflow = flow.injection.double() + zero.scatter_add(0, graph.edge_index[1], edge_flow)
    outflow = zero.scatter_add(0, graph.edge_index[0], edge_flow)
    return inflow, torch.where(graph.answer_mask, flow.flow.double(), outflow)


def check_conservation(flow: Flow, rtol: float) -> None:
    inflow, outflow = inflow_and_outflow(flow)
    # Flows below 1e-30 of the whole are below what float32 can split further.
    close(outflow, inflow, rtol=rtol, atol=1e-30)
    close(flow.absorbed, flow.injected, rtol=rtol, atol=0)
    close(flow.injected, (flow.injected > 0).to(flow.injected), rtol=rtol)  # 1 or, where no source reaches it, 0
    close(flow.throughput, 2 * flow.flow, rtol=0)


def reaches(graph: TokenGraph) -> Tensor:
    """[N] bool, by walking the edges: is there a path of positive weights to a sink?"""
    found = graph.answer_mask.clone()
    for source, target, weight in reversed(
        list(zip(*graph.edge_index.tolist(), graph.edge_weight.tolist(), strict=True))
    ):
        # Edges are sorted by target, so a target is settled before the edges into it are read.
        if weight > 0 and found[target]:
            found[source] = True
    return found


@solvers
@given(graph=graphs())
def test_flow_is_conserved_in_float64(solver: str, graph: TokenGraph) -> None:
    check_conservation(trace_flow(graph, solver), rtol=1e-10)


@solvers
@given(graph=graphs(dtype=torch.float32))
def test_flow_is_conserved_in_float32(solver: str, graph: TokenGraph) -> None:
    check_conservation(trace_flow(graph, solver), rtol=1e-5)


@fast_solvers
@given(graph=graphs())
def test_fast_solvers_equal_the_reference(solver: str, graph: TokenGraph) -> None:
    fast, slow = trace_flow(graph, solver), trace_flow(graph, "reference")
    for name in ("reach", "flow", "edge_flow", "absorbed", "injected", "transition"):
        close(getattr(fast, name), getattr(slow, name), rtol=1e-9, atol=1e-280)
    close(fast.log_reach, slow.log_reach, rtol=1e-9, atol=1e-9)


@solvers
@given(graph=graphs())
def test_tokens_without_a_path_to_the_answer_get_exactly_nothing(solver: str, graph: TokenGraph) -> None:
    flow, found = trace_flow(graph, solver), reaches(graph)
    assert torch.equal(torch.isfinite(flow.log_reach), found)
    for values in (flow.reach, flow.flow, flow.throughput, flow.injection):
        assert (values[~found] == 0).all()
    assert bool(flow.injected[0] > 0) == bool((graph.question_mask & found).any())


@solvers
@given(graph=graphs())
def test_reach_is_at_most_the_number_of_sinks_where_rows_sum_to_at_most_one(solver: str, graph: TokenGraph) -> None:
    total = torch.zeros(graph.num_nodes, dtype=torch.float64).scatter_add(0, graph.edge_index[1], graph.edge_weight)
    graph.edge_weight = graph.edge_weight / total.clamp(min=1)[graph.edge_index[1]]
    reach = trace_flow(graph, solver).reach
    assert (reach >= 0).all() and (reach <= int(graph.answer_mask.sum()) * (1 + 1e-12)).all()


@solvers
@pytest.mark.parametrize("factor", [1e-8, 1e8])
@given(graph=graphs())
def test_scaling_every_edge_into_the_answer_changes_no_flow(solver: str, factor: float, graph: TokenGraph) -> None:
    # A common factor on all edges into sinks cancels only if no sink's flow can also run past it: it never can,
    # since edges that leave a sink don't exist.
    before = trace_flow(graph, solver)
    scaled = graph.clone()
    into = scaled.answer_mask[scaled.edge_index[1]]
    scaled.edge_weight = torch.where(into, scaled.edge_weight * factor, scaled.edge_weight)
    after = trace_flow(scaled, solver)
    close(after.flow, before.flow, rtol=1e-9, atol=1e-200)
    close(after.edge_flow, before.edge_flow, rtol=1e-9, atol=1e-200)


@solvers
@given(graph=graphs(), seed=st.integers(0, 1000))
def test_dead_branches_change_no_flow(solver: str, graph: TokenGraph, seed: int) -> None:
    """Five tokens at the end attend to everything, and nothing that reaches the answer attends to them."""
    N, extra = int(graph.num_nodes), 5
    W = torch.zeros(N + extra, N + extra, dtype=torch.float64)
    W[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight
    draw = torch.Generator().manual_seed(seed)
    W[N:] = torch.rand(extra, N + extra, generator=draw, dtype=torch.float64).tril(N - 1)

    def longer(mask: Tensor) -> Tensor:
        return torch.cat([mask, torch.zeros(extra, dtype=torch.bool)])

    bigger = TokenGraph.from_dense(
        W,
        prompt_mask=longer(graph.prompt_mask),
        answer_mask=longer(graph.answer_mask),
        question_mask=longer(graph.question_mask),
    )
    before, after = trace_flow(graph, solver), trace_flow(bigger, solver)
    close(after.flow[:N], before.flow, rtol=1e-11, atol=1e-300)
    assert (after.flow[N:] == 0).all()


@solvers
@given(graph=graphs())
def test_flow_is_reach_times_g(solver: str, graph: TokenGraph) -> None:
    """f(k) = h(k) g(k) with g(k) = sum_i W[k, i] g(i), for tokens that inject nothing (docs/method.md, section 3)."""
    flow = trace_flow(graph, solver)
    h, f = flow.log_reach, flow.flow
    # log g, so that a reach of 1e-300 does not overflow it.
    log_g = f.log() - h
    source, target = graph.edge_index
    for k in ((f > 1e-100) & (flow.injection == 0)).nonzero().flatten().tolist():
        into = (target == k) & ~graph.answer_mask[source] & (f[source] > 0)
        incoming = torch.logsumexp(graph.edge_weight[into].log() + log_g[source[into]], dim=0)
        close(incoming, log_g[k], rtol=1e-8, atol=1e-8)


@solvers
@given(graph=graphs())
def test_flow_is_linear_in_what_is_injected(solver: str, graph: TokenGraph) -> None:
    """The flow from a question is the mean of the flows from each of its tokens that reach the answer."""
    whole = trace_flow(graph, solver)
    parts = []
    for token in (whole.injection > 0).nonzero().flatten().tolist():
        single = graph.clone()
        single.question_mask = mask_of(int(graph.num_nodes), token)
        parts.append(trace_flow(single, solver).flow)
    if parts:
        close(torch.stack(parts).mean(0), whole.flow, rtol=1e-9, atol=1e-280)


@solvers
@given(several=st.lists(graphs(max_tokens=12), min_size=1, max_size=4))
def test_a_batch_equals_its_graphs_one_by_one(solver: str, several: list[TokenGraph]) -> None:
    together = trace_flow(Batch.from_data_list(several), solver)
    assert len(together) == len(several)
    for alone, one in zip((trace_flow(graph, solver) for graph in several), together, strict=True):
        for name in ("reach", "flow", "throughput", "edge_flow", "injected", "absorbed", "log_reach"):
            # The logarithm of a number near 1 has no relative accuracy.
            close(getattr(one, name), getattr(alone, name), rtol=1e-12, atol=1e-12 if name == "log_reach" else 1e-300)
        assert torch.equal(one.iterations, alone.iterations)


@fast_solvers
@settings(max_examples=8 if NAMED else 30)
@given(several=st.lists(graphs(max_tokens=12), min_size=1, max_size=3), place=st.integers(0, 3))
def test_a_batch_has_the_bits_of_its_graphs(solver: str, several: list[TokenGraph], place: int) -> None:
    """Also where one of them is too much for floats, and is solved with exponents."""
    several.insert(place, chain(350, 0.1, torch.float64))
    together = trace_flow(Batch.from_data_list(several), solver)
    for graph, one in zip(several, together, strict=True):
        alone = trace_flow(graph, solver)
        for name in ("reach", "log_reach", "flow", "transition", "edge_flow", "absorbed", "iterations"):
            assert torch.equal(getattr(one, name), getattr(alone, name)), name


@fast_solvers
@given(several=st.lists(graphs(max_tokens=12), min_size=2, max_size=4), order=st.randoms())
def test_the_order_of_graphs_in_a_batch_does_not_matter(solver: str, several: list[TokenGraph], order: object) -> None:
    numbers = list(range(len(several)))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    straight = credit(trace_flow(Batch.from_data_list(several), solver))
    mixed = credit(trace_flow(Batch.from_data_list([several[n] for n in numbers]), solver))
    for place, n in enumerate(numbers):
        assert torch.equal(mixed[place].weights, straight[n].weights)
        assert mixed[place].flags == straight[n].flags


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_of_2000_weak_edges_delivers_everything(solver: str, dtype: torch.dtype) -> None:
    flow = trace_flow(chain(2000, 0.1, dtype), solver)
    assert float(flow.absorbed) == 1.0
    assert (flow.flow == 1).all()
    close(
        flow.log_reach[0],
        torch.tensor(2000.0).double() * torch.tensor(0.1, dtype=dtype).double().log(),
        rtol=1e-5,
    )


@solvers
def test_a_chain_of_huge_edges_delivers_everything(solver: str) -> None:
    flow = trace_flow(chain(500, 1e8, torch.float64), solver)
    assert float(flow.absorbed) == 1.0 and (flow.flow == 1).all()


@solvers
def test_many_weak_paths_add_up(solver: str) -> None:
    """Each of the 6^200 paths weighs 6^-200 (0 in floating point); together they carry everything."""
    flow = trace_flow(layered(depth=200, width=6), solver)
    close(flow.reach, torch.ones(1200), rtol=1e-9)
    close(flow.flow, torch.full((1200,), 1 / 6, dtype=torch.float64), rtol=1e-9)


@solvers
def test_a_weak_shortcut_does_not_end_the_sum_before_the_strong_detour(solver: str) -> None:
    """One edge of 1e-9 leads to the answer at once, a chain of 300 edges of weight 1 leads there too."""
    N = 301
    W = torch.zeros(N, N, dtype=torch.float64)
    W[torch.arange(1, N), torch.arange(N - 1)] = 1.0
    W[N - 1, 0] = 1e-9
    graph = TokenGraph.from_dense(W, prompt_mask=mask_of(N, 0), answer_mask=mask_of(N, N - 1))
    flow = trace_flow(graph, solver)
    close(flow.reach[0], torch.tensor(1 + 1e-9, dtype=torch.float64), rtol=1e-11)
    close(flow.flow[150], torch.tensor(1 / (1 + 1e-9), dtype=torch.float64), rtol=1e-11)


@solvers
@pytest.mark.parametrize("sinks", [(12,), (25, 26), (39,), (3, 4), (0, 39), (20, 21, 22, 38)], ids=str)
def test_sinks_anywhere(solver: str, sinks: tuple[int, ...]) -> None:
    """In the middle, at the end, inside the prompt (then a token injects and absorbs), or only one."""
    graph = random_graph(40, seed=3)
    graph.answer_mask = mask_of(40, *sinks)
    flow = trace_flow(graph, solver)
    check_conservation(flow, rtol=1e-10)
    assert (flow.reach[list(sinks)] == 1).all()
    assert (flow.reach[max(sinks) + 1 :] == 0).all()
    leaving = graph.answer_mask[graph.edge_index[0]]
    assert (flow.edge_flow[leaving] == 0).all()
    if max(sinks) < 13:
        source_and_sink = sinks[0]
        assert flow.injection[source_and_sink] > 0 and flow.flow[source_and_sink] >= flow.injection[source_and_sink]


@solvers
def test_absorb_at_prompt_lets_no_flow_run_within_the_prompt(solver: str) -> None:
    graph = random_graph(40, seed=5)
    graph.answer_mask = mask_of(40, 12, 37)  # token 12 is the last of the prompt and a sink
    flow = trace_flow(graph, solver, absorb_at_prompt=True)
    within = graph.prompt_mask[graph.edge_index[1]] & (graph.edge_index[1] != 12)
    assert (flow.edge_flow[within] == 0).all()
    assert flow.edge_flow[graph.edge_index[1] == 12].sum() > 0
    check_conservation(flow, rtol=1e-10)
    assert trace_flow(graph, solver).edge_flow[within].sum() > 0


@solvers
def test_no_sink_and_no_path_are_defined(solver: str) -> None:
    graph = random_graph(20)
    graph.answer_mask = mask_of(20)
    flow = trace_flow(graph, solver)
    assert (flow.flow == 0).all() and float(flow.injected) == 0 and float(flow.absorbed) == 0
    assert credit(flow).flags == [("no_answer",)]
    assert (credit(flow).weights == 1).all()


@solvers
def test_zero_weights_are_no_paths(solver: str) -> None:
    graph = chain(3, 1.0)
    graph.edge_weight = torch.tensor([1.0, 0.0, 1.0])
    assert trace_flow(graph, solver).reach.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("solver", FAST)
def test_float32_equals_the_reference_at_4096_tokens(solver: str) -> None:
    graph = random_graph(4096, seed=1, dtype=torch.float32, threshold=1 / 1024)
    fast, slow = trace_flow(graph, solver), trace_flow(graph, "reference")
    for name in ("reach", "flow", "throughput"):
        close(getattr(fast, name), getattr(slow, name), rtol=1e-4, atol=1e-30)


def test_scatter_stops_by_a_bound_on_the_error() -> None:
    """The error that is left is below what was asked for, whatever was asked for."""
    graph = random_graph(300, seed=2)
    exact = trace_flow(graph, "reference")
    iterations = []
    for tol in (1e-1, 1e-3, 1e-6):
        flow = trace_flow(graph, "scatter", tol=tol)
        error = ((flow.reach - exact.reach).abs() / exact.reach.clamp(min=1e-300)).max()
        assert float(error) <= tol
        iterations.append(int(flow.iterations))
    assert iterations == sorted(set(iterations)) and iterations[-1] < 60


@pytest.mark.parametrize("solver", ["scatter", "blocks"])
@pytest.mark.parametrize("max_hops", [None, 0, 3])
def test_looking_less_often_whether_to_stop_changes_nothing(
    solver: str, max_hops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [random_graph(30, seed=1), chain(21, 0.5, torch.float64), random_graph(9, seed=2)]
    batch = Batch.from_data_list(several)
    often = trace_flow(batch, solver, max_hops=max_hops)
    monkeypatch.setattr(layers, "LOOK_EVERY", {"cpu": 4})
    rarely = trace_flow(batch, solver, max_hops=max_hops)
    for name in ("log_reach", "flow", "iterations"):
        assert torch.equal(getattr(often, name), getattr(rarely, name))


def test_max_hops_shows_in_what_is_not_absorbed() -> None:
    flow = trace_flow(chain(20, 0.5, torch.float64), "scatter", max_hops=5)
    assert int(flow.iterations) == 5
    # Five hops back from the answer don't get to the question: nothing is injected, and reach says so.
    assert float(flow.injected) == 0 and float(flow.reach[14]) == 0 and float(flow.reach[15]) == 0.5**5
    part = trace_flow(random_graph(60), "scatter", max_hops=3)
    assert 0.1 < float(part.unabsorbed) < 1 and float(part.injected) == pytest.approx(1)


def test_limits_on_hops_are_for_solvers_that_have_hops() -> None:
    graph = random_graph(60)
    limits: list[dict[str, Any]] = [{"max_hops": 3}, {"tol": 0.1}]
    for limit in limits:
        chosen, named = trace_flow(graph, **limit), trace_flow(graph, "scatter", **limit)
        assert chosen.solver == "scatter" and torch.equal(chosen.flow, named.flow)
        for solver in ("scipy", "reference"):
            with pytest.raises(ValueError, match=f"{next(iter(limit))} is for solvers that go by hops.*{solver}"):
                trace_flow(graph, solver, **limit)


@pytest.mark.gpu
@given(graph=graphs(dtype=torch.float32))
@settings(max_examples=30)
def test_cuda_equals_the_cpu(graph: TokenGraph) -> None:
    here, there = trace_flow(graph, "scatter"), trace_flow(graph.clone().cuda(), "auto")
    assert there.solver == "scatter"
    for name in ("reach", "flow", "edge_flow"):
        close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-4, atol=1e-30)


def test_weights_that_require_grad_are_read_like_any_others() -> None:
    graph = random_graph(10)
    expected = trace_flow(graph).flow
    graph.edge_weight = graph.edge_weight.clone().requires_grad_()
    for solver in SOLVERS:
        close(trace_flow(graph, solver).flow, expected, rtol=1e-9)
        assert not trace_flow(graph, solver).flow.requires_grad


def test_solvers_are_used_or_refused() -> None:
    graph = random_graph(10)
    assert trace_flow(graph).solver == "scipy"
    for solver in SOLVERS:
        assert trace_flow(graph, solver).solver == solver.split(":")[0]
    with pytest.raises(ValueError, match=r"solver must be \"auto\", .*scatter.*got 'cuda'"):
        trace_flow(graph, "cuda")
