"""Does it help RL: tasks are what they say, runs are logged once and compare, summaries say what the lines do."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')

from benchmarks import rl_gain, rl_tasks
from benchmarks.rl_gain import ABLATIONS, ARMS, Settings, config_of, numbers_of, plan, plot, read, run_all, summarise
from benchmarks.rl_tasks import TASKS, Recipe, imitate, load_policy, prompts_of, symbols
from flowgraph.answers import find_answer
from flowgraph.rl.samples import samples_of
from flowgraph.rl.scorer import Scored, Scorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SMALL = Recipe(width=32, layers=2, heads=2, steps=60, batch=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def at(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(cache))
    return cache


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_scratchpad_is_right_where_python_says_so() -> None:
    task = TASKS["scratchpad"]
    for prompt in prompts_of(task, 100, seed=0):
        *additions, question = prompt.strip("?\n").split(";")
        values = {"x": 0, "y": 0}
        for one in additions:
            exec(one.replace("+", "+="), {}, values)
        right = eval(question, {}, values) % 10
        given = [n for n in range(-2, 20) if task.reward(prompt, f"x3+4=7\nA:{n}") == 1]
        assert given == [right]


def test_countdown_is_right_where_python_says_so() -> None:
    task = TASKS["countdown"]
    rng = random.Random(0)
    some_right = 0
    for prompt in prompts_of(task, 40, seed=0):
        numbers, target = prompt.strip("?\n").split(":")
        for _ in range(100):
            digits = rng.choices(numbers.split(","), k=3)
            text = f"{digits[0]}{rng.choice('+-')}{digits[1]}{rng.choice('+-')}{digits[2]}"
            right = sorted(digits) == sorted(numbers.split(",")) and eval(text) == int(target)
            assert task.reward(prompt, f"A:1+2-3\nA:{text}") == right
            some_right += right
    assert some_right > 20


@pytest.mark.parametrize("said", ["", "A:", "x3+4=7\n", "A:x", "A:3 4", "A:7\nA:", "A:9-", "A:\uff11"])
@pytest.mark.parametrize("name", TASKS)
def test_no_reward_for_what_is_no_answer(name: str, said: str) -> None:
    assert TASKS[name].reward(prompts_of(TASKS[name], 1, seed=0)[0], said) == 0


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_made_of_known_tokens_and_answer(name: str) -> None:
    task, tokenizer, rng = TASKS[name], symbols(), random.Random(0)
    for prompt in prompts_of(task, 200, seed=0):
        said = task.demonstrate(prompt, rng, 1.0)
        ids = tokenizer(prompt + said)["input_ids"]
        assert tokenizer.decode(ids) == prompt + said and tokenizer.pad_token_id not in ids
        assert len(ids) <= 60 and len(tokenizer(said)["input_ids"]) < task.response_tokens
        assert find_answer(said, "A:").match is not None


@pytest.mark.parametrize("name", TASKS)
def test_the_teacher_is_right_less_than_half_of_the_time(name: str) -> None:
    task, rng = TASKS[name], random.Random(0)
    prompts = prompts_of(task, 1000, seed=0)
    right = sum(task.reward(prompt, task.demonstrate(prompt, rng, 1.0)) for prompt in prompts) / len(prompts)
    assert 0.3 < right < 0.55


def test_a_scratchpad_without_slips_is_right_line_by_line() -> None:
    task, rng, useful = TASKS["scratchpad"], random.Random(0), set()
    for prompt in prompts_of(task, 100, seed=0):
        said = task.demonstrate(prompt, rng, 0.0)
        lines = re.findall(r"([xy])(\d)\+(\d)=(\d)\n", said)
        assert len(lines) == 3 and all((int(a) + int(b)) % 10 == int(c) for _, a, b, c in lines)
        assert task.reward(prompt, said) == 1
        useful.add(tuple(name == prompt[-5] for name, *_ in lines))
    assert len(useful) == 6  # steps and decoys in every order


def test_a_countdown_without_mistakes_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_tasks, "_GOOD_TRY", 1.0)
    task, rng = TASKS["countdown"], random.Random(0)
    assert all(task.reward(prompt, task.demonstrate(prompt, rng, 0.0)) for prompt in prompts_of(task, 100, seed=0))


@pytest.mark.parametrize("name", TASKS)
def test_prompts_differ_and_come_again_by_their_seed(name: str) -> None:
    first = prompts_of(TASKS[name], 50, seed=0)
    assert len(set(first)) == 50 and first == prompts_of(TASKS[name], 50, seed=0)
    assert first != prompts_of(TASKS[name], 50, seed=1)


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_policy_learns_to_imitate() -> None:
    _, few = imitate(TASKS["countdown"], 0, replace(SMALL, steps=2))
    _, many = imitate(TASKS["countdown"], 0, SMALL)
    assert many < few - 1


def test_a_policy_is_trained_once(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["scratchpad"]
    short = replace(SMALL, steps=2)
    model, fingerprint = load_policy(task, 0, short)
    assert load_policy(task, 1, short)[1] != fingerprint
    (manifest,) = (one for one in at.glob("evidence/policies/scratchpad-0-*/manifest.json"))
    assert json.loads(manifest.read_text())["made_by"]["recipe"]["steps"] == 2
    monkeypatch.setattr(rl_tasks, "imitate", None)
    again, same = load_policy(task, 0, short)
    assert same == fingerprint
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


# --- arms -------------------------------------------------------------------------------------------------------------


def weights_of(arm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, scores, mask) that an arm gives to one demonstration by a random model."""
    tokenizer = symbols()
    model, _ = imitate(TASKS["scratchpad"], 0, replace(SMALL, steps=1))
    asked = tokenizer("x+3;y+5;x+4;y+1;x+8;x+5?\n")["input_ids"]
    said = tokenizer("x3+4=7\ny5+1=6\nx7+8=5\nx5+5\nA:0")["input_ids"]
    ids = torch.tensor(asked + said + [tokenizer.eos_token_id])
    config = config_of(arm, 0, model, tokenizer)
    scorer = Scorer(model, tokenizer, config) if config.scorer is None else config.scorer
    samples = samples_of([ids], [torch.arange(len(ids)) >= len(asked)])
    found = scorer.score(samples)
    scored = Scored(samples, found, config)
    return scored[0], scored.scores[0], scored.masks[0]


def test_every_arm_weights_the_same_tokens_by_the_same_recipe() -> None:
    masks = []
    for arm in ARMS:
        weights, _, mask = weights_of(arm)
        masks.append(mask)
        n = math.ceil(0.4 * int(mask.sum()))
        assert int((weights == 1.5).sum()) == (0 if arm == "uniform" else n), arm
        assert ((weights == 1) | (weights == 1.5)).all() and (weights[~mask] == 1).all()
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_the_lowest_arm_picks_the_least_flow() -> None:
    weights, _, mask = weights_of("flow/lowest")
    _, flow, _ = weights_of("flow")
    picked = weights == 1.5
    assert int(picked.sum()) == math.ceil(0.4 * int(mask.sum()))
    assert flow[picked].max() <= flow[mask & ~picked].min()


def test_the_larger_step_is_the_same_for_all_tokens() -> None:
    weights, _, mask = weights_of("uniform/1.2")
    torch.testing.assert_close(weights[mask], torch.full((int(mask.sum()),), 1.2))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_of_two_arms_are_logged_once_and_begin_alike(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A policy of a second's training is seldom right; but its answers are often small numbers.
    easy = replace(TASKS["scratchpad"], solves=lambda prompt, answer: answer in "01234")
    monkeypatch.setitem(TASKS, "scratchpad", easy)
    settings = Settings(steps=2, every=1, prompts=2, group=4, held_out=16, imitation=SMALL)
    jobs = list(plan(["scratchpad"], [0], ["uniform", "flow"]))
    assert run_all(jobs[:1], settings, tmp_path) == 1
    assert run_all(jobs, settings, tmp_path) == 1
    assert run_all(jobs, settings, tmp_path) == 0
    uniform, flow = read(tmp_path / "rl-scratchpad.jsonl")
    assert (uniform["arm"], flow["arm"]) == ("uniform", "flow")
    for one in (uniform, flow):
        assert one["steps"] == [0, 1, 2] and len(one["accuracy"]) == 3 and len(one["reward"]) == 2
        assert 0 < one["credit_share"] < 1 < one["cpu_seconds"] + 1 and len(json.dumps(one)) < 1500
        assert one["flags"]["scored"] > 0 and one["flags"]["failed"] == 0
    for name in ("policy", "settings", "seed", "versions"):
        assert uniform[name] == flow[name]
    assert uniform["accuracy"][0] == flow["accuracy"][0] and uniform["reward"][0] == flow["reward"][0]
    summary = summarise([uniform, flow])
    assert summary["arms"]["flow"]["against"]["uniform"]["pairs"] == 1

    later = [uniform | {"policy": "0" * 12}]
    (tmp_path / "rl-scratchpad.jsonl").write_text(json.dumps(later[0]) + "\n")
    with pytest.raises(ValueError, match=r"seed 0 .* another policy"):
        run_all(jobs, settings, tmp_path)


def test_seeds_are_done_in_all_arms_before_the_next() -> None:
    jobs = list(plan(TASKS, range(6)))
    assert [seed for _, _, seed in jobs] == sorted(seed for _, _, seed in jobs)
    assert len(jobs) == len(set(jobs)) == 6 * 2 * len(ARMS) + 4 * len(ABLATIONS)
    assert {arm for name, arm, seed in jobs if seed == 5} == set(ARMS)
    assert not {arm for name, arm, _ in jobs if name == "countdown"} & set(ABLATIONS)


def test_other_settings_are_other_runs() -> None:
    assert Settings().key != Settings(learning_rate=1e-4).key != Settings(imitation=SMALL).key


# --- what came out ----------------------------------------------------------------------------------------------------


def line(arm: str, seed: int, *accuracy: float, **changes: Any) -> dict[str, Any]:
    return {
        "task": "scratchpad", "arm": arm, "seed": seed, "policy": "p", "settings": "s", "steps": [0, 10, 30],
        "accuracy": list(accuracy), "reward": [0.0], "flags": dict.fromkeys(rl_gain.FLAGS, 0.0), "cpu_seconds": 1.0,
        "credit_share": 0.1, "versions": {},
    } | changes  # fmt: skip


def lines() -> list[dict[str, Any]]:
    found = []
    for seed in range(5):
        base = 0.1 * seed
        found += [line("uniform", seed, 0.2, 0.3, 0.3 + base), line("random", seed, 0.2, 0.3, 0.3 + base)]
        found += [line("flow", seed, 0.2, 0.4, 0.45 + base), line("entropy", seed, 0.2, 0.2, 0.2 + base)]
    return found


def test_area_is_the_mean_over_the_steps() -> None:
    found = numbers_of(line("flow", 0, 0.0, 0.2, 0.4))
    assert found["final"] == 0.4 and found["area"] == pytest.approx((0.1 * 10 + 0.3 * 20) / 30)


def test_differences_are_taken_seed_by_seed() -> None:
    summary = summarise(lines())
    arms = summary["arms"]
    assert [arms[name]["verdict"] for name in ("uniform", "random", "flow", "entropy")] == [
        None, "no difference shown", "better", "worse",
    ]  # fmt: skip
    against = arms["flow"]["against"]["uniform"]
    # The seeds differ a lot, the pairs not at all.
    assert against["pairs"] == 5 and against["final"] == pytest.approx({"mean": 0.15, "low": 0.15, "high": 0.15})
    assert arms["flow"]["final"]["high"] - arms["flow"]["final"]["low"] > 0.1
    assert arms["flow"]["final"]["mean"] == pytest.approx(0.65)
    assert [one["mean"] for one in arms["flow"]["curve"]] == pytest.approx([0.2, 0.4, 0.65])
    assert arms["uniform"]["against"].keys() == {"random"}


def test_seeds_without_a_pair_are_left_out_of_differences() -> None:
    some = [one for one in lines() if not (one["arm"] == "uniform" and one["seed"] > 2)]
    arms = summarise(some)["arms"]
    assert arms["flow"]["against"]["uniform"]["pairs"] == 3 and arms["flow"]["seeds"] == 5
    assert arms["flow"]["verdict"] == "no difference shown"  # three pairs say nothing
    assert arms["flow"]["against"]["random"]["verdict"] == "better"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "countdown"}, "runs of one task"),
        ({"settings": "other"}, "runs of one settings"),
        ({}, "seed 0 twice"),
        ({"arm": "reach", "policy": "other"}, "no pair"),
    ],
)
def test_runs_that_do_not_compare_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise([*lines(), line("flow", 0, 0.2, 0.4, 0.4) | change])


def test_no_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="runs of one task"):
        summarise([])


@pytest.mark.parametrize("arms", [("uniform",), ("uniform", "flow"), ("flow", "random", "entropy", "uniform")])
def test_a_picture_is_drawn(arms: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(summarise([one for one in lines() if one["arm"] in arms]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
