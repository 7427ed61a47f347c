"""Laws of shape_advantages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowgraph.credit import weights_from_scores
from flowgraph.rl.shaping import schedule, shape_advantages, warmed

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def case(seed: int, rows: int = 5, tokens: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Advantages [B, T] with some zeros, weights in [0, 3) and a mask whose first row is empty."""
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(rows, tokens, generator=g) * (torch.rand(rows, tokens, generator=g) > 0.1)
    weights = torch.rand(rows, tokens, generator=g) * 3
    mask = torch.rand(rows, tokens, generator=g) > 0.3
    mask[0] = False
    mask[1:, 0] = True
    return advantages.to(dtype), weights.to(dtype), mask


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


seeds = st.integers(0, 2**32 - 1)


def test_by_hand() -> None:
    advantages = torch.tensor([2.0, -4.0, 0.0])
    weights = torch.tensor([[1.0, 1.5, 9.0], [1.5, 0.5, 1.0], [1.5, 1.5, 1.5]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
    shaped = shape_advantages(advantages, weights, mask)
    assert shaped.tolist() == [[2.0, 3.0, 2.0], [-4.0, -2.0, -4.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("signs", ["both", "positive", "negative"])
@given(seed=seeds)
def test_weights_of_one_change_no_bit(seed: int, signs: Any, normalize: bool, dtype: torch.dtype) -> None:
    advantages, weights, mask = case(seed, tokens=300, dtype=dtype)
    advantages[1, 0] = -0.0
    ones = torch.ones_like(weights)
    per_token = shape_advantages(advantages, ones, mask, signs=signs, normalize=normalize)
    assert torch.equal(bits(per_token), bits(advantages))
    per_row = shape_advantages(advantages[:, 0], ones, mask, signs=signs, normalize=normalize)
    assert torch.equal(bits(per_row), bits(advantages[:, :1].expand(mask.shape)))


@given(seed=seeds)
def test_one_advantage_per_row_is_the_same_at_every_token(seed: int) -> None:
    advantages, weights, mask = case(seed)
    row = advantages[:, 0]
    spread = row[:, None].expand(mask.shape)
    assert torch.equal(shape_advantages(row, weights, mask), shape_advantages(spread, weights, mask))


@given(seed=seeds)
def test_outside_the_mask_nothing_is_read_or_changed(seed: int) -> None:
    advantages, weights, mask = case(seed)
    dirty = weights.masked_fill(~mask, torch.nan)
    for normalize in (False, True):
        clean = shape_advantages(advantages, weights, mask, normalize=normalize)
        assert torch.equal(shape_advantages(advantages, dirty, mask, normalize=normalize), clean)
        assert torch.equal(clean[~mask], advantages[~mask])


@given(seed=seeds)
def test_signs_split_the_work(seed: int) -> None:
    advantages, weights, mask = case(seed)
    both = shape_advantages(advantages, weights, mask)
    positive = shape_advantages(advantages, weights, mask, signs="positive")
    negative = shape_advantages(advantages, weights, mask, signs="negative")
    assert torch.equal(positive, both.where(advantages > 0, advantages))
    assert torch.equal(negative, both.where(advantages < 0, advantages))
    assert torch.equal(-shape_advantages(-advantages, weights, mask, signs="positive"), negative)


@given(seed=seeds)
def test_normalized_weights_have_mean_one_and_no_scale(seed: int) -> None:
    _, weights, mask = case(seed, dtype=torch.float64)
    shaped = shape_advantages(torch.ones_like(weights), weights, mask, normalize=True)
    mean = shaped.where(mask, 0).sum(1)[1:] / mask.sum(1)[1:]
    torch.testing.assert_close(mean, torch.ones_like(mean))
    scales = torch.logspace(-6, 6, weights.shape[0], dtype=torch.float64)[:, None]
    rescaled = shape_advantages(torch.ones_like(weights), weights * scales, mask, normalize=True)
    torch.testing.assert_close(rescaled, shaped)


def test_the_mean_of_a_long_bfloat16_row_is_exact_enough() -> None:
    weights = torch.ones(1, 4096, dtype=torch.bfloat16)
    weights[:, :2048] = 3
    shaped = shape_advantages(torch.ones(1), weights, torch.ones(1, 4096, dtype=torch.bool), normalize=True)
    torch.testing.assert_close(shaped[0, [0, -1]], torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize("advantage_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_keeps_the_dtype_of_the_advantages(advantage_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    advantages, weights, mask = case(0)
    shaped = shape_advantages(advantages.to(advantage_dtype), weights.to(weight_dtype), mask)
    assert shaped.dtype == advantage_dtype
    torch.testing.assert_close(shaped.float(), shape_advantages(advantages, weights, mask), rtol=2e-2, atol=1e-3)


def test_leaves_its_inputs_alone() -> None:
    inputs = case(3)
    before = [x.clone() for x in inputs]
    shaped = shape_advantages(*inputs, normalize=True)
    shaped.zero_()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_integer_masks_are_bool_masks() -> None:
    advantages, weights, mask = case(1)
    expected = shape_advantages(advantages, weights, mask)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(shape_advantages(advantages, weights, mask.to(dtype)), expected)


def test_empty_batches_and_rows() -> None:
    for shape in ((0, 4), (3, 0)):
        empty = torch.ones(shape)
        assert shape_advantages(empty, empty, empty.bool(), normalize=True).shape == shape


# --- the rows that a training step really meets -----------------------------------------------------------------------

options = pytest.mark.parametrize("normalize", [False, True])
all_signs = pytest.mark.parametrize("signs", ["both", "positive", "negative"])


@options
@all_signs
def test_a_row_without_answer_trains_as_before(signs: Any, normalize: bool) -> None:
    """Its weights are uniform; the other row is weighted as if it were alone."""
    advantages, mask = torch.tensor([0.7, -0.3]), torch.ones(2, 4, dtype=torch.bool)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.5, 1.0, 1.0, 1.5]])
    shaped = shape_advantages(advantages, weights, mask, signs=signs, normalize=normalize)
    assert torch.equal(shaped[0], advantages[:1].expand(4))
    alone = shape_advantages(advantages[1:], weights[1:], mask[1:], signs=signs, normalize=normalize)
    assert torch.equal(shaped[1:], alone)


@options
@all_signs
def test_an_advantage_of_zero_stays_zero(signs: Any, normalize: bool) -> None:
    weights, mask = torch.tensor([[0.0, 1.5, 9.0]]), torch.ones(1, 3, dtype=torch.bool)
    for advantages in (torch.zeros(1), torch.zeros(1, 3)):
        assert (shape_advantages(advantages, weights, mask, signs=signs, normalize=normalize) == 0).all()


@options
def test_an_empty_or_fully_masked_row_keeps_its_advantages(normalize: bool) -> None:
    advantages = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    weights = torch.tensor([[torch.nan, torch.inf, -1.0], [3.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    shaped = shape_advantages(advantages, weights, mask, normalize=normalize)
    assert torch.equal(shaped[0], advantages[0]) and not torch.equal(shaped[1], advantages[1])


@options
def test_tool_output_keeps_its_advantage_and_is_not_in_the_mean(normalize: bool) -> None:
    weights = torch.tensor([[1.5, 100.0, 0.5, 100.0, 1.0]])
    mask = torch.tensor([[1, 0, 1, 0, 1]])  # a tool wrote tokens 1 and 3
    shaped = shape_advantages(torch.tensor([2.0]), weights, mask, normalize=normalize)
    assert shaped.tolist() == [[3.0, 2.0, 1.0, 2.0, 2.0]]  # the mean of 1.5, 0.5 and 1 is 1


@options
def test_what_stands_under_pads_is_neither_read_nor_changed(normalize: bool) -> None:
    advantages = torch.tensor([[torch.nan, 2.0, -2.0, torch.inf]])
    weights = torch.tensor([[-1.0, 1.5, 0.5, torch.nan]])
    shaped = shape_advantages(advantages, weights, torch.tensor([[0, 1, 1, 0]]), normalize=normalize)
    assert shaped[0, 1:3].tolist() == [3.0, -1.0]
    assert shaped[0, 0].isnan() and shaped[0, 3] == torch.inf


@options
def test_a_row_of_which_nothing_is_kept_is_not_trained_on(normalize: bool) -> None:
    """The rule "keep" over a batch may leave a row with weights of 0 only, which has no mean to divide by."""
    scores = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 1.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    weights = weights_from_scores(scores, mask, "keep", top=0.5, per="batch")
    shaped = shape_advantages(torch.tensor([1.0, 1.0]), weights, mask, normalize=normalize)
    assert shaped.tolist() == [[1, 1, 1], [0, 0, 0]]


# --- warm-up and annealing --------------------------------------------------------------------------------------------


def test_schedule_by_hand() -> None:
    assert [schedule(step, 4, 6, 2) for step in range(10)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0, 0]
    assert [schedule(step) for step in (0, 1, 10**9)] == [1, 1, 1]
    assert [schedule(step, 2) for step in range(4)] == [0, 0.5, 1, 1]
    assert [schedule(step, 0, 2, 0) for step in range(4)] == [1, 1, 0, 0]
    assert [schedule(step, 2, 2, 2) for step in range(6)] == [0, 0.5, 1, 0.5, 0, 0]


@given(step=st.integers(0, 200), up=st.integers(0, 50), hold=st.integers(0, 50), down=st.integers(0, 50))
def test_schedule_goes_up_once_and_down_once(step: int, up: int, hold: int, down: int) -> None:
    now, then = schedule(step, up, up + hold, down), schedule(step + 1, up, up + hold, down)
    assert 0 <= now <= 1
    assert then >= now if step < up else then <= now
    assert schedule(up + hold + down, up, up + hold, down) == 0
    if hold:
        assert schedule(up, up, up + hold, down) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step is -1: expected at least 0"),
        ({"step": 1.5}, TypeError, "step is 1.5: expected a whole number of steps"),
        ({"warmup_steps": -3}, ValueError, "warmup_steps is -3"),
        ({"warmup_steps": True}, TypeError, "warmup_steps is True"),
        ({"warmup_steps": None}, TypeError, "warmup_steps is None"),
        ({"anneal_after": -1}, ValueError, "anneal_after is -1"),
        ({"anneal_after": 5, "anneal_steps": -1}, ValueError, "anneal_steps is -1"),
        ({"anneal_steps": 5}, ValueError, "anneal_steps is 5 and anneal_after None"),
        ({"warmup_steps": 9, "anneal_after": 5}, ValueError, "anneal_after is 5, before the end of warmup_steps 9"),
    ],
)
def test_bad_schedules(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schedule(**({"step": 0} | arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, part=st.floats(0, 1))
def test_warmed_is_the_formula(seed: int, part: float, dtype: torch.dtype) -> None:
    weights = case(seed, dtype=dtype)[1]
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    expected = 1 + part * (weights.double() - 1)
    found = warmed(weights, part)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(bits(warmed(weights, 1.0)), bits(weights))
    assert torch.equal(bits(warmed(weights, 0.0)), bits(torch.ones_like(weights)))
    assert torch.equal(bits(warmed(torch.ones_like(weights), part)), bits(torch.ones_like(weights)))


@pytest.mark.parametrize("rule", ["top", "proportional", "rank", "softmax"])
def test_warm_up_is_a_smaller_gain(rule: str) -> None:
    scores, mask = torch.rand(3, 9), torch.rand(3, 9) > 0.2
    full = weights_from_scores(scores, mask, rule, gain=2.0)
    torch.testing.assert_close(warmed(full, 0.25), weights_from_scores(scores, mask, rule, gain=1.25))


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_a_part_is_from_0_to_1(part: float) -> None:
    with pytest.raises(ValueError, match=r"part is .*: expected 0 to 1"):
        warmed(torch.ones(2), part)


# --- bad input --------------------------------------------------------------------------------------------------------

A, C, M = torch.ones(2), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)


def at(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"advantages": [1.0, 1.0]}, TypeError, r"advantages is a list"),
        ({"mask": None}, TypeError, r"mask is a NoneType"),
        ({"advantages": A.long()}, TypeError, r"advantages has dtype torch.int64"),
        ({"weights": M}, TypeError, r"weights has dtype torch.bool"),
        ({"mask": C}, TypeError, r"mask has dtype torch.float32"),
        ({"mask": M[0]}, ValueError, r"mask has shape \[3\]: expected \[B, T\]"),
        ({"weights": C[:, :2]}, ValueError, r"weights has shape \[2, 2\], mask \[2, 3\]"),
        ({"weights": A}, ValueError, r"weights has shape \[2\]"),
        (
            {"advantages": torch.ones(3)},
            ValueError,
            r"advantages has shape \[3\]: expected \[2\] or \[2, 3\]",
        ),
        ({"advantages": C[:, :1]}, ValueError, r"advantages has shape \[2, 1\]"),
        ({"weights": C.to("meta")}, ValueError, r"weights is on meta, advantages on cpu"),
        ({"weights": at(C, -0.5)}, ValueError, r"weights is -0.5 at row 1, token 2"),
        ({"weights": at(C, torch.nan)}, ValueError, r"weights is nan at row 1, token 2"),
        ({"weights": at(C, torch.inf)}, ValueError, r"weights is inf at row 1, token 2"),
        ({"advantages": at(C, torch.nan)}, ValueError, r"advantages is nan at row 1, token 2"),
        (
            {"advantages": torch.tensor([1.0, -torch.inf])},
            ValueError,
            r"advantages is -inf at row 1, token 0",
        ),
        ({"mask": at(M.long(), 2)}, ValueError, r"mask is 2 at row 1, token 2"),
        ({"signs": "all"}, ValueError, r"signs is 'all': expected one of 'both', 'positive', 'negative'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"advantages": A, "weights": C, "mask": M, **change}
    with pytest.raises(error, match=message):
        shape_advantages(**arguments)
