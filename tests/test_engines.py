"""A job from begin to end: what it goes on with, what it refuses, and that its engines give the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill
from flowgraph.adapters import engines, shards
from flowgraph.adapters.engines import Engine, prepare
from flowgraph.adapters.scoring import Tally
from tests.jobs import (
    KILLS,
    KILLS_ONCE,
    assert_close,
    assert_whole,
    contents,
    job_of,
    responses,
    score,
    table_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 24


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows: list[Any] = responses(ROWS)
    rows[7] = "{"
    return write_rows(tmp_path / "in.jsonl", rows)


# ------------------------------------------------------------------------- going on


def test_the_same_job_again_does_nothing_twice(source: Path) -> None:
    out = source.with_name("out")
    done = score(job_of(source, out))
    assert done == {"rows": ROWS, "written": ROWS - 1, "failed": 1, "tokens": done["tokens"], "flags": {}}
    before = kill.parts(out)
    heard: list[float] = []
    job = job_of(source, out)
    tally = Tally(ROWS)

    def unloadable() -> Any:
        raise AssertionError("there is nothing left that needs a model")

    assert engines.score(job, Engine(), tally, advance=heard.append, load=unloadable) == done
    assert kill.parts(out) == before
    assert sum(heard) == ROWS
    assert (tally.rows, tally.written, tally.rate) == (ROWS, ROWS - 1, 0)
    assert_whole(out, source)


def test_overwriting_begins_anew_with_the_same_options_too(source: Path) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    before = kill.parts(out)
    score(job_of(source, out, overwrite=True))
    assert not set(before.values()) & set(kill.parts(out).values())
    assert_whole(out, source)


def test_a_missing_or_damaged_part_is_made_again(source: Path) -> None:
    out = source.with_name("out")
    score(job_of(source, out, reproducible=True))
    expected, before = contents(out), kill.parts(out)
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(b"PAR1")
    (out / ".part-000000.parquet.1234.partial").write_bytes(b"left over")
    score(job_of(source, out, reproducible=True))
    assert contents(out) == expected
    assert kill.parts(out)["part-000000.parquet"] == before["part-000000.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_rows": 5}, "shard_rows: 10 -> 5"),
        ({"measures": True}, "measures: nothing -> True"),
        ({"limits": {"max_row_bytes": 99}}, "max_row_bytes: 16777216 -> 99"),
    ],
)
def test_other_options_are_refused_or_begin_anew(source: Path, change: dict[str, Any], message: str) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    with pytest.raises(ValueError) as caught:
        job_of(source, out, **change)
    assert message in str(caught.value)
    assert "--overwrite" in str(caught.value)
    done = score(job_of(source, out, overwrite=True, **change))
    assert done["rows"] == ROWS
    assert_whole(out, source)


@pytest.mark.parametrize("schema", ["flowgraph-scores/1", None])
def test_a_folder_with_a_manifest_that_cannot_be_read_is_refused_or_begins_anew(
    source: Path, schema: str | None
) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    path = out / shards.MANIFEST
    path.write_text("{" if schema is None else json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    with pytest.raises(ValueError, match="is no manifest of scores"):
        job_of(source, out)
    assert score(job_of(source, out, overwrite=True))["rows"] == ROWS
    assert_whole(out, source)
    (source.with_name("other") / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder of something else"):
        job_of(source, source.with_name("other"), overwrite=True)


def test_other_files_are_refused_or_begin_anew(source: Path) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    write_rows(source, responses(12))
    with pytest.raises(ValueError, match=r"begun otherwise \(in\.jsonl size: \d+ -> \d+"):
        job_of(source, out)
    score(job_of(source, out, overwrite=True))
    assert_whole(out, source)
    assert len(list(out.glob("part-*"))) == 2


def test_a_copy_goes_on_by_its_full_fingerprint(source: Path) -> None:
    out = source.with_name("out")
    manifest, goes_on = prepare(source, out, {}, how="full")
    out.mkdir()
    manifest.write(out)
    os.utime(source, ns=(1, 1))
    assert prepare(source, out, {}, how="full") == (manifest, True)
    with pytest.raises(ValueError, match="fingerprint: full -> quick"):
        prepare(source, out, {})
    assert not goes_on


def test_the_plan_is_not_made_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    monkeypatch.setattr(engines, "plan", None)
    job_of(source, out)


@pytest.mark.parametrize("place", [".", "in", "in/out", ".."])
def test_scores_do_not_go_where_responses_are(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "top" / "in"
    write_rows(folder / "a.jsonl", responses(2))
    with pytest.raises(ValueError, match=r"one is in the other|folder of something else"):
        prepare(folder, (folder.parent / place), {})


def test_two_runs_in_one_folder_are_refused(source: Path) -> None:
    out = source.with_name("out")
    job = job_of(source, out)
    out.mkdir()
    with shards.locked(out), pytest.raises(ValueError, match="another run is writing"):
        score(job)


def test_a_part_that_vanishes_is_missed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.with_name("out")
    job = job_of(source, out)
    monkeypatch.setattr(engines, "_local", lambda *args: iter(()))
    monkeypatch.setattr(engines, "SHOWS_WITHIN", 0.3)
    with pytest.raises(OSError, match=r"3 parts of .* are missing, the first is 0"):
        score(job)


def test_many_files_of_all_kinds(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "in"
    write_rows(folder / "b" / "x.jsonl", responses(5))
    write_rows(folder / "a.jsonl", responses(3))
    pq.write_table(pa.Table.from_pylist(responses(7)), folder / "c.parquet")
    out = tmp_path / "out"
    done = score(job_of(folder, out, shard_rows=4))
    assert done["written"] == 15
    found = table_of(out)
    places = list(zip(found["file"].to_pylist(), found["line"].to_pylist(), strict=True))
    assert places == [
        *(("a.jsonl", k) for k in range(1, 4)),
        *(("b/x.jsonl", k) for k in range(1, 6)),
        *(("c.parquet", k) for k in range(1, 8)),
    ]
    assert found["id"].to_pylist() == [f"r{k}" for count in (3, 5, 7) for k in range(count)]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="engine must be one of local, ray, got 'spark'"):
        Engine("spark")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Engine(workers=0)


# ------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_give_the_same_to_the_byte(source: Path) -> None:
    out, alone = source.with_name("out"), source.with_name("alone")
    score(job_of(source, alone, shard_rows=4, reproducible=True))
    score(job_of(source, out, shard_rows=4, reproducible=True), workers=2)
    assert contents(out) == contents(alone)
    workers = set((source.parent / "workers").read_text().split())
    assert len(workers) == 3


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", responses(ROWS, _9=KILLS_ONCE))
    plain = write_rows(tmp_path / "plain" / "in.jsonl", responses(ROWS, _9="?"))
    score(job_of(source, tmp_path / "out", shard_rows=4), workers=2)
    score(job_of(plain, plain.with_name("expected"), shard_rows=4))
    assert (tmp_path / "killed").exists()
    assert_whole(tmp_path / "out", source)
    found, expected = table_of(tmp_path / "out"), table_of(plain.with_name("expected"))
    assert found["line"].to_pylist() == list(range(1, ROWS + 1))
    others = [k != 9 for k in range(ROWS)]  # there another letter stands
    assert_close(found.filter(others), expected.filter(others))


def test_what_a_dead_worker_left_half_written_is_gone_at_the_end(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", responses(ROWS)), tmp_path / "out"
    job = job_of(source, out, shard_rows=4)

    def dies(rows: float) -> None:
        for folder in (out, out / shards.FAILED):
            folder.mkdir(exist_ok=True)
            (folder / ".part-000001.parquet.0123abcd.partial").write_bytes(b"half")

    engines.score(job, Engine(device="cpu"), Tally(job.manifest.rows), advance=dies)
    assert_whole(out, source)


@pytest.mark.slow
def test_a_row_that_kills_every_worker_is_set_aside(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", responses(ROWS, _9=KILLS))
    done = score(job_of(source, tmp_path / "out", shard_rows=4), workers=2)
    assert (done["written"], done["failed"]) == (ROWS - 1, 1)
    assert_whole(tmp_path / "out", source)
    assert shards.read_failed(tmp_path / "out")[0]["line"] == 10


@pytest.mark.slow
def test_two_rows_of_one_part_that_kill_every_worker_are_set_aside(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", responses(4, _1=KILLS, _3=KILLS))
    done = score(job_of(source, tmp_path / "out", shard_rows=4), workers=2)
    assert (done["written"], done["failed"]) == (2, 2)
    assert [one["line"] for one in shards.read_failed(tmp_path / "out")] == [2, 4]


@pytest.mark.slow
def test_a_model_that_no_worker_can_load_is_named(source: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        score(job_of(source, source.with_name("out"), given={"folder": "/nowhere"}), workers=2)


@pytest.mark.slow
def test_workers_that_die_before_they_begin_end_the_job(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "DIE", 2)
    with pytest.raises(RuntimeError, match="workers die, 2 times without finishing a part"):
        score(job_of(source, source.with_name("out"), given={"dies": True}), workers=2)


@pytest.mark.slow
def test_sigterm_ends_the_workers_and_blames_no_row(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", responses(8)), tmp_path / "out"
    one = kill.process(source, out, workers=2, given={"pause": 0.5})
    until = time.monotonic() + 300
    while not list(out.glob("_doing/part-*")) and time.monotonic() < until:
        time.sleep(0.05)
    one.terminate()
    assert kill.end_of(one) == 143
    assert all(shards._noted(note) == (None, {}) for note in out.glob("_doing/part-*.json"))
    for worker in (tmp_path / "workers").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)


# ------------------------------------------------------------------------- Ray


@pytest.mark.parametrize(
    ("engine", "cluster", "expected", "warns"),
    [
        ({}, {"CPU": 64, "GPU": 8}, (8, 1.0), False),
        ({"gpus": 0.5}, {"CPU": 64, "GPU": 8}, (16, 0.5), False),
        ({"workers": 3}, {"CPU": 64, "GPU": 8}, (3, 1.0), False),
        ({"device": "cpu"}, {"CPU": 64, "GPU": 8}, (1, 0.0), False),
        ({}, {"CPU": 64}, (1, 0.0), False),
        ({"gpus": 1}, {"CPU": 64}, (1, 1), True),
        ({"workers": 9}, {"CPU": 64, "GPU": 8}, (9, 1.0), True),
        ({"workers": 2, "cpus": 2}, {"CPU": 2}, (2, 0.0), True),
    ],
)
def test_what_ray_reserves(
    engine: dict[str, Any], cluster: dict[str, float], expected: Any, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert engines._reserved(Engine("ray", **{"workers": None} | engine), cluster) == expected
    assert ("what does not fit waits" in caplog.text) == warns


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with kill.cluster(gpus=1) as found:  # in name only
        yield found


RAY: dict[str, Any] = {"name": "ray", "workers": 2, "cpus": 0.5}


@pytest.mark.slow
def test_ray_gives_the_same_to_the_byte(source: Path, address: str) -> None:
    out, alone = source.with_name("out"), source.with_name("alone")
    score(job_of(source, alone, shard_rows=3, reproducible=True, measures=True, graphs=True))
    score(job_of(source, out, shard_rows=3, reproducible=True, measures=True, graphs=True), **RAY)
    assert contents(out) == contents(alone)
    assert_whole(out, source)


@pytest.mark.slow
def test_ray_goes_on_where_this_process_stopped(source: Path, address: str) -> None:
    out = source.with_name("out")
    score(job_of(source, out))
    expected = table_of(out)
    before = kill.parts(out)
    (out / "part-000001.parquet").unlink()
    score(job_of(source, out), **RAY)
    assert_close(table_of(out), expected)
    assert {name: one for name, one in kill.parts(out).items() if "000001" not in name} == {
        name: one for name, one in before.items() if "000001" not in name
    }


@pytest.mark.slow
def test_ray_gives_each_actor_its_gpu(source: Path, address: str) -> None:
    done = score(job_of(source, source.with_name("out")), name="ray", workers=None, cpus=0.5, gpus=1)
    assert done["written"] == ROWS - 1
    assert len(set((source.parent / "workers").read_text().split())) == 1


@pytest.mark.slow
def test_relative_paths_are_those_of_the_driver(source: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    given = {"folder": str(source.parent)}
    assert score(job_of(Path("in.jsonl"), Path("out"), given=given), **RAY)["written"] == ROWS - 1
    assert_whole(source.with_name("out"), source)
    job = job_of(Path("in.jsonl"), Path("other"), given=given)
    source.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        score(job, **RAY)
    assert caught.value.filename == str(source)


@pytest.mark.slow
def test_a_model_that_no_actor_can_load_is_named(source: Path, address: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        score(job_of(source, source.with_name("out"), given={"folder": "/nowhere"}), **RAY)


class Odd(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device", "/out"), OSError, "[Errno 28] No space left on device: '/out'"),
        (FileNotFoundError(2, "No such file", Path("/in")), FileNotFoundError, "[Errno 2] No such file: '/in'"),
        (OSError("in.jsonl has changed"), OSError, "in.jsonl has changed"),
        (TimeoutError("it took too long"), TimeoutError, "it took too long"),
        (json.JSONDecodeError("no", "{", 0), ValueError, "no: line 1 column 1 (char 0)"),
        (MemoryError("x"), RuntimeError, "MemoryError: x"),
        (Odd("a", "b"), RuntimeError, "Odd: a b"),
    ],
)
def test_errors_travel_between_processes(error: Exception, kind: type[Exception], text: str) -> None:
    found = engines._unpacked(json.loads(json.dumps(engines._packed(error))))
    assert (type(found), str(found)) == (kind, text)


@pytest.mark.slow
def test_what_stops_an_actor_stops_the_job_in_its_own_words(source: Path, address: str) -> None:
    with pytest.raises(TimeoutError, match=r"^reading rows of in\.jsonl took longer than --io-timeout"):
        score(job_of(source, source.with_name("out"), given={"hangs": True}, limits={"io_timeout": 2}), **RAY)
    score(job_of(source, source.with_name("out")), **RAY)
    assert_whole(source.with_name("out"), source)


@pytest.mark.slow
def test_a_row_that_kills_every_actor_is_set_aside(tmp_path: Path, address: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", responses(ROWS, _9=KILLS, _2=KILLS_ONCE))
    done = score(job_of(source, tmp_path / "out", shard_rows=4), **RAY)
    assert (done["written"], done["failed"]) == (ROWS - 1, 1)
    assert_whole(tmp_path / "out", source)
    assert shards.read_failed(tmp_path / "out")[0]["line"] == 10
