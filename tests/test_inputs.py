"""What score reads: every kind of file, cut into shards that hold every row once, and what is wrong with others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgraph.adapters import inputs
from flowgraph.adapters.inputs import Shard, Source, fingerprint, passed_over, plan, read, sources, unchanged
from flowgraph.adapters.records import Record, records_of, row_of

MESSAGES = [{"role": "user", "content": "1+1?"}]
ANSWER = [{"role": "assistant", "content": "2"}]


def all_rows(found: list[Source], shards: list[Shard], **how: Any) -> list[tuple[str, int, Any]]:
    """(file, line, row or why not) of every shard, in order."""
    by_name = {one.name: one for one in found}
    return [(shard.source, line, row) for shard in shards for line, row in read(by_name[shard.source], shard, **how)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------- which files


def test_a_folder_gives_its_files_in_order_and_passes_others_over(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r"}]
    for name in ("b.jsonl", "a/2.jsonl", "a/10.ndjson", "_failed/x.jsonl", ".hidden.jsonl", "a/_x.jsonl"):
        write_lines(tmp_path / name, rows)
    (tmp_path / "notes.txt").write_text("{}")
    pq.write_table(pa.table({"prompt": ["p"], "response": ["r"]}), tmp_path / "c.parquet")
    found = sources(tmp_path)
    assert [(one.name, one.kind) for one in found] == [
        ("a/10.ndjson", "jsonl"),
        ("a/2.jsonl", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("c.parquet", "parquet"),
    ]
    assert len(all_rows(found, plan(found))) == 4


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{}])
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    assert [one.name for one in sources(tmp_path / "in")] == ["a.jsonl"]
    assert passed_over(tmp_path / "in") == "1 link"


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{}])
    assert passed_over(tmp_path) == passed_over(tmp_path / "a.jsonl") == ""
    for name in ("b.jsonl.gz", "c/d.jsonl.gz", "c/README", "_failed/x.txt", ".hidden.gz"):
        write_lines(tmp_path / name, [{}])
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert passed_over(tmp_path) == "3 files (.gz, no ending), 1 link"
    assert [one.name for one in sources(tmp_path)] == ["a.jsonl", "linked.jsonl"]
    with pytest.raises(ValueError, match=r"is a folder without \.jsonl.*; it has 2 files \(\.gz, no ending\)"):
        sources(tmp_path / "c")


@pytest.mark.parametrize(("name", "came"), [("b.jsonl.gz", r"ends in \.gz"), ("rollouts", "has no ending")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, came: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} {came}; files that can be read end in \.jsonl"):
        sources(write_lines(tmp_path / name, [{}]))


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IN: there is no file"):
        sources(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is a folder without \.jsonl"):
        sources(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="is empty: there is no line to score"):
        plan(sources(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file"):
        plan(sources(tmp_path))


# ------------------------------------------------------------------------- every row once


@given(
    lines=st.lists(st.sampled_from([b"{}", b'{"a": 1}', b"", b"  ", b"\xef\xbb\xbf{}", b"[", b"\xff"]), max_size=30),
    end=st.sampled_from([b"", b"\n", b"\r\n"]),
    rows=st.integers(1, 7),
    most=st.integers(1, 60),
)
def test_shards_of_lines_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, rows: int, most: int
) -> None:
    """Against a plain loop over the lines of the file."""
    path = tmp_path_factory.mktemp("cut") / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    expected = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():
            expected.append(number)
    found = sources(path)
    if not expected:
        with pytest.raises(ValueError, match="is empty"):
            plan(found, rows=rows, most_bytes=most)
        return
    shards = plan(found, rows=rows, most_bytes=most)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert max(shard.rows for shard in shards) <= rows
    seen = all_rows(found, shards)
    assert [line for _, line, _ in seen] == expected
    assert sum(shard.rows for shard in shards) == len(expected)
    assert [shard.line for shard in shards] == [next(read(found[0], shard))[0] for shard in shards]


@pytest.mark.parametrize(("rows", "group"), [(3, 4), (4, 4), (100, 3), (1, 7)])
def test_shards_of_tables_hold_every_row_once(tmp_path: Path, rows: int, group: int) -> None:
    table = pa.table({"id": pa.array(range(10)), "prompt": ["p"] * 10, "response": [f"r{k}" for k in range(10)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=group)
    found = sources(tmp_path / "in.parquet")
    seen = all_rows(found, plan(found, rows=rows))
    assert [line for _, line, _ in seen] == list(range(1, 11))
    assert [row for *_, row in seen] == table.to_pylist()


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1024, [512] * 4), (2048, [683, 683, 682]), (500, [1000, 1000, 48])],
)
def test_large_row_groups_are_cut_into_equal_parts(group: int, expected: list[int], tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p"] * 2048, "response": ["r"] * 2048})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=group)
    assert [shard.rows for shard in plan(sources(tmp_path / "in.parquet"), rows=1000)] == expected


def test_shards_of_parquet_end_with_row_groups_where_they_can(tmp_path: Path) -> None:
    def cuts(*sizes: int) -> list[int]:
        with pq.ParquetWriter(tmp_path / "in.parquet", pa.schema([("prompt", pa.string())])) as file:
            for size in sizes:
                file.write_table(pa.table({"prompt": pa.array(["p"] * size, pa.string())}))
        return [shard.rows for shard in plan(sources(tmp_path / "in.parquet"), rows=10)]

    assert cuts(4, 4, 4) == [8, 4]
    assert cuts(25, 10, 3) == [9, 8, 8, 10, 3]
    assert cuts(10, 0, 10) == [10, 10]


def test_a_shard_decodes_no_more_of_its_row_group_than_it_has_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"prompt": [f"p{k}" for k in range(2000)]}), tmp_path / "in.parquet")
    decoded: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        for batch in original(self, *args, **kwargs):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    found = sources(tmp_path / "in.parquet")
    assert len(list(read(found[0], plan(found, rows=100)[1]))) == 100
    assert sum(decoded) <= 200 + inputs._STEP


def test_shards_end_by_bytes_too(tmp_path: Path) -> None:
    found = sources(write_lines(tmp_path / "in.jsonl", ["x" * 100] * 6))
    assert [shard.rows for shard in plan(found, most_bytes=250)] == [2, 2, 2]
    pq.write_table(pa.table({"prompt": ["x" * 1000] * 8}), tmp_path / "in.parquet", use_dictionary=False)
    found = sources(tmp_path / "in.parquet")
    assert all(shard.rows <= 2 for shard in plan(found, most_bytes=2200))


def test_the_cut_depends_on_nothing_but_files_and_options(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [{"n": k} for k in range(5)])
    found = sources(tmp_path)
    assert plan(found, rows=2) == plan(list(sources(tmp_path)), rows=2)
    assert [(shard.source, shard.line) for shard in plan(found, rows=2)] == [
        (name, line) for name in ("a.jsonl", "b.jsonl") for line in (1, 3, 5)
    ]


# ------------------------------------------------------------------------- what rows look like


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "id": 1}, [Record(7, "1", "p", "c", as_is=True)]),
        ({"prompt": MESSAGES, "completion": ANSWER}, [Record(7, None, MESSAGES, ANSWER)]),
        ({"prompt": "1+1?", "completion": ANSWER}, [Record(7, None, MESSAGES, ANSWER)]),
        ({"prompt_ids": [1], "completion_ids": [2, 3]}, [Record(7, None, [1], [2, 3])]),
        (
            {"prompt": MESSAGES, "reward_model": {"ground_truth": "2"}, "responses": ["2", "3"]},
            [Record(7, None, MESSAGES, "2", 0), Record(7, None, MESSAGES, "3", 1)],
        ),
        ({"input": "user\nq", "output": "2", "score": 1.0, "step": 3}, [Record(7, None, "user\nq", "2", as_is=True)]),
    ],
)  # fmt: skip
def test_formats_of_trainers(row: dict[str, Any], expected: list[Record]) -> None:
    assert records_of(7, row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "a pair of preferences"),
        ({"prompt": "p", "responses": []}, '"responses" must be a list of texts, got an empty list'),
        ({"prompt": "p", "responses": ["a", None]}, '"responses"[1] must be text, got null'),
        ({"prompt": "p", "responses": ["a", " "]}, '"responses[1]" is empty'),
        ({"prompt": "p", "completion": []}, '"completion" is an empty list of messages'),
        ({"input": "p"}, "no response"),
        ({"input": MESSAGES, "output": "r"}, '"input" must be text, got a list'),
        ({"prompt": "p", "response": b"r"}, '"response" must be text, got bytes'),
        ({"prompt": [("role", "user")], "response": "r"}, '"prompt"[0] must be a message'),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        records_of(1, row)
    assert reason in str(caught.value)


def test_what_a_table_fills_in_is_absent(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": "q", "name": None}], "messages": None, "response": "r", "id": 1},
        {"prompt": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    pq.write_table(
        pa.Table.from_pylist([{"id": None, "response": None} | row for row in rows]), tmp_path / "in.parquet"
    )
    found = sources(tmp_path / "in.parquet")
    records = [records_of(line, row) for _, line, row in all_rows(found, plan(found))]
    assert records == [
        [Record(1, "1", [{"role": "user", "content": "q"}], "r")],
        [Record(2, None, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], None)],
    ]


def test_a_table_without_any_known_column_names_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "in.parquet", row_group_size=2)
    found = sources(tmp_path / "in.parquet")
    seen = all_rows(found, plan(found, rows=2))
    assert [line for _, line, _ in seen] == [1, 2, 3]
    with pytest.raises(ValueError, match="this one has 'text'"):
        records_of(*seen[0][1:])


def test_data_sets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": MESSAGES, "responses": [f"r{k}"], "x": k} for k in range(7)])
    one.select([6, 2, 4, 0, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk(tmp_path / "two")
    found = sources(tmp_path)
    assert [(source.name, source.kind) for source in found] == [
        ("one", "dataset"), ("two/test", "dataset"), ("two/train", "dataset"),
    ]  # fmt: skip
    shards = plan(found, rows=3)
    assert sum(shard.rows for shard in shards) == 5 + 2 + 7
    seen = all_rows(found, shards)
    assert [row["responses"][0] for name, _, row in seen if name == "one"] == ["r6", "r2", "r4", "r0", "r1"]
    assert [line for name, line, _ in seen if name == "two/train"] == list(range(1, 8))
    assert "x" not in seen[0][2]
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is no data set that can be read"):
        plan(sources(tmp_path / "one"))


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"flowgraph-llm\[datasets\]"):
        plan(sources(tmp_path))


# ------------------------------------------------------------------------- limits


def test_a_row_of_ten_million_tokens_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "p", "response": "r"}\n{"prompt_ids": [1], "response_ids": [1')
        for _ in range(100):
            file.write(b",1" * 100_000)
        file.write(b']}\n{"prompt": "p", "response": "s"}\n')
    parsed: list[int] = []
    original = row_of

    def spy(raw: bytes) -> Any:
        parsed.append(len(raw))
        return original(raw)

    monkeypatch.setattr(inputs, "row_of", spy)
    found = sources(path)
    how = {"max_row_bytes": 1 << 20}
    seen = all_rows(found, plan(found, **how), **how)
    assert [line for _, line, _ in seen] == [1, 2, 3]
    assert "the row has 20,000,041 bytes, more than --max-row-bytes 1,048,576" in str(seen[1][2])
    assert seen[2][2]["response"] == "s"
    assert max(parsed) < 100


def test_large_rows_of_tables_do_not_become_objects(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "response_ids": [1] * n} for n in (5, 10_000, 5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    found = sources(tmp_path / "in.parquet")
    seen = [row for *_, row in all_rows(found, plan(found), max_row_bytes=10_000)]
    assert [isinstance(row, ValueError) for row in seen] == [False, True, False]
    assert "more than --max-row-bytes 10,000" in str(seen[1])


def test_text_of_a_table_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    text = pa.array([b"r", b"\xff\xfe", b"s"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["p"] * 3, "response": text}), tmp_path / "in.parquet")
    found = sources(tmp_path / "in.parquet")
    seen = [row for *_, row in all_rows(found, plan(found))]
    assert isinstance(seen[1], ValueError)
    assert [row["response"] for row in (seen[0], seen[2])] == ["r", "s"]


# ------------------------------------------------------------------------- fingerprints


def test_a_change_of_any_kind_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a" * 300_000)
    os.utime(path, ns=(0, 10**9))
    (source,) = sources(path)
    quick, full = fingerprint(source), fingerprint(source, "full")
    assert quick == fingerprint(source)
    os.utime(path, ns=(0, 10**9 + 999))  # as another machine may round it
    assert quick == fingerprint(source)
    unchanged(source, quick)
    path.write_bytes(b"a" * 150_000 + b"b" + b"a" * 149_999)  # in the middle, the same size
    os.utime(path, ns=(0, 2 * 10**9))
    assert fingerprint(source) != quick
    assert fingerprint(source, "full") != full
    with pytest.raises(OSError, match=r"in\.jsonl has changed while it was scored"):
        unchanged(source, quick)
    path.write_bytes(b"a" * 300_000)
    assert fingerprint(source, "full") == full, "a copy has the same"
    path.write_bytes(b"a" * 299_999)
    assert fingerprint(source, "full") != full
