"""A folder of scores: its files are whole or absent, its manifest says what it is of, and others' files stay."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph.adapters import shards
from flowgraph.adapters.inputs import Shard
from flowgraph.adapters.shards import (
    Attempt,
    Later,
    Manifest,
    clear,
    deaths,
    finished,
    graph_of,
    known,
    locked,
    pardon,
    schema,
    whole,
    write_shard,
)
from tests.graphs import random_graph

SHARD = Shard(3, "a.jsonl", 31, 2, 310, 330)
INPUTS = {"a.jsonl": {"size": 9, "sha256": "ff", "changed": 1}}
MANIFEST = Manifest({"model": "m", "options": {"top": 0.4}}, INPUTS, [SHARD])
ROW = {
    "file": "a.jsonl", "line": 31, "choice": 0, "id": None, "prompt_tokens": 1, "response_tokens": 1,
    "response_token_ids": [5], "weights": [1.0], "throughput": [0.0], "reach": [0.0], "answer": None, "flags": [],
    "dropped": 0.0, "lost": 0.0, "unabsorbed": 0.0, "unlisted": 0.0, "reach_bound": 0.0, "flow_bound": 0.0,
    "top_overlap": None,
}  # fmt: skip


def table() -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist([ROW], schema=schema())


def about() -> dict[str, Any]:
    return {"job": MANIFEST.digest, "written": 1, "failed": 0, "tokens": 2, "flags": {}}


# ------------------------------------------------------------------------- whole or absent


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_not_finished_is_absent_and_what_was_there_stays(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    for before in (None, "old"):
        if before:
            path.write_text(before)
        with pytest.raises(error), whole(path) as hidden:
            hidden.write_text("new")
            raise error
        assert [one.read_text() for one in tmp_path.iterdir()] == ([before] if before else [])
    with whole(path) as hidden:
        assert hidden.name.startswith(".x.")
        hidden.write_text("new")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """On Windows a folder can't be opened, and a file that is only read can't be synced; SMB and FUSE refuse fsync."""
    really_open, really_sync = os.open, os.fsync

    def opens(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if number == errno.EACCES and os.path.isdir(path):
            raise PermissionError(number, os.strerror(number), str(path))
        return really_open(path, flags, *args, **kwargs)

    def syncs(file: int) -> None:
        if number == errno.EINVAL and stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR and not stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        really_sync(file)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "fsync", syncs)
    with whole(tmp_path / "x") as hidden:
        hidden.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        shards._sync(tmp_path if number == errno.EINVAL else tmp_path / "x")


def test_a_shard_is_there_when_its_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finished(tmp_path, SHARD, MANIFEST.digest) is None
    failed = [{"file": "a.jsonl", "line": 32, "choice": None, "id": None, "reason": "not JSON"}]
    renamed: list[str] = []
    real = os.replace

    def spy(source: Any, target: Path) -> None:
        renamed.append(Path(target).relative_to(tmp_path).as_posix())
        real(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_shard(tmp_path, SHARD, table(), failed, about())
    assert renamed == ["_failed/part-000003.jsonl", "part-000003.parquet"]
    assert finished(tmp_path, SHARD, MANIFEST.digest) == {**about(), "shard": SHARD.to_dict()}
    assert shards.read_failed(tmp_path) == failed
    assert finished(tmp_path, SHARD, "another job") is None
    assert finished(tmp_path, Shard(3, "a.jsonl", 31, 3, 310, 340), MANIFEST.digest) is None
    write_shard(tmp_path, SHARD, table(), [], about())
    assert shards.read_failed(tmp_path) == [], "of an earlier attempt"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_damaged_shard_is_not_there(tmp_path: Path, keep: int) -> None:
    write_shard(tmp_path, SHARD, table(), [], about())
    path = shards.part(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:keep])
    assert finished(tmp_path, SHARD, MANIFEST.digest) is None


def test_parquet_files_of_others_are_no_shards(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table(), shards.part(tmp_path, 3))
    assert finished(tmp_path, SHARD, MANIFEST.digest) is None


def test_later_gives_the_value_or_the_error_or_says_that_it_takes_too_long() -> None:
    assert Later(lambda: 5).value(5, "it") == 5

    def wrong() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Later(wrong).value(5, "it")
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"reading a took longer than --io-timeout 0\.1 s"):
        Later(never.wait).value(0.1, "reading a")
    never.set()


# ------------------------------------------------------------------------- manifest


def test_a_manifest_reads_back_and_knows_what_differs(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    found = Manifest.read(tmp_path)
    assert found == MANIFEST
    assert found.digest == MANIFEST.digest
    assert found.changes(MANIFEST) == []
    other = Manifest({"model": "m", "options": {"top": 0.5}}, {"b.jsonl": INPUTS["a.jsonl"]}, [])
    assert found.changes(other) == [
        "options top: 0.4 -> 0.5",
        "a.jsonl size: 9 -> nothing",
        "a.jsonl sha256: ff -> nothing",
        "a.jsonl changed: 1 -> nothing",
        "b.jsonl size: nothing -> 9",
        "b.jsonl sha256: nothing -> ff",
        "b.jsonl changed: nothing -> 1",
    ]
    assert other.digest != found.digest
    copied = Manifest(MANIFEST.settings, {"a.jsonl": {**INPUTS["a.jsonl"], "changed": 2}}, [])
    assert copied.digest == found.digest, "a copy of the input has the same rows"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"schema": "flowgraph-scores/1"}', '{"schema": "flowgraph-scores/2"}', "[" * 100_000),
        json.dumps({"schema": shards.SCHEMA, "settings": {}, "inputs": {}, "shards": [{"x": 1}]}),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / shards.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"_manifest\.json is no manifest of scores"):
        known(tmp_path)


def test_folders_of_something_else_are_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert known(out) is None
    out.mkdir()
    assert known(out) is None
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is a folder of something else, it holds thesis\.tex"):
        known(out)
    MANIFEST.write(out)
    assert known(out) == MANIFEST
    write_shard(out, SHARD, table(), [{"line": 1}], about())
    clear(out)
    assert [one.name for one in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        known(out / "thesis.tex")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another run is writing"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


# ------------------------------------------------------------------------- deaths


def test_deaths_are_counted_by_the_row_that_was_in_work(tmp_path: Path) -> None:
    first = Attempt(tmp_path, SHARD)
    assert not first.again
    first.at("31/0")  # dies here
    second = Attempt(tmp_path, SHARD)
    assert second.again and not second.killed("31/0")
    second.at("32/0")  # dies here
    third = Attempt(tmp_path, SHARD)
    third.at("31/0")  # dies here
    fourth = Attempt(tmp_path, SHARD)
    assert fourth.killed("31/0") and not fourth.killed("32/0")
    fourth.over()
    assert not Attempt(tmp_path, SHARD).again


@pytest.mark.parametrize("text", ["", "{", "[]", '{"deaths": []}', '{"deaths": {"1/0": "x"}}'])
def test_a_note_that_was_cut_off_counts_nothing(tmp_path: Path, text: str) -> None:
    Attempt(tmp_path, SHARD)
    (tmp_path / shards.DOING / "part-000003.json").write_text(text)
    assert Attempt(tmp_path, SHARD).again


def test_who_leaves_in_order_blames_no_row_and_forgets_no_death(tmp_path: Path) -> None:
    first = Attempt(tmp_path, SHARD)
    first.leave()
    assert not Attempt(tmp_path, SHARD).again
    second = Attempt(tmp_path, SHARD)
    second.at("31/0")  # dies here
    third = Attempt(tmp_path, SHARD)
    third.at("32/0")
    third.leave()
    fourth = Attempt(tmp_path, SHARD)
    assert fourth.again and fourth.deaths == {"31/0": 1}


def test_deaths_are_counted_and_rows_in_work_pardoned(tmp_path: Path) -> None:
    assert deaths(tmp_path) == 0
    attempt = Attempt(tmp_path, SHARD)
    assert deaths(tmp_path) == 1
    attempt.at("31/0")
    assert deaths(tmp_path) == 2
    attempt = Attempt(tmp_path, SHARD)
    attempt.at("32/0")
    assert deaths(tmp_path) == 3
    pardon(tmp_path)
    assert deaths(tmp_path) == 2
    assert Attempt(tmp_path, SHARD).deaths == {"31/0": 1}


# ------------------------------------------------------------------------- graphs


def test_graphs_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    graph = random_graph(6)
    other = random_graph(6)
    other.prompt_mask = graph.prompt_mask
    other.token_ids = torch.cat([graph.token_ids, graph.token_ids])[: len(graph.token_ids)]
    (tmp_path / shards.GRAPHS).mkdir()
    shards._save_graphs(tmp_path / shards.GRAPHS / "part-000003.safetensors", [graph, other])
    for number, one in enumerate((graph, other)):
        found = graph_of(tmp_path, f"part-000003/{number}")
        for name, value in one.to_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[name], value), name
