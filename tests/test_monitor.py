"""What a monitor says, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from flowgraph.rl import entropy_overlap, monitor
from flowgraph.rl.monitor import KEYS

THROUGHPUT = torch.tensor([[9.0, 1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 3.0, 1.0, 9.0], [9.0, 0.0, 0.0, 9.0, 9.0]])
WEIGHTS = torch.tensor([[9.0, 1.5, 1.5, 1.0, 1.0], [9.0, 1.0, 1.5, 1.0, 9.0], [9.0, 1.0, 1.0, 9.0, 9.0]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
"""Row 0: flow is even. Row 1: 0, 3, 1 of 4. Row 2: no flow. What stands outside the mask must not count."""


def test_numbers_by_hand() -> None:
    found = monitor(THROUGHPUT, WEIGHTS, MASK)
    spread = 1 / (0.75**2 + 0.25**2)  # row 1
    assert found == pytest.approx(
        {
            "effective_tokens": (4 + spread) / 2,
            "effective_share": (1 + spread / 3) / 2,
            # Row 1, ascending 0, 1, 3: ((2 - 4) * 0 + (4 - 4) * 1 + (6 - 4) * 3) / (3 * 4) = 1/2
            "gini": (0 + 0.5) / 2,
            "credited_share": (2 / 4 + 1 / 3 + 0 / 2) / 3,
            "credited_flow": (2 / 4 + 3 / 4) / 2,
        }
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gini_and_effective_tokens_at_their_ends(n: int) -> None:
    ones = torch.ones(1, n)
    even, one = monitor(ones, ones, ones.bool()), monitor(torch.eye(n)[:1], ones, ones.bool())
    assert (even["gini"], even["effective_tokens"]) == pytest.approx((0, n))
    assert (one["gini"], one["effective_tokens"]) == pytest.approx((1 - 1 / n, 1))


def test_gini_is_the_mean_difference() -> None:
    scores = torch.rand(1, 9)
    differences = (scores[0][:, None] - scores[0][None]).abs().mean() / (2 * scores.mean())
    assert monitor(scores, scores, torch.ones(1, 9).bool())["gini"] == pytest.approx(float(differences))


def test_delimiters() -> None:
    text = [["x", ". ", "a.", "=", "\n"], ["x", "-", ",", "b", ","], ["x", "", " ", ",", ","]]
    found = monitor(THROUGHPUT, WEIGHTS, MASK, text=text)
    # Credited: ". " and "a." in row 0, "," in row 1. Delimiters: ". " and "\n" of 4, "," of 3, " " of 2.
    assert found["delimiter_share"] == pytest.approx((1 / 2 + 1 / 1) / 2)
    assert found["delimiter_base"] == pytest.approx((2 / 4 + 1 / 3 + 1 / 2) / 3)


def test_entropy_overlap() -> None:
    entropy = torch.tensor([[9.0, 5.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 1.0, 9.0], [9.0, 1.0, 2.0, 9.0, 9.0]])
    # Row 0: tokens 1 and 2 are credited, 1 and 4 have the highest entropy. Row 1: token 2 both. Row 2: none credited.
    rows = entropy_overlap(WEIGHTS, MASK, entropy).tolist()
    assert rows[:2] == [0.5, 1.0] and math.isnan(rows[2])
    assert monitor(THROUGHPUT, WEIGHTS, MASK, entropy=entropy)["entropy_overlap"] == 0.75


def test_reward_correlation() -> None:
    throughput = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    ones, mask = torch.ones(4, 2), torch.ones(4, 2).bool()
    rewards = torch.tensor([1.0, 0.0, 99.0, 0.0])  # row 2 has no flow
    assert monitor(throughput, ones, mask, rewards=rewards)["reward_correlation"] == pytest.approx(1)
    assert monitor(throughput, ones, mask, rewards=-rewards)["reward_correlation"] == pytest.approx(-1)
    assert "reward_correlation" not in monitor(throughput, ones, mask, rewards=torch.zeros(4))


def test_nothing_to_say() -> None:
    empty = torch.zeros(0, 3)
    assert monitor(empty, empty, empty.bool(), text=[], entropy=empty, rewards=torch.zeros(0)) == {}
    zeros, nan = torch.zeros(2, 3), torch.full((2, 3), torch.nan)
    assert monitor(nan, nan, zeros.bool(), text=[[""] * 3] * 2, entropy=zeros, rewards=torch.ones(2)) == {}
    assert monitor(zeros, torch.ones(2, 3), torch.ones(2, 3).bool()) == {"credited_share": 0.0}


def test_every_number_has_a_name() -> None:
    text = [["a"] * 5] * 3
    found = monitor(THROUGHPUT, WEIGHTS, MASK, text=text, entropy=THROUGHPUT, rewards=torch.tensor([1.0, 2.0, 3.0]))
    assert tuple(found) == KEYS
    assert all(type(number) is float for number in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": MASK.long()}, "mask must be bool"),
        ({"throughput": THROUGHPUT[:2]}, "throughput must be a float tensor"),
        ({"weights": WEIGHTS.long()}, "weights must be a float tensor"),
        ({"throughput": -THROUGHPUT}, "throughput is -1.0 at row 0, token 1"),
        ({"throughput": THROUGHPUT / 0}, "throughput is inf at row 0, token 1"),
        ({"entropy": THROUGHPUT[:, :3]}, "entropy must be a float tensor"),
        ({"rewards": torch.ones(2)}, "rewards must be"),
        ({"text": [["a"] * 5] * 2}, "text must be 3 lists of 5"),
    ],
)
def test_bad_input(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor(**{"throughput": THROUGHPUT, "weights": WEIGHTS, "mask": MASK} | changes)  # type: ignore[arg-type]
