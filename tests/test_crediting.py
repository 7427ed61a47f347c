"""One training step, free of any trainer: which tokens get which factor, and what is logged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.rl import Crediting, FlowConfig, Scorer, shape_advantages
from flowgraph.rl.crediting import COUNTED
from tests.written import ANSWERS, TOKENIZER, ids, is_mark, marked, policy, written_by_hand

PROMPTS = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False), marked(5, 2)]
ADVANTAGES = [1.0, -0.5, 2.0, -1.5]


def rollouts(responses: list[list[int]] = RESPONSES) -> tuple[list[Tensor], list[Tensor]]:
    token_ids, masks = [], []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        start = ids(prompt, end=False)
        token_ids.append(torch.tensor(start + response))
        masks.append(torch.arange(len(start) + len(response)) >= len(start))
    return token_ids, masks


def by_hand(**changes: Any) -> Crediting:
    defaults = {"answer": ANSWERS, "preset": "paper", "gain": 3.0}
    return Crediting(Scorer(written_by_hand(), TOKENIZER, FlowConfig(**{**defaults, **changes})))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_token_that_carries_all_flow_gets_the_gain_and_no_other(per_token: bool) -> None:
    token_ids, masks = rollouts()
    advantages: list[Any] = list(ADVANTAGES)
    if per_token:
        advantages = [torch.full((len(one),), a) for one, a in zip(token_ids, ADVANTAGES, strict=True)]
    factors = by_hand().factors(token_ids, masks, advantages)
    for factor, one in zip(factors, token_ids, strict=True):
        assert torch.equal(factor, torch.where(is_mark(one), 3.0, 1.0))


@pytest.mark.parametrize("change", [{"score": "random"}, {"answer": "boxed"}, {"layers": [1]}, {"seed": 1}])
def test_a_config_with_scores_that_its_scorer_does_not_give_is_refused(change: dict[str, Any]) -> None:
    scorer = Scorer(policy(), TOKENIZER, FlowConfig(answer=ANSWERS))
    Crediting(scorer, FlowConfig(answer=ANSWERS, rule="rank", gain=2.0, signs="positive", per="batch"))
    with pytest.raises(ValueError, match=f"config has {next(iter(change))}=.* the scorer was made with"):
        Crediting(scorer, FlowConfig(**{"answer": ANSWERS, **change}))


def test_layers_are_the_same_as_a_list_or_a_tuple() -> None:
    config = FlowConfig(layers=[1], answer=ANSWERS)
    assert Crediting(Scorer(policy(), TOKENIZER, config), replace(config, layers=(1,))).config.layers == (1,)


@pytest.mark.parametrize(("signs", "up", "down"), [("both", 3, 3), ("positive", 3, 1), ("negative", 1, 3)])
def test_signs(signs: str, up: float, down: float) -> None:
    token_ids, masks = rollouts()
    factors = by_hand(signs=signs).factors(token_ids, masks, ADVANTAGES)
    assert [factor.max() for factor in factors] == [up, down, up, down]


@pytest.mark.parametrize("normalize", [False, True])
def test_factors_do_what_shape_advantages_does(normalize: bool) -> None:
    token_ids, masks = rollouts()
    config = FlowConfig(answer=ANSWERS, rule="rank", normalize=normalize)
    crediting = Crediting(Scorer(policy(), TOKENIZER, config))
    factors = crediting.factors(token_ids, masks, ADVANTAGES)
    scored = crediting.scorer.credits(token_ids, masks)
    for number, advantage in enumerate(ADVANTAGES):
        one, mask = torch.tensor([advantage]), masks[number][None]
        shaped = shape_advantages(one, scored[number][None], mask, normalize=normalize)[0]
        torch.testing.assert_close(factors[number] * advantage, shaped)
        if normalize:
            assert factors[number][masks[number]].mean() == pytest.approx(1)


def test_a_gain_of_1_changes_no_bit() -> None:
    token_ids, masks = rollouts()
    factors = by_hand(gain=1.0).factors(token_ids, masks, ADVANTAGES)
    assert all((factor == 1).all() for factor in factors)
    assert factors.counts["scored"] == 4


@pytest.mark.parametrize(("step", "gain"), [(0, 1.0), (1, 2.0), (2, 3.0), (5, 3.0), (7, 2.0), (9, 1.0), (20, 1.0)])
def test_warm_up_and_annealing(step: int, gain: float) -> None:
    token_ids, masks = rollouts()
    crediting = by_hand(warmup_steps=2, anneal_after=5, anneal_steps=4)
    factors = crediting.factors(token_ids, masks, ADVANTAGES, step=step)
    assert all(factor[is_mark(one)] == gain for factor, one in zip(factors, token_ids, strict=True))


def test_an_advantage_of_0_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    crediting = by_hand()
    monkeypatch.setattr(crediting.scorer, "score", lambda samples: [] if not samples else pytest.fail("scored"))
    factors = crediting.factors(*rollouts(), [0.0] * 4)
    assert all((factor == 1).all() for factor in factors)
    assert factors.metrics["flow/scored"] == 0 and "flow/failed" not in factors.metrics


@pytest.mark.parametrize(("signs", "share"), [("both", 1.0), ("positive", 0.5), ("negative", 0.5)])
def test_a_sign_that_is_not_weighted_is_not_scored(signs: str, share: float) -> None:
    assert by_hand(signs=signs).factors(*rollouts(), ADVANTAGES).metrics["flow/scored"] == share


def test_tool_output_has_factor_1() -> None:
    token_ids, masks = rollouts()
    trained = [mask & ~is_mark(one) for mask, one in zip(masks, token_ids, strict=True)]
    factors = by_hand().factors(token_ids, masks, ADVANTAGES, trained_mask=trained)
    assert all((factor == 1).all() for factor in factors)
    assert factors.metrics["flow/no_flow"] == 1


def test_a_step_of_bad_samples() -> None:
    """No answer, cut off, empty, and ten times as long as the rest: three are counted, the long one is credited."""
    responses = [ids("aaaa@bb"), marked(1, 3, end=False), [], marked(90, 110)]
    token_ids, masks = rollouts(responses)
    factors = by_hand(max_batch_tokens=64).factors(
        token_ids, masks, ADVANTAGES, truncated=[False, True, False, False], rewards=[0, 0, 0, 1]
    )
    marks = [is_mark(one) for one in token_ids]
    assert (factors[0] == 1).all() and (factors[2] == 1).all()
    assert torch.equal(factors[1] == 3, marks[1]) and torch.equal(factors[3] == 3, marks[3])
    shares = {name: factors.metrics[f"flow/{name}"] for name in COUNTED}
    assert shares == {"no_answer": 0.25, "cut_off": 0.25, "no_flow": 0, "empty": 0.25, "failed": 0}
    assert factors.metrics["flow/scored"] == 1


def test_a_sample_that_fails_warns_and_is_counted() -> None:
    token_ids, masks = rollouts()
    token_ids[1][3] = 10_000
    with pytest.warns(UserWarning, match=r"no credits for a response, its weights stay 1: token_ids must be in 0\.\."):
        factors = by_hand().factors(token_ids, masks, ADVANTAGES)
    assert list(factors.failed) == [1] and (factors[1] == 1).all()
    assert factors.metrics["flow/failed"] == 0.25
    assert all((factors[n] == 3).sum() == 1 for n in (0, 2, 3))


def test_the_log_of_a_step() -> None:
    crediting = by_hand()
    first = crediting.factors(*rollouts(), ADVANTAGES, rewards=[1.0, 0.0, 1.0, 0.0]).metrics
    assert first["flow/credited_flow"] == 1 and first["flow/effective_tokens"] == 1
    assert 0 < first["flow/credited_share"] < 1 and first["flow/seconds"] > 0
    second = crediting.factors(*rollouts(), ADVANTAGES).metrics
    stability = {name for name in second if "stability" in name} - {name for name in first if "stability" in name}
    assert stability and all(second[name] == pytest.approx(1) for name in stability if "base" not in name)


def test_overlap_with_entropy() -> None:
    token_ids, masks = rollouts()
    high = [is_mark(one).float() for one in token_ids]
    assert by_hand().factors(token_ids, masks, ADVANTAGES, entropy=high).metrics["flow/entropy_overlap"] == 1
    low = [1 - one for one in high]
    assert by_hand().factors(token_ids, masks, ADVANTAGES, entropy=low).metrics["flow/entropy_overlap"] == 0
    assert "flow/entropy_overlap" not in by_hand().factors(token_ids, masks, ADVANTAGES).metrics


def test_scores_taken_before_are_weighted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    crediting = by_hand()
    token_ids, masks = rollouts()
    scored = crediting.scorer.credits(token_ids, masks)
    monkeypatch.setattr(crediting.scorer, "score", lambda samples: pytest.fail("scored again"))
    factors = crediting.factors(token_ids, masks, [1.0, 0.0, -1.0, 1.0], scored=scored)
    assert [float(factor.max()) for factor in factors] == [3, 1, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": [1.0]}, "advantages must have one entry per sample, 4, got 1"),
        ({"advantages": [1.0, 2.0, torch.ones(2), 1.0]}, r"advantages\[2\] must be a number or \[N\]"),
        ({"advantages": [1.0, float("nan"), 0.0, 1.0]}, r"advantages\[1\] is nan at token \d+: expected a finite"),
        ({"rewards": [1.0]}, "rewards must have one entry per sample, 4, got 1"),
        ({"trained_mask": [torch.ones(1)]}, "trained_mask has 1 rows, response_mask 4"),
        ({"step": -1}, "step is -1"),
        ({"entropy": [torch.ones(1)] * 4}, r"entropy must be 4 tensors \[N_i\], as long as token_ids each"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str) -> None:
    token_ids, masks = rollouts()
    given = {"token_ids": token_ids, "response_mask": masks, "advantages": ADVANTAGES}
    with pytest.raises(ValueError, match=message):
        by_hand().factors(**{**given, **changes})
