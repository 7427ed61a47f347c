"""Rules from scores to weights, and credit on flows."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import TokenGraph, credit, trace_flow, weights_from_scores
from tests.graphs import graphs, mask_of, random_graph

RULES = ("top", "proportional", "rank", "softmax")
rules = pytest.mark.parametrize("rule", RULES)


def top_by_hand(scores: list[float], mask: list[bool], top: str, gain: float) -> list[float]:
    """The definition, with exact arithmetic for the count; a stable sort leaves ties to the earlier token."""
    taking_part = [i for i, m in enumerate(mask) if m]
    count = math.ceil(Fraction(top) * len(taking_part))
    best = sorted(taking_part, key=lambda i: -scores[i])[:count]
    return [gain if i in best and scores[i] > 0 else 1.0 for i in range(len(scores))]


@given(data=st.data(), top=st.sampled_from(["0.1", "0.2", "0.4", "0.6", "1", "0.333", "0.07"]))
def test_top_equals_the_definition(data: st.DataObject, top: str) -> None:
    n = data.draw(st.integers(0, 60))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 3.0]), min_size=n, max_size=n))
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    weights = weights_from_scores(torch.tensor(scores), torch.tensor(mask, dtype=torch.bool), top=float(top))
    assert weights.tolist() == top_by_hand(scores, mask, top, 1.5)


def test_the_share_of_thirty_tokens_is_not_rounded_up() -> None:
    """0.1 * 30 is 3.0000000000000004 in floating point."""
    weights = weights_from_scores(torch.arange(1.0, 31), torch.ones(30, dtype=torch.bool), top=0.1)
    assert (weights > 1).sum() == 3


def test_other_rules_by_hand() -> None:
    scores, mask = torch.tensor([4.0, 1.0, 2.0, 0.0, 9.0]), torch.tensor([True, True, True, True, False])
    expected = {
        "proportional": [1.5, 1.125, 1.25, 1, 1],
        "rank": [1.5, 1.25, 1.375, 1, 1],
        # standard deviation of (4, 1, 2, 0): sqrt(2.1875)
        "softmax": [1.5, 1 + math.exp(-3 / 2.1875**0.5) / 2, 1 + math.exp(-2 / 2.1875**0.5) / 2, 1, 1],
    }
    for rule, weights in expected.items():
        torch.testing.assert_close(weights_from_scores(scores, mask, rule), torch.tensor(weights))


@rules
@given(data=st.data(), gain=st.sampled_from([0.5, 1.0, 1.5, 3.0]))
def test_laws_of_every_rule(rule: str, data: st.DataObject, gain: float) -> None:
    n = data.draw(st.integers(1, 30))
    number = st.floats(0, 1e6, allow_subnormal=False)
    scores = torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)), dtype=torch.float64)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    weights = weights_from_scores(scores, mask, rule, gain=gain)
    assert (weights[~mask] == 1).all() and (weights[scores == 0] == 1).all()
    assert (weights >= min(1, gain) - 1e-12).all() and (weights <= max(1, gain) + 1e-12).all()
    part = weights[mask]
    if len(part) and scores[mask].max() > 0:
        assert part[scores[mask].argmax()] == pytest.approx(gain)  # the highest score gets the whole gain
    order = scores[mask].argsort()
    steps = part[order].diff() * (1 if gain >= 1 else -1)
    if rule != "top":  # of tied scores "top" may take only the earlier one
        assert (steps >= -1e-12).all()
    # scores outside the mask, even NaN, change nothing; nor does a common factor
    other = torch.where(mask, scores, torch.nan)
    assert torch.equal(weights_from_scores(other, mask, rule, gain=gain), weights)
    torch.testing.assert_close(weights_from_scores(scores * 8, mask, rule, gain=gain), weights)


@rules
def test_padded_rows_equal_the_rows_alone(rule: str) -> None:
    lengths = (7, 0, 12, 1)
    scores, mask = torch.rand(4, 12), torch.arange(12) < torch.tensor(lengths)[:, None]
    weights = weights_from_scores(scores, mask, rule)
    for row, length in enumerate(lengths):
        alone = weights_from_scores(scores[row, :length], mask[row, :length], rule)
        torch.testing.assert_close(weights[row, :length], alone, rtol=1e-6, atol=0)
        assert (weights[row, length:] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule must be one of 'top', 'proportional', 'rank', 'softmax', got 'best'"),
        ({"top": 0}, r"top must be in \(0, 1\], got 0"),
        ({"top": 40}, r"top must be in \(0, 1\], got 40"),
        ({"gain": -1}, "gain must be finite and >= 0, got -1"),
        ({"gain": float("nan")}, "gain must be finite"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be bool \[3\] like scores, got \[4\]"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"scores": torch.ones(3, dtype=torch.int64)}, r"scores must be a float tensor \[T\] or \[B, T\]"),
        ({"scores": torch.ones(1, 1, 3)}, "scores must be a float tensor"),
        ({"scores": torch.tensor([1.0, torch.nan, 1])}, "scores of trace 0, token 1 is nan"),
        ({"scores": torch.tensor([1.0, 1.0, -2])}, "scores of trace 0, token 2 is -2.0; .* >= 0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": torch.ones(3), "mask": torch.ones(3, dtype=torch.bool)} | changes
    with pytest.raises(ValueError, match=message):
        weights_from_scores(**arguments)


def by_hand(graph: TokenGraph, scores: Tensor) -> list[float]:
    return top_by_hand(scores.tolist(), graph.credit_mask.tolist(), "0.4", 1.5)


@pytest.mark.parametrize("score", ["throughput", "reach"])
@given(several=st.lists(graphs(max_tokens=16), min_size=1, max_size=4))
def test_credit_of_a_batch_is_the_definition_graph_by_graph(score: str, several: list[TokenGraph]) -> None:
    flow = trace_flow(Batch.from_data_list(several))
    credits = credit(flow, score)
    assert len(credits) == len(several)
    for graph, one, part in zip(several, credits, flow, strict=True):
        scores = part.throughput if score == "throughput" else part.reach
        assert one.weights.tolist() == by_hand(graph, scores)
        assert torch.equal(one.scores, scores) and torch.equal(one.mask, graph.credit_mask)
        dry = not bool((scores[graph.credit_mask] > 0).any())
        blind = not bool(graph.answer_mask.any())
        assert one.flags[0] == (("no_answer",) if blind else ("no_flow",) if dry else ())
        if one.flags[0]:
            assert (one.weights == 1).all()


def test_answer_special_tokens_and_tools_get_no_credit() -> None:
    graph = random_graph(30)
    graph.credit_mask = mask_of(30, 12, 13, 14, 20)
    weights = credit(trace_flow(graph), top=1.0).weights
    assert (weights > 1).nonzero().flatten().tolist() == [12, 13, 14, 20]


def test_weights_come_back_in_the_callers_layout() -> None:
    several = [random_graph(6), random_graph(9, seed=1), random_graph(5, seed=2)]
    credits = credit(trace_flow(Batch.from_data_list(several)))
    # a left-padded row, and a row that packs two documents with a hole between them
    places = [torch.arange(8, 14), torch.arange(0, 9), torch.tensor([9, 10, 12, 13, 14])]
    weights = credits.to_layout([0, 1, 1], places, (3, 15))
    for one, row, place in zip(credits, [0, 1, 1], places, strict=True):
        assert torch.equal(weights[row, place], one.weights)
    assert (weights[0, :8] == 1).all() and (weights[2] == 1).all() and weights[1, 11] == 1


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match="score must be one of 'throughput', 'reach', got 'attention'"):
        credit(trace_flow(random_graph(8)), "attention")
