"""Means over traces with their uncertainty: the bootstrap over traces.

A trace is the unit that is drawn: `resamples` times n traces are drawn with replacement, and the interval of the mean
holds the middle `level` of the means of the draws (percentile interval, Efron 1979). The draws depend on nothing but n,
`resamples` and `seed`: two calls over the same traces use the same draws, so that intervals of two signals are made of
the same traces. How much two signals differ is a question for `paired`, not for whether two intervals overlap.

With few values the bootstrap's intervals are too narrow: `student` is for the handful of seeds of a training run.

Shapes: n traces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_MAX_DRAWN = 2**22
"""Numbers drawn at a time: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A mean over traces and where it lies: low .. high. Both are NaN for a single trace, which says nothing of it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: ArrayLike, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """The mean of values [n], one per trace (booleans: the share that is True), and its bootstrap interval.

    Raises:
        ValueError: no values, or one is not finite: leave that trace out of every signal, or find out why.
    """
    x = _values("values", values)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if len(x) == 1:
        return Interval(float(x[0]), np.nan, np.nan)
    generator = np.random.default_rng(seed)
    size = max(1, _MAX_DRAWN // len(x))
    means = [
        x[generator.integers(len(x), size=(min(size, resamples - begin), len(x)))].mean(1)
        for begin in range(0, resamples, size)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def paired(a: ArrayLike, b: ArrayLike, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """mean(a) - mean(b) over the same n traces, in the same order: each draw takes a trace's a and b together.

    Booleans are counted as 0 and 1: the difference of two shares.

    Raises:
        ValueError: as `interval`; or a and b are not equally long.
    """
    x, y = _values("a", a), _values("b", b)
    if len(x) != len(y):
        raise ValueError(f"a and b must have one value per trace each, in the same order, got {len(x)} and {len(y)}")
    return interval(x - y, seed=seed, level=level, resamples=resamples)


def student(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of a few values [n] and its interval by Student's t, with n - 1 degrees of freedom.

    For a paired comparison give it the differences. NaN ends for a single value, as `interval` has them.

    Raises:
        ValueError: as `interval`.
    """
    from scipy.stats import t

    x = _values("values", values)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if len(x) == 1:
        return Interval(float(x[0]), np.nan, np.nan)
    half = float(t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def _values(name: str, values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name} must be numbers [n], one per trace, n >= 1, got shape {list(x.shape)}")
    if not np.isfinite(x).all():
        trace = int(np.flatnonzero(~np.isfinite(x))[0])
        raise ValueError(f"{name} must be finite, but trace {trace} has {x[trace]}; leave it out of every signal alike")
    return x
