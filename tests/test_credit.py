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

from flowgraph import Flow, TokenGraph, credit, trace_flow, weights_from_scores
from tests.graphs import graphs, mask_of, random_graph

RULES = ("top", "proportional", "rank", "softmax", "keep")
rules = pytest.mark.parametrize("rule", RULES)
pers = pytest.mark.parametrize("per", ["sequence", "batch"])
SHARES = ["0.1", "0.2", "0.4", "0.6", "1", "0.333", "0.07"]


def pooled_by_hand(scores: list[float], rule: str, top: str, gain: float) -> list[float]:
    """The definition of every rule for tokens that are ranked together, with exact arithmetic for the count."""
    count = math.ceil(Fraction(top) * len(scores))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]  # stable: ties go to the earlier one
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    out = []
    for i, s in enumerate(scores):
        if rule == "keep":
            out.append(1.0 if i in best and s > 0 else 0.0)
        elif s == 0:
            out.append(1.0)
        elif rule == "top":
            out.append(gain if i in best else 1.0)
        elif rule == "proportional":
            out.append(1 + (gain - 1) * s / max(scores))
        elif rule == "rank":
            out.append(1 + (gain - 1) * sum(other <= s for other in scores) / len(scores))
        else:
            # Equal scores have no spread in exact arithmetic, whatever rounding makes of it.
            away = (s - max(scores)) / std if len(set(scores)) > 1 else 0.0
            out.append(1 + (gain - 1) * math.exp(away))
    return out


def weights_by_hand(
    scores: list[list[float]], mask: list[list[bool]], rule: str, per: str, top: str = "0.4", gain: float = 1.5
) -> list[list[float]]:
    """The definition for a batch: which tokens are ranked together, and 1 for all the others."""
    out = [[1.0] * len(row) for row in scores]
    ranked = []  # per trace the places of its tokens, for traces with a positive score
    for b, row in enumerate(mask):
        places = [(b, t) for t, taking_part in enumerate(row) if taking_part]
        if any(scores[b][t] > 0 for b, t in places):
            ranked.append(places)
    pools = ranked if per == "sequence" else [[place for places in ranked for place in places]] if ranked else []
    for pool in pools:
        for (b, t), weight in zip(pool, pooled_by_hand([scores[b][t] for b, t in pool], rule, top, gain), strict=True):
            out[b][t] = weight
    return out


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Scores with many ties and zeros, and masks; some rows without a positive score, some without any token."""
    rows, tokens = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    numbers = [draw(st.sampled_from([[0.0], [0.0, 0.125, 0.25, 0.5, 3.0]])) for _ in range(rows)]
    scores = [draw(st.lists(st.sampled_from(few), min_size=tokens, max_size=tokens)) for few in numbers]
    mask = [draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(rows)]
    return scores, mask


@rules
@pers
@given(batch=batches(), top=st.sampled_from(SHARES), gain=st.sampled_from([0.0, 0.5, 1.5, 3.0]))
def test_every_rule_equals_its_definition(
    rule: str, per: str, batch: tuple[list[list[float]], list[list[bool]]], top: str, gain: float
) -> None:
    scores, mask = torch.tensor(batch[0], dtype=torch.float64), torch.tensor(batch[1], dtype=torch.bool)
    weights = weights_from_scores(scores, mask, rule, top=float(top), gain=gain, per=per)
    expected = torch.tensor(weights_by_hand(*batch, rule, per, top, gain), dtype=torch.float64)
    if rule in ("top", "keep"):
        assert torch.equal(weights, expected)
    else:
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


@pers
def test_keep_by_hand(per: str) -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 9.0], [3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    weights = weights_from_scores(scores, mask, "keep", top=0.4, gain=7.0, per=per)
    if per == "sequence":  # ceil(1.2) = 2 of three, ceil(1.6) = 2 of four
        assert weights[:2].tolist() == [[1, 0, 1, 1], [1, 1, 0, 0]]
    else:  # ceil(2.8) = 3 of seven: row 2 has no positive score, so that its tokens are not counted
        assert weights[:2].tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]
    assert (weights[2:] == 1).all()


def test_top_of_a_batch_by_hand() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0], [1.0, 3.0, 3.0]])
    weights = weights_from_scores(scores, torch.ones(2, 3, dtype=torch.bool), top=0.5, per="batch")
    assert weights.tolist() == [[1.5, 1.5, 1.5], [1, 1, 1]]  # of three 3.0 the one in the earlier row


def test_keep_never_keeps_a_score_of_zero() -> None:
    weights = weights_from_scores(torch.tensor([0.0, 2.0, 0.0]), torch.ones(3, dtype=torch.bool), "keep", top=1.0)
    assert weights.tolist() == [0, 1, 0]


@rules
def test_one_trace_is_a_batch_of_one(rule: str) -> None:
    scores, mask = torch.rand(9), torch.rand(9) > 0.3
    weights = weights_from_scores(scores, mask, rule)
    for per in ("sequence", "batch"):
        assert torch.equal(weights_from_scores(scores, mask, rule, per=per), weights)
        assert torch.equal(weights_from_scores(scores[None], mask[None], rule, per=per)[0], weights)


@rules
@pers
@given(data=st.data())
def test_the_order_of_traces_plays_no_part_without_ties(rule: str, per: str, data: st.DataObject) -> None:
    scores = torch.tensor(data.draw(st.permutations(range(1, 29)))).view(4, 7).double()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=28, max_size=28))).view(4, 7)
    order = torch.tensor(data.draw(st.permutations(range(4))))
    weights = weights_from_scores(scores, mask, rule, per=per)
    again = weights_from_scores(scores[order], mask[order], rule, per=per)
    torch.testing.assert_close(again, weights[order], rtol=1e-12, atol=0)


@rules
@pers
@given(factor=st.floats(1e-6, 1e6))
def test_a_common_factor_changes_nothing(rule: str, per: str, factor: float) -> None:
    scores = torch.arange(1.0, 31, dtype=torch.float64).view(3, 10).square()
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) > 0.2
    weights = weights_from_scores(scores, mask, rule, per=per)
    torch.testing.assert_close(weights_from_scores(scores * factor, mask, rule, per=per), weights)


@rules
@pers
def test_pads_and_traces_without_a_score_change_nothing(rule: str, per: str) -> None:
    scores, mask = torch.rand(3, 8), torch.rand(3, 8) > 0.2
    weights = weights_from_scores(scores, mask, rule, per=per)
    wide, wide_mask = torch.full((5, 14), torch.nan), torch.zeros(5, 14, dtype=torch.bool)
    wide[[0, 2, 4], 5:13], wide_mask[[0, 2, 4], 5:13] = scores, mask
    wide[1], wide_mask[1] = 0, True  # no flow; row 3 has no token at all
    padded = weights_from_scores(wide, wide_mask, rule, per=per)
    torch.testing.assert_close(padded[[0, 2, 4], 5:13], weights, rtol=1e-6, atol=0)
    assert (padded[[1, 3]] == 1).all() and (padded[[0, 2, 4], :5] == 1).all() and (padded[[0, 2, 4], 13:] == 1).all()


@rules
@pers
def test_the_scores_of_a_batch_may_be_in_half_precision(rule: str, per: str) -> None:
    scores = (torch.rand(8, 500) * 2000).half()  # their sum is far beyond 65504
    mask = torch.ones(8, 500, dtype=torch.bool)
    weights = weights_from_scores(scores, mask, rule, per=per)
    assert weights.dtype == torch.float16
    torch.testing.assert_close(
        weights.float(), weights_from_scores(scores.float(), mask, rule, per=per), atol=1e-3, rtol=0
    )


@rules
@pers
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_to_weigh(rule: str, per: str, shape: tuple[int, ...]) -> None:
    assert weights_from_scores(torch.ones(shape), torch.ones(shape).bool(), rule, per=per).shape == shape


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
    low, high = (0, 1) if rule == "keep" else (1, gain)
    part = weights[mask]
    if not (scores[mask] > 0).any():
        assert (weights == 1).all()
        return
    assert (weights[~mask] == 1).all() and (part[scores[mask] == 0] == low).all()
    assert (part >= min(low, high) - 1e-12).all() and (part <= max(low, high) + 1e-12).all()
    assert part[scores[mask].argmax()] == pytest.approx(high)  # the highest score gets the highest weight
    order = scores[mask].argsort()
    steps = part[order].diff() * (1 if high >= low else -1)
    if rule not in ("top", "keep"):  # of tied scores these may take only the earlier one
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
        ({"rule": "best"}, "rule must be one of 'top', 'proportional', 'rank', 'softmax', 'keep', got 'best'"),
        ({"top": 0}, r"top must be in \(0, 1\], got 0"),
        ({"top": 40}, r"top must be in \(0, 1\], got 40"),
        ({"gain": -1}, "gain must be finite and >= 0, got -1"),
        ({"gain": float("nan")}, "gain must be finite"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"per": "token"}, "per must be one of 'sequence', 'batch', got 'token'"),
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


def mixed(flow: Flow) -> Tensor:
    """The mix of one graph as `credit` gives it, once it is what its definition says."""
    found = credit(flow, "mix").scores
    mask = flow.graph.credit_mask
    flows, reaches = flow.flow.double(), flow.reach.double()
    if not float(flows[mask].sum()) or not float(reaches[mask].sum()):
        assert not found.any()
    elif float(reaches[mask].max()) > 1e-30:
        expected = (flows / flows[mask].sum() * reaches / reaches[mask].sum()).sqrt()
        torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-15)
    return found


def test_a_mix_needs_no_reach_that_fits_the_dtype() -> None:
    """All weights into the answer times 1e-40: reach is 0 in float32, its logarithm is not."""
    graph = random_graph(12, dtype=torch.float32)
    usual = credit(trace_flow(graph), "mix").scores
    into = graph.answer_mask[graph.edge_index[1]]
    graph.edge_weight = torch.where(into, graph.edge_weight * 1e-30, graph.edge_weight)
    flow = trace_flow(graph)
    graph.edge_weight = torch.where(into, graph.edge_weight * 1e-10, graph.edge_weight)
    tiny = trace_flow(graph)
    assert float(tiny.reach[~graph.answer_mask].max()) < 1e-37
    for found, tolerance in ((flow, 1e-4), (tiny, 1e-2)):
        scores = credit(found, "mix").scores
        torch.testing.assert_close(scores[graph.credit_mask], usual[graph.credit_mask], rtol=tolerance, atol=0)


@pytest.mark.parametrize("score", ["throughput", "reach", "mix"])
@pers
@pytest.mark.parametrize("rule", ["top", "keep"])
@given(several=st.lists(graphs(max_tokens=16), min_size=1, max_size=4))
def test_credit_of_a_batch_is_the_definition(score: str, per: str, rule: str, several: list[TokenGraph]) -> None:
    flow = trace_flow(Batch.from_data_list(several))
    credits = credit(flow, score, rule=rule, per=per)
    parts = [mixed(part) if score == "mix" else getattr(part, score) for part in flow]
    masks = [graph.credit_mask.tolist() for graph in several]
    expected = weights_by_hand([part.tolist() for part in parts], masks, rule, per)
    assert len(credits) == len(several)
    for graph, one, scores, weights in zip(several, credits, parts, expected, strict=True):
        assert one.weights.tolist() == weights
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
    with pytest.raises(ValueError, match="score must be one of 'throughput', 'reach', 'mix', got 'attention'"):
        credit(trace_flow(random_graph(8)), "attention")


@pytest.mark.parametrize(("rule", "gain"), [("top", 1.5), ("top", 0.5), ("keep", 1.5)])
def test_which_tokens_got_credit(rule: str, gain: float) -> None:
    """Those that stand out, whichever way the rule makes them: the damped ones of a gain below 1 don't."""
    flow = trace_flow(Batch.from_data_list([random_graph(30, seed=1), random_graph(20, seed=2)]))
    found = credit(flow, rule=rule, gain=gain)
    for one in found:
        count = math.ceil(0.4 * int(one.mask.sum()))
        assert int(one.credited.sum()) == (int(one.mask.sum()) - count if gain < 1 else count)
        assert not one.credited[~one.mask].any()
    assert not credit(flow, gain=1.0).credited.any()
