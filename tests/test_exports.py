"""Graphs out to other tools and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch_geometric.data import Batch

from flowgraph import TokenGraph, Trace, Tracer, trace_flow
from flowgraph.adapters import exports
from tests.graphs import graphs, random_graph
from tests.written import ANSWERS, TOKENIZER, ids, marked, written_by_hand


def there_and_back(name: str, what: Any, folder: Path) -> TokenGraph:
    if name == "networkx":
        return exports.from_networkx(exports.to_networkx(what))
    path = folder / f"graph.{name}"
    getattr(exports, f"write_{name}")(what, path)
    found: TokenGraph = getattr(exports, f"read_{name}")(path)
    return found


def assert_equal(one: TokenGraph, other: TokenGraph) -> None:
    for name in ("edge_index", "edge_weight", "token_ids", "self_weight", "dropped", "prompt_mask", "question_mask",
                 "answer_mask", "response_mask", "credit_mask"):  # fmt: skip
        assert torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype, name
    assert (one.model, one.layers, one.rule) == (other.model, other.layers, other.rule)


def trace() -> Trace:
    token_ids = torch.tensor([ids("?;", end=False) + marked(3, 2)])
    tracer = Tracer(written_by_hand(), TOKENIZER, preset="paper", answer=ANSWERS)
    return tracer.from_ids(token_ids, prompt_mask=torch.arange(token_ids.shape[1])[None] < 2)[0]


FORMATS = ("networkx", "graphml", "parquet", "json")


@pytest.mark.parametrize("name", FORMATS)
@given(graph=graphs(max_tokens=10))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(name: str, graph: TokenGraph, tmp_path: Path) -> None:
    for what in (graph, trace_flow(graph)):
        assert_equal(there_and_back(name, what, tmp_path), graph)


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_of_a_trace_in_float32(name: str, tmp_path: Path) -> None:
    one = trace()
    assert one.graph.edge_weight.dtype == torch.float32 and one.graph.layers
    assert_equal(there_and_back(name, one, tmp_path), one.graph)


def test_networkx_has_flow_text_and_credit() -> None:
    one = trace()
    graph = exports.to_networkx(one)
    assert [graph.nodes[n]["text"] for n in graph] == one.text
    assert [graph.nodes[n]["credit"] for n in graph] == one.weights.tolist()
    mark = one.text.index("@") if one.text else 0
    assert graph.nodes[mark]["throughput"] == pytest.approx(2)
    assert sum(values["flow"] for *_, values in graph.in_edges(mark, data=True)) == pytest.approx(1)


def test_text_that_no_file_can_hold(tmp_path: Path) -> None:
    one = trace()
    assert one.text is not None
    one.text[:3] = ["\x00<b>&", "\ud83d", "ש\N{ROCKET}"]
    for name in FORMATS[1:]:
        assert_equal(there_and_back(name, one, tmp_path), one.graph)
    text = json.loads((tmp_path / "graph.json").read_text())["nodes"]["text"]
    assert text[:3] == ["\x00<b>&", "?", "ש\N{ROCKET}"]


def test_parquet_for_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    one = trace()
    nodes, edges = exports.write_parquet(one, tmp_path / "one")
    assert pandas.read_parquet(nodes)["text"].tolist() == one.text
    assert pandas.read_parquet(edges)["flow"].sum() == pytest.approx(float(one.flow.edge_flow.sum()))


def test_what_is_refused(tmp_path: Path) -> None:
    graph = random_graph(10)
    with pytest.raises(TypeError, match="what must be a Trace, a Flow or a TokenGraph, got int"):
        exports.to_networkx(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="what is a batch of 2 graphs; export them one by one"):
        exports.write_json(Batch.from_data_list([graph, graph]), tmp_path / "x.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read a graph from .*bad.json: KeyError\('nodes'\)"):
        exports.read_json(tmp_path / "bad.json")
    (tmp_path / "bad.graphml").write_text("<graphml")
    with pytest.raises(ValueError, match=r"cannot read a graph from .*bad.graphml"):
        exports.read_graphml(tmp_path / "bad.graphml")
    loose = exports.to_networkx(graph)
    del loose.nodes[4]["answer_mask"]
    with pytest.raises(ValueError, match="node 4 has no attribute 'answer_mask', which others have"):
        exports.from_networkx(loose)
    backwards = exports.to_networkx(graph)
    backwards.add_edge(5, 2, **backwards.edges[0, 1])
    with pytest.raises(ValueError, match=r"edge 5 -> 2 .* runs against time"):
        exports.from_networkx(backwards)
    (tmp_path / "other.nodes.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ValueError, match=r"cannot read .*other.nodes.parquet"):
        exports.read_parquet(tmp_path / "other")


def test_cupy_is_named_when_it_is_missing() -> None:
    try:
        import cupy  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"flowgraph-llm\[cuda13\]"):
            exports.to_cupy(random_graph(10))
    else:
        pytest.skip("cupy is installed")


@pytest.mark.gpu
def test_cupy_shares_memory_with_tensors() -> None:
    cupy = pytest.importorskip("cupy")
    flow = trace_flow(random_graph(20).to("cuda"))
    arrays = exports.to_cupy(flow)
    assert arrays["edge_flow"].data.ptr == flow.edge_flow.data_ptr()
    assert float(cupy.asnumpy(arrays["edge_flow"]).sum()) == pytest.approx(float(flow.edge_flow.sum()))
