"""`python -m benchmarks.gpu` works from end to end on a CPU; goes on, stops in time, says what failed, invents nothing.

Kernels run in Triton's interpreter, in the worker's own process.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import page, predict, present, stages, worker
from benchmarks.gpu.plan import STAGES, TILES, Case, plan
from benchmarks.gpu.shapes import SHAPES, ids_of, masks_of, model_of
from benchmarks.run import RESULTS, Store
from flowgraph import Tracer, rows
from flowgraph.solve import SOLVERS

CPU = torch.device("cpu")
CASES = plan("tiny")


# --- shapes and predictions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "published"), [("qwen3-4b", 4.02e9), ("qwen3-8b", 8.19e9), ("llama-3.1-8b", 8.03e9)])
def test_shapes_have_the_published_numbers_of_parameters(name: str, published: float) -> None:
    shape = SHAPES[name]
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    assert shape.layers * shape.numbers_per_layer + embeddings == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_random_model_is_whole(kind: str) -> None:
    """Made without its weights; so what is no weight has to be made good."""
    rope = SHAPES["llama-3.1-8b" if kind == "llama" else "qwen3-4b"].rope
    shape = replace(SHAPES["tiny"], kind=kind, rope=rope)
    model = model_of(shape, CPU, 512)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    fresh = type(model)(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(one.numel() for one in model.parameters()) == sum(one.numel() for one in fresh.parameters())
    graph = Tracer(model, mode="sparse").from_ids(ids_of(shape, 256), **masks_of(256))[0].graph
    assert 2 < graph.num_edges / 256 < 64


def test_work_is_counted_as_by_hand() -> None:
    """Qwen3-4B: 12 layers in the middle, 32 heads of 128, 8,192 tokens: the numbers of docs/gpu.md."""
    shape = SHAPES["qwen3-4b"]
    assert (shape.chosen, shape.deepest) == (12, 24)
    work = predict.rows(shape, 8192, "triton")
    assert work.attention == pytest.approx(3.3e12, rel=0.01) and work.powers == pytest.approx(1.3e10, rel=0.01)
    assert work.cache == pytest.approx(39e9, rel=0.01)
    linear, attention, _ = predict.forward(shape, 8192)
    assert linear.matrix == pytest.approx(2 * 3.63e9 * 8192, rel=0.01)
    assert attention.attention == pytest.approx(36 * 4 * 32 * 128 * 8192**2 / 2, rel=0.01)
    resource, least = predict.least(predict.Work(matrix=989e12, memory=3.35e12 * 2))
    assert resource == "memory" and least == pytest.approx(2)
    assert predict.seconds(work, work) == pytest.approx(2 * predict.seconds(work))
    longer = predict.seconds(predict.rows(shape, 65536, "triton")) / predict.seconds(
        predict.rows(shape, 32768, "triton")
    )
    assert 3.5 < longer < 4.5


def test_predictions_go_by_the_sizes_that_the_code_has() -> None:
    cuda = torch.device("cuda")
    for N in (100, 1024, 8192, 16_384, 16_385, 131_072):
        assert predict.block_rows(N) == rows.rows_of_a_block(N, cuda)
        assert predict.band_rows(N) == rows.rows_of_a_band(N, predict.block_rows(N))
        assert predict.is_kept(N) == (rows.of_device(rows.KEPT_BYTES, cuda) >= 4 * N * N / 2)
    pytest.importorskip("triton")
    from flowgraph.triton_rows import tile_for

    tile = tile_for(1024, 128, torch.bfloat16)
    assert (tile.rows, tile.columns) == (predict.TILE_ROWS, predict.TILE_COLUMNS)
    assert TILES[0] == f"tile {tile.rows}x{tile.columns} warps {tile.warps} stages {tile.stages}"


def test_the_plan_holds_every_stage_and_every_case_once() -> None:
    for shape in ("tiny", "real"):
        cases = plan(shape)
        assert len({case.key for case in cases}) == len(cases) and {case.stage for case in cases} == set(STAGES)
    real = {case.key for case in plan("real")}
    for key in (
        "kernels: triton, qwen3-4b@32768",
        "credits: exact triton, qwen3-4b@1024",
        "long: sparse torch, qwen3-4b@131072",
        "long: exact triton, qwen3-8b@32768",
        "long: sparse triton offload, qwen3-4b@131072",
        "long: exact triton no edges offload, qwen3-4b@131072",
        "solves: scatter cupy, qwen3-4b@8192",
        "scorer: sparse triton, qwen3-4b@8192",
    ):
        assert key in real


# --- the run ----------------------------------------------------------------------------------------------------------


class Made:
    """A worker that says what it is told to, and notes what it was asked."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.answers, self.alive, self.started = answers or {}, True, 0
        self.asked: list[str] = []

    def start(self) -> Any:
        self.started += 1
        self.alive = True
        return self

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        key = Case(*request["case"]).key
        self.asked.append(key)
        found = self.answers.get(key, {"measured": {"seconds": 1.0}})
        if isinstance(found, Exception):
            self.alive = False
            raise found
        return dict(found)

    def is_alive(self) -> bool:
        return self.alive

    def close(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "gpu.json", fresh=False)
    made.content["machine"] = {"card": "made up", "device": "cpu", "commit": "abc"}
    return made


def results(store: Store) -> dict[str, Any]:
    """What is in the file."""
    return {f"{one['case']}@{one['tokens']}": one for one in json.loads(store.path.read_text())["results"]}


def clock(*times: float) -> Callable[[], float]:
    """A clock that shows the times one after the other, and then the last one."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_results_are_kept_at_once_and_what_is_there_is_not_measured_again(store: Store) -> None:
    worker = Made()
    script.measure(store, script.left(store, CASES[:3]), 1e18, worker.start, seed=5)
    assert worker.asked == [case.key for case in CASES[:3]] == list(results(store))
    one = results(store)[CASES[0].key]
    assert one["measured"] == {"seconds": 1.0} and one["expected"] == CASES[0].expected and one["seed"] == 5
    again = Store(store.path, fresh=False)
    assert script.left(again, CASES) == CASES[3:]
    assert script.left(again, CASES, only=["ceilings"]) == CASES[:1]
    assert script.left(Store(store.path, fresh=True), CASES) == CASES


def test_after_the_deadline_nothing_begins(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    worker = Made()
    # Asked before each case, at its begin and at its end.
    script.measure(store, CASES, 10.0, worker.start, now=clock(0, 0, 4, 9.9, 9.9, 60, 60))
    assert worker.asked == [case.key for case in CASES[:2]]
    assert f"{len(CASES) - 2} cases are left" in capsys.readouterr().out
    script.measure(store, script.left(store, CASES), 10.0, worker.start, now=clock(0))
    assert sorted(results(store)) == sorted(case.key for case in CASES) and len(worker.asked) == len(CASES)


def test_the_longest_traces_have_the_time_that_they_are_expected_to_take_and_more(store: Store) -> None:
    """So they begin early enough for a run to be over in time; or first, in the next one."""
    cases = [case for case in plan() if case.stage == "long"]
    for case in cases:
        together = case.expected["forward_seconds"] + case.expected["seconds"]
        assert 3 * together < script.limit_of(case) < 480
    assert all(script.limit_of(case) == script.CASE_SECONDS for case in plan() if case.stage != "long")
    slow = next(case for case in cases if case.what == "exact torch" and case.tokens == 131_072)
    made, late = Made(), 480 - (script.limit_of(slow) - script.CASE_SECONDS)
    script.measure(store, [CASES[0], slow], 480.0, made.start, now=clock(0, 0, 1, late))
    assert made.asked == [CASES[0].key]
    script.measure(store, [slow], 480.0, made.start, now=clock(late))
    assert made.asked == [CASES[0].key, slow.key]


def test_a_library_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError("undefined symbol") if name == "torch_scatter" else ImportError(name)

    monkeypatch.setattr(worker, "import_module", load)
    found = worker.about(CPU)
    assert found["torch_scatter"] == "unusable: OSError: undefined symbol" and found["cupy"] == "absent"


def test_the_host_s_link_is_counted_where_queries_and_keys_wait_behind_it() -> None:
    """Qwen3-4B, 131,072 tokens: 128 bands, for each of which half of the keys of 12 layers are sent on average."""
    shape, N = SHAPES["qwen3-4b"], 131_072
    keys = 12 * 8 * 128 * 2 * N
    assert predict.sent_rows(shape, N).link == pytest.approx(keys * 64.5 + 12 * 32 * 128 * 2 * N)
    assert predict.sent_cache(shape, N).link == pytest.approx(2 * 2 * keys * (1 + 31 / 2))
    assert predict.seconds(predict.Work(link=55e9)) == pytest.approx(1, rel=0.01)
    here, there = (predict.credits_of(shape, N, f"exact triton{way}") for way in ("", " offload"))
    assert {*there} - {*here} == {"rows, sent", "rows again, sent"}


def test_what_fails_is_in_the_file_and_the_next_case_runs(store: Store) -> None:
    keys = [case.key for case in CASES[:4]]
    worker = Made({
        keys[0]: {"failed": "ValueError: no"},
        keys[1]: script.Gone("exit -11: out of luck"),
        keys[2]: {"skipped": "not installed"},
    })  # fmt: skip
    script.measure(store, CASES[:4], 1e18, worker.start)
    found = results(store)
    assert found[keys[0]]["failed"] == "ValueError: no" and found[keys[1]]["failed"] == "exit -11: out of luck"
    assert all("measured" not in found[key] for key in keys[:3]) and found[keys[3]]["measured"]
    assert worker.started == 2  # a new one after the one that died
    assert script.keys_of(store, "failed") == keys[:2]
    assert script.left(store, CASES[:4]) == [] and script.left(store, CASES[:4], retry=True) == CASES[:3]


WORKER = """
import json, sys, time
print(json.dumps({"card": "made up"}), flush=True)
for line in sys.stdin:
    if "hang" in line: time.sleep(60)
    if "die" in line: sys.exit("the device is gone")
    print(json.dumps({"measured": {"length": len(line)}}), flush=True)
    print(json.dumps({"ready": True}), flush=True)
"""


def test_a_worker_that_hangs_or_dies_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "ERRORS", tmp_path / "errors.txt")
    command = [sys.executable, "-c", WORKER]
    worker = script.Worker("cpu", command)
    assert worker.about == {"card": "made up"}
    assert worker.ask({"case": []}, 20) == {"measured": {"length": 13}} and worker.is_alive()
    with pytest.raises(script.Gone, match="exit 1: the device is gone"):
        worker.ask({"case": "die"}, 20)
    assert not worker.is_alive()
    worker.close()
    worker = script.Worker("cpu", command)
    began = time.monotonic()
    with pytest.raises(script.Gone, match="nothing came within 0 s"):
        worker.ask({"case": "hang"}, 0.3)
    assert time.monotonic() - began < 20 and not worker.is_alive()
    worker.close()


FEW = (
    "ceilings",
    "equality: edges",
    "kernels: torch",
    "credits: sparse torch",
    "solves: blocks",
    "scorer: sparse torch",
    "tune: block",
    "long: exact torch",
)
"""One case of each stage, those that take least in the interpreter."""


def end_to_end(path: Path, *arguments: str) -> dict[str, Any]:
    """What is in the file after a run, which has to end well."""
    code = script.main(["--device", "cpu", "--out", str(path), *arguments])
    content: dict[str, Any] = json.loads(path.read_text())
    assert code == 0, [one["failed"] for one in content["results"] if "failed" in one]
    return content


@pytest.fixture
def single_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("single_threaded")
def test_a_case_of_each_stage_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(RESULTS.iterdir())
    content = end_to_end(tmp_path / "gpu.json", "--only", *FEW)
    assert {one["stage"] for one in content["results"]} == set(STAGES)
    assert content["machine"]["device"] == "cpu" and content["machine"]["commit"]
    for one in content["results"]:
        if "skipped" not in one:
            assert one["measured"] and all(isinstance(number, int | float) for number in one["measured"].values())
    assert "A trial on a CPU: no number here says anything of speed" in capsys.readouterr().out
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.slow
@pytest.mark.usefixtures("single_threaded")
def test_everything_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = end_to_end(tmp_path / "gpu.json")
    assert {f"{one['case']}@{one['tokens']}" for one in content["results"]} == {case.key for case in CASES}
    skipped = {one["what"] for one in content["results"] if "skipped" in one}
    assert skipped <= {"scatter torch_scatter", "scatter cupy", "blocks cupy"}
    capsys.readouterr()
    end_to_end(tmp_path / "gpu.json")
    assert "[1/" not in capsys.readouterr().out  # nothing was left


def test_a_card_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        script.main(["--device", "cuda", "--out", str(tmp_path / "gpu.json")])
    assert ended.value.code == 2 and "no work on cuda" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_results_of_a_cpu_stay_out_of_the_results() -> None:
    assert script.default_path({"device": "cpu", "card": "CPU"}).parent != RESULTS
    path = script.default_path({"device": "cuda", "card": "NVIDIA H100 80GB HBM3"})
    assert path == RESULTS / "gpu-nvidia-h100-80gb-hbm3.json"


# --- equality ---------------------------------------------------------------------------------------------------------


def test_a_wrong_solver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("equality", "solvers", "tiny", 24)
    found = stages.run(stages.Bench(CPU, 1), case)
    assert "failed" not in found and len(found["checks"]) >= 10
    right = SOLVERS["blocks"]

    def wrong(system: Any) -> Any:
        solution = right(system)
        return replace(solution, flow=solution.flow * 1.01)

    monkeypatch.setitem(SOLVERS, "blocks", wrong)
    failed = stages.run(stages.Bench(CPU, 1), case)["failed"]
    assert "flow: blocks torch: 1.0e-02, allowed 1e-04" in failed and "scatter" not in failed


def test_the_time_of_a_solver_is_taken_and_the_solvers_stay_as_they_are() -> None:
    before = dict(SOLVERS)
    found = stages.run(stages.Bench(CPU, 1), Case("solves", "blocks torch", "tiny", 48))["measured"]
    assert 0 < found["seconds"] <= found["trace_flow_seconds"] * 3 and before == SOLVERS
    with pytest.raises(present.Absent, match="no solver 'magic'"):
        stages.run(stages.Bench(CPU, 1), Case("solves", "magic torch", "tiny", 48))


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_without_measurements_there_are_predictions_alone() -> None:
    text = page.section([])
    assert "Nothing has been measured yet" in text
    measured = {line[3] for line in cells(page.goals_table(None))}
    assert measured == {"-"} and all(line[4] == "not measured" for line in cells(page.goals_table(None)))
    for stage in page.SHOWN:
        for line in cells(page.stage_table(stage, [c for c in plan() if c.stage == stage], page.Numbers({}))):
            assert set(line[4:-1:2]) == {"-"}, line
    expected = {line[2] for line in cells(page.goals_table(None))}
    assert "-" not in expected


def content_of(*found: tuple[Case, dict[str, Any]]) -> dict[str, Any]:
    about = {"card": "NVIDIA H100", "device": "cuda", "torch": "2", "triton": "3", "transformers": "5"}
    made = [
        {"case": case.name, "tokens": case.tokens, "stage": case.stage, "what": case.what, "shape": case.shape}
        | {"commit": "abc", "expected": case.expected}
        | one
        for case, one in found
    ]
    return {"machine": about, "results": made}


def test_goals_are_reached_or_not_by_what_was_measured() -> None:
    sparse, exact = (Case("credits", f"{mode} triton", "qwen3-4b", 8192) for mode in ("sparse", "exact"))
    kernel, card = Case("kernels", "triton", "qwen3-4b", 8192), Case("machine", "ceilings")
    solves = [Case("solves", what, "qwen3-4b", 8192) for what in ("sweep triton", "scatter torch")]
    longs = [Case("long", "sparse triton offload", "qwen3-4b", N) for N in (8192, 32768, 131072)]
    content = content_of(
        (sparse, {"measured": {"credits_over_forward": 0.05}}),
        (exact, {"measured": {"credits_over_forward": 0.2}}),
        (card, {"measured": {"matrix_per_second": 6.6e14, "memory_per_second": 3e12, "powers_per_second": 3.6e12}}),
        (kernel, {"measured": {"edges_seconds": 0.021}}),  # 3.3 TFLOP take 5.0 ms here
        (solves[0], {"failed": "no | luck"}),
        (solves[1], {"measured": {"seconds": 0.004}}),
        *((case, {"measured": {"peak_bytes": 1e4 * case.tokens}}) for case in longs),
    )
    found = {line[0]: line[3:] for line in cells(page.goals_table(page.Numbers(content)))}
    assert found["credits / forward, sparse, Qwen3-4B, 8,192 tokens"] == ["0.050", "yes"]
    assert found["credits / forward, exact, Qwen3-4B, 8,192 tokens"] == ["0.200", "no"]
    assert found["rows and edges, 8,192 tokens: time / that of the ceiling"] == ["4.20", "no"]
    assert found["both solves, 64 graphs of 8,192 tokens, the fastest"] == ["4.0 ms", "yes"]
    assert found["sparse, offload, qwen3-4b, 131,072 tokens: peak above the model"] == ["1.3 GB", "yes"]
    assert found["sparse, offload, qwen3-8b, 32,768 tokens: peak above the model"] == ["-", "not measured"]
    assert found["sparse, offload: growth of that peak with N, exponent"] == ["1.00", "yes"]
    text = page.section([content])
    assert "Nothing has been measured yet" not in text and "Measured on NVIDIA H100" in text
    assert "| 5.0% |" in text and "failed: no / luck" in text
    assert "seconds 4.0 ms (" in page.report(content)


def test_the_page_is_what_the_code_and_the_logs_say(tmp_path: Path) -> None:
    copy = tmp_path / "gpu.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.write_page(copy)
    numbers = re.compile(r"[-+]?\d+(?:[.,]\d+)*")
    ours, theirs = copy.read_text(encoding="utf-8"), page.PAGE.read_text(encoding="utf-8")
    assert numbers.sub("#", ours) == numbers.sub("#", theirs), "run python -m benchmarks.gpu --tables"
    assert ours == theirs, "run python -m benchmarks.gpu --tables"
