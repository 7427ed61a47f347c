"""Bootstrap intervals over traces: what they cover, that pairs stay together, and that a seed is all their chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowgraph.adapters.evidence.statistics import Interval, interval, paired, student


def draws(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 3, n)


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    found = [interval(draws(60, seed), seed=seed, resamples=1000) for seed in range(400)]
    covered = np.mean([one.low <= 2 <= one.high for one in found])
    assert 0.91 <= covered <= 0.975  # 95 %, less some 1 % that percentiles lose at n = 60; standard error 1.1 %


def test_a_lower_level_gives_a_narrower_interval_that_covers_less() -> None:
    found = [interval(draws(60, seed), level=0.5, resamples=1000) for seed in range(400)]
    assert 0.42 <= np.mean([one.low <= 2 <= one.high for one in found]) <= 0.58


@pytest.mark.parametrize("n", [2, 7, 100])
def test_an_interval_equals_that_of_scipy(n: int) -> None:
    x = draws(n)
    found = interval(x, seed=3, level=0.9)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=10_000, confidence_level=0.9, method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(x.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowgraph.adapters.evidence import statistics

    whole = interval(draws(30))
    monkeypatch.setattr(statistics, "_MAX_DRAWN", 1000)
    assert interval(draws(30)) == whole


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    assert interval(draws(30), seed=1) == interval(draws(30), seed=1)
    assert interval(draws(30), seed=1) != interval(draws(30), seed=2)


def test_pairs_are_drawn_together() -> None:
    noise = 100 * draws(50)
    found = paired(noise + 1 + draws(50, 1) / 100, noise)
    assert found.low > 0.9 and found.high < 1.1 and found.excludes_zero  # unpaired, +- 120
    assert not paired(noise + 1, np.random.default_rng(9).permutation(noise)).excludes_zero


def test_a_difference_is_the_difference_of_the_same_draws() -> None:
    a, b = draws(40, 1), draws(40, 2)
    rng = np.random.default_rng(5)
    chosen = rng.integers(40, size=(10_000, 40))
    slow = np.quantile(a[chosen].mean(1) - b[chosen].mean(1), [0.025, 0.975])
    found = paired(a, b, seed=5)
    assert (found.mean, found.low, found.high) == pytest.approx((a.mean() - b.mean(), *slow), rel=1e-9)


def test_a_signal_against_itself_differs_by_nothing() -> None:
    assert paired(draws(20), draws(20)) == Interval(0.0, 0.0, 0.0)


def test_booleans_are_shares() -> None:
    changed, control = np.array([True] * 30 + [False] * 10), np.array([False, True] * 20)
    assert interval(changed).mean == 0.75
    assert paired(changed, control).mean == 0.25
    assert interval(np.ones(8, dtype=bool)) == Interval(1.0, 1.0, 1.0)


def test_one_trace_has_a_mean_and_no_interval() -> None:
    found = interval([3.0])
    assert found.mean == 3 and np.isnan([found.low, found.high]).all() and not found.excludes_zero


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interval([1.0, np.nan]), "values must be finite, but trace 1 has nan"),
        (lambda: paired([1.0, 2.0], [np.inf, 2.0]), "b must be finite, but trace 0 has inf"),
        (lambda: interval([]), "n >= 1"),
        (lambda: interval(np.ones((2, 2))), r"shape \[2, 2\]"),
        (lambda: paired([1.0, 2.0], [1.0]), "got 2 and 1"),
        (lambda: interval([1.0, 2.0], level=95), "level must be between 0 and 1, got 95"),
        (lambda: interval([1.0, 2.0], resamples=0), "resamples must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_name(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_handful_is_judged_by_students_t(n: int) -> None:
    x = draws(n)
    found, theirs = student(x, level=0.9), stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((x.mean(), theirs.low, theirs.high))
    assert found.high - found.low > interval(x, level=0.9).high - interval(x, level=0.9).low


def test_a_single_one_has_no_interval() -> None:
    assert np.isnan([student([3.0]).low, student([3.0]).high]).all() and student([3.0]).mean == 3
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        student([1, 2], level=1)
