"""Rules that choose edges, against a few lines of plain Python per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowgraph import DenseRows, Mass, Threshold, TopK, sparsify
from flowgraph.sparsify import EdgeRule, default_rule
from tests.graphs import attention

RULES = [
    Threshold(),
    Threshold(1 / 32),
    Threshold(0.01, cap=3),
    TopK(1),
    TopK(5),
    Mass(0.5),
    Mass(0.9, cap=4),
    Mass(1.0),
]


def chosen_by_hand(weights: list[float], rule: EdgeRule) -> list[int]:
    """The earlier tokens that become edges of one row, ascending."""
    heaviest = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: (-weights[i], i))
    if isinstance(rule, Threshold):
        heaviest = [i for i in heaviest if weights[i] > rule.value]
    if isinstance(rule, Mass):
        kept, total = 0.0, sum(weights)
        for count, i in enumerate(heaviest):
            if kept >= rule.share * total:
                heaviest = heaviest[:count]
                break
            kept += weights[i]
    cap = rule.k if isinstance(rule, TopK) else getattr(rule, "cap", None)
    return sorted(heaviest[:cap])


def matrix(kind: str) -> Tensor:
    W = attention(37, seed=4)
    if kind == "ties":  # uniform rows, in numbers that add up without rounding
        W = torch.full((37, 37), 1 / 64, dtype=torch.float64).tril()
    if kind == "sparse":
        W = W * (W > 0.05)
    if kind == "empty":
        W = torch.zeros(37, 37, dtype=torch.float64)
    return W


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["attention", "ties", "sparse", "empty"])
@pytest.mark.parametrize("block", [1, 8, 100])
def test_rules_equal_the_choice_by_hand(rule: EdgeRule, kind: str, block: int) -> None:
    W = matrix(kind)
    edges = sparsify(DenseRows(W, block=block), rule)
    expected = [(i, k) for k in range(37) for i in chosen_by_hand(W[k, :k].tolist(), rule)]
    assert list(zip(*edges.edge_index.tolist(), strict=True)) == expected
    assert torch.equal(edges.edge_weight, W[edges.edge_index[1], edges.edge_index[0]])
    assert torch.equal(edges.self_weight, W.diagonal())
    kept = torch.zeros(37, dtype=torch.float64).scatter_add(0, edges.edge_index[1], edges.edge_weight)
    torch.testing.assert_close(edges.dropped, W.tril(-1).sum(-1) - kept)
    assert edges.rule == str(rule)


@given(value=st.floats(0.001, 0.5), seed=st.integers(0, 100))
def test_a_threshold_never_keeps_more_than_its_inverse_per_row(value: float, seed: int) -> None:
    edges = sparsify(DenseRows(attention(30, seed)), Threshold(value))
    assert edges.edge_index[1].bincount(minlength=30).max() <= 1 / value


def test_default_keeps_everything_up_to_2048_tokens() -> None:
    assert str(default_rule(2048)) == "all edges"
    assert str(default_rule(2049)) == "weight > 0.000976562"
    assert sparsify(DenseRows(attention(20))).edge_weight.numel() == 190


def test_rules_in_words() -> None:
    assert [str(rule) for rule in RULES] == [
        "all edges",
        "weight > 0.03125",
        "weight > 0.01, at most 3 per token",
        "top 1 per token",
        "top 5 per token",
        "0.5 of the mass",
        "0.9 of the mass, at most 4 per token",
        "1 of the mass",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(-0.1), r"Threshold value must be in \[0, 1\), got -0.1"),
        (lambda: Threshold(float("nan")), "Threshold value must be"),
        (lambda: Threshold(0.1, cap=0), "cap must be a whole number >= 1, got 0"),
        (lambda: TopK(-1), "k must be a whole number >= 0, got -1"),
        (lambda: Mass(0.0), r"Mass share must be in \(0, 1\], got 0.0"),
        (lambda: Mass(0.5, cap=-1), "cap must be"),
    ],
)
def test_bad_rules_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
