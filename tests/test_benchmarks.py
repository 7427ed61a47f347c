"""The benchmarks' own arithmetic, on a made-up run: fits, goals, tables, pictures; and that there is enough text."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, plots, run, tables, text
from flowgraph import TokenGraph, Tracer, tracer
from tests.written import policy

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def one(case: str, tokens: int, seconds: float, peak: float, **more: Any) -> dict[str, Any]:
    """A result beside a forward pass of 1 ms and 0.05 MB per token."""
    plain, plain_peak = 1e-3 * tokens, 5e4 * tokens
    compared = {
        "forward_seconds": plain,
        "time_over_forward": seconds / plain,
        "peak_bytes_above_forward": peak - plain_peak,
    }
    return {"case": case, "tokens": tokens, "seconds": seconds, "peak_bytes": peak, "commit": "abc"} | compared | more


@pytest.fixture
def content() -> dict[str, Any]:
    results = []
    for N in LENGTHS:
        results.append({"case": "forward", "tokens": N, "seconds": 1e-3 * N, "peak_bytes": 5e4 * N, "commit": "abc"})
        stages = {"capture": 6e-4 * N, "rows": 1e-8 * N**2}
        results.append(one("exact", N, 0.84e-3 * N, 6e4 * N, stages=stages))
        results.append(one("sparse", N, 0.79e-3 * N, 6e4 * N, stages=stages))
        results.append(one("captured:sparse", N, 0.2e-3 * N, 1e4 * N))
    results.append(one("eager", 2048, 5 * 2.048, 5e9))
    results.append({"case": "eager", "tokens": 4096, "failed": "NoRoom: ...", "needed_bytes": 20 * 10**9})
    for N in run.COMPARED:
        results.append(one("sparse", N, 0.79e-3 * N, 6e4 * N))
        results.append(one("flashtrace:recompute", N, 7.9e-3 * N, 6e5 * N))
        results.append(one("flashtrace", N, 79e-3 * N, 6e6 * N))
    results.append({"case": "bandwidth", "tokens": 0, "seconds": 0.1, "bytes_per_second": 2e10})
    solved = {"num_edges": 2_000_000, "graph": "made up", "reach_seconds": 0.01, "flow_seconds": 0.01,
              "bytes_moved": 5e7, "bytes_per_edge": 25.0, "trace_flow_seconds": 0.1}  # fmt: skip
    results.append({"case": "solve", "tokens": 32768, "seconds": 0.02} | solved)
    equality = {"exact": {"largest": 1e-6, "misplaced": 1e-7}, "sparse": {"failed": "no such mode"}}
    return {"format": run.FORMAT, "machine": {"cpu": "a CPU"}, "text": "made up", "equality": equality,
            "results": results}  # fmt: skip


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert tables.exponent([(N, 3.0 * N**1.7) for N in LENGTHS]) == pytest.approx(1.7)
    assert tables.exponent([(1, 1.0), (2, 2.0)]) is None


def test_goals_are_met_missed_or_not_measured(content: dict[str, Any]) -> None:
    found = {goal.name: goal for goal in tables.goals(content)}
    assert found["sparse, end to end, 2,048 tokens: time / forward"].met is True
    assert found["sparse, end to end, 2,048 tokens: time / forward"].measured == pytest.approx(0.79)
    assert found["sparse, q and k captured already, 2,048 tokens: time / forward"].met is False
    assert found["sparse / eager maps, 2,048 tokens: time"].measured == pytest.approx(0.79 / 5)
    assert found["sparse / eager maps, 2,048 tokens: peak memory"].measured == pytest.approx(6e4 * 2048 / 5e9)
    # The faster of FlashTrace's settings is the one that counts.
    assert found["sparse / FlashTrace, 400 + 3,600 tokens: time"].measured == pytest.approx(0.1)
    assert found["exact / FlashTrace, 400 + 3,600 tokens: time"].met is None
    assert found["sparse, 32,768 tokens: peak above that of a forward"].measured == pytest.approx(327.68)
    assert found["both solves, 32,768 tokens, 2 M edges"].measured == pytest.approx(20)
    assert found["exact: growth of peak memory with N, exponent"].measured == pytest.approx(1)


def test_goals_of_an_empty_run_are_not_measured() -> None:
    assert {goal.met for goal in tables.goals({"results": []})} == {None}


def test_the_page_gets_the_numbers_and_keeps_the_rest(content: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Long\nbefore\n<!-- numbers -->\nold\n<!-- /numbers -->\nafter\n")
    tables.write_page(content, page)
    once = page.read_text()
    assert once.startswith("# Long\nbefore\n<!-- numbers -->\n") and once.endswith("\n<!-- /numbers -->\nafter\n")
    assert "old" not in once and "no room for 20 GB" in once and "| 32,768 | 32.8 | 0.84 | 0.79 |" in once
    assert "| exact | rows | 0.010 |" in once and "| 2.00 |" in once
    tables.write_page(content, page)
    assert page.read_text() == once
    with pytest.raises(ValueError, match="must hold <!-- numbers -->"):
        page.write_text("nothing")
        tables.write_page(content, page)


def test_pictures_are_small(content: dict[str, Any], tmp_path: Path) -> None:
    for path in plots.draw(content, tmp_path):
        assert 5_000 < path.stat().st_size < 100_000


def test_results_are_kept_as_they_come_and_replaced(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    store = run.Store(path, fresh=False)
    store.put({"case": "exact", "tokens": 256, "seconds": 2.0})
    store.put({"case": "exact", "tokens": 256, "seconds": 1.0})
    again = run.Store(path, fresh=False)
    assert again.has("exact@256") and not again.has("sparse@256")
    assert [result["seconds"] for result in again.content["results"]] == [1.0]
    assert not run.Store(path, fresh=True).has("exact@256")
    old = copy.deepcopy(content) | {"format": None}
    path.write_text(json.dumps(old))
    assert not run.Store(path, fresh=False).has("exact@1024")  # of another form: not to be mixed


def test_the_plan_holds_every_case_once() -> None:
    keys = [key for job in run.plan() for key in job.keys]
    assert len(keys) == len(set(keys))
    for key in ("forward@1024", "sparse@32768", "eager@4096", "captured:exact@8192", "flashtrace@4000", "solve@32768"):
        assert key in keys


def test_what_cannot_run_is_said_in_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "FLASHTRACE", tmp_path / "python")
    (result,) = run.run_job(run.Job(1000, ("flashtrace",)))
    assert result["case"] == "flashtrace" and "make bench-flashtrace" in result["failed"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", "false")
    results = list(run.run_job(run.Job(256, ("exact", "sparse"))))
    assert [result["case"] for result in results] == ["exact", "sparse"]
    assert all(result["failed"].startswith("exit 1") for result in results)


def test_stages_add_up_and_leave_the_functions_alone() -> None:
    ids = torch.arange(3, 43)[None]
    place = torch.arange(40)[None]
    before = TokenGraph.from_sparse, vars(tracer)["capture"]
    began = time.perf_counter()
    with cases.stages() as seconds:
        Tracer(policy(), mode="edges").from_ids(ids, prompt_mask=place < 10, sink_mask=place >= 38)
    whole = time.perf_counter() - began
    assert {"capture", "rows", "edges", "graph", "solve", "credit", "other"} <= set(seconds)
    assert 0.5 * whole < sum(seconds.values()) <= whole
    assert (TokenGraph.from_sparse, vars(tracer)["capture"]) == before


@pytest.mark.parametrize("missing", [False, True])
def test_the_text_is_long_enough(missing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing:
        monkeypatch.setenv("FLOWGRAPH_DATA", str(tmp_path))
    name, everything = text.source()
    assert missing <= (name == text.HELP)
    assert len(everything) > 8 * 32768


def test_both_parts_of_the_text_are_tokenized_alike(smollm2_tokenizer: Any) -> None:
    ids, prompt, rest = text.tokens(smollm2_tokenizer, 4000, 400)
    again = smollm2_tokenizer([prompt, rest], add_special_tokens=False).input_ids
    assert [len(part) for part in again] == [400, 3600] and again[0] + again[1] == ids
    with pytest.raises(ValueError, match="tokens do not hold"):
        text.tokens(smollm2_tokenizer, 10**6, 400)
