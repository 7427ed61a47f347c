"""TokenGraph: construction, laws, PyG batching, files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from flowgraph import TokenGraph, trace_flow
from tests.graphs import attention, graphs, mask_of, random_graph

PROMPT, ANSWER = mask_of(4, 0, 1), mask_of(4, 3)


def four_tokens(**changes: Any) -> TokenGraph:
    """0 -> 1, 0 -> 2, 1 -> 3, 2 -> 3."""
    arguments: dict[str, Any] = {
        "edge_index": torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]]),
        "edge_weight": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "prompt_mask": PROMPT,
        "answer_mask": ANSWER,
    } | changes
    return TokenGraph.from_edges(**arguments)


def same(a: TokenGraph, b: TokenGraph) -> bool:
    left, right = a.to_dict(), b.to_dict()
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) and value.dtype == right[key].dtype
        if isinstance(value, Tensor)
        else value == right[key]
        for key, value in left.items()
    )


def test_from_dense_by_hand() -> None:
    W = torch.tensor([[1.0, 0, 0, 0], [0.7, 0.3, 0, 0], [0.5, 0.1, 0.4, 0], [0.05, 0.15, 0.2, 0.6]])
    graph = TokenGraph.from_dense(W, prompt_mask=PROMPT, answer_mask=ANSWER, threshold=0.1)
    assert graph.edge_index.tolist() == [[0, 0, 1, 2], [1, 2, 3, 3]]  # 0.1 itself is not above the threshold
    torch.testing.assert_close(graph.edge_weight, torch.tensor([0.7, 0.5, 0.15, 0.2]))
    torch.testing.assert_close(graph.self_weight, torch.tensor([1.0, 0.3, 0.4, 0.6]))
    torch.testing.assert_close(graph.dropped, torch.tensor([0.0, 0.0, 0.1, 0.05]))
    assert graph.rule == "weight > 0.1"
    assert graph.response_mask.tolist() == [False, False, True, True]
    assert graph.credit_mask.tolist() == [False, False, True, False]
    assert graph.question_mask.tolist() == graph.prompt_mask.tolist()
    assert graph.token_ids.tolist() == [-1] * 4
    assert isinstance(graph, Data) and graph.num_nodes == 4 and graph.num_edges == 4


def test_rows_are_accounted_for() -> None:
    graph = random_graph(50, threshold=1 / 64)
    kept = torch.zeros(50, dtype=torch.float64).scatter_add(0, graph.edge_index[1], graph.edge_weight)
    torch.testing.assert_close(kept + graph.self_weight + graph.dropped, torch.ones(50, dtype=torch.float64))
    assert (random_graph(50).dropped == 0).all()


@given(order=st.permutations(range(4)))
def test_edges_are_sorted_by_target_then_source(order: list[int]) -> None:
    edges, weights = torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert same(four_tokens(edge_index=edges[:, order], edge_weight=weights[order]), four_tokens())


def test_batching_is_that_of_pyg() -> None:
    several = [random_graph(n, seed=n) for n in (5, 30, 12)]
    several[1].layers, several[1].model, several[2].layers = [3, 4], "m", [1]
    batch = Batch.from_data_list(several)
    assert isinstance(batch, TokenGraph) and batch.ptr.tolist() == [0, 5, 35, 47]
    assert batch.validate() and list(batch.layers) == [[], [3, 4], [1]]  # type: ignore[comparison-overlap]
    for number, graph in enumerate(several):
        assert same(batch[number], graph)
    assert [same(a, b) for a, b in zip(batch.to_data_list(), several, strict=True)] == [True] * 3
    loaded = list(DataLoader(several, batch_size=2))
    assert [len(trace_flow(part)) for part in loaded] == [2, 1]
    assert batch.to("cpu").edge_weight.device.type == "cpu"
    assert same(batch.clone()[1], several[1])


@given(several=st.lists(graphs(max_tokens=10), min_size=1, max_size=3))
def test_any_batch_is_valid_and_comes_apart(several: list[TokenGraph]) -> None:
    batch = Batch.from_data_list(several)
    assert batch.validate()
    assert all(same(a, b) for a, b in zip(batch.to_data_list(), several, strict=True))


@given(graph=graphs())
def test_save_and_load_bit_by_bit(graph: TokenGraph, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("graphs") / "graph.safetensors"
    graph.layers, graph.model = [10, 11], 'a "model" with ünicode'
    graph.save(path)
    assert same(TokenGraph.load(path), graph)


def test_batches_are_saved_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes one graph, got a batch"):
        Batch.from_data_list([random_graph(5)]).save(tmp_path / "x")


def corrupt(path: Path, how: str) -> None:
    blob = path.read_bytes()
    tensors = load_file(path)
    header = {"format": "flowgraph/2", "model": "", "layers": [], "rule": ""}
    if how == "truncated":
        path.write_bytes(blob[: len(blob) // 2])
    elif how == "pickle":
        torch.save({"a": 1}, path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "huge header":
        path.write_bytes((2**60).to_bytes(8, "little") + blob[8:])
    elif how == "foreign":
        save_file(tensors, path)
    elif how == "no json":
        save_file(tensors, path, metadata={"flowgraph": "{"})
    elif how == "other version":
        save_file(tensors, path, metadata={"flowgraph": json.dumps(header | {"format": "flowgraph/99"})})
    elif how == "missing tensor":
        del tensors["dropped"]
        save_file(tensors, path, metadata={"flowgraph": json.dumps(header)})
    elif how == "broken law":
        tensors["edge_index"] = tensors["edge_index"].flip(0).contiguous()
        save_file(tensors, path, metadata={"flowgraph": json.dumps(header)})
    elif how == "wrong layers":
        save_file(tensors, path, metadata={"flowgraph": json.dumps(header | {"layers": None})})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "(?i)incomplete|metadata|header"),
        ("pickle", "(?i)header"),
        ("empty", "(?i)header|small|empty"),
        ("huge header", "(?i)header"),
        ("foreign", "not one of FlowGraph"),
        ("no json", "(?i)expecting property name"),
        ("other version", "its format is not 'flowgraph/2'"),
        ("missing tensor", "its tensors are"),
        ("broken law", "runs against time"),
        ("wrong layers", "layers must be a list of layer numbers, got None"),
    ],
)
def test_corrupt_and_foreign_files_are_refused_with_a_reason(how: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    random_graph(12).save(path)
    corrupt(path, how)
    with pytest.raises(ValueError, match=r"cannot load a graph from .*graph\.safetensors: ") as caught:
        TokenGraph.load(path)
    assert re.search(reason, str(caught.value))


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        TokenGraph.load("nowhere.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"edge_index": torch.tensor([[1, 0, 1, 2], [0, 2, 3, 3]])},
            r"graph 0, edge 1 -> 0 .* runs against time",
        ),
        ({"edge_index": torch.tensor([[0, 2, 1, 2], [1, 2, 3, 3]])}, r"edge 2 -> 2 .* runs against time"),
        (
            {"edge_index": torch.tensor([[0, 0, 2, 2], [1, 2, 3, 3]])},
            r"edge 2 -> 3 .* occurs twice.*coalesce",
        ),
        ({"edge_index": torch.tensor([[0, 0, 1, 2], [1, 2, 3, 9]])}, r"names a token outside 0\.\.3"),
        ({"edge_index": torch.tensor([[0, 0, 1, 2]])}, r"edge_index must be \[2, E\] int64, got \[1, 4\]"),
        (
            {"edge_weight": torch.tensor([0.1, float("nan"), 0.3, 0.4])},
            r"edge 0 -> 2 .* has weight nan; .* finite",
        ),
        (
            {"edge_weight": torch.tensor([0.1, float("inf"), 0.3, 0.4])},
            r"edge 0 -> 2 .* has weight inf; .* finite",
        ),
        (
            {"edge_weight": torch.tensor([0.1, 0.2, -0.5, 0.4])},
            r"edge 1 -> 3 .* has weight -0.5; .* not be negative",
        ),
        (
            {"edge_weight": torch.tensor([0.1])},
            r"edge_weight must be \[E\] = \[4\] float32 or float64, got \[1\]",
        ),
        ({"edge_weight": torch.ones(4, dtype=torch.int64)}, r"edge_weight must be .* got \[4\] torch.int64"),
        (
            {"answer_mask": mask_of(5, 4)},
            r"answer_mask must be a bool tensor of shape \[N\] = \[4\], got \[5\]",
        ),
        ({"answer_mask": torch.tensor([0, 0, 0, 1])}, r"answer_mask must be a bool tensor .* torch.int64"),
        ({"answer_mask": [False] * 4}, r"answer_mask must be a bool tensor .* got list"),
        ({"question_mask": mask_of(4, 2)}, r"graph 0: token 2 is in question_mask but not in the prompt"),
        ({"question_mask": mask_of(4)}, r"graph 0 has no source"),
        ({"prompt_mask": mask_of(4)}, r"graph 0 has no source: prompt_mask or question_mask is empty"),
        ({"response_mask": mask_of(4)}, r"graph 0 has no response token"),
        ({"response_mask": mask_of(4, 1, 2)}, r"graph 0: token 1 is in the prompt and in the response"),
        ({"credit_mask": mask_of(4, 0)}, r"graph 0: token 0 is in credit_mask but not in the response"),
        (
            {"token_ids": torch.zeros(3, dtype=torch.int64)},
            r"token_ids must have shape \[N\] = \[4\], got \[3\]",
        ),
        ({"dropped": torch.full((4,), torch.nan)}, r"graph 0: dropped of token 0 is not finite"),
    ],
)
def test_broken_laws_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        four_tokens(**changes)


def test_a_trace_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graph 0 has 1 token\(s\); a trace needs at least"):
        TokenGraph.from_dense(torch.ones(1, 1), prompt_mask=mask_of(1, 0), answer_mask=mask_of(1, 0))


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.ones(3, 4), r"W must be a float matrix \[N, N\], got \[3, 4\]"),
        (torch.ones(4, 4, dtype=torch.int64).tril(), r"W must be a float matrix"),
        (
            torch.ones(4, 4),
            r"W\[0, 1\] = 1 runs against time: token 0 cannot attend to the later token 1; .*W\.T",
        ),
        (-torch.ones(4, 4).tril(), r"W\[0, 0\] = -1.0; attention weights must be finite and not negative"),
        (torch.full((4, 4), torch.inf).tril(), r"W\[0, 0\] = inf"),
        (torch.full((4, 4), torch.nan).tril(), r"nan"),
    ],
)
def test_bad_matrices_are_named(W: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGraph.from_dense(W, prompt_mask=PROMPT, answer_mask=ANSWER)


def test_one_bad_graph_in_a_batch_is_named() -> None:
    several = [random_graph(6), random_graph(7), random_graph(8)]
    batch = Batch.from_data_list(several)
    edge = int((batch.batch[batch.edge_index[0]] == 1).nonzero()[3])
    batch.edge_weight[edge] = torch.nan
    source, target = (batch.edge_index[:, edge] - 6).tolist()
    with pytest.raises(ValueError, match=rf"graph 1, edge {source} -> {target} .* has weight nan"):
        trace_flow(batch)
    assert batch.validate(raise_on_error=False) is False
    several[2].question_mask = mask_of(8)
    with pytest.raises(ValueError, match="graph 2 has no source"):
        trace_flow(Batch.from_data_list(several))


def test_flow_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="graph must be a TokenGraph or a batch of them, got Tensor"):
        trace_flow(attention(4))  # type: ignore[arg-type]
