"""The job in one process: its rows are those of the tracer, and what goes wrong with one row costs no other."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from flowgraph import Tracer
from flowgraph.adapters import engines, scoring, shards
from flowgraph.adapters.records import CERTIFICATE, COLUMNS, Record
from flowgraph.adapters.scoring import Limits, Tally
from flowgraph.adapters.shards import graph_of, read_failed
from flowgraph.measures import MEASURES
from tests.jobs import (
    NAN,
    WINDOW,
    assert_close,
    assert_whole,
    contents,
    job_of,
    load,
    responses,
    score,
    table_of,
    write_rows,
)
from tests.written import TOKENIZER

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 23


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", responses(ROWS))


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    return load({"folder": tmp_path_factory.mktemp("model")})[0]


def reasons(out: Path) -> dict[int, str]:
    """Line -> why it was set aside."""
    return {one["line"]: one["reason"] for one in read_failed(out)}


# ------------------------------------------------------------------------- rows


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_rows_are_those_of_the_tracer_whatever_the_batches(source: Path, tracer: Tracer, batch_tokens: int) -> None:
    out = source.with_name("out")
    assert score(job_of(source, out, limits={"batch_tokens": batch_tokens}))["written"] == ROWS
    assert_whole(out, source)
    found = table_of(out)
    assert found["line"].to_pylist() == list(range(1, ROWS + 1))
    for row, given in zip(found.to_pylist(), responses(ROWS), strict=True):
        trace = tracer(given["question"], given["response"])
        response = trace.graph.response_mask
        assert (row["file"], row["id"], row["choice"]) == ("in.jsonl", given["id"], 0)
        assert row["response_token_ids"] == trace.graph.token_ids[response].tolist()
        assert row["answer"] == trace.answer == str(row["line"] + 6)
        for name in ("throughput", "reach"):
            expected = getattr(trace, name)[response]
            torch.testing.assert_close(torch.tensor(row[name]), expected, rtol=0, atol=1e-5)
        assert sorted(row["weights"]) == sorted(trace.weights[response].tolist())


def test_messages_are_encoded_as_the_tracer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template, raising=False)
    tracer = load({"folder": tmp_path, "options": {"question": "user"}})[0]
    example = [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "A: 4"}]
    prompt, text = [*example, {"role": "user", "content": "3 and 3?"}], "It is 6.\nA: 6"
    for response in (text, [{"role": "assistant", "content": text}]):
        found, trace = scoring.encode(tracer, Record(1, None, prompt, response), chat=True), tracer(prompt, response)
        assert found.question_mask is not None and torch.equal(found.token_ids, trace.graph.token_ids)
        for name in ("prompt_mask", "response_mask", "question_mask"):
            assert torch.equal(getattr(found, name), getattr(trace.spans, name))


def test_batches_hold_the_token_budget_and_long_rows_go_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    original = Tracer.from_ids

    def spy(self: Tracer, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Tracer, "from_ids", spy)
    score(job_of(source, source.with_name("out"), shard_rows=100, limits={"batch_tokens": 160}))
    assert sum(rows for rows, _ in sizes) == ROWS
    assert all(rows * tokens <= 160 or rows == 1 for rows, tokens in sizes)
    assert max(rows for rows, _ in sizes) > 1
    assert max(tokens for _, tokens in sizes) <= 160


def test_a_reproducible_job_is_equal_to_the_byte(source: Path, tracer: Tracer) -> None:
    """Between runs, numbers of threads and settings of batches; and its numbers are exactly those of the tracer."""
    outs = [source.with_name(name) for name in ("a", "b")]
    threads = torch.get_num_threads()
    for out, tokens, used in zip(outs, (1, 5000), (1, 2), strict=True):
        torch.set_num_threads(used)
        score(job_of(source, out, reproducible=True, limits={"batch_tokens": tokens}))
        assert not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    assert contents(outs[0]) == contents(outs[1])
    row = table_of(outs[0]).slice(4, 1).to_pylist()[0]
    trace = tracer(*(responses(5)[4][name] for name in ("question", "response")))
    assert row["reach"] == trace.reach[trace.graph.response_mask].tolist()


def test_columns_and_metadata(source: Path) -> None:
    out = source.with_name("out")
    score(job_of(source, out, measures=True))
    file = pq.ParquetFile(out / "part-000001.parquet")
    names = file.schema_arrow.names
    assert set(COLUMNS.names) < set(names)
    assert names == ["file", "line", "choice", *COLUMNS.names[1:], *CERTIFICATE, *MEASURES]
    assert file.schema_arrow.metadata[b"flowgraph.schema"] == shards.SCHEMA.encode()
    about = json.loads(file.schema_arrow.metadata[b"flowgraph.shard"])
    assert (about["written"], about["failed"], about["shard"]["line"]) == (10, 0, 11)
    table = table_of(out)
    assert max(table["dropped"].to_pylist()) < 1e-5
    assert max(table["unabsorbed"].to_pylist()) < 1e-5
    assert all(0 < value < 1 for value in table["gini"].to_pylist())


def test_graphs_are_kept_and_found_by_row(source: Path, tracer: Tracer) -> None:
    out = source.with_name("out")
    score(job_of(source, out, graphs=True, reproducible=True))
    for row in (0, 9, 10, 22):
        given = responses(ROWS)[row]
        expected = tracer(given["question"], given["response"]).graph
        name = table_of(out)["graph"].to_pylist()[row]
        graph = graph_of(out, name)
        assert (graph.model, graph.layers, graph.rule) == (expected.model, expected.layers, expected.rule)
        for key in ("edge_index", "edge_weight", "answer_mask", "token_ids"):
            assert torch.equal(graph[key], expected[key])
    for bad, message in (
        ("../x/1", "is no name of a graph"),
        ("part-9/0", "no file"),
        ("part-000000/99", "cannot load"),
    ):
        with pytest.raises(ValueError, match=message):
            graph_of(out, bad)


def test_several_responses_of_one_row(tmp_path: Path, tracer: Tracer) -> None:
    texts = ["It is 42. The answer is 42.", "So it is 41. The answer is 41.", "?" * (WINDOW + 1)]
    source = write_rows(tmp_path / "in.jsonl", [*responses(1), {"question": "6 * 7?", "responses": texts, "id": "x"}])
    out = tmp_path / "out"
    done = score(job_of(source, out))
    assert (done["rows"], done["written"], done["failed"]) == (2, 3, 1)
    table = table_of(out)
    assert list(zip(table["line"].to_pylist(), table["choice"].to_pylist(), strict=True)) == [(1, 0), (2, 0), (2, 1)]
    assert table["answer"].to_pylist() == ["7", "42", "41"]
    (failed,) = read_failed(out)
    assert (failed["file"], failed["line"], failed["choice"], failed["id"]) == ("in.jsonl", 2, 2, "x")
    assert_whole(out, source)


def test_what_the_user_wrote_is_the_source_of_flow_in_a_batch(tmp_path: Path) -> None:
    """Rows with chat messages need a template; without one they are set aside, each with the reason."""
    source = write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "q"}]}, *responses(2)])
    score(job_of(source, tmp_path / "out", given={"options": {"question": "user"}}))
    assert "must be an assistant one" in reasons(tmp_path / "out")[1]
    assert "--question user needs chat messages" in reasons(tmp_path / "out")[2]


# ------------------------------------------------------------------------- what goes wrong with a row


def test_rows_that_cannot_be_traced_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    rows: list[Any] = responses(8, _3=NAN)
    rows[1] = '{"question": "q", "resp'
    rows[4] = {"question": "q", "response": "long " * WINDOW, "id": "long"}
    rows[5] = {"prompt_ids": [1], "response_ids": [2, 10_000]}
    rows[6] = {"prompt_ids": [1], "response_ids": [2] * 10_000}
    source = write_rows(tmp_path / "in.jsonl", rows)
    source.write_bytes(source.read_bytes() + b'{"question": "caf\xe9", "response": "r"}\n')
    out = tmp_path / "out"
    done = score(job_of(source, out))
    assert (done["rows"], done["written"], done["failed"]) == (9, 3, 6)
    assert table_of(out)["line"].to_pylist() == [1, 3, 8]
    found = reasons(out)
    assert "not JSON" in found[2]
    assert "NaN" in found[4] or "finite" in found[4]
    assert f"more than the {WINDOW} that the model can see" in found[5]
    assert "token id 10000 is unknown to the model" in found[6]
    assert "the row has 10,001 tokens" in found[7]
    assert "not UTF-8" in found[9]
    assert_whole(out, source)


def test_one_row_of_nan_changes_no_other(tmp_path: Path) -> None:
    """To the bit it may not be: the batch is traced again in halves."""
    good = write_rows(tmp_path / "good.jsonl", responses(12))
    bad = write_rows(tmp_path / "bad" / "good.jsonl", responses(12, _5=NAN))
    for source in (good, bad):
        score(job_of(source, source.with_name("out"), shard_rows=12))
    kept = table_of(good.with_name("out"))
    assert_close(kept.filter([k != 5 for k in range(12)]), table_of(bad.with_name("out")))


MEMORY: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to"),
]


@pytest.mark.parametrize("error", MEMORY)
def test_too_little_memory_makes_smaller_batches_and_then_costs_a_row(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    expected = source.with_name("expected")
    score(job_of(source, expected))
    sizes: list[int] = []
    original = Tracer.from_ids

    def small(self: Tracer, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(input_ids.numel())
        if input_ids.numel() > 250 or input_ids.shape[1] > 75:
            raise error()
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Tracer, "from_ids", small)
    out = source.with_name("out")
    done = score(job_of(source, out, limits={"batch_tokens": 10_000}))
    assert 0 < done["failed"] < ROWS
    for reason in reasons(out).values():
        assert "out of memory with this row alone, " in reason
    kept = [line in set(table_of(out)["line"].to_pylist()) for line in table_of(expected)["line"].to_pylist()]
    assert_close(table_of(expected).filter(kept), table_of(out))
    assert_whole(out, source)
    later = sizes[len(sizes) // 2 :]
    assert sum(size > 250 for size in later) <= done["failed"] + 2, "it has learnt what there is room for"


def test_a_lost_device_ends_the_job_and_sets_nothing_aside(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Tracer, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    out = source.with_name("out")
    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "from_ids", lost)
        with pytest.raises(RuntimeError, match="CUDA error"):
            score(job_of(source, out))
    assert not list(out.glob("part-*"))
    assert score(job_of(source, out))["written"] == ROWS


def test_a_row_that_costs_the_device_each_time_is_set_aside_at_last(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = source.with_name("out"), Tracer.from_ids
    long = max(map(len, (row["response"] for row in responses(ROWS))))

    def lost(self: Tracer, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] > long + 15:  # the longest row, or a batch with it
            raise RuntimeError("CUDA error: device-side assert triggered")
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Tracer, "from_ids", lost)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="CUDA error"):
            score(job_of(source, out, shard_rows=100))
    done = score(job_of(source, out, shard_rows=100))
    assert (done["written"], done["failed"]) == (ROWS - 1, 1)
    assert "2 processes died" in next(iter(reasons(out).values()))


def test_a_row_that_ends_its_process_twice_is_left_alone(source: Path) -> None:
    """What two runs left that died in the work on row 3: the third is warned."""
    out = source.with_name("out")
    job = job_of(source, out)
    out.mkdir()
    job.manifest.write(out)
    doing = out / shards.DOING / "part-000000.json"
    doing.parent.mkdir()
    for deaths in (0, 1):
        doing.write_text(json.dumps({"row": "4/0", "deaths": {"4/0": deaths, "5/0": 1}}))
        if not deaths:
            attempt = shards.Attempt(out, job.manifest.shards[0])
            assert attempt.again and not attempt.killed("4/0")
    done = score(job)
    assert (done["written"], done["failed"]) == (ROWS - 1, 1)
    assert "2 processes died while they traced it" in reasons(out)[4]
    assert_whole(out, source)


# ------------------------------------------------------------------------- what goes wrong with the machine


def test_a_full_disk_stops_the_job_and_leaves_no_half_of_anything(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.with_name("out")
    real, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            score(job_of(source, out))
    assert 1 <= len(list(out.glob("part-*.parquet"))) < 3
    assert not list(out.rglob("*.partial"))
    first = contents(out)
    assert score(job_of(source, out))["written"] == ROWS
    assert_whole(out, source)
    assert all(contents(out)[name] == raw for name, raw in first.items() if name.startswith("part-"))


def test_a_file_system_that_hangs_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, answers = source.with_name("out"), threading.Event()
    job = job_of(source, out)
    job = scoring.Job(**{**vars(job), "limits": Limits(io_timeout=2)})  # what does not hang is done in milliseconds
    out.mkdir()
    worker = scoring.Worker(job)

    def hangs(*args: Any) -> Any:
        answers.wait()
        return iter(())

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", hangs)
            with pytest.raises(TimeoutError, match=r"writing part 0 of .* took longer than --io-timeout 2 s"):
                list(worker.run(job.manifest.shards[:1]))
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "read", hangs)
            with pytest.raises(TimeoutError, match=r"reading rows of in\.jsonl took longer"):
                list(worker.run(job.manifest.shards[1:]))
    finally:
        answers.set()


def test_a_file_that_changes_under_the_job_stops_it(source: Path) -> None:
    out = source.with_name("out")
    job = job_of(source, out)
    with source.open("a") as file:
        file.write("{}\n")
    with pytest.raises(OSError, match=r"in\.jsonl has changed while it was scored"):
        score(job)
    with pytest.raises(ValueError, match=r"begun otherwise \(in\.jsonl size: "):
        job_of(source, out)


@pytest.fixture
def no_handler() -> Iterator[None]:
    """Of SIGTERM. Ray leaves one behind in every process in which it ran."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("no_handler")
def test_sigterm_ends_a_job_in_order_and_no_row_is_blamed(tmp_path: Path) -> None:
    """As schedulers send it, each time while the second row of a part is in work, which is tried row by row."""
    source, out = write_rows(tmp_path / "in.jsonl", responses(3)), tmp_path / "out"
    doing = out / shards.DOING
    doing.mkdir(parents=True)
    job = job_of(source, tmp_path / "plan")
    job.manifest.write(out)
    (doing / "part-000000.json").write_text(json.dumps({"row": None, "deaths": {"3/0": 1}}))

    def ends(rows: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            engines.score(job_of(source, out), engines.Engine(device="cpu"), Tally(3), advance=ends)
        assert ended.value.code == 143
        assert json.loads((doing / "part-000000.json").read_text()) == {"row": None, "deaths": {"3/0": 1}}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert score(job_of(source, out))["written"] == 3


@pytest.mark.usefixtures("no_handler")
@pytest.mark.parametrize("case", ["a handler", "another thread"])
def test_sigterm_is_left_to_whoever_handles_it(case: str) -> None:
    def handler(number: int, frame: Any) -> None: ...

    found: list[Any] = []

    def look() -> None:
        with scoring.in_order():
            found.append(signal.getsignal(signal.SIGTERM))

    if case == "a handler":
        signal.signal(signal.SIGTERM, handler)
        look()
    else:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == [handler if case == "a handler" else signal.SIG_DFL]


def test_a_model_that_has_to_be_reproducible_is_loaded_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs while it is loaded, and CUDA reads CUBLAS_WORKSPACE_CONFIG when it starts."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[Any] = []

    def spy(given: Any) -> Any:
        seen.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled()))
        return load(given)

    job = job_of(write_rows(tmp_path / "in.jsonl", responses(2)), tmp_path / "out", reproducible=True)
    scoring.Worker(scoring.Job(**{**vars(job), "model": scoring.Model(spy, {"folder": str(tmp_path)})}))
    assert seen == [(":4096:8", True)]


@pytest.mark.parametrize(
    ("text", "lost", "short"),
    [
        ("CUDA error: device-side assert triggered", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False, True),
        ("CUDA error: out of memory", False, True),
        ("size mismatch", False, False),
    ],
)
def test_memory_of_a_device_is_not_a_lost_device(text: str, lost: bool, short: bool) -> None:
    error = RuntimeError(text)
    assert (scoring.device_is_lost(error), scoring.is_out_of_memory(error)) == (lost, short)


# ------------------------------------------------------------------------- counts


def test_the_tally_counts_rows_rate_and_what_is_left() -> None:
    tally = Tally(4000)
    tally.add(1000, 990, 10, 5000, {"no_answer": 3})
    tally.begin()
    tally._begun -= 10
    tally.add(1000, 1000, 0, 5000, {"no_answer": 1})
    assert tally.rate == pytest.approx(100, rel=0.01)
    assert tally.token_rate == pytest.approx(500, rel=0.01)
    assert tally.flags == {"no_answer": 4}
    assert re.fullmatch(r"2,000 of 4,000 rows, (100.0|99.9)/s, 10 set aside, 0:00:(19|20) left", str(tally))


@pytest.mark.parametrize("name", ["batch_tokens", "max_row_bytes", "io_timeout"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
        Limits(**{name: 0})
