"""What an attacker would send: text on which a regular expression never ends, files that claim more than they hold."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flowgraph import TokenGraph, page
from flowgraph.adapters import exports
from flowgraph.adapters.service import MOST_BYTES, ServiceConfig
from flowgraph.answers import FINDERS, find_answer
from flowgraph.segments import split
from flowgraph.spans import token_offsets
from tests.fuzz.run import bounded_memory
from tests.fuzz.targets import a_trace, check_page
from tests.graphs import random_graph
from tests.written import TOKENIZER

pytestmark = pytest.mark.fuzz

# ------------------------------------------------------------------------- time is linear in the text

UNITS = (
    " ", "\n", "#", "*", "**", "$", "\\", "\\boxed{", "{", "<answer>", "answer is ", "answer ", "answer is **",
    "answer is $", "answer is \\(", "\nA:", ".", "!", "! ", "... ", "'", ":", "**:", "\u202e\u05e9", "\ud800",
    "\x00", "e.g. ",
    "\n1. ", "\n```", "<think>", "<|im_start|> ", "\n- ", "\n**a", "\u3002", "a. ", "\u00a0", "\\boxed ", "<answer ",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
@pytest.mark.parametrize("before", ["", "answer is "])
def test_finders_and_splitters_read_100_kilobytes_at_once(unit: str, before: str) -> None:
    text = (before + unit * (100_000 // len(unit)))[:100_000]
    pieces = [text[k : k + 50] for k in range(0, len(text), 50)]
    begun = time.process_time()
    for finder in ("auto", *FINDERS):
        find_answer(text, finder)
    if not before:
        for by in ("words", "lines", "sentences", "steps", "turns"):
            assert split(pieces, by).num_tokens == len(pieces)
    # Once through takes below 0.3 s; what looks back to the start each time took minutes.
    assert time.process_time() - begun < 5


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_takes_ten_times_as_long(unit: str) -> None:
    text = ("answer is " + unit * (1_000_000 // len(unit)))[:1_000_000]
    pieces = [text[k : k + 50] for k in range(0, len(text), 50)]
    begun = time.process_time()
    for finder in ("auto", *FINDERS):
        find_answer(text, finder)
    for by in ("words", "lines", "sentences", "steps", "turns"):
        split(pieces, by)
    assert time.process_time() - begun < 30


@pytest.mark.parametrize("unit", [[150], [243, 102], [0], [1, 2], [100, 200, 30]])
def test_offsets_of_broken_bytes_are_found_in_linear_time(unit: list[int]) -> None:
    ids = unit * (20_000 // len(unit))
    begun = time.process_time()
    text, offsets = token_offsets(TOKENIZER, ids)
    assert len(offsets) == len(ids) and offsets[-1][1] == len(text)
    assert time.process_time() - begun < 20


# ------------------------------------------------------------------------- files that claim more than they hold


def safetensors(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def graph_file(folder: Path) -> tuple[Path, dict[str, Any], bytes]:
    path = folder / "graph.safetensors"
    random_graph(5).save(path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return path, json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("name", ["edge_weight", "prompt_mask", "token_ids"])
@pytest.mark.parametrize("shape", [[2**40], [2**62, 4], [2**64 - 1], [], [0, 2**60], [5, 1]])
def test_shapes_of_safetensors_are_checked_before_memory_is_taken(name: str, shape: list[int], tmp_path: Path) -> None:
    path, header, body = graph_file(tmp_path)
    header[name]["shape"] = shape
    path.write_bytes(safetensors(header, body))
    with bounded_memory(), pytest.raises(ValueError, match="cannot load a graph"):
        TokenGraph.load(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("edge_weight", "I64"), ("token_ids", "F64"), ("edge_index", "U64"), ("dropped", "I64")]
)
def test_dtypes_of_safetensors_are_checked(name: str, kind: str, tmp_path: Path) -> None:
    path, header, body = graph_file(tmp_path)
    header[name]["dtype"] = kind
    path.write_bytes(safetensors(header, body))
    with pytest.raises(ValueError, match=rf"{name} must be .* got .* {kind}"):
        TokenGraph.load(path)


@pytest.mark.parametrize(
    "changes", [{"layers": [1e400]}, {"layers": "12"}, {"layers": [True]}, {"model": 3}, {"rule": None}]
)
def test_words_of_safetensors_are_checked(changes: dict[str, Any], tmp_path: Path) -> None:
    path, header, body = graph_file(tmp_path)
    about = json.loads(header["__metadata__"]["flowgraph"]) | changes
    header["__metadata__"]["flowgraph"] = json.dumps(about)
    path.write_bytes(safetensors(header, body))
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        TokenGraph.load(path)


def test_brackets_without_end_in_safetensors(tmp_path: Path) -> None:
    path, header, body = graph_file(tmp_path)
    header["__metadata__"]["flowgraph"] = "[" * 100_000
    path.write_bytes(safetensors(header, body))
    with pytest.raises(ValueError, match="cannot load a graph"):
        TokenGraph.load(path)


def test_a_parquet_of_few_bytes_and_billions_of_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports.write_parquet(random_graph(5), tmp_path / "graph")
    edges = tmp_path / "graph.edges.parquet"
    table = pq.read_table(edges)
    rows = 1 << 20
    much = {
        name: pa.array([0]).take(pa.array([0] * rows)).cast(table.schema.field(name).type)
        for name in table.column_names
    }
    pq.write_table(pa.table(much).replace_schema_metadata(table.schema.metadata), edges)
    assert edges.stat().st_size < rows / 50
    monkeypatch.setattr(exports, "MOST_ROWS", rows - 1)
    with pytest.raises(ValueError, match=f"it says that it has {rows} rows; at most {rows - 1} are read"):
        exports.read_parquet(tmp_path / "graph")


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE g [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 10))
    + "]><graphml>&a9;</graphml>"
)
OUTSIDE = '<!DOCTYPE g [<!ENTITY x SYSTEM "file:///etc/hostname">]><graphml>&x;</graphml>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "text", [LAUGHS, OUTSIDE, "<!DOCTYPE g>" + " " * 10_000 + "<graphml/>"], ids=["laughs", "outside", "plain"]
)
def test_graphml_with_a_doctype_is_refused(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "g.graphml").write_bytes(text.encode(encoding))
    with bounded_memory(), pytest.raises(ValueError, match="it has a DOCTYPE"):
        exports.read_graphml(tmp_path / "g.graphml")


def test_graphml_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "g.graphml.gz"
    exports.write_graphml(random_graph(5), path)
    assert exports.read_graphml(path).num_nodes == 5  # whatever its name
    path.write_bytes(gzip.compress(b"<graphml>" + b" " * 10_000_000))
    with pytest.raises(ValueError, match="cannot read a graph from"):
        exports.read_graphml(path)


# ------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "model: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("a.yaml", "model: &a [x]\nflow: *a", r"\*a is an alias"),
        ("a.yaml", "a: &a [x,x]\n" + "".join(f"a{k}: &a{k} [{'*a,' * 9}]\n" for k in range(30)), "is an alias"),
        ("a.yaml", "model: " + "[" * 30_000, "more than 128 brackets"),
        ("a.yaml", "model: !!int ''", "cannot be read"),
        ("a.yaml", "model: !!timestamp x", "cannot be read"),
        ("a.yaml", "? {a: 1}\n: 2", "cannot be read"),
        ("a.yaml", "model: m\nworkers: .inf", "workers must be a whole number"),
        ("a.yaml", "model: m\ntimeout: .nan", "timeout must be a number"),
        ("a.yaml", "model: m\nflow: text", "flow must hold options"),
        ("a.json", '{"model": "m", "flow": {"layers": [1e400]}}', "layers must be"),
        ("a.json", '{"model": "m", "flow": {"gain": "1e400"}}', "gain must be finite"),
        ("a.json", '{"model": "m", "flow": {"edges": {"top_k": 1e400}}}', "top_k"),
        ("a.json", '{"model": "m", "flow": {"tail_tokens": null}}', "tail_tokens must be int"),
        ("a.json", '{"model": "m", "flow": {"answer": "re:a{99999999999}"}}', "no regular expression"),
        ("a.json", '{"model": "m", "dtype": ["float32"]}', "dtype must be"),
        ("a.json", '{"model": "m", "workers": true}', "workers must be a whole number"),
        ("a.json", "[" * 20_000, "cannot be read"),
        ("a.toml", "model = " + "[" * 20_000, "cannot be read"),
        ("a.toml", "model = 1979-05-27", "model must be the name"),
        ("a.json", " " * (MOST_BYTES + 1), f"at most {MOST_BYTES}"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_configurations_that_are_refused(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_text(text)
    begun = time.process_time()
    with bounded_memory(), pytest.raises(ValueError, match=message) as caught:
        ServiceConfig.read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    assert time.process_time() - begun < 5
    assert os.listdir(tmp_path) == [name]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read"):
        ServiceConfig.read(tmp_path / "a.yaml")


# ------------------------------------------------------------------------- pages

HOSTILE = (
    "</script><script>alert(1)</script>", "<!--<script>", "]]>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)",
    "&lt;&#60;",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}", "\u2028\u2029", "\ud800", "\x00\x1b[31m", "\u202e\u2066gnp",
    "javascript:alert(1)", "\\u003c/script>",
)  # fmt: skip


def with_text(value: Any, text: str) -> Any:
    """The same trace with `text` in every string that may be any text, and as a key of what has free keys."""
    fixed = {"role", "score", "kind"}
    if isinstance(value, dict):
        changed = {key: entry if key in fixed else with_text(entry, text) for key, entry in value.items()}
        return changed | ({text: 1.0} if "absorbed" in value else {})
    if isinstance(value, list):
        return [with_text(entry, text) for entry in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_pages_hold_hostile_text_as_text(text: str) -> None:
    shown = text.encode("utf-8", "replace").decode()
    html = page.render([with_text(a_trace(), text) | {"version": shown}], title=shown)
    check_page(html)
    head = html.split('<script type="application/json"')[0]
    own = page.render([a_trace()], title="t").split('<script type="application/json"')[0]
    # In the head it stands three times: the title, the heading, the version; and it adds no tag and no attribute.
    tags: Callable[[str], list[str]] = lambda page: re.findall(r"<[a-zA-Z!/]\w*", page)  # noqa: E731
    assert tags(head) == tags(own)
    assert "49" not in html or "49" in own
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data[0]["model"] == text


def test_a_page_goes_where_it_is_told(tmp_path: Path) -> None:
    out = page.write(tmp_path / "a" / "p.html", [with_text(a_trace(), "../../../escaped")], title="../escaped")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [out] == [tmp_path / "a" / "p.html"]


@pytest.mark.parametrize("value", [10**400, -(10**400)])
@pytest.mark.parametrize("where", ["edges", "tokens", "summary", "checkpoints"])
def test_numbers_that_no_float_holds_are_refused(where: str, value: int) -> None:
    trace = a_trace()
    if where == "edges":
        trace["edges"]["share"] = value
    elif where == "tokens":
        trace["tokens"]["weight"] = [value, 1.0]
    elif where == "summary":
        trace["measures"]["depth"]["value"] = value
    else:
        trace["checkpoints"][0]["lost"] = value
    with pytest.raises(ValueError, match="finite"):
        page.render([trace])


# ------------------------------------------------------------------------- tables


def tables() -> dict[str, Any]:
    path = io.StringIO()
    one = exports.Tables.of(random_graph(5))
    json.dump(
        {"about": one.about} | {k: {n: v.tolist() for n, v in getattr(one, k).items()} for k in ("nodes", "edges")},
        path,
    )
    found: dict[str, Any] = json.loads(path.getvalue())
    return found


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("edges", "source", [0, 1], "of source and"),
        ("edges", "source", None, "source must be a column"),
        ("edges", "source", [[0]] * 10, "source must be a column"),
        ("edges", "source", [0.5] * 10, "source must be a column of int64"),
        ("edges", "target", [2**70] * 10, "target must be a column of int64"),
        ("edges", "weight", ["1"] * 10, "weight must be a column of float64"),
        ("nodes", "prompt_mask", [1, 1, 0, 0, 0], "prompt_mask must be a column of bool"),
        ("nodes", "prompt_mask", [[True], [True, False]], "prompt_mask must be a column"),
        ("nodes", "token_id", [1.5] * 5, "token_id must be a column of int64"),
        ("about", "layers", [1e400], "layers must be a list of layer numbers"),
        ("about", "dtype", ["float32"], "its dtype is"),
        ("about", "format", {}, "its format is"),
    ],
)
def test_columns_that_are_refused(part: str, name: str, value: Any, message: str, tmp_path: Path) -> None:
    found = tables()
    found[part][name] = value
    (tmp_path / "g.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        exports.read_json(tmp_path / "g.json")


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"nodes": [], "edges": 1, "about": 2}', "[" * 100_000, '{"nodes": {}}']
)
def test_json_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read a graph from .*g\.json"):
        exports.read_json(tmp_path / "g.json")


def test_an_accepted_table_is_the_graph() -> None:
    found = tables()
    graph = exports.Tables(found["nodes"], found["edges"], found["about"]).graph()
    assert torch.equal(graph.edge_weight, random_graph(5).edge_weight)
