"""Stability: every variant against a tracer of its own that runs the model anew, ranked by scipy."""

from __future__ import annotations

import importlib
import json
import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowgraph import Threshold, Trace, Tracer, capture, credit, sparsify, trace_flow
from flowgraph.stability import Stability, layer_agreement, stability, summarize
from tests.written import TOKENIZER, policy

PROMPT, RESPONSE = "What is 6 times 7?", "7 and 7 is 14, so 6 * 7 is 42.\nThe answer is 43.\nA: 42"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return policy(num_hidden_layers=6)


def traced(model: Any, **options: Any) -> Trace:
    return Tracer(model, TOKENIZER, **options)(PROMPT, RESPONSE)


def rank_correlation(one: Trace, other: Trace) -> float:
    mask = one.credit.mask & other.credit.mask
    return float(stats.spearmanr(one.credit.scores[mask], other.credit.scores[mask]).statistic)


def common_share(one: Trace, other: Trace, top: float = 0.4) -> float:
    """Of the tokens with the highest scores, by sorting."""
    mask = (one.credit.mask & other.credit.mask).nonzero().flatten().tolist()
    count = int(np.ceil(top * len(mask) - 1e-9))
    best = [set(sorted(mask, key=lambda i: -float(t.credit.scores[i]))[:count]) for t in (one, other)]
    return len(best[0] & best[1]) / count


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("edges", "1/64", {"edges": Threshold(1 / 64)}),
    ("edges", "1/256", {"edges": Threshold(1 / 256)}),
    ("edges", "1/1024", {"edges": Threshold(1 / 1024)}),
    ("edges", "exact", {"mode": "exact"}),
    ("layers", "early third", {"layers": [0, 1]}),
    ("layers", "late third", {"layers": [4, 5]}),
    ("layers", "all layers", {"layers": "all"}),
    ("layers", "layer 2", {"layers": [2]}),
    ("layers", "layer 3", {"layers": [3]}),
    ("preset", "paper", {"preset": "paper"}),
    ("answer", "answer is", {"answer": "answer is"}),
]


@pytest.fixture(scope="module")
def found(model: Any) -> Stability:
    return stability(Tracer(model, TOKENIZER), PROMPT, RESPONSE)


@pytest.mark.parametrize(("group", "name", "options"), VARIANTS)
def test_a_variant_is_what_a_tracer_of_its_own_says(
    model: Any, found: Stability, group: str, name: str, options: dict[str, Any]
) -> None:
    default, other = traced(model), traced(model, **options)
    one = found[name]
    assert one.group == group
    assert one.spearman == pytest.approx(rank_correlation(default, other), abs=2e-3)
    assert one.overlap == pytest.approx(common_share(default, other), abs=0.05)
    assert one.same_answer == (name != "answer is")


def test_there_is_every_variant_and_no_other(found: Stability) -> None:
    names = [name for _, name, _ in VARIANTS]
    halves = [f"half {number}{side}" for number in (1, 2, 3, 4) for side in "ab"]
    assert sorted(one.name for one in found.variants) == sorted([*names, *halves, "boxed", "####", "<answer>"])
    assert found.answer == "42"
    assert found.layers == [2, 3]
    assert found["exact"].spearman == pytest.approx(1, abs=1e-3)
    assert found["1/64"].spearman < found["1/1024"].spearman
    with pytest.raises(KeyError, match="no variant 'none'"):
        found["none"]


def test_a_finder_that_finds_nothing_is_told_from_one_that_finds_the_same(model: Any, found: Stability) -> None:
    assert found["boxed"].same_answer is None
    assert np.isnan([found["boxed"].spearman, found["boxed"].overlap]).all()
    last = stability(Tracer(model, TOKENIZER, answer=re.compile(r"A: (\d+)")), PROMPT, RESPONSE, groups=["answer"])
    assert last["A:"].same_answer is True
    assert last["A:"].spearman == pytest.approx(1)


def test_halves_of_heads_share_none_and_leave_none_out(model: Any, found: Stability) -> None:
    """From the same random order, the rows of each half by hand."""
    default = traced(model)
    ids = default.graph.token_ids
    captured = capture(model, ids[None])
    heads = [(layer, head) for layer in (2, 3) for head in range(4)]
    order = np.random.default_rng(0).permutation(8).tolist()
    flows = []
    for name, chosen in (("half 1a", order[:4]), ("half 1b", order[4:])):
        of = {layer: sorted(heads[c][1] for c in chosen if heads[c][0] == layer) for layer in (2, 3)}
        rows = captured.rows(0, torch.arange(len(ids)), heads={layer: some for layer, some in of.items() if some})
        roles: dict[str, Any] = {
            role: default.graph[role] for role in ("prompt_mask", "answer_mask", "response_mask", "credit_mask")
        }
        flow = trace_flow(type(default.graph).from_sparse(sparsify(rows, None), **roles))
        flows.append(credit(flow, "mix").scores[default.credit.mask])
        expected = stats.spearmanr(flows[-1], default.credit.scores[default.credit.mask]).statistic
        assert found[name].spearman == pytest.approx(expected, abs=2e-3)
    once = stability(Tracer(model, TOKENIZER), PROMPT, RESPONSE, groups=["heads"], halves=1)
    assert once.head_agreement == pytest.approx(stats.spearmanr(*flows).statistic, abs=2e-3)
    assert found["half 1a"].spearman != found["half 2a"].spearman


def test_agreement_of_layers_is_the_mean_over_pairs(model: Any) -> None:
    layers = [1, 2, 4]
    tracer = Tracer(model, TOKENIZER, layers=layers)
    singles = [traced(model, layers=[layer]) for layer in layers]
    expected = np.mean([rank_correlation(one, other) for one, other in combinations(singles, 2)])
    assert layer_agreement(tracer, PROMPT, RESPONSE) == pytest.approx(expected, abs=2e-3)
    both = stability(tracer, PROMPT, RESPONSE, groups=["layers"])
    assert both.layer_agreement == pytest.approx(expected, abs=2e-3)
    assert both["middle third"].spearman < 1, "not the default here"
    assert np.isnan(layer_agreement(Tracer(model, TOKENIZER, layers=[2]), PROMPT, RESPONSE))


def test_score_top_and_rule_of_the_tracer_count(model: Any) -> None:
    options: dict[str, Any] = {"score": "reach", "top": 0.2, "rule": "rank"}
    one = stability(Tracer(model, TOKENIZER, **options), PROMPT, RESPONSE, groups=["edges"])["1/64"]
    default, other = (traced(model, **options, edges=edges) for edges in (None, Threshold(1 / 64)))
    assert one.spearman == pytest.approx(rank_correlation(default, other), abs=2e-3)
    assert one.overlap == pytest.approx(common_share(default, other, 0.2), abs=0.1)


def test_the_question_of_messages(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE, raising=False)
    example = [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "A: 4"}]
    messages = [{"role": "system", "content": "Be brief."}, *example, {"role": "user", "content": PROMPT}]
    for question, other in (("prompt", "user"), ("user", "prompt")):
        found = stability(Tracer(model, TOKENIZER, question=question), messages, RESPONSE, groups=["question"])
        traces = [Tracer(model, TOKENIZER, question=name)(messages, RESPONSE) for name in (question, other)]
        assert found[other].spearman == pytest.approx(rank_correlation(*traces), abs=2e-3)
        assert found[other].spearman < 1 - 1e-4
        said = [{"role": "assistant", "content": RESPONSE}]
        again = stability(Tracer(model, TOKENIZER, question=question), messages, said, groups=["question"])
        assert again.to_dict() == found.to_dict()


def test_token_ids_with_masks_of_their_own(model: Any, found: Stability) -> None:
    trace = traced(model)
    ids, prompt = trace.graph.token_ids, int(trace.graph.prompt_mask.sum())
    same = stability(Tracer(model, TOKENIZER), ids[:prompt], ids[prompt:])
    assert same.to_dict() == found.to_dict()
    blind = Tracer(model)  # no tokenizer: nothing is searched for
    masked = stability(blind, ids[:prompt], ids[prompt:], answer_tokens=trace.spans.answer_tokens, groups=["edges"])
    assert masked["1/64"].spearman == pytest.approx(found["1/64"].spearman, abs=0.05)
    asked = torch.arange(len(ids)) < 5
    question = stability(Tracer(model, TOKENIZER), ids[:prompt], ids[prompt:], question_mask=asked, groups=["question"])
    assert [one.name for one in question.variants] == ["prompt"]


def test_the_model_runs_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, runs = Tracer(model, TOKENIZER), []
    layer_agreement(tracer, PROMPT, RESPONSE)  # the layers that there are are known now
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    stability(tracer, PROMPT, RESPONSE)
    assert len(runs) == 1


def test_long_traces_stream_and_say_the_same(model: Any, found: Stability, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the package that name is the function.
    monkeypatch.setattr(importlib.import_module("flowgraph.stability"), "LONG", 8)
    streamed = stability(Tracer(model, TOKENIZER), PROMPT, RESPONSE, groups=["edges"])
    assert streamed["1/64"].spearman == pytest.approx(found["1/64"].spearman, abs=2e-3)


def test_without_an_answer_there_is_nothing_to_compare(model: Any) -> None:
    none = stability(Tracer(model, TOKENIZER), PROMPT, "I do not know")
    assert (none.answer, none.variants, none.flags) == (None, [], ("no_answer",))
    assert np.isnan([none.layer_agreement, none.head_agreement]).all()
    shown = json.loads(json.dumps(none.to_dict(), allow_nan=False))
    assert shown["layer_agreement"] is None


def test_many_traces_are_summed_up(model: Any, found: Stability) -> None:
    other = stability(Tracer(model, TOKENIZER), PROMPT, "It is 42, I think.\nA: 42")
    none = stability(Tracer(model, TOKENIZER), PROMPT, "I do not know")
    rows = {row["name"]: row for row in summarize([found, other, none])}
    pair = [found["1/64"].spearman, other["1/64"].spearman]
    mean, low, high = rows["1/64"]["spearman"]
    assert rows["1/64"]["n"] == 2
    assert mean == pytest.approx(np.mean(pair))
    assert [low, high] == pytest.approx(sorted(pair)), "all that two traces can say"
    halves = [np.mean([v.overlap for v in one.variants if v.group == "heads"]) for one in (found, other)]
    assert rows["random half"]["overlap"][0] == pytest.approx(np.mean(halves))
    assert rows["answer is"]["n"] == 1
    assert rows["answer is"]["same_answer"] == 0
    assert rows["layer_agreement"]["spearman"][0] == pytest.approx(
        np.mean([found.layer_agreement, other.layer_agreement])
    )
    few = stability(Tracer(model, TOKENIZER), PROMPT, RESPONSE, groups=["edges"])
    assert {row["group"] for row in summarize([few])} == {"edges"}, "no row of what was not asked for"
    with pytest.raises(ValueError, match="found is empty"):
        summarize([])


IDS: Tensor = torch.arange(5, 9)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ((PROMPT, RESPONSE), {"groups": ["colours"]}, "groups holds 'colours'"),
        ((PROMPT, RESPONSE), {"halves": 0}, "halves must be at least 1"),
        ((PROMPT,), {}, "response must be text like prompt"),
        ((IDS, "text"), {}, r"response must be token ids \[R\]"),
        ((PROMPT, IDS), {}, "response must be text"),
        ((PROMPT, RESPONSE), {"answer_tokens": IDS > 0}, "answer_tokens goes with token ids"),
    ],
)
def test_bad_input_is_named(model: Any, arguments: tuple[Any, ...], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability(Tracer(model, TOKENIZER), *arguments, **more)


def test_the_users_question_needs_messages_or_a_mask(model: Any) -> None:
    tracer = Tracer(model, TOKENIZER, question="user")
    with pytest.raises(ValueError, match="needs chat messages"):
        stability(tracer, PROMPT, RESPONSE)
    with pytest.raises(ValueError, match="needs question_mask"):
        stability(tracer, IDS, IDS)
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        stability(Tracer(model), PROMPT, RESPONSE)
