"""Which library adds up is a choice and not a result; what is named is taken or refused.

There is no cupy without a GPU: NumPy and SciPy, whose functions it has, stand in for it here. torch-scatter is tested
where it is installed (`make test-scatter`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import AnswerReachability, FlowPropagation, Tracer, rows, sums, trace_flow
from flowgraph.options import Options
from flowgraph.solve import AUTO, LIBRARIES_OF, choose, solvers_for
from flowgraph.sums import PIECE, Groups
from tests.conftest import ROOT
from tests.graphs import chain, random_graph
from tests.written import policy

CUDA = torch.device("cuda")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy for cupy, SciPy for cupyx.scipy."""
    found = find_spec
    monkeypatch.setattr(sums, "find_spec", lambda name: name if name == "cupy" else found(name))
    monkeypatch.setattr(sums, "_cupy", lambda: (np, scipy.sparse))
    monkeypatch.setattr(sums, "CUPY_DEVICES", ("cpu",))


needs_torch_scatter = pytest.mark.skipif(not find_spec("torch_scatter"), reason="needs torch-scatter")
libraries = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("torch_scatter", marks=needs_torch_scatter), "cupy"]
)


# --- sums ------------------------------------------------------------------------------------------------------------


@libraries
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_highest_of_groups(backend: str, dtype: torch.dtype) -> None:
    """Groups that are empty in the middle and at both ends; every number is the slow loop's."""
    token = torch.tensor([3, 1, 3, 7, 3, 1, 3])
    values = torch.tensor([0.1, 2.0, 0.3, 4.0, 0.5, 6.0, 0.7], dtype=dtype)
    whole = torch.tensor([-5, -(2**28), 3, -9, 2**40, -(2**29), 0])
    groups = Groups.by(token, 10, backend=backend)
    total, top = groups.sum(groups.arrange(values)), groups.highest(groups.arrange(whole))
    assert total.dtype == dtype and top.dtype == torch.int64
    for n in range(10):
        here = token == n
        torch.testing.assert_close(total[n], values[here].sum(), rtol=1e-6, atol=0)
        assert int(top[n]) == (int(whole[here].max()) if here.any() else 0)
    nothing = Groups.by(token[:0], 4, backend=backend)
    assert nothing.sum(values[:0]).tolist() == nothing.highest(whole[:0]).tolist() == [0] * 4


@pytest.mark.parametrize("lengths", [[0, 1, 1024, 0, 1025, 5000, 3, 0], [2048], [0, 0], [1] * 2000, [3_000_000]])
def test_long_groups_are_added_up_in_short_pieces(lengths: list[int]) -> None:
    """So that what a GPU makes of a group does not depend on where it lies. No piece is longer, none is lost."""
    token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values = torch.rand(len(token), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = Groups.by(token, len(lengths))
    begins, first = groups._pieces
    pieces = begins.diff()
    assert begins[0] == 0 and begins[-1] == len(token)
    assert pieces.min() >= 0 and pieces.max() <= PIECE
    for n, length in enumerate(lengths):
        own = pieces[first[n] : first[n + 1]].tolist()
        assert own == [PIECE] * (length // PIECE) + [length % PIECE] * (length % PIECE > 0)
    expected = torch.stack([part.sum() for part in values.split(lengths)])
    torch.testing.assert_close(groups.sum(values), expected, rtol=1e-12, atol=0)


def test_groups_keep_the_order_of_their_edges() -> None:
    token = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0))
    groups = Groups.by(token, 50)
    assert groups.order is not None and torch.equal(groups.index, token[groups.order])
    for n in range(50):
        assert groups.order[groups.ptr[n] : groups.ptr[n + 1]].tolist() == (token == n).nonzero().flatten().tolist()
    assert Groups.by(groups.index, 50).order is None


def test_layers_take_edges_in_any_order() -> None:
    graph = random_graph(60)
    order = torch.randperm(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
    edges, weight, flow = graph.edge_index, graph.edge_weight, trace_flow(graph)
    for some in (order, torch.arange(len(order))):
        reach, _ = AnswerReachability(1e-12)(edges[:, some], weight[some], graph.answer_mask)
        torch.testing.assert_close(reach.value, flow.reach, rtol=1e-10, atol=0)
        through, _ = FlowPropagation(1e-12)(edges[:, some], flow.transition[some], flow.injection)
        torch.testing.assert_close(through, flow.flow, rtol=1e-10, atol=1e-30)


# --- solves ----------------------------------------------------------------------------------------------------------


@libraries
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("solver", ["scatter", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_libraries_give_one_flow(solver: str, backend: str, dtype: torch.dtype) -> None:
    if backend not in LIBRARIES_OF[solver]:
        pytest.skip("not one of its libraries")
    batch = Batch.from_data_list([random_graph(150, 1, dtype), chain(300, 0.1, dtype), random_graph(4, 2, dtype)])
    ours, theirs = trace_flow(batch, solver, backend), trace_flow(batch, "reference")
    assert (ours.solver, ours.backend) == (solver, backend)
    rtol = 1e-5 if dtype == torch.float32 else 1e-9
    for name in ("reach", "flow", "edge_flow", "absorbed"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=rtol, atol=1e-30)
    assert ours[1].backend == backend
    alone = trace_flow(batch[0], solver, backend)
    assert torch.equal(alone.flow, ours[0].flow) and torch.equal(alone.log_reach, ours[0].log_reach)


@pytest.mark.usefixtures("stand_in")
def test_a_tracer_hands_the_library_on() -> None:
    ids, place = torch.arange(4, 44)[None], torch.arange(40)[None]
    masks: dict[str, Any] = {"prompt_mask": place < 12, "sink_mask": place == 37}

    def flow(**options: Any) -> Any:
        return Tracer(policy(), mode="edges", **options).from_ids(ids, **masks)[0].flow

    ours, plain = flow(backend="cupy"), flow()
    assert (ours.solver, ours.backend, plain.solver, plain.backend) == ("scatter", "cupy", "scipy", "torch")
    torch.testing.assert_close(ours.flow, plain.flow, rtol=1e-5, atol=1e-9)
    assert flow(backend="cupy", solver="blocks").solver == "blocks"


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("solver", "backend", "device", "expected"),
    [
        ("auto", "auto", "cpu", ("scipy", "torch")),
        ("auto", "auto", "cuda", ("scatter", "torch")),
        ("auto", "auto", "mps", ("scatter", "torch")),
        ("auto", "torch", "cpu", ("scipy", "torch")),
        ("auto", "torch", "cuda", ("scatter", "torch")),
        ("auto", "triton", "cuda", ("sweep", "triton")),
        ("auto", "cupy", "cpu", ("scatter", "cupy")),
        ("sweep", "auto", "cuda", ("sweep", "triton")),
        ("blocks", "auto", "cuda", ("blocks", "torch")),
        ("blocks", "cupy", "cpu", ("blocks", "cupy")),
        ("scatter", "auto", "cpu", ("scatter", "torch")),
        ("scipy", "torch", "cpu", ("scipy", "torch")),
        ("reference", "auto", "cuda", ("reference", "torch")),
    ],
)
def test_what_is_named_is_taken(solver: str, backend: str, device: str, expected: tuple[str, str]) -> None:
    if backend == "triton" or solver == "sweep":
        pytest.importorskip("triton")
    assert choose(solver, backend, device) == expected


@pytest.mark.parametrize(
    ("solver", "backend", "device", "message"),
    [
        ("magic", "auto", "cpu", "solver must be \"auto\", 'scatter', .*got 'magic'"),
        ("auto", "numba", "cpu", "backend must be \"auto\", 'torch', .*got 'numba'"),
        ("scipy", "cupy", "cpu", 'solver="scipy" does not work with backend="cupy", only with \'torch\''),
        ("scatter", "triton", "cuda", "does not work with backend=\"triton\", only with 'torch', 'torch_scatter'"),
        ("sweep", "torch", "cuda", "only with 'triton'"),
        ("scipy", "auto", "cuda", r'works on the CPU, the graph is on cuda.*solver="scatter"'),
    ],
)
def test_what_does_not_go_together_is_refused(solver: str, backend: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(solver, backend, device)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sums, rows):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for backend, extra in (("torch_scatter", "scatter"), ("cupy", "cuda13"), ("triton", "cuda13")):
        with pytest.raises(ImportError, match=rf'backend="{backend}" needs .*pip install "flowgraph-llm\[{extra}\]"'):
            choose("auto", backend, CUDA)
    assert solvers_for("cpu") == [("scatter", "torch"), ("scipy", "torch"), ("blocks", "torch"), ("reference", "torch")]


def test_cupy_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "find_spec", lambda name: name)
    with pytest.raises(
        ValueError, match='backend="cupy" needs a CUDA GPU and the graph is on cpu: use backend="torch"'
    ):
        trace_flow(random_graph(5), backend="cupy")


@pytest.mark.parametrize(
    ("options", "rows", "solves"),
    [
        ({}, "auto", "auto"),
        ({"backend": "torch"}, "torch", "torch"),
        ({"backend": "triton"}, "triton", "triton"),
        ({"backend": "triton", "solver": "sweep"}, "triton", "triton"),
        ({"backend": "triton", "solver": "scatter"}, "triton", "auto"),
        ({"backend": "triton", "mode": "exact"}, "triton", "triton"),
        ({"backend": "cupy"}, "torch", "cupy"),
        ({"backend": "torch_scatter", "solver": "scatter"}, "torch", "torch_scatter"),
    ],
)
def test_options_say_what_computes_rows_and_what_solves(options: dict[str, Any], rows: str, solves: str) -> None:
    made = Options(**options)
    assert (made.rows_backend, made.solve_backend) == (rows, solves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "numba"}, "backend must be"),
        ({"solver": "magic"}, "solver must be"),
        ({"solver": "magic", "backend": "triton"}, "solver must be"),
        ({"solver": "scipy", "backend": "cupy"}, 'solver="scipy" does not work with backend="cupy"'),
        ({"mode": "exact", "backend": "torch_scatter"}, 'mode="exact" has no graph to solve.*backend="auto"'),
        ({"mode": "exact", "backend": "cupy"}, 'mode="exact" has no graph to solve'),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_what_only_solves_graphs_keeps_to_graphs() -> None:
    assert Options(keep_attention=True).mode_of(5000) == "exact"
    assert Options(keep_attention=True, backend="triton").mode_of(5000) == "exact"
    assert Options(keep_attention=True, backend="cupy").mode_of(5000) == "sparse"


# --- what auto goes by -----------------------------------------------------------------------------------------------


def measured() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "solvers.json").read_text())


def test_auto_takes_what_was_fastest() -> None:
    """Over all batches that were measured, by the geometric mean of times over the fastest."""
    content = measured()
    assert content["device"] == "cpu"
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in content["results"]:
        if "ratio" in result:
            ratios.setdefault((result["solver"], result["backend"]), []).append(result["ratio"])
    batches = {result["batch"] for result in content["results"]}
    whole = {names: found for names, found in ratios.items() if len(found) == len(batches)}
    mean: Callable[[tuple[str, str]], float] = lambda names: sum(map(math.log, whole[names]))  # noqa: E731
    assert min(whole, key=mean) == AUTO["cpu"]


def test_all_that_there_is_was_measured() -> None:
    seen = {(result["solver"], result["backend"]) for result in measured()["results"]}
    assert {(solver, "torch") for solver, found in LIBRARIES_OF.items() if "torch" in found} <= seen
    assert ("scatter", "torch_scatter") in seen


def test_groups_on_the_cpu_add_in_order() -> None:
    """So that numbers of very different size round as one after the other."""
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(500, generator=draw, dtype=torch.float32) * 10 ** torch.randint(-6, 6, (500,), generator=draw)
    one = Tensor([0.0])[0]
    for value in values:
        one = one + value
    assert torch.equal(Groups.by(torch.zeros(500, dtype=torch.int64), 1).sum(values)[0], one)
