"""Ground-truth tasks: what is called a carrier is one, by an oracle that reads nothing but the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.evidence import decoders
from benchmarks.evidence.decoders import Recipe, load_decoder, train
from benchmarks.evidence.tasks import TASKS, Problem, Task
from benchmarks.evidence.verify import continued, rates, tried, verified

EVERY = [pytest.param(name, level, id=f"{name}-{level}") for name, task in TASKS.items() for level in task.levels]


def problems(name: str, level: int, count: int = 60, seed: int = 0) -> list[Problem]:
    generator = Random(f"{seed} {name} {level}")
    return [TASKS[name].sample(generator, level) for _ in range(count)]


def text_of(problem: Problem) -> str:
    return TASKS[problem.task].render(problem.tokens)


# --- the oracle: each task once more, from its text ---------------------------------------------------------


def chains(text: str) -> str:
    body, asked = text[1:].rsplit(";", 1)
    bound = dict(statement.split("=") for statement in body.split(";"))
    name = asked[1]
    for _ in bound:
        name = bound.get(name, name)
    if not name.isdigit():
        raise ValueError("a circle")
    return name


def needles(text: str) -> str:
    body, asked = text[1:].rsplit(";", 1)
    return str(sum(int(own[1]) for own in body.split(";") if own[0] == asked[1]) % 10)


def addition(text: str) -> str:
    body, asked = text[1:].rsplit(";", 1)
    columns = {column[0]: column[1:] for column in body.split(";")}
    first, second = [int("".join(columns[place][side] for place in "mkhtu")) for side in (0, 1)]
    return f"{first + second:06d}"[::-1]["uthkm".index(asked[1])]


def scratchpad(text: str) -> str:
    """The answer that the steps lead to. A step marked "!" states its value against its sum."""
    response = text.split("?")[1]
    values: dict[str, int] = {}
    *steps, last = response.split(";")
    for step in steps:
        name, term, added, value = re.fullmatch(r"(\w):(\w)\+(\d)\1=(!?\d)", step).groups()  # type: ignore[union-attr]
        own = int(values.get(term, term)) + int(added)
        values[name] = int(value[1:]) if value.startswith("!") else own % 10
    return str((values[last[0]] + int(last[2])) % 10)


def other_texts(name: str, text: str, unit: str, at: int) -> Iterator[str]:
    """The text with every other value in the unit that stands at a place of it."""
    before, after = text[:at], text[at + len(unit) :]
    assert text[at : at + len(unit)] == unit
    if name == "chains":
        bound = re.findall(r"(\w)=", text)
        values = [*"0123456789"] if unit[2].isdigit() else bound
        found = [f"{unit[:2]}{value};" for value in values]
    elif name == "needles":
        found = [f"{unit[0]}{digit};" for digit in "0123456789"]
    elif name == "addition":
        found = [f"{unit[0]}{value:02d};" for value in range(100)]
    else:
        found = [f"{unit[:-2]}!{digit};" for digit in "0123456789"]
    for other in found:
        if other.replace("!", "") != unit:
            yield before + other + after


ORACLES: dict[str, Callable[[str], str]] = {
    "chains": chains,
    "needles": needles,
    "addition": addition,
    "scratchpad": scratchpad,
}


def answer(name: str, text: str) -> str | None:
    try:
        return ORACLES[name](text)
    except ValueError:  # a circle of variables answers nothing
        return None


def placed(problem: Problem) -> list[tuple[str, int]]:
    """Each unit's text, and where it starts in the text of the problem."""
    task = TASKS[problem.task]
    return [
        (task.render(problem.tokens[start:end]), len(task.render(problem.tokens[:start])))
        for start, end in problem.units
    ]


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_carriers_are_exactly_the_units_that_can_change_the_answer(name: str, level: int) -> None:
    for problem in problems(name, level):
        text = text_of(problem)
        right = text[-1]
        assert ORACLES[name](text) == right
        found = set()
        for index, (unit, at) in enumerate(placed(problem)):
            answers = {answer(name, other) for other in other_texts(name, text, unit, at)} - {None}
            if answers != {right}:
                found.add(index)
        assert found == set(problem.carriers), text


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_redraws_change_one_unit_and_what_follows_is_right(name: str, level: int) -> None:
    task = TASKS[name]
    for problem in problems(name, level, 20):
        for unit, (start, end) in enumerate(problem.units):
            others = task.redraws(problem, unit)
            assert len({tuple(tokens[start:end]) for tokens in others}) == len(others) > 0
            for tokens in others:
                assert tokens[:start] == problem.tokens[:start] and tokens[start:end] != problem.tokens[start:end]
                if name == "scratchpad":
                    wrong = task.render([*tokens[: end - 2]]) + "!" + task.render(tokens[end - 2 :])
                    assert scratchpad(wrong) == wrong[-1]
                    assert {
                        index for index, (one, two) in enumerate(zip(tokens, problem.tokens, strict=True)) if one != two
                    } >= {end - 2}
                else:
                    text = task.render(tokens)
                    assert ORACLES[name](text) == text[-1]
                    assert tokens[end : problem.prompt] == problem.tokens[end : problem.prompt]


def test_a_redrawn_step_is_followed_by_what_it_leads_to() -> None:
    (problem,) = problems("scratchpad", 3, 1)
    unit = problem.carriers[-1]
    start, end = problem.units[unit]
    for tokens in TASKS["scratchpad"].redraws(problem, unit):
        differ = [place for place, (one, two) in enumerate(zip(tokens, problem.tokens, strict=True)) if one != two]
        assert differ[0] == end - 2 and start < end - 2  # the value, and what depends on it
        assert problem.answer[0] in differ


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_ranges_lie_apart_and_where_they_should(name: str, level: int) -> None:
    sizes = set()
    for problem in problems(name, level):
        edges = [place for unit in problem.units for place in unit]
        assert edges == sorted(edges)
        assert all(start < end for start, end in problem.units)
        assert problem.answer == (len(problem.tokens) - 1, len(problem.tokens))
        first, last = (problem.prompt, problem.answer[0]) if name == "scratchpad" else (1, problem.prompt)
        assert first <= edges[0] and edges[-1] <= last
        assert len(problem.carriers) == len(set(problem.carriers)) == len(problem.hops)
        assert problem.hops == sorted(problem.hops) and problem.hops[0] == 1
        assert problem.level == (len(problem.hops) if name == "needles" else max(problem.hops))
        assert len(problem.carriers) < len(problem.units)
        sizes.add(len(problem.tokens))
    assert len(sizes) == 1 and sizes.pop() <= 80


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_the_position_of_a_unit_says_nothing(name: str, level: int) -> None:
    # Where every subset is as likely, a unit of n carries in k/n of the problems, wherever it stands.
    drawn = problems(name, level, 1200)
    count = len(drawn[0].units)
    expected = sum(len(problem.carriers) for problem in drawn) / count / len(drawn)
    for unit in range(count):
        share = sum(unit in problem.carriers for problem in drawn) / len(drawn)
        assert abs(share - expected) < 0.07, (unit, share, expected)


def test_a_decoy_may_stand_last_and_be_made_of_useful_steps() -> None:
    last, made = 0, 0
    for problem in problems("scratchpad", 2, 200):
        steps = [unit for unit, _ in placed(problem)]
        last += len(steps) - 1 not in problem.carriers
        useful = {steps[unit][0] for unit in problem.carriers}
        made += any(step[2] in useful for unit, step in enumerate(steps) if unit not in problem.carriers)
    assert last > 60 and made > 60


@pytest.mark.parametrize("name", TASKS)
def test_the_same_generator_draws_the_same_problems(name: str) -> None:
    assert problems(name, 2) == problems(name, 2)
    assert problems(name, 2) != problems(name, 2, seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_questions_have_their_right_answers(name: str) -> None:
    task = TASKS[name]
    for problem in problems(name, 2, 20):
        tails = task.questions(problem)
        assert problem.tokens[-len(tails[0]) :] in tails
        body = problem.tokens[: -len(tails[0])]
        for tail in tails:
            text = task.render([*body, *tail])
            assert ORACLES[name](text) == text[-1]


def test_symbols_and_ids_are_one_to_one() -> None:
    for task in TASKS.values():
        assert len(set(task.vocabulary)) == len(task.vocabulary) < 64
        assert task.symbols(task.encode(task.vocabulary)) == task.vocabulary


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_easier_problems_are_right_too(name: str, level: int) -> None:
    task = TASKS[name].easier(level)
    assert task.levels == tuple(range(1, level + 1)) and TASKS[name].levels == (1, 2, 3)
    generator = Random(0)
    for own in task.levels * 5:
        problem = task.sample(generator, own)
        text = text_of(problem)
        assert ORACLES[name](text) == text[-1]
        if name == "chains" and level == 1:
            assert not re.search("=[a-z]", text)
        if name == "scratchpad":
            assert not re.search(r"\+[4-9]", text)


def test_unknown_levels_and_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="level 7 of chains"):
        TASKS["chains"].sample(Random(0), 7)
    with pytest.raises(ValueError, match="task 'riddles'"):
        load_decoder("riddles")


# --- decoders -----------------------------------------------------------------------------------------------

TINY = Recipe(layers=1, width=16, heads=2, steps=20, batch=8, rate=1e-2)


def test_several_questions_in_one_sequence_are_what_one_would_be() -> None:
    task = TASKS["chains"]
    model = train(task, TINY, lambda line: None)
    drawn = problems("chains", 2, 4)
    tokens, positions, visible, targets = decoders._batch(task, drawn, 8, Random(0))
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, attention_mask=visible, use_cache=False).logits
    start = drawn[0].prompt - 2
    assert (targets >= 0).sum() == 4 * 8
    for row in range(4):
        for place in range(start, tokens.shape[1], 3):
            alone = torch.cat([tokens[row, :start], tokens[row, place : place + 3]])
            with torch.no_grad():
                logits = model(alone[None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, place : place + 3], logits[start:], rtol=1e-4, atol=1e-5)
            assert targets[row, place + 2] == tokens[row, place + 2]


def test_training_is_repeatable_and_learns() -> None:
    task = TASKS["needles"]
    lines: list[str] = []
    first, second = (train(task, TINY, lines.append).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    early, late = (float(line.split("loss ")[1].split()[0]) for line in lines[:2])
    assert late < early < 4


def test_a_decoder_is_trained_once_and_again_when_its_recipe_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(decoders, "COUNTED", 50)
    monkeypatch.setitem(decoders.RECIPES, "addition", TINY)
    said: list[str] = []
    model = load_decoder("addition", say=said.append)
    before = len(said)
    again = load_decoder("addition", say=said.append)
    assert before > 1 and len(said) == before
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
    monkeypatch.setitem(decoders.RECIPES, "addition", Recipe(layers=2, width=16, heads=2, steps=2, batch=4))
    assert load_decoder("addition", say=said.append).config.num_hidden_layers == 2
    assert len(list((tmp_path / "evidence").glob("addition-*/manifest.json"))) == 2


class Perfect(torch.nn.Module):
    """Writes what is right: answers of the oracle and, in a response, open variables in alphabetical order.

    A step that it finds written counts as it stands there.
    """

    def __init__(self, task: Task, deaf: bool = False) -> None:
        super().__init__()
        self.task = task
        self.deaf = deaf

    def forward(
        self, tokens: torch.Tensor, past_key_values: torch.Tensor | None = None, **_: object
    ) -> SimpleNamespace:
        seen = tokens if past_key_values is None else torch.cat([past_key_values, tokens], 1)
        following = torch.tensor([self.task.encode([self._next(row)])[0] for row in seen.tolist()])
        logits = torch.nn.functional.one_hot(following, len(self.task.vocabulary)).double()[:, None]
        return SimpleNamespace(logits=logits, past_key_values=seen)

    def _next(self, row: list[int]) -> str:
        text = self.task.render(row)
        if self.task.name != "scratchpad":
            return "7" if self.deaf else ORACLES[self.task.name](text)
        prompt, response = text[1:].split("?")
        *statements, asked = prompt.split(";")
        *steps, part = response.split(";")
        values = {step[0]: int(step[-1]) for step in steps}
        open_ = sorted(own for own in statements if own[0] not in values and (own[2].isdigit() or own[2] in values))
        whole = f"{asked}="
        if open_:
            own = next((own for own in open_ if part and own[0] == part[0]), open_[0])
            whole = f"{own}{own[0]}={(int(values.get(own[2], own[2])) + int(own[4])) % 10};"
            if not whole.startswith(part):  # a value that was given: only the end of the step is missing
                whole = f"{part};"
        elif part == whole:
            return "7" if self.deaf else str((values[asked[0]] + int(asked[2])) % 10)
        assert whole.startswith(part)
        following = whole[len(part) :]
        return next(symbol for size in (2, 1) if (symbol := following[:size]) in self.task.vocabulary)


@pytest.mark.parametrize("name", TASKS)
def test_verification_of_a_perfect_decoder_finds_the_carriers(name: str) -> None:
    drawn = [problem for level in TASKS[name].levels for problem in problems(name, level, 5)]
    model: Any = Perfect(TASKS[name])
    results = tried(model, drawn)
    assert all(result.right and result.agrees for result in results)
    assert all(min(result.followed) == 1 for result in results)
    assert verified(model, drawn[0]) == [unit in drawn[0].carriers for unit in range(len(drawn[0].units))]
    found = rates(results)
    assert found.pop("changed decoys") == 0
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("name", TASKS)
def test_verification_of_a_decoder_that_reads_nothing_finds_nothing(name: str) -> None:
    model: Any = Perfect(TASKS[name], deaf=True)
    results = tried(model, problems(name, 2, 20))
    assert not any(any(result.changed) or result.agrees for result in results)


def test_a_continuation_keeps_what_is_given_and_writes_what_is_likely() -> None:
    model = train(TASKS["scratchpad"], TINY, lambda line: None)
    tokens = torch.tensor([problem.tokens for problem in problems("scratchpad", 1, 3)])
    starts = torch.tensor([40, 55, 79])
    written = continued(model, tokens, starts)
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(written[row, :start], tokens[row, :start])
        with torch.no_grad():
            likely = model(written[row : row + 1], use_cache=False).logits[0].argmax(-1)
        assert torch.equal(written[row, start:], likely[start - 1 : -1])
