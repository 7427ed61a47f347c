"""The files of `flowgraph score`: what a line may hold, what is wrong with others, and that OUT is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowgraph.adapters import records
from flowgraph.adapters.records import (
    COLUMNS,
    Record,
    ScoreFile,
    errors_path,
    lines,
    parse,
    read_scores,
    record_at,
    with_labels,
)

MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "2"}]


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r"}, Record(7, None, "p", "r")),
        ({"prompt": MESSAGES, "response": "r", "id": "x"}, Record(7, "x", MESSAGES, "r")),
        ({"question": "q", "response": "r", "answer": "18", "id": 3}, Record(7, "3", "q", "r")),
        ({"messages": ANSWERED}, Record(7, None, ANSWERED, None)),
        ({"messages": MESSAGES, "response": "2"}, Record(7, None, MESSAGES, "2")),
        ({"prompt_ids": [1, 2], "response_ids": [3], "prompt": "ignored"}, Record(7, None, [1, 2], [3])),
        ({"prompt": "p", "question": "ignored", "response": " r\n"}, Record(7, None, "p", " r\n")),
    ],
)
def test_each_form_of_a_line(row: dict[str, Any], expected: Record) -> None:
    record = parse(7, line(row))
    assert record == expected
    assert record.has_ids == ("prompt_ids" in row)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"prompt": "p", "resp', "not JSON"),
        (b'{"prompt": "caf\xe9", "response": "r"}', "not UTF-8: byte 16 of the line is 0xe9"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"9" * 10_000, "not JSON that can be read"),
        (b"[1, 2]", "one JSON object {...}, got a list"),
        (b"null", "got null"),
        (b"{}", "this one has no field"),
        (line({"text": "t"}), "this one has 'text'"),
        (line({"prompt": "p"}), 'no response: beside "prompt"'),
        (line({"prompt": "p", "response": ""}), '"response" is empty'),
        (line({"prompt": "p", "response": " \n"}), '"response" is empty'),
        (line({"prompt": "", "response": "r"}), '"prompt" is empty'),
        (line({"prompt": "p", "response": None}), 'no response: beside "prompt" a line needs "response"'),
        (line({"prompt": "p", "response": ["r"]}), '"response" must be text, got a list'),
        (line({"prompt": 3, "response": "r"}), '"prompt" must be text or a list of messages, got a number'),
        (line({"question": MESSAGES, "response": "r"}), '"question" must be text, got a list'),
        (line({"messages": "m"}), '"messages" must be a list of messages, got text'),
        (line({"messages": []}), "an empty list"),
        (line({"messages": [1]}), '"messages"[0] must be a message'),
        (line({"messages": [{"content": "x"}]}), '"messages"[0] must be a message'),
        (line({"messages": [{"role": "user", "content": 3}]}), '"content" must be text, got a number'),
        (line({"prompt_ids": [1]}), 'no "response_ids"'),
        (line({"response_ids": [1]}), 'no "prompt_ids"'),
        (line({"prompt_ids": [1], "response_ids": []}), "an empty one"),
        (line({"prompt_ids": [1], "response_ids": "1"}), "token ids, got text"),
        (line({"prompt_ids": [1, -1], "response_ids": [1]}), '"prompt_ids"[1] must be a token id, got -1'),
        (line({"prompt_ids": [True], "response_ids": [1]}), "must be a token id, got true"),
        (line({"prompt_ids": [2**31], "response_ids": [1]}), "must be a token id"),
        (line({"prompt": "p", "response": "r", "id": {}}), '"id" must be a string or a number, got an object'),
        (b'{"prompt": "p", "response": "\\ud800"}', "half of a surrogate pair at character 1"),
        (b'{"prompt": "p", "response": "r", "id": "\\ud800"}', '"id" holds half'),
    ],
)
def test_a_line_that_cannot_be_used_says_why(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(1, raw)
    assert reason in str(caught.value)


def test_lines_count_blank_ones_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = line({"prompt": "p", "response": "r"})
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n  \n" + good)
    assert [number for number, _ in lines(path)] == [1, 4]
    assert record_at(path, 4) == Record(4, None, "p", "r")
    with pytest.raises(ValueError, match=r"line 2 of .* is blank"):
        record_at(path, 2)
    with pytest.raises(ValueError, match="no line 5; its last one is 4"):
        record_at(path, 5)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no line 1: it is empty"):
        record_at(path, 1)


def row(number: int, tokens: int = 3, **changes: Any) -> dict[str, Any]:
    values = [number + k / 8 for k in range(tokens)]
    return {
        "line": number,
        "id": f"é{number}",
        "prompt_tokens": 5,
        "response_tokens": tokens,
        "response_token_ids": list(range(tokens)),
        "weights": values,
        "throughput": values,
        "reach": values,
        "answer": "18",
        "flags": ["cut_off"],
    } | changes


def test_what_is_written_reads_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_GROUP_ROWS", 4)
    path = tmp_path / "new" / "out.parquet"
    rows = [row(1), row(2, tokens=0, id=None, answer=None, flags=[]), *(row(k) for k in range(3, 11))]
    with ScoreFile(path, {"model": "m"}) as out:
        for one in rows:
            out.add(one)
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 3
    assert file.schema_arrow.equals(COLUMNS)
    assert file.schema_arrow.metadata[b"flowgraph.model"] == b"m"
    assert file.read().to_pylist() == rows
    frame = pd.read_parquet(path)
    assert frame["weights"][0].tolist() == [1.0, 1.125, 1.25]
    assert frame["weights"][0].dtype == "float32"
    assert frame["id"].isna().tolist() == [False, True] + [False] * 8
    assert [p.name for p in path.parent.iterdir()] == ["out.parquet"]


def test_long_responses_fill_a_row_group_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_GROUP_TOKENS", 10)
    with ScoreFile(tmp_path / "out.parquet", {}) as out:
        for number in range(1, 5):
            out.add(row(number, tokens=6))
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2


def test_lines_set_aside_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with ScoreFile(path, {}) as out:
        out.set_aside(2, "not JSON: \x1b[2J \n é")
        out.add(row(1))
    assert errors_path(path).name == "out.parquet.errors.jsonl"
    (error,) = map(json.loads, errors_path(path).read_text().splitlines())
    assert error == {"line": 2, "reason": "not JSON: \x1b[2J \n é"}
    with ScoreFile(path, {}) as out:
        out.add(row(1))
    assert not errors_path(path).exists(), "it tells of an earlier run"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_stops_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(records, "_GROUP_ROWS", 1)
    path = tmp_path / "out.parquet"
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(error), ScoreFile(path, {}) as out:
            out.add(row(1))
            out.set_aside(2, "bad")
            raise error
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_row_that_does_not_fit_the_columns_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"weights|convert|float"), ScoreFile(tmp_path / "out.parquet", {}) as out:
        out.add(row(1, weights=["x"]))
    assert list(tmp_path.iterdir()) == []


def test_further_numbers_are_columns_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with ScoreFile(path, {}, ["gini", "width"]) as out:
        out.add(row(1, gini=0.25, width=float("nan")))
        out.add(row(2, width=3.0))
    table = pq.read_table(path)
    assert table.schema.names == [*COLUMNS.names, "gini", "width"]
    assert [str(table.schema.field(name).type) for name in ("gini", "width")] == ["double", "double"]
    assert table["gini"].to_pylist() == [0.25, None]
    assert table["width"].to_pylist() == [None, 3.0]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "scores.parquet"
    with ScoreFile(path, {}, ["gini"]) as out:
        for number, name in ((1, "a"), (2, None), (4, "c")):
            out.add(row(number, id=name, gini=number / 8))
    return path


LABELS = [{"id": "a", "ok": True, "p": 7, "x": 1}, {"ok": False, "p": 7}, None, {"id": "c", "ok": True, "x": 0.5}]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join("" if one is None else json.dumps(one) for one in LABELS))
    return path


def test_scores_are_read_without_their_lists(scores: Path, tmp_path: Path) -> None:
    table = read_scores(scores)
    assert table.column_names == ["line", "id", "prompt_tokens", "response_tokens", "answer", "gini"]
    assert table["line"].to_pylist() == [1, 2, 4]
    (tmp_path / "no.parquet").write_text("{}")
    with pytest.raises(ValueError, match="is no Parquet file"):
        read_scores(tmp_path / "no.parquet")
    with pytest.raises(ValueError, match="there is no file"):
        read_scores(tmp_path / "none.parquet")
    with ScoreFile(tmp_path / "empty.parquet", {}):
        pass
    with pytest.raises(ValueError, match="has no rows"):
        read_scores(tmp_path / "empty.parquet")


def test_labels_are_joined_by_line(scores: Path, labels: Path) -> None:
    table = with_labels(read_scores(scores), labels, ["ok", "p", "x"])
    assert table["ok"].to_pylist() == [True, False, True]
    assert table["p"].to_pylist() == [7, 7, None]
    assert table["x"].to_pylist() == [1.0, None, 0.5]
    assert table["gini"].to_pylist() == [0.125, 0.25, 0.5]


def test_labels_are_joined_by_id(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with ScoreFile(path, {}) as out:
        out.add(row(1, id="c"))
        out.add(row(2, id="a"))
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(one) for one in LABELS if one))
    assert with_labels(read_scores(path), tmp_path / "labels.jsonl", ["x"], on="id")["x"].to_pylist() == [0.5, 1]
    (tmp_path / "labels.jsonl").write_text(json.dumps(LABELS[0]) + "\n" + json.dumps(LABELS[0]))
    with pytest.raises(ValueError, match=r"id 'a' stands in .* twice, the second time on line 2"):
        with_labels(read_scores(path), tmp_path / "labels.jsonl", ["x"], on="id")


def test_labels_of_several_files_are_joined_by_file_and_line(tmp_path: Path) -> None:
    """Lines of different files have the same numbers."""
    for name, ok in (("a.jsonl", True), ("b/c.jsonl", False)):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"ok": ok, "id": f"{name} 1"}) + "\n" + json.dumps({"ok": ok}) + "\n")
    files = ["a.jsonl", "a.jsonl", "b/c.jsonl", "b/c.jsonl"]
    table = pa.table({"file": files, "line": [1, 2, 1, 2], "id": ["a.jsonl 1", None, "b/c.jsonl 1", None]})
    assert with_labels(table, tmp_path / "in", ["ok"])["ok"].to_pylist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"the scores are of 2 files, a\.jsonl, b/c\.jsonl, .* give the folder"):
        with_labels(table, tmp_path / "in" / "a.jsonl", ["ok"])
    one = table.slice(0, 2)
    assert with_labels(one, tmp_path / "in" / "a.jsonl", ["ok"])["ok"].to_pylist() == [True, True]
    with pytest.raises(ValueError, match="have no column 'file'; give the file that was scored"):
        with_labels(one.drop_columns(["file"]), tmp_path / "in", ["ok"])
    (tmp_path / "in" / "b" / "c.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no file b/c\.jsonl, which the scores are of"):
        with_labels(table, tmp_path / "in", ["ok"])


def test_a_field_that_is_null_is_not_there() -> None:
    row = {"prompt_ids": None, "messages": None, "prompt": "p", "response": None, "completion": "c"}
    assert parse(3, line(row)) == Record(3, None, "p", "c", as_is=True)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("", "ok", "has no line 1, which the scores have"),
        ('{"ok": 1}\n{"ok": 1}\n\n{"ok": 1, "id": "d"}', "ok", "has id None on line 1, the scores have 'a'"),
        ('{"id": "a", "ok": 1}\n{"ok": "no"}\n\n{"id": "c"}', "ok", "got a number and text"),
        ('{"id": "a", "ok": []}\n{"ok": []}\n\n{"id": "c"}', "ok", "got a list"),
        ('{"id": "a"}\n{}\n\n{"id": "c"}', "ok", "got nothing but null"),
        ('{"id": "a"}\n{"ok"', "ok", "line 2 of .* cannot be used"),
        ("[]", "ok", "must hold one JSON object"),
    ],
)
def test_labels_of_another_file_are_refused(scores: Path, labels: Path, text: str, field: str, message: str) -> None:
    labels.write_text(text)
    with pytest.raises(ValueError, match=message):
        with_labels(read_scores(scores), labels, [field])
