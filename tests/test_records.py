"""The files of `flowgraph score`: what a line may hold, what is wrong with others, and that OUT is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from flowgraph.adapters import records
from flowgraph.adapters.records import COLUMNS, Record, ScoreFile, errors_path, lines, parse, record_at

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
        (line({"prompt": "p", "response": None}), '"response" must be text, got null'),
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
