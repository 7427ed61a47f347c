"""What a monitor says, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from flowgraph.rl.monitor import KEYS, Monitor, entropy_overlap, monitor

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
    seen = Monitor()
    for _ in range(2):
        found = seen(
            THROUGHPUT,
            WEIGHTS,
            MASK,
            text=[["a"] * 5] * 3,
            entropy=THROUGHPUT,
            rewards=torch.tensor([1.0, 2.0, 3.0]),
            token_ids=MASK.long(),
        )
    assert tuple(found) == KEYS
    assert all(type(number) is float for number in found.values())


def test_which_tokens_count_as_credited() -> None:
    """Above 1; or, where a rule lowers weights, above the lowest."""
    rows = {
        "top": ([1.5, 1.0, 1.5, 1.0], 0.5),
        "top, of all tokens": ([1.5, 1.5, 1.5, 1.5], 1.0),
        "keep": ([1.0, 0.0, 0.0, 0.0], 0.25),
        "keep, half of it": ([1.0, 0.5, 0.5, 0.5], 0.25),
        "a gain of 0.5": ([0.5, 0.5, 1.0, 0.5], 0.25),
        "uniform": ([1.0, 1.0, 1.0, 1.0], 0.0),
        "keep, nothing in this row": ([0.0, 0.0, 0.0, 0.0], 0.0),
    }
    for name, (weights, share) in rows.items():
        row, mask = torch.tensor([[0.0, *weights, 9.0]]), torch.tensor([[False, *[True] * 4, False]])
        assert monitor(torch.ones(1, 6), row, mask)["credited_share"] == share, name


# --- from step to step ------------------------------------------------------------------------------------------------


def step(*rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, mask and token ids of rows of letters: capitals have weight 1.5, blanks are pads."""
    weights = torch.tensor([[1.5 if c.isupper() else 1.0 for c in row] for row in rows])
    mask = torch.tensor([[c != " " for c in row] for row in rows])
    return weights, mask, torch.tensor([[ord(c.lower()) for c in row] for row in rows])


def see(monitor: Monitor, *rows: str) -> dict[str, float]:
    weights, mask, token_ids = step(*rows)
    return monitor(torch.ones_like(weights), weights, mask, token_ids=token_ids)


def test_stability_by_hand() -> None:
    seen = Monitor()
    first = see(seen, "ABcdefghij", "aBcd      ")
    assert not {"place_stability", "place_base", "token_stability", "token_base"} & set(first)
    # c': parts 0 and 1 have 1/4 each, and row 1 has its token 1 of 4 in part floor(10/4) = 2: 1/2. "a" 1/4, "b" 3/4.
    second = see(seen, "  AaaaZaaaaa", "  bbbb      ", "  BBaaaaaaaa")
    # c: row 0 half in part 0, half in part 4; row 1 has no credit; row 2 half in part 0, half in part 1.
    assert second["place_stability"] == pytest.approx(min(1 / 4, 1 / 2) + min(1 / 4, 1 / 4))
    # c: "a" 1/4, "z" 1/4, "b" 1/2
    assert second["token_stability"] == pytest.approx(min(1 / 4, 1 / 4) + min(3 / 4, 1 / 2))
    third = see(seen, "zzzzZzzzzz")
    assert third["place_stability"] == third["token_stability"] == pytest.approx(1 / 4)


def test_heavier_credits_count_for_more() -> None:
    seen, ones, mask = Monitor(), torch.ones(1, 2), torch.ones(1, 2).bool()
    seen(ones, torch.tensor([[1.1, 1.3]]), mask)
    found = seen(ones, torch.tensor([[1.6, 1.2]]), mask)
    assert found["place_stability"] == pytest.approx(0.25 + 0.25)


def test_the_same_credits_again_are_wholly_stable() -> None:
    seen = Monitor()
    see(seen, "abCdE", "Abcde")
    found = see(seen, "abCdE", "Abcde")
    assert found["place_stability"] == found["token_stability"] == pytest.approx(1)
    assert found["place_base"] < 0.9


def test_all_tokens_alike_are_no_more_stable_than_chance() -> None:
    """If every token has the same credit, it is in the same places as by chance."""
    seen = Monitor()
    see(seen, "ABCDEFGHIJ")
    found = see(seen, "KBCDEFGHIJ")
    assert found["place_stability"] == found["place_base"] == pytest.approx(1)
    assert found["token_stability"] == found["token_base"] == pytest.approx(0.9)


@pytest.mark.parametrize("steady", [False, True])
def test_the_base_is_what_chance_gives(steady: bool) -> None:
    """200 steps of random texts, credits either by chance or mostly on rare tokens and in the first third."""
    g = torch.Generator().manual_seed(0)
    seen, above = Monitor(), {"place": 0.0, "token": 0.0}
    for _ in range(200):
        ids = (torch.rand(4, 40, generator=g) ** 3 * 12).long()
        length = torch.randint(10, 41, (4, 1), generator=g)
        mask = torch.arange(40) < length
        scores = torch.rand(4, 40, generator=g)
        if steady:
            scores = scores + 2 * (ids > 6) + (torch.arange(40) < length / 3)
        cut = scores.masked_fill(~mask, -1).topk(4, dim=1).values[:, -1:]
        found = seen(torch.ones(4, 40), torch.where(scores >= cut, 1.5, 1.0), mask, token_ids=ids)
        for name in above:
            above[name] += (found.get(f"{name}_stability", 0) - found.get(f"{name}_base", 0)) / 199
    for name, mean in above.items():
        assert mean > 0.03 if steady else abs(mean) < 0.02, name


def test_chance_is_drawn_anew_in_each_step() -> None:
    seen = Monitor()
    assert len({see(seen, "ABcdefghij").get("place_base") for _ in range(12)}) > 2


def test_pads_and_steps_without_credit_change_nothing() -> None:
    one, other = Monitor(), Monitor()
    see(one, "aBcD ", "aaaAA")
    see(other, "    aBcD   ", "  aaaAA    ", " " * 11)
    assert "place_stability" not in see(other, "abcd")
    assert "place_stability" not in see(other, "    ")
    assert see(one, "ABcd", "bBbb") == see(other, " ABcd  ", "bBbb   ")


def test_a_resumed_run_goes_on_as_if_never_stopped() -> None:
    one, other = Monitor(), Monitor()
    see(one, "abCDe", "FGhij")
    see(one, "aBcDE", "FghIj")
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    for rows in (["AbCde", "fghiJ"], ["ABcde", "fgHij"]):
        assert see(other, *rows) == see(one, *rows)
    fresh = Monitor()
    fresh.load_state_dict(Monitor().state_dict())
    assert "place_stability" not in see(fresh, "Ab")


def test_without_token_ids_places_are_still_compared() -> None:
    seen, (weights, mask, _) = Monitor(), step("aBcD")
    for _ in range(2):
        found = seen(weights, weights, mask)
    assert "place_stability" in found and "token_stability" not in found


@pytest.mark.parametrize("token_ids", [torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 5)])
def test_bad_token_ids(token_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token_ids must be whole numbers \[B, T\] = \[3, 5\]"):
        Monitor()(THROUGHPUT, WEIGHTS, MASK, token_ids=token_ids)


@pytest.mark.parametrize("state", [{}, {"place": []}, {"steps": 1, "weights": []}])
def test_bad_state(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"state must be what Monitor.state_dict gave"):
        Monitor().load_state_dict(state)


# --- bad input --------------------------------------------------------------------------------------------------------


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
