r"""Two groups of traces, measure by measure: how they differ, and how sure that is.

    difference      mean(a) - mean(b), with its bootstrap interval: each group is drawn anew by itself, pairs together
    auc             chance that a trace of a has more of it than one of b, a tie counts half: how well this one number
                    tells the groups apart (0.5 not at all; 0 or 1 perfectly)
    rank_biserial   2 auc - 1, also known as Cliff's delta. Of pairs: (R+ - R-) / (R+ + R-), R the sums of ranks of the
                    differences that are above and below 0, by their size
    cohens_d        difference / pooled standard deviation. Of pairs: mean / standard deviation of their differences
    p               two-sided. By ranks: Mann-Whitney, of pairs Wilcoxon. By permutation of groups (of pairs: of who is
                    who): the difference of means
    p_corrected     Benjamini and Hochberg's, over all measures that were tested

Of pairs, `auc` is that of the two groups as if they were none. NaN is left out measure by measure and counted. A
measure with fewer than two values (pairs) in a group isn't tested: all but its means and medians is NaN. Nor is one
that is the same in all traces: its p is NaN.

The tests take traces for independent. Several solutions of one problem are not: pair them by the problem. Rows of a
group with the same key count as one, their mean.

Shapes: A and B rows of the groups, M measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Numbers = NDArray[np.float64]

TESTS = ("rank", "permutation")
_BATCH = 1 << 22  # numbers that are drawn at a time


class Example(NamedTuple):
    """One trace: its row in the group (of pairs: in the order of their keys), what it has, and the caller's label."""

    row: int
    value: float
    label: Any


@dataclass(frozen=True)
class Difference:
    """One measure in both groups. Pairs of numbers are of (a, b); NaN is what could not be had.

    Attributes:
        n: how many values; of pairs, how many of these, twice. missing: NaN that were left out.
        difference, low, high: of the means, and its bootstrap interval.
        examples: the traces at the ends: those of a that are farthest on a's side (the highest, if a has more of it),
            and those of b on the other. Of pairs: those with the highest and with the lowest difference a - b, which is
            then their value; half of all at most, so that no pair is at both ends.
    """

    measure: str
    n: tuple[int, int]
    missing: tuple[int, int]
    mean: tuple[float, float]
    median: tuple[float, float]
    difference: float
    low: float
    high: float
    auc: float
    rank_biserial: float
    cohens_d: float
    p: float
    p_corrected: float
    examples: tuple[list[Example], list[Example]]


@dataclass(frozen=True)
class Comparison(Sequence[Difference]):
    """All measures of two groups, in the order they came in.

    Attributes:
        names: of the groups. sizes: their rows. pairs: how many pairs, None if there are none.
        unpaired: rows of each group whose key the other has not.
        unshared: measures that only one group has; they are not compared.
        settings: test, confidence, resamples and seed.
    """

    names: tuple[str, str]
    sizes: tuple[int, int]
    pairs: int | None
    unpaired: tuple[int, int]
    unshared: list[str]
    settings: dict[str, Any]
    differences: list[Difference]

    def __len__(self) -> int:
        return len(self.differences)

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.differences)

    def __getitem__(self, which: Any) -> Any:
        """By number, slice, or the name of a measure."""
        if isinstance(which, str):
            found = [one for one in self.differences if one.measure == which]
            if not found:
                raise KeyError(f"no measure {which!r}; there are {', '.join(one.measure for one in self)}")
            return found[0]
        return self.differences[which]

    def ranked(self) -> list[Difference]:
        """The surest first: by p_corrected, then by how far auc is from 0.5; untested ones last."""
        return sorted(self, key=lambda one: (np.nan_to_num(one.p_corrected, nan=2), -abs(one.auc - 0.5)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON: None for NaN."""
        about = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "differences"}
        return plain(about | {"measures": [_row(one) for one in self]})

    def to_table(self) -> pa.Table:
        """One row per measure, for Parquet; without the examples. Null for NaN."""
        rows = []
        for one in self:
            row: dict[str, Any] = {}
            for name, value in _row(one).items():
                if isinstance(value, tuple) and name != "examples":
                    row |= {f"{name}_a": value[0], f"{name}_b": value[1]}
                elif name != "examples":
                    row[name] = value
            rows.append(plain(row))
        return pa.Table.from_pylist(rows).replace_schema_metadata(
            {f"flowgraph.{name}": str(value) for name, value in self.settings.items()}
            | {"flowgraph.a": self.names[0], "flowgraph.b": self.names[1]}
        )


def compare(
    a: Mapping[str, ArrayLike],
    b: Mapping[str, ArrayLike],
    *,
    names: tuple[str, str] = ("a", "b"),
    labels: tuple[Sequence[Any], Sequence[Any]] | None = None,
    pair: tuple[Sequence[Any], Sequence[Any]] | None = None,
    test: str = "rank",
    confidence: float = 0.95,
    resamples: int = 2000,
    interval: str = "percentile",
    seed: int = 0,
    examples: int = 3,
) -> Comparison:
    """Compare two groups of traces by every measure that both have.

    Args:
        a, b: measure -> [A] (or [B]) numbers, NaN where there is none.
        names: what to call the groups.
        labels: ([A], [B]) what to call a trace in the examples; default: its row. Of pairs: not used, it is the key.
        pair: ([A], [B]) keys; rows of a and b with the same one are compared with each other.
        test: what p is from: "rank" or "permutation".
        confidence: of the interval. resamples: of the bootstrap, and of the permutations.
        interval: "percentile" or "BCa" (scipy.stats.bootstrap), which can have no end in small groups: NaN.
        seed: the same one gives the same result, for a measure whatever others there are.
        examples: traces at each end.

    Raises:
        ValueError: names the measure and the row, or what else is wrong.
    """
    _check(test, confidence, resamples, interval)
    groups = [_arrays(name, group) for name, group in zip(names, (a, b), strict=True)]
    sizes = (groups[0][1], groups[1][1])
    shared = [name for name in groups[0][0] if name in groups[1][0]]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no measure in common: {list(a)} and {list(b)}")
    unshared = [name for group in (a, b) for name in group if name not in shared]
    for what, given in (("labels", labels), ("pair", pair)):
        if given is not None and (len(given[0]), len(given[1])) != sizes:
            raise ValueError(f"{what} must have one entry per row, {sizes}, got {len(given[0])} and {len(given[1])}")
    keys: list[Any] | None = None
    unpaired = (0, 0)
    if pair is not None:
        keys, places, unpaired = _pairs(pair, names)
    how: dict[str, Any] = {"test": test, "confidence": confidence, "resamples": resamples, "interval": interval}
    found = []
    for name in shared:
        x, y = groups[0][0][name], groups[1][0][name]
        if keys is not None:
            x, y = _means(x, places[0], len(keys)), _means(y, places[1], len(keys))
            named = (keys, keys)
        else:
            named = labels or (range(sizes[0]), range(sizes[1]))  # type: ignore[assignment]
        found.append(_difference(name, x, y, named, keys is not None, examples, seed=seed, **how))
    return Comparison(
        names=names,
        sizes=sizes,
        pairs=None if keys is None else len(keys),
        unpaired=unpaired,
        unshared=unshared,
        settings=how | {"seed": seed},
        differences=_corrected(found),
    )


def mean_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of numbers, NaN left out: the bootstrap interval (percentile) of the mean.

    Of a single number the interval is NaN, of none all three.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if not len(x):
        return (np.nan, np.nan, np.nan)
    how: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "interval": "percentile", "seed": seed}
    low, high = _interval((x,), **how) if len(x) > 1 else (np.nan, np.nan)
    return float(x.mean()), low, high


# ------------------------------------------------------------------------- tables


def numbers(table: pa.Table) -> dict[str, Numbers]:
    """The columns of a table that hold numbers, float64, null as NaN; without `line`, which is but a place."""
    found = {}
    for field in table.schema:
        if field.name != "line" and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            column = table[field.name].cast(pa.float64(), safe=False)
            found[field.name] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def divide(table: pa.Table, by: str, groups: Sequence[str] | None = None) -> list[tuple[str, pa.Table]]:
    """The rows of a table in two groups, by the values of a column: (value, its rows) twice. Null is in neither.

    Args:
        groups: the two values, a's first, as text ("true" and "false"); default: the two that there are, true first.

    Raises:
        ValueError: there is no such column, or another number of values than two and no `groups`.
    """
    if by not in table.column_names:
        raise ValueError(f"there is no column {by!r}; there are {', '.join(table.column_names)}")
    values = [None if value is None else _text(value) for value in table[by].to_pylist()]
    known = Counter(value for value in values if value is not None)
    if groups is None:
        if len(known) != 2:
            few = ", ".join(f"{value} ({count})" for value, count in known.most_common(8)) or "nothing but null"
            raise ValueError(f"column {by!r} must have two values, it has {len(known)}: {few}; choose two of them")
        groups = sorted(known, key=lambda value: (value != "true", value))
    if len(groups) != 2 or groups[0] == groups[1]:
        raise ValueError(f"groups must be two different values of {by!r}, got {list(groups)}")
    if lost := [group for group in groups if not known[group]]:
        raise ValueError(f"no row has {lost[0]!r} as {by!r}; there are {', '.join(sorted(known)[:8]) or 'only nulls'}")
    return [(group, table.filter(pa.array([value == group for value in values]))) for group in groups]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------- one measure


def _difference(
    name: str,
    x: Numbers,
    y: Numbers,
    labels: tuple[Sequence[Any], Sequence[Any]],
    paired: bool,
    count: int,
    *,
    test: str,
    **how: Any,
) -> Difference:
    keep = [~np.isnan(x), ~np.isnan(y)]
    if paired:
        keep = [keep[0] & keep[1]] * 2
    rows = [np.flatnonzero(mask) for mask in keep]
    missing = (len(x) - len(rows[0]), len(y) - len(rows[1]))
    x, y = x[rows[0]], y[rows[1]]
    n = (len(x), len(y))
    mean, median = _each(np.mean, x, y), _each(np.median, x, y)
    found: dict[str, float] = dict.fromkeys(("low", "high", "auc", "rank_biserial", "cohens_d", "p"), np.nan)
    if min(n) > 1:
        found["low"], found["high"] = _interval((x - y,) if paired else (x, y), **how)
        found["auc"] = _auc(x, y)
        found["rank_biserial"] = _matched(x - y) if paired else 2 * found["auc"] - 1
        found["cohens_d"] = _cohens_d(x, y, paired)
        found["p"] = _p(x, y, paired, test, how["resamples"], how["seed"])
    if paired:
        away, ends = x - y, ((rows[0], x - y, labels[0]), (rows[0], y - x, labels[0]))
        values, count = (away, away), min(count, len(away) // 2)
    else:
        sign = 1.0 if not found["auc"] < 0.5 else -1.0
        ends = ((rows[0], sign * x, labels[0]), (rows[1], -sign * y, labels[1]))
        values = (x, y)
    at_ends = []
    for (row, height, label), value in zip(ends, values, strict=True):
        order = np.argsort(-height, kind="stable")[:count]
        at_ends.append([Example(int(row[i]), float(value[i]), label[int(row[i])]) for i in order])
    return Difference(
        measure=name,
        n=n,
        missing=missing,
        mean=mean,
        median=median,
        difference=mean[0] - mean[1],
        p_corrected=np.nan,
        examples=(at_ends[0], at_ends[1]),
        **found,
    )


def _each(f: Any, x: Numbers, y: Numbers) -> tuple[float, float]:
    """Of groups that may be empty, which numpy would warn of."""
    return (float(f(x)) if len(x) else np.nan, float(f(y)) if len(y) else np.nan)


def _interval(
    data: tuple[Numbers, ...], *, confidence: float, resamples: int, interval: str, seed: int
) -> tuple[float, float]:
    """Of the mean, or of the difference of two."""
    if all(np.ptp(one) == 0 for one in data):  # every sample is the same, and BCa divides by their spread
        value = float(data[0].mean() - (data[1].mean() if len(data) > 1 else 0))
        return value, value

    def statistic(*samples: Numbers, axis: int) -> Numbers:
        first, *second = (sample.mean(axis=axis) for sample in samples)
        return first - second[0] if second else first

    found = stats.bootstrap(
        data, statistic, vectorized=True, n_resamples=resamples, confidence_level=confidence, method=interval,
        batch=max(1, _BATCH // max(map(len, data))), random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _auc(x: Numbers, y: Numbers) -> float:
    ranks = stats.rankdata(np.concatenate([x, y]))
    return float((ranks[: len(x)].sum() - len(x) * (len(x) + 1) / 2) / (len(x) * len(y)))


def _matched(differences: Numbers) -> float:
    """The rank-biserial correlation of pairs; those without a difference have no side."""
    differences = differences[differences != 0]
    if not len(differences):
        return 0.0
    ranks = stats.rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum())


def _cohens_d(x: Numbers, y: Numbers, paired: bool) -> float:
    if paired:
        mean, variance = float((x - y).mean()), float((x - y).var(ddof=1))
    else:
        mean = float(x.mean() - y.mean())
        squares = (len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)
        variance = float(squares / (len(x) + len(y) - 2))
    if mean == 0:
        return 0.0
    return mean / float(np.sqrt(variance)) if variance > 0 else np.nan


def _p(x: Numbers, y: Numbers, paired: bool, test: str, resamples: int, seed: int) -> float:
    if not (np.concatenate([x, y]) - x[0]).any():
        return np.nan
    if paired and not (x - y).any():
        return 1.0  # where Wilcoxon's has nothing to rank
    if test == "permutation":

        def statistic(x: Numbers, y: Numbers, axis: int) -> Numbers:
            return x.mean(axis=axis) - y.mean(axis=axis)

        kind = "samples" if paired else "independent"
        how: dict[str, Any] = {"permutation_type": kind, "n_resamples": resamples, "vectorized": True}
        how |= {"batch": max(1, _BATCH // (len(x) + len(y))), "random_state": np.random.default_rng(seed)}
        return float(stats.permutation_test((x, y), statistic, **how).pvalue)
    found = stats.wilcoxon(x, y) if paired else stats.mannwhitneyu(x, y)
    return float(found.pvalue)


def _corrected(found: list[Difference]) -> list[Difference]:
    """With p_corrected, over those that have a p."""
    tested = [number for number, one in enumerate(found) if not np.isnan(one.p)]
    if tested:
        values = stats.false_discovery_control([found[number].p for number in tested])
        for number, value in zip(tested, values, strict=True):
            found[number] = replace(found[number], p_corrected=float(value))
    return found


# ------------------------------------------------------------------------- groups and pairs


def _arrays(name: str, group: Mapping[str, ArrayLike]) -> tuple[dict[str, Numbers], int]:
    """Every measure as float64, and how many rows they have."""
    if not group:
        raise ValueError(f"{name} has no measures")
    arrays = {measure: np.asarray(values, dtype=np.float64) for measure, values in group.items()}
    first = next(iter(arrays))
    for measure, values in arrays.items():
        if values.ndim != 1 or len(values) != len(arrays[first]):
            raise ValueError(
                f"{name}[{measure!r}] must be [{len(arrays[first])}] like {first!r}, got {list(values.shape)}"
            )
        if np.isinf(values).any():
            row = int(np.flatnonzero(np.isinf(values))[0])
            raise ValueError(f"{name}[{measure!r}] is infinite at row {row}; NaN stands for a value that isn't there")
    if not len(arrays[first]):
        raise ValueError(f"{name} has no rows")
    return arrays, len(arrays[first])


def _pairs(
    pair: tuple[Sequence[Any], Sequence[Any]], names: tuple[str, str]
) -> tuple[list[Any], tuple[NDArray[np.int64], NDArray[np.int64]], tuple[int, int]]:
    """The keys of both groups in a's order, for each row the number of its key (-1: none), and how many have none."""
    others = {key for key in pair[1] if key is not None}
    number: dict[Any, int] = {}
    for key in pair[0]:
        if key in others:
            number.setdefault(key, len(number))
    if not number:
        raise ValueError(
            f"{names[0]} and {names[1]} have no key in common to pair by: {[*pair[0][:3]]} ... and {[*pair[1][:3]]} ..."
        )
    places = [np.array([number.get(key, -1) for key in keys], dtype=np.int64) for keys in pair]
    lost = [int((place < 0).sum()) for place in places]
    return list(number), (places[0], places[1]), (lost[0], lost[1])


def _means(values: Numbers, place: NDArray[np.int64], count: int) -> Numbers:
    """[count] mean over the rows of each key, NaN left out; NaN where there is nothing else."""
    use = (place >= 0) & ~np.isnan(values)
    total = np.bincount(place[use], weights=values[use], minlength=count)
    size = np.bincount(place[use], minlength=count)
    return np.divide(total, size, out=np.full(count, np.nan), where=size > 0)


def _check(test: str, confidence: float, resamples: int, interval: str) -> None:
    if test not in TESTS:
        raise ValueError(f"test must be one of {', '.join(map(repr, TESTS))}, got {test!r}")
    if interval not in ("percentile", "BCa"):
        raise ValueError(f'interval must be "percentile" or "BCa", got {interval!r}')
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


# ------------------------------------------------------------------------- plain values


def _row(one: Difference) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in fields(one)}


def plain(value: Any) -> Any:
    """Lists, dicts and numbers alone; None for NaN."""
    if isinstance(value, Example):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
