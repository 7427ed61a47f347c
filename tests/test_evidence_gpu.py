"""The evidence on larger models: runs that are cut go on and do nothing twice; long tasks are what they say."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')

from benchmarks.evidence import decoders, gpu, recall
from benchmarks.evidence.decoders import Recipe, Training
from benchmarks.evidence.gpu import SIZES, OutOfTime, Run, estimate, go_on, left_over, spread, table
from benchmarks.evidence.tasks import LONG, TASKS
from benchmarks.evidence.verify import Tried
from tests.jobs import responses, write_rows
from tests.written import TOKENIZER, policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TINY = SIZES["tiny"]


@dataclass(frozen=True)
class Cut(Run):
    """Time for so many looks at the clock."""

    looks: list[int] = field(default_factory=lambda: [10**9])

    def left(self) -> float:
        self.looks[0] -= 1
        return 1e9 if self.looks[0] >= 0 else 0.0


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model and traces for it."""
    folder = tmp_path_factory.mktemp("given") / "bytes"
    policy(max_position_embeddings=256).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return {"models": [folder], "traces": write_rows(folder / "rows.jsonl", responses(4))}


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(gpu, "AT_LEAST", 0.5)
    monkeypatch.setattr(gpu, "UNSEEN", 0.5)


def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained decoders are taken to solve every problem, and intervention to confirm the carriers."""

    def tried(model: Any, problems: Any) -> list[Tried]:
        return [Tried(one, True, [unit in one.carriers for unit in range(len(one.units))], []) for one in problems]

    monkeypatch.setattr(recall, "tried", tried)


def run_in(out: Path, given: dict[str, Any], looks: int = 10**9, **changes: Any) -> Cut:
    return Cut(out, replace(TINY, **changes), "cpu", math.inf, 1, **given, looks=[looks])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the queue ---


def test_runs_that_are_cut_do_nothing_twice_and_come_to_the_same(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved(monkeypatch)
    steps: Counter[str] = Counter()
    advance = Training.advance
    monkeypatch.setattr(Training, "advance", lambda self: steps.update([self.task.name]) or advance(self))
    assert go_on(run_in(tmp_path / "whole", given), lambda line: None) == []
    assert steps == {"needles": 12, "needles-long": 8}

    steps.clear()
    rounds, said = 0, list[str]()
    while left := left_over(run_in(tmp_path / "cut", given)):
        assert go_on(run_in(tmp_path / "cut", given, looks=7), said.append) == []
        rounds += 1
        assert rounds < 60, left
    assert rounds > 5 and any("goes on next time" in line for line in said)
    assert steps == {"needles": 12, "needles-long": 8}, "steps of training done again"
    done = [line["unit"] for line in lines_of(tmp_path / "cut" / "units.jsonl") if line["done"]]
    assert len(done) == len(set(done)) == 10
    assert {"commit", "gpu", "cpu", "seconds", "date"} <= set(lines_of(tmp_path / "cut" / "units.jsonl")[0])

    names = sorted(path.name for path in (tmp_path / "whole").glob("*-*.jsonl"))
    assert names == [
        *("choices-needles-larger.jsonl", "choices-needles-long.jsonl"),
        *("recall-needles-larger.jsonl", "recall-needles-long.jsonl", "rl-countdown.jsonl"),
    ]
    for name in names:
        whole, cut = (lines_of(tmp_path / one / name) for one in ("whole", "cut"))
        if name.startswith("rl"):
            assert [(one["arm"], one["seed"], one["accuracy"]) for one in cut] == [
                (one["arm"], one["seed"], one["accuracy"]) for one in whole
            ]
        else:
            assert cut[0]["model"] == whole[0]["model"] and cut[0]["commit"] and cut[0]["machine"]["cores"]
            assert sorted(cut[1:], key=lambda one: one["problem"]) == whole[1:]
    assert len(lines_of(tmp_path / "cut" / "faithful-bytes" / "traces.jsonl")) == 2

    text = table(tmp_path / "cut")
    for heading in (
        "recall-needles-larger",
        "choices, long",
        "faithful-bytes",
        "rl-countdown",
        "right answers: level 1",
    ):
        assert heading in text
    before = (tmp_path / "cut" / "units.jsonl").read_text()
    assert go_on(run_in(tmp_path / "cut", given), said.append) == []
    assert (tmp_path / "cut" / "units.jsonl").read_text() == before


def test_a_unit_that_fails_is_said_and_in_nobodys_way(tmp_path: Path, given: dict[str, Any]) -> None:
    said: list[str] = []
    run = run_in(tmp_path, {**given, "traces": None}, decoders={}, rl_tasks=("countdown",))
    assert go_on(run, said.append) == ["faithful bytes"]
    assert "faithful bytes: FAILED, --model needs --traces" in said[0] and "rl countdown: done" in said[1]
    assert [line.split(":")[0] for line in left_over(run)] == ["faithful bytes"]


def test_lines_of_another_decoder_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved(monkeypatch)
    some: dict[str, Any] = {"decoders": {"needles-larger": TINY.decoders["needles-larger"]}, "rl_tasks": ()}
    go_on(run_in(tmp_path, {}, **some), lambda line: None)
    again = {"needles-larger": ("needles", replace(TINY.decoders["needles-larger"][1], seed=5))}
    (tmp_path / "units.jsonl").unlink()
    (tmp_path / "state" / "needles-larger" / "config.json").unlink()
    said: list[str] = []
    failed = go_on(run_in(tmp_path, {}, **some | {"decoders": again, "problems": 5}), said.append)
    assert failed == ["recall needles-larger"], "choices were complete"
    assert any("holds lines of the model" in line for line in said)


def test_a_log_goes_on_with_its_own_model_alone(tmp_path: Path) -> None:
    header, model = {"task": "needles", "split": "report", "signals": ["flow"]}, torch.nn.Linear(2, 2)

    def line_of(number: int) -> dict[str, Any]:
        return {"problem": number}

    new = tmp_path / "new.jsonl"
    recall.run(new, header, range(2), line_of, lambda: model)
    lines = recall.run(new, header, range(3), line_of, lambda: model)
    assert len(lines) == 4 and set(lines[0]) == {*header, "model", "commit", "machine"}
    assert lines[0]["model"] == recall.fingerprint(model) != recall.fingerprint(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"holds lines of the model [0-9a-f]{12}, and this one is"):
        recall.run(new, header, range(4), line_of, lambda: torch.nn.Linear(2, 2))

    old = tmp_path / "old.jsonl"  # as the first versions wrote them
    recall.run(old, header, range(2), line_of)
    assert len(recall.run(old, header, range(2), line_of, lambda: pytest.fail("nothing is missing"))) == 3
    with pytest.raises(ValueError, match=r"of the model \(it does not say which\)"):
        recall.run(old, header, range(3), line_of, lambda: model)
    assert len(recall.read_log(old)) == 3


def test_estimates_take_all_runs_of_a_unit_together() -> None:
    lines = [
        {"unit": "train a", "kind": "train", "done": False, "seconds": 10.0},
        {"unit": "train a", "kind": "train", "done": True, "seconds": 20.0},
        {"unit": "train b", "kind": "train", "done": False, "seconds": 99.0},
    ]
    assert estimate(lines, "train") == 30 and estimate(lines, "rl") is None


def test_nothing_is_begun_that_would_not_fit(tmp_path: Path) -> None:
    run = Cut(tmp_path, TINY, "cpu", math.inf, 1, looks=[3])
    seen = []
    with pytest.raises(OutOfTime):
        for job, result in spread(abs, [-1, -2, -3, -4], 1, run):
            seen.append((job, result))
    assert seen == [(-1, 1), (-2, 2), (-3, 3)]
    with pytest.raises(OutOfTime):
        list(spread(abs, [-1], 1, replace(run, looks=[9]), lambda: 1e10))


@pytest.mark.slow
def test_jobs_are_spread_over_processes_until_time_is_over(tmp_path: Path) -> None:
    run = Cut(tmp_path, TINY, "cpu", math.inf, 2, looks=[999])
    assert dict(spread(abs, range(-5, 0), 2, run)) == {job: -job for job in range(-5, 0)}
    began = time.monotonic()
    with pytest.raises(OutOfTime):
        list(spread(time.sleep, [100.0, 100.0], 2, replace(run, looks=[2])))
    assert time.monotonic() - began < 90, "less than one of the jobs takes"
    gpu.end_processes()
    assert not torch.multiprocessing.active_children()


@pytest.mark.slow
def test_decoders_trained_at_a_time_are_those_trained_one_by_one(tmp_path: Path) -> None:
    some = replace(TINY, rl_tasks=(), problems=0, candidates=0)
    for name, processes in (("one", 1), ("two", 2)):
        run = Run(tmp_path / name, some, "cpu", time.monotonic() + 3600, processes)
        assert go_on(run, lambda line: None, ["train"]) == []
    one, two = (
        {line["unit"]: line["model"] for line in lines_of(tmp_path / n / "units.jsonl")} for n in ("one", "two")
    )
    assert one == two and len(one) == 2
    late = Run(tmp_path / "late", some, "cpu", time.monotonic() + gpu.AT_LEAST + 0.5, 2)
    assert go_on(late, lambda line: None, ["train"]) == []
    assert not torch.multiprocessing.active_children()


# --- training ---


def test_training_in_parts_gives_the_weights_of_training_at_once(tmp_path: Path) -> None:
    recipe = Recipe(layers=2, width=16, heads=2, steps=9, batch=4, questions=1, stages=((2, 4),))
    task = TASKS["scratchpad"]
    expected = decoders.train(task, recipe, lambda line: None).state_dict()
    first = Training(task, recipe)
    for _ in range(5):
        first.advance()
    first.save(tmp_path / "some" / "checkpoint.pt")
    second = Training(task, recipe)
    second.load(tmp_path / "some" / "checkpoint.pt")
    for _ in range(4):
        second.advance()
    assert second.step == 9
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


# --- the long tasks ---


@pytest.mark.parametrize("name", LONG)
def test_in_long_tasks_exactly_the_carriers_matter(name: str) -> None:
    task, generator = LONG[name], Random(0)
    for level in task.levels:
        for _ in range(4):
            problem = task.sample(generator, level)
            assert len(problem.carriers) == len(problem.hops) >= (1 if "needles" in name else level)
            matter = {
                unit
                for unit in range(len(problem.units))
                if any(other[-1] != problem.tokens[-1] for other in task.redraws(problem, unit))
            }
            assert matter == set(problem.carriers)
            assert len(problem.units) <= len(recall.DIGITS) and len(problem.tokens) < 256
    lengths = {len(task.sample(generator, level).tokens) for level in task.levels for _ in range(5)}
    assert len(lengths) == 1
    assert len(problem.units) >= 1.5 * len(TASKS[name.removesuffix("-long")].sample(generator, 3).units)


def test_the_full_size_covers_all_tasks() -> None:
    assert {task for task, _ in SIZES["full"].decoders.values()} == {*TASKS, *LONG}
    for task, recipe in SIZES["full"].decoders.values():
        assert sum(steps for _, steps in recipe.stages) < recipe.steps and recipe.width > 2 * 96
        assert all(level <= max((TASKS | LONG)[task].levels) for level, _ in recipe.stages)
