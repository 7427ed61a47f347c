"""Recall of known carriers, the choices made with it, and the layered graph: against what can be worked out by hand."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.evidence import choices, recall
from benchmarks.evidence.choices import Candidate, Case, choose, contrast, moving_mass
from benchmarks.evidence.layered import LayeredSignal, attention_shares, layered_flow
from benchmarks.evidence.recall import found, measure, place_of, precision, ranking, summarise
from benchmarks.evidence.tasks import TASKS, Problem
from benchmarks.evidence.verify import Tried
from flowgraph.adapters.evidence.signals import SIGNALS, FlowSignal, Reading, dense
from flowgraph.rl.attributions import rollout
from flowgraph.rows import DenseRows
from tests.models import eager_attention, tiny
from tests.written import byte_tokenizer, policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def subject(model: Any) -> recall.Subject:
    return recall.Subject("chains", model)


# --- recall and average precision -------------------------------------------------------------------------------------


def test_recall_and_precision_by_hand() -> None:
    ranks = ranking(torch.tensor([0.1, 0.9, 0.5, 0.7]))
    assert ranks == [3, 0, 2, 1]
    assert found(ranks, [1, 2]) == [1, 0]  # the two best units are 1 and 3
    assert precision(ranks, [1, 2]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert measure(ranks, [1, 2, 0], [1, 2, 3]) == {
        "recall": pytest.approx(2 / 3),
        "precision": pytest.approx((1 + 2 / 3 + 3 / 4) / 3),
        "early": 0.5,
        "hop 1": 1,
        "hop 2": 1,
        "hop 3": 0,
    }


@pytest.mark.parametrize("scores", [[2, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 3, 3, 1], [5, 4, 3, 2, 1]])
@pytest.mark.parametrize("carriers", [[0], [1, 3], [4, 1, 2]])
def test_ties_are_the_mean_over_all_orders(scores: list[float], carriers: list[int]) -> None:
    orders = [order for order in permutations(range(5)) if all(scores[a] >= scores[b] for a, b in pairwise(order))]
    hits, values = [], []
    for order in orders:
        places = [order.index(carrier) for carrier in carriers]
        hits.append([place < len(carriers) for place in places])
        values.append(np.mean([sum(other <= place for other in places) / (place + 1) for place in places]))
    ranks = ranking(torch.tensor(scores, dtype=torch.float64))
    assert found(ranks, carriers) == pytest.approx(np.mean(hits, axis=0))
    assert precision(ranks, carriers) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("units, k", [(6, 1), (6, 2), (5, 4), (7, 3)])
def test_chance_is_the_mean_over_all_rankings(units: int, k: int) -> None:
    # Over all sets of carriers in one ranking, which is the same as over all rankings.
    by_set = [measure(list(range(units)), carriers, [1] * k) for carriers in combinations(range(units), k)]
    chance = measure([0] * units, range(k), [1] * k)
    assert chance["recall"] == pytest.approx(np.mean([one["recall"] for one in by_set])) == pytest.approx(k / units)
    assert chance["precision"] == pytest.approx(np.mean([one["precision"] for one in by_set]))


def test_units_are_scored_by_their_best_and_by_their_mean_token() -> None:
    scores, units = torch.tensor([9.0, 1, 2, 6, 4, 4, 0]), [(1, 4), (4, 6)]
    assert recall.unit_scores(scores, units, "max").tolist() == [6, 4]
    assert recall.unit_scores(scores, units, "mean").tolist() == [3, 4]


def test_rankings_as_words() -> None:
    ranks = [12, 0, 35, 0, 1]
    assert recall.write_ranking(ranks) == "c0z01"
    assert recall.read_ranking("c0z01") == ranks
    with pytest.raises(ValueError, match="37 units"):
        recall.write_ranking([0] * 37)


# --- problems ---------------------------------------------------------------------------------------------------------


def test_credit_goes_to_units_of_the_prompt_or_to_the_response_before_the_answer() -> None:
    prompt_task = recall.problem_of("chains", "report", 5)
    place = place_of(prompt_task)
    inside = {token for start, stop in prompt_task.units for token in range(start, stop)}
    assert set(place.credit_mask.nonzero().flatten().tolist()) == inside
    assert place.answer_tokens.nonzero().flatten().tolist() == list(range(*prompt_task.answer))

    scratchpad = recall.problem_of("scratchpad", "report", 5)
    place = place_of(scratchpad)
    assert place.credit_mask.nonzero().flatten().tolist() == list(range(scratchpad.prompt, scratchpad.answer[0]))
    assert torch.equal(place.response_mask, ~place.prompt_mask) and place.prompt_mask.sum() == scratchpad.prompt


def test_splits_have_other_problems_and_a_problem_is_always_the_same() -> None:
    drawn = {split: [recall.problem_of("needles", split, number) for number in range(30)] for split in recall.SPLITS}
    assert drawn["report"] == [recall.problem_of("needles", "report", number) for number in range(30)]
    for one, other in combinations(drawn.values(), 2):
        assert not {str(problem.tokens) for problem in one} & {str(problem.tokens) for problem in other}
    assert {problem.level for problem in drawn["report"]} == set(TASKS["needles"].levels)


def solved(monkeypatch: pytest.MonkeyPatch, *, agrees: bool = True) -> None:
    """The untrained model is taken to solve every problem, and hiding to confirm the carriers."""

    def tried(model: Any, problems: Sequence[Problem]) -> list[Tried]:
        changed = [[(unit in one.carriers) == agrees for unit in range(len(one.units))] for one in problems]
        return [Tried(one, True, by_unit, []) for one, by_unit in zip(problems, changed, strict=True)]

    monkeypatch.setattr(recall, "tried", tried)


def oracle(problem: Problem, reading: Reading) -> dict[str, Tensor]:
    """A signal that knows, one that knows the opposite, and one that knows nothing."""
    scores = torch.zeros(len(reading), dtype=torch.float64)
    for carrier in problem.carriers:
        scores[problem.units[carrier][0]] = 1
    return {"perfect": scores, "flow": 1 - scores, "nothing": torch.ones_like(scores)}


@pytest.fixture
def log(subject: recall.Subject, monkeypatch: pytest.MonkeyPatch) -> list[recall.Line]:
    """Lines of 12 problems, as they stand in a log."""
    solved(monkeypatch)
    header = {"task": "chains", "split": "report", "signals": ["perfect", "flow", "nothing"]}
    lines = [header, *(subject.line("report", number, oracle) for number in range(12))]
    return [json.loads(json.dumps(line)) for line in lines]


def test_a_perfect_signal_gets_1_and_an_empty_one_gets_chance(log: list[recall.Line]) -> None:
    one = summarise(log)["chains"]
    assert (one["problems"], one["counted"], one["solved"], one["verified"]) == (12, 12, 1, 1)
    signals = one["signals"]
    for how in recall.AGGREGATIONS:
        assert signals["perfect"][how]["recall"] == {"mean": 1, "low": 1, "high": 1}
        assert signals["perfect"][how]["precision"]["mean"] == signals["perfect"][how]["hop 3"]["mean"] == 1
        for key, chance in one["chance"].items():
            assert signals["nothing"][how][key]["mean"] == pytest.approx(chance, abs=1e-4)
        for level, chances in one["chance by level"].items():
            assert signals["nothing"][how]["levels"][level]["recall"]["mean"] == pytest.approx(
                chances["recall"], abs=1e-4
            )
    assert signals["flow"]["mean"]["recall"]["mean"] == 0
    assert signals["perfect"]["mean"]["difference"]["recall"]["mean"] == 1
    assert "difference" not in signals["flow"]["mean"]
    shown = "\n".join(recall.show(summarise(log), "max"))
    assert "perfect" in shown and "1.00 [1.00 1.00]" in shown


def test_summarise_is_pure_and_knows_no_order(log: list[recall.Line]) -> None:
    before = copy.deepcopy(log)
    expected = summarise(log)
    assert log == before
    other = [{**line, "task": "needles"} for line in log]
    mixed = [*log, *other]
    random.Random(0).shuffle(mixed)
    assert summarise(mixed)["chains"] == expected["chains"] and set(summarise(mixed)) == {"chains", "needles"}


def test_problems_that_are_not_solved_or_not_verified_only_count_as_such(
    subject: recall.Subject, log: list[recall.Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved(monkeypatch, agrees=False)
    disputed = subject.line("report", 25, oracle)  # of the next lot
    assert disputed["solved"] and not disputed["verified"] and "max" not in disputed
    failed = disputed | {"problem": 26, "solved": False}
    one = summarise([*log, disputed, failed])["chains"]
    assert one["solved"] == 13 / 14 and one["verified"] == 12 / 13 and one["counted"] == 12
    assert one["signals"] == summarise(log)["chains"]["signals"]
    alone = summarise([log[0], failed])["chains"]
    assert alone["verified"] is None and "signals" not in alone


def test_lines_that_do_not_fit_are_refused(log: list[recall.Line]) -> None:
    with pytest.raises(ValueError, match="problem 3 stands in the log twice"):
        summarise([*log, log[4]])
    with pytest.raises(ValueError, match="no header line for chains"):
        summarise(log[1:])
    with pytest.raises(ValueError, match="another split"):
        summarise([*log, log[1] | {"problem": 99, "split": "choose"}])
    with pytest.raises(ValueError, match="two logs"):
        summarise([*log, log[0] | {"signals": ["flow"]}])


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    path, asked = tmp_path / "some" / "log.jsonl", []

    def line_of(number: int) -> recall.Line:
        asked.append(number)
        return {"problem": number}

    header = {"task": "chains", "split": "report", "signals": ["flow"]}
    recall.run(path, header, range(3), line_of)
    path.write_text(path.read_text() + '{"problem": 3, "cut of')
    lines = recall.run(path, header, range(5), line_of)
    assert asked == [0, 1, 2, 3, 4]
    assert lines == [header, *({"problem": number} for number in range(5))]
    with pytest.raises(ValueError, match="other signals"):
        recall.run(path, header | {"signals": ["reach"]}, range(5), line_of)


def test_every_signal_can_be_ranked(subject: recall.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved(monkeypatch)
    monkeypatch.setattr(recall, "load_decoder", lambda task: subject.model)
    names = recall.default_signals()
    lines = recall.recall("chains", "report", 2, names, tmp_path)
    assert all(len(line[how].split()) == len(names) for line in lines[1:] for how in recall.AGGREGATIONS)
    assert (tmp_path / "recall-chains.jsonl").stat().st_size < 300_000 / 200 * len(lines)
    assert set(summarise(lines)["chains"]["signals"]) == set(SIGNALS) - {
        n for n in SIGNALS if "sparse" in n or "flash" in n
    }


# --- the layered graph ------------------------------------------------------------------------------------------------


def random_layers(N: int, L: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(N)
    layers = [torch.rand(N, N, generator=generator, dtype=torch.float64).tril() for _ in range(L)]
    return [A / A.sum(1, keepdim=True) for A in layers]


def test_reach_at_the_first_layer_is_rollout() -> None:
    attention, sinks = random_layers(9, 4), torch.arange(9) >= 7
    found = layered_flow(attention, sinks, torch.arange(9) < 3)
    rolled = rollout([DenseRows(A) for A in reversed(attention)], sinks)
    torch.testing.assert_close(found.reach[0] / 2, rolled)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_layers_conserve_reach_and_flow(share: float) -> None:
    attention, sinks, sources = random_layers(9, 4), torch.arange(9) >= 7, torch.arange(9) < 3
    found = layered_flow(attention, sinks, sources, share)
    torch.testing.assert_close(found.reach.sum(1), torch.full((5,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(found.flow.sum(1), torch.ones(5, dtype=torch.float64))
    assert found.flow[0][~sources].sum() == 0 and found.flow[-1][~sinks].sum() == 0
    assert float(found.throughput[~sinks].max()) <= 1 and float(found.visits.max()) <= 2 + 1e-12


def test_visits_and_throughput_are_those_of_all_walks() -> None:
    attention, sinks, sources = random_layers(4, 3), torch.arange(4) == 3, torch.arange(4) < 2
    shares = [torch.rand(4, dtype=torch.float64) for _ in attention]
    steps = [torch.diag(1 - a) + a[:, None] * A for a, A in zip(shares, attention, strict=True)]
    ends, visits, through = torch.zeros(4).double(), torch.zeros(4).double(), torch.zeros(4).double()
    walks = []
    for walk in product(range(4), repeat=4):  # tokens at layers 0..3
        if walk[-1] == 3:
            chance = math.prod(float(T[after, here]) for T, (here, after) in zip(steps, pairwise(walk), strict=True))
            walks.append((walk, chance))
            ends[walk[0]] += chance
            visits[list(set(walk))] += chance
    for walk, chance in walks:
        if walk[0] < 2:  # flow: walks backwards from the sink, given where they end, evenly over the sources
            through[list(set(walk))] += chance / float(ends[walk[0]]) / 2
    found = layered_flow(attention, sinks, sources, shares)
    torch.testing.assert_close(found.reach[0], ends)
    torch.testing.assert_close(found.visits, visits)
    torch.testing.assert_close(found.throughput, through)


def test_layered_refusals(model: Any) -> None:
    mask = torch.zeros(1025, dtype=torch.bool)
    with pytest.raises(ValueError, match="up to 1024 tokens, got 1025"):
        layered_flow([], mask, mask)
    A = random_layers(4, 1)[0]
    with pytest.raises(ValueError, match="no token"):
        layered_flow([A], torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention of layer 1"):
        layered_flow([A, A.T], torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="score"):
        LayeredSignal("throughput")


def test_layered_signals_read_a_model(subject: recall.Subject) -> None:
    reading = subject.reading(recall.problem_of("chains", "report", 2))
    layers = [eager_attention(subject.model, [layer], input_ids=reading.token_ids[None])[0] for layer in range(6)]
    expected = layered_flow(layers, reading.sinks("flowgraph"), reading.place.prompt_mask)
    for score, values in (("flow", expected.throughput), ("reach", expected.visits), ("rollout", expected.reach[0])):
        torch.testing.assert_close(LayeredSignal(score)(reading), values, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(LayeredSignal("flow", weights="value_norm")(reading), expected.throughput)


def test_attention_is_weighed_against_the_residual_stream(model: Any) -> None:
    ids = torch.arange(2, 20)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
        first = model.model.layers[0]
        hooks = list(first.self_attn._forward_hooks)  # transformers' own
        places = model.model.rotary_emb(states[0], torch.arange(18)[None])
        added = first.self_attn(first.input_layernorm(states[0]), position_embeddings=places, attention_mask=None)[0][0]
    before = states[0][0].norm(dim=-1)
    shares = attention_shares(model, ids)
    expected = added.norm(dim=-1) / (added.norm(dim=-1) + before)
    torch.testing.assert_close(shares[0], expected.double(), rtol=1e-4, atol=1e-6)
    assert len(shares) == 6 and list(first.self_attn._forward_hooks) == hooks and not first._forward_pre_hooks
    with pytest.raises(ValueError, match="self_attn"):
        attention_shares(torch.nn.Linear(2, 2), ids)


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(subject: recall.Subject) -> Case:
    problem = recall.problem_of("chains", "choose", 2)
    chosen = choose(moving_mass([subject.reading(one) for one in subject.unlabelled[:2]]))
    return Case(subject.reading(problem), chosen, choices.wrong_readings(subject, problem))


@pytest.mark.parametrize(
    "candidate, signal",
    [
        (Candidate(), FlowSignal()),
        (Candidate("reach", "paper"), FlowSignal("reach", "paper")),
        (Candidate("mix", weights="value_norm"), FlowSignal("mix", weights="value_norm")),
        (Candidate("flow", first="dropped"), FlowSignal(first="dropped")),
        (Candidate("reach", where="all"), FlowSignal("reach", layers="all")),
        (Candidate("flow", where="late"), FlowSignal(layers=(4, 5))),
    ],
)
def test_candidates_are_the_signals_that_have_the_option(case: Case, candidate: Candidate, signal: FlowSignal) -> None:
    torch.testing.assert_close(candidate(case), signal(case.reading))
    assert candidate.name() in choices.CANDIDATES or candidate.first == "dropped"


def test_both_kinds_of_sinks(case: Case) -> None:
    W = dense(case.reading.rows("middle")).double()
    N = len(W)
    expected = torch.zeros(N, dtype=torch.float64)
    expected[[N - 2, N - 1]] = 1  # the answer is the last token
    for i in reversed(range(N - 2)):
        expected[i] = W[i + 1 :, i] @ expected[i + 1 :]
    torch.testing.assert_close(Candidate("reach", "both")(case), expected)


def test_moving_mass_is_off_the_diagonal_and_off_the_first_token(subject: recall.Subject) -> None:
    readings = [subject.reading(problem) for problem in subject.unlabelled[:2]]
    mass = moving_mass(readings)
    model = subject.model
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            ids = torch.stack([reading.token_ids for reading in readings])
            maps = torch.stack(model(ids, output_attentions=True).attentions).double()  # [L, B, H, N, N]
    finally:
        model.set_attn_implementation("sdpa")
    moved = maps[..., 1:].sum(-1)
    moved[..., 1:] -= maps.diagonal(dim1=-2, dim2=-1)[..., 1:]
    for (layer, head), value in mass.items():
        assert value == pytest.approx(float(moved[layer, :, head].mean()), abs=1e-5)
    assert len(mass) == 24


def test_layers_and_heads_with_the_most_moving_mass() -> None:
    mass = {(layer, head): layer + head / 10 for layer in range(6) for head in range(4)} | {(0, 0): 100.0}
    chosen = choose(mass)
    assert chosen.layers["early"] == (0, 1) and chosen.layers["middle"] == (2, 3) and chosen.layers["late"] == (4, 5)
    assert chosen.layers["all"] == tuple(range(6)) and chosen.layers["moving"] == (0, 1)
    assert chosen.heads["moving_heads"] == {3: [0, 1, 2, 3]}
    assert chosen.heads["moving_all"] == {0: [0], 3: [1, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3]}
    five = choose({(layer, 0): 1.0 for layer in range(5)})
    assert five.layers["moving"] == five.layers["early"] == (0,) and five.layers["late"] == (3, 4)


def test_contrast_by_hand(case: Case) -> None:
    reading = case.reading
    credit = reading.place.credit_mask.nonzero().flatten().tolist()
    own, other = torch.zeros(len(reading)).double(), torch.zeros(len(reading) + 3).double()
    own[credit[0]], own[credit[1]], own[0] = 3, 1, 8  # the first token may get no credit and is in no sum
    other[credit[0]], other[credit[1]] = 2, 2
    minus, times = (contrast(reading, own, [other, other], how) for how in ("minus", "times"))
    assert minus[credit[0]] == pytest.approx(0.25) and minus[credit[1]] == 0
    assert times[credit[0]] == pytest.approx(0.75**2 / 1.25) and times[credit[1]] == pytest.approx(0.25**2 / 0.75)
    assert len(minus) == len(reading)


def test_contrasts_need_rows_that_saw_the_answer(case: Case) -> None:
    by_paper = Candidate("reach", "paper", contrast="minus")
    assert float(by_paper(case).sum()) > 0
    before = Candidate("reach", "flowgraph", contrast="minus")  # one token: the predicting row has not seen it
    assert float(before(case).sum()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="needs a case with wrong answers"):
        by_paper(replace(case, wrong=()))
    with pytest.raises(ValueError, match="shared statements"):
        Candidate(contrast="group")(case)
    shared = torch.linspace(0, 1, len(case.reading), dtype=torch.float64)
    torch.testing.assert_close(
        Candidate(contrast="group")(replace(case, shared=shared)), Candidate()(case) * (1 - shared)
    )


def test_statements_shared_by_wrong_solutions(smollm2_tokenizer: Any) -> None:
    text = "Tom has 3 + 4 = <<3+4=7>>7.\nHe eats <<7-2=5>>5.\nA: 5"
    ids = torch.tensor(smollm2_tokenizer(text, add_special_tokens=False)["input_ids"])
    wrong = ["<<3 + 4=7>>7 so A: 7", "<<3*4=12>>"]
    shared = choices.shared_statements(smollm2_tokenizer, ids, torch.ones(len(ids), dtype=torch.bool), wrong)
    told = {smollm2_tokenizer.decode([int(i)]): float(x) for i, x in zip(ids, shared, strict=True)}
    assert told["Tom"] == 0.5 and told[" eats"] == 0 and told["A"] == 0


def test_answers_of_solutions() -> None:
    rows = [
        {"correct": True, "answer": "1,200", "response": "so\nA: 1,200", "source": "reference"},
        {"correct": False, "answer": "1,200", "response": "so\nA: -3", "source": "model"},
        {"correct": False, "answer": "1,200", "response": "so\nA: -3", "source": "model"},
        {"correct": False, "answer": "1,200", "response": "A: 1200", "source": "model"},
        {"correct": False, "answer": "1,200", "response": "no end", "source": "model"},
        {"correct": True, "answer": "1,200", "response": "well\nA: 1200", "source": "model"},
    ]
    assert choices.wrong_answers(rows) == ["-3"]
    assert choices.right_solution(rows) is rows[5]
    assert choices.problems_of(range(20), 1, 3) == choices.problems_of(reversed(range(20)), 1, 3)
    assert all(problem % 2 for problem in choices.problems_of(range(20), 1, 3))


@pytest.fixture
def solutions(tmp_path: Path) -> Path:
    """A right and two wrong solutions to each of 26 problems, as the GSM8K file has them."""
    rows = []
    for problem in range(26):
        known = {"problem": problem, "question": f"What is {problem} + 4?", "answer": str(problem + 4)}
        for answer in (problem + 4, problem + 5, problem + 6):
            response = f"It is <<{problem}+4={answer}>>{answer}.\nA: {answer}"
            rows.append(known | {"response": response, "correct": answer == problem + 4, "source": "model"})
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_candidates_on_solutions(solutions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
    monkeypatch.setattr("flowgraph.smollm2.load", lambda: (policy(), tokenizer))
    lines = choices.gsm8k_log(solutions, 2, tmp_path)
    assert [line["problem"] % 2 for line in lines[1:]] == [0, 0, 1, 1]
    assert not {line["problem"] for line in lines[1:]} & set(choices.problems_of(range(26), 0, choices.UNLABELLED))
    for line in lines[1:]:
        assert set(line["drop"]) == set(choices.CANDIDATES) and all(np.isfinite(list(line["drop"].values())))
        assert len(set(line["drop"].values())) > 1
        # What is left of the response without the answers and the blank that predicts the last one.
        assert line["may be hidden"] == len(f"It is <<{line['problem']}+4=>>.\nA:")


# --- the choice -------------------------------------------------------------------------------------------------------


def choice_lines(gsm8k: bool = True) -> list[recall.Line]:
    """ "reach" is best on both tasks and GSM8K, "flow" in the middle; "random" beats all and is no candidate."""
    names = ["flow", "reach", "mix", "random"]
    ranks = ["1023", "0123", "2103", "0123"]  # the carrier is unit 0
    lines: list[recall.Line] = []
    for task in ("chains", "needles", "addition", "scratchpad"):
        lines.append({"task": task, "split": "choose", "signals": names})
        for number in range(4):
            about = {"task": task, "split": "choose", "problem": number, "level": 2, "solved": True}
            known = {"units": 4, "carriers": [0], "hops": [2], "max": " ".join(ranks), "mean": " ".join(ranks)}
            lines.append(about | {"verified": True} | known if number else about | {"verified": False})
    if gsm8k:
        lines.append({"task": "gsm8k", "split": "both", "signals": [*names, "flow/group"]})
        for number in range(6):
            drop = {"flow": 1.0 + number, "reach": 2.0 + number, "mix": 0.5, "random": 9.0, "flow/group": 8.0}
            lines.append({"task": "gsm8k", "problem": number, "drop": drop})
    return lines


def test_the_rule_chooses_and_the_other_half_reports() -> None:
    lines = choice_lines()
    before = copy.deepcopy(lines)
    summary = choices.summarise(lines)
    assert lines == before
    random.Random(1).shuffle(lines)
    assert choices.summarise(lines) == summary

    assert summary["winner"] == "reach" and len(summary["rule"]) == 4
    candidates = summary["candidates"]
    assert candidates["reach"]["mean rank"] == 1
    assert candidates["flow"]["ranks"]["needles precision"] == 2 and candidates["flow"]["mean rank"] == 2.125
    assert candidates["random"]["mean rank"] is None and candidates["flow/group"]["mean rank"] is None
    assert candidates["reach"]["choose"]["gsm8k choose drop"]["mean"] == 4
    assert candidates["reach"]["report"]["gsm8k report drop"]["mean"] == 5
    assert candidates["reach"]["difference"]["gsm8k report drop"] == {"mean": 1, "low": 1, "high": 1}
    assert candidates["reach"]["difference"]["scratchpad precision"]["mean"] == 0.5
    assert summary["traces"]["chains precision"] == 3 and summary["traces"]["gsm8k report drop"] == 3
    assert "winner: reach" in "\n".join(choices.show(summary))


def test_without_gsm8k_the_other_numbers_decide() -> None:
    summary = choices.summarise(choice_lines(gsm8k=False))
    assert summary["rule"] == ["chains precision", "chains early", "needles precision"]
    assert summary["winner"] == "reach"
    with pytest.raises(ValueError, match="none of the numbers"):
        choices.summarise([])


def test_all_candidates_run_on_a_task(subject: recall.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved(monkeypatch)
    monkeypatch.setattr(recall, "load_decoder", lambda task: subject.model)
    lines = choices.task_log("chains", "choose", 1, tmp_path)
    assert len(lines) == 2 and len(lines[1]["max"].split()) == len(lines[0]["signals"])
    assert set(lines[0]["signals"]) == set(choices.CANDIDATES) - set(choices.GROUP)
