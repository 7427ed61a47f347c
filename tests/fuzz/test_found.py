"""What the fuzzers found, one test for each, named by what went wrong. (More of it, by kind: test_hostile.py.)"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph import TokenGraph
from flowgraph.adapters import exports, records
from flowgraph.adapters.service import newest_checkpoint
from flowgraph.answers import find_answer
from flowgraph.rl import FlowConfig
from flowgraph.segments import split
from flowgraph.spans import locate
from tests.fuzz.targets import targets
from tests.fuzz.test_graphs import sound
from tests.graphs import mask_of, random_graph

pytestmark = pytest.mark.fuzz


@pytest.mark.parametrize(
    "text", ["." * 200_000, "a. " * 60_000, "!? " * 60_000 + "x"], ids=["dots", "sentences", "marks"]
)
def test_sentences_of_long_texts_took_time_by_the_square_of_their_length(text: str) -> None:
    begun = time.process_time()
    split([text[k : k + 50] for k in range(0, len(text), 50)], "sentences")
    assert time.process_time() - begun < 5


def test_abbreviations_and_numbers_still_end_no_sentence() -> None:
    text = "See e.g. Fig. 3.\n  12. Dr. Who... left!! Then"
    assert split(list(text), "sentences").names == ["See e.g. Fig. 3.", "12. Dr. Who...", "left!!", "Then"]


@pytest.mark.parametrize("encoding", ["utf-x", "utf-127", "none"])
def test_an_encoding_that_no_one_knows_was_a_lookup_error(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "g.graphml").write_text(f"<?xml version='1.0' encoding='{encoding}'?><graphml/>")
    with pytest.raises(ValueError, match="cannot read a graph from"):
        exports.read_graphml(tmp_path / "g.graphml")


def test_ends_of_edges_of_two_lengths_were_a_runtime_error() -> None:
    tables = exports.Tables.of(random_graph(5))
    edges = tables.edges | {"source": tables.edges["source"][1:]}
    with pytest.raises(ValueError, match="the edges have 9 of source and 10 of target"):
        exports.Tables(tables.nodes, edges, tables.about).graph()


def test_an_edge_attribute_named_source_was_a_type_error() -> None:
    graph = exports.to_networkx(random_graph(5))
    for _, _, values in graph.edges(data=True):
        values["source"] = "elsewhere"
    assert exports.from_networkx(graph).edge_weight.equal(random_graph(5).edge_weight)


def test_a_broken_page_of_parquet_was_an_oserror(tmp_path: Path) -> None:
    for name in ("parquet nodes", "parquet edges", "scores"):
        data = targets()[name].seeds[0]
        refused = 0
        for place in range(4, len(data) - 4, max(1, len(data) // 60)):
            try:
                targets()[name].run(data[:place] + bytes([data[place] ^ 0x7F]) + data[place + 1 :], tmp_path)
            except ValueError as error:
                refused += "parquet" in str(error)
        assert refused


@pytest.mark.parametrize("value", [1, [1], {"a": 1}, "LlamaForCausalLM", "[" * 50_000], ids=ascii)
def test_architectures_of_another_kind_ended_the_search_for_checkpoints(value: Any, tmp_path: Path) -> None:
    nested = isinstance(value, str) and value.startswith("[")
    (tmp_path / "config.json").write_text(value if nested else json.dumps({"architectures": value}))
    (tmp_path / "model.safetensors").touch()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("special_ids", [[2**70], [-1], ["x"], [None], 3, torch.tensor([[1]])], ids=ascii)
def test_special_ids_of_any_kind_were_runtime_errors(special_ids: Any) -> None:
    with pytest.raises(ValueError, match="special_ids must be token ids"):
        locate(torch.arange(4), mask_of(4, 0), sink_mask=mask_of(4, 3), special_ids=special_ids)


def test_special_ids_beyond_the_dtype_of_token_ids_were_a_runtime_error() -> None:
    ids = torch.arange(4, dtype=torch.int8)
    spans = locate(ids, mask_of(4, 0), sink_mask=mask_of(4, 3), special_ids=[50_000, 2])
    assert spans.credit_mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("tail_tokens", [2.5, "2", True, None])
def test_tail_tokens_of_another_kind(tail_tokens: Any) -> None:
    with pytest.raises(ValueError, match="tail_tokens must be a whole number"):
        locate(torch.arange(4), mask_of(4, 0), sink_mask=mask_of(4), no_answer="tail", tail_tokens=tail_tokens)


@pytest.mark.parametrize("text", [b"4", None, 4])
def test_text_that_is_none_is_named(text: Any) -> None:
    with pytest.raises(TypeError, match="text must be a str"):
        find_answer(text)


@pytest.mark.parametrize("name", ["edge_index", "edge_weight", "token_ids", "self_weight", "dropped"])
@pytest.mark.parametrize(
    "value", [[0.5] * 4, 3, torch.ones(4, dtype=torch.complex64)], ids=["list", "number", "complex"]
)
def test_what_is_no_tensor_of_a_graph_was_an_attribute_error(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        TokenGraph.from_edges(**sound() | {name: value})


@pytest.mark.parametrize(
    "values",
    [{"layers": [float("inf")]}, {"edges": {"top_k": float("inf")}}, {"edges": {"mass": None}}, {"gain": 10**400},
     {"heads": {"local_heads": [[float("inf"), 0]], "global_heads": []}}, 
     {"heads": {"local_heads": 3, "global_heads": []}},
     {"answer": "re:" + "(" * 20_000}, {"answer": "re:a{99999999999}"}, {"warmup_steps": None}, {"tail_tokens": 1.5},
     {"max_batch_tokens": "9" * 30}, {"top": True}, {"signs": ["both"]}, {"absorb_at_prompt": 1}],
    ids=lambda values: ascii(values)[:40],
)  # fmt: skip
def test_options_of_another_kind(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))) as caught:
        FlowConfig.from_dict(values)
    assert len(str(caught.value)) < 1000


def test_a_line_of_brackets_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        records.parse(1, b"[" * 100_000)
