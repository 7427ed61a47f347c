"""Two groups of traces: every number against its definition in plain loops, or against scipy called by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from flowgraph.compare import compare, divide, mean_interval, numbers


def groups(seed: int = 0, sizes: tuple[int, int] = (14, 11)) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two measures that differ, one with ties, and one that doesn't; some values are missing."""
    draw = np.random.default_rng(seed)
    a, b = (
        {
            "gini": draw.normal(shift, 1, size),
            "ties": draw.integers(0, 4, size).astype(float) + shift,
            "same": draw.normal(0, 1, size),
        }
        for shift, size in zip((0.8, 0.0), sizes, strict=True)
    )
    a["gini"][3] = np.nan
    b["gini"][:2] = np.nan
    return a, b


def known(x: Any) -> Any:
    return x[~np.isnan(x)]


@pytest.mark.parametrize("measure", ["gini", "ties", "same"])
def test_effect_sizes_and_p_are_their_definitions(measure: str) -> None:
    a, b = groups()
    one = compare(a, b)[measure]
    x, y = known(a[measure]), known(b[measure])
    assert one.n == (len(x), len(y))
    assert one.missing == (len(a[measure]) - len(x), len(b[measure]) - len(y))
    assert one.mean == pytest.approx((x.mean(), y.mean()))
    assert one.median == pytest.approx((np.median(x), np.median(y)))
    assert one.difference == pytest.approx(x.mean() - y.mean())
    wins = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p in x for q in y)
    more = sum(p > q for p in x for q in y) - sum(p < q for p in x for q in y)
    assert one.auc == pytest.approx(wins / len(x) / len(y))
    assert one.rank_biserial == pytest.approx(more / len(x) / len(y))
    squares = sum((p - x.mean()) ** 2 for p in x) + sum((q - y.mean()) ** 2 for q in y)
    assert one.cohens_d == pytest.approx((x.mean() - y.mean()) / (squares / (len(x) + len(y) - 2)) ** 0.5)
    assert one.p == stats.mannwhitneyu(x, y).pvalue


def test_p_is_corrected_for_all_measures_that_were_tested() -> None:
    a, b = groups()
    a["short"], b["short"] = np.full(14, np.nan), np.ones(11)
    a["flat"], b["flat"] = np.ones(14), np.ones(11)
    found = compare(a, b)
    assert np.isnan([found["short"].p_corrected, found["flat"].p_corrected]).all()
    tested = sorted((one.p, one.measure) for one in found if one.measure not in ("short", "flat"))
    for rank, (_, measure) in enumerate(tested):
        expected = min(p * len(tested) / (place + 1) for place, (p, _) in enumerate(tested) if place >= rank)
        assert found[measure].p_corrected == pytest.approx(min(expected, 1))
    assert [one.measure for one in found.ranked()][:3] == [measure for _, measure in tested]
    assert found["flat"].difference == found["flat"].low == found["flat"].high == 0
    assert found["flat"].auc == 0.5
    assert found["short"].n == (0, 11)
    assert found["short"].mean[1] == 1


def test_the_interval_is_that_of_a_bootstrap_by_hand() -> None:
    a, b = groups(sizes=(40, 30))
    one = compare(a, b, resamples=4000, confidence=0.9)["gini"]
    x, y = known(a["gini"]), known(b["gini"])
    draw = np.random.default_rng(99)
    means = [draw.choice(x, len(x)).mean() - draw.choice(y, len(y)).mean() for _ in range(4000)]
    spread = x.std() / len(x) ** 0.5
    assert [one.low, one.high] == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=spread / 5)
    bca = compare(a, b, interval="BCa")["gini"]
    assert bca.low < bca.difference < bca.high
    assert (bca.low, bca.high) != (one.low, one.high)


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        one = compare({"m": draw.normal(1, 1, 30)}, {"m": draw.normal(0, 2, 40)}, resamples=200)["m"]
        covered += one.low <= 1 <= one.high
    assert 85 <= covered <= 99


def test_a_seed_fixes_the_interval_whatever_other_measures_there_are() -> None:
    a, b = groups()
    alone = compare({"gini": a["gini"]}, {"gini": b["gini"]})["gini"]
    assert (alone.low, alone.high) == (compare(a, b)["gini"].low, compare(a, b)["gini"].high)
    assert compare(a, b, seed=1)["gini"].low != alone.low


def test_permutation_goes_through_all_divisions_of_small_groups() -> None:
    x, y = np.array([1.0, 4.0, 2.5, 8.0]), np.array([0.5, 1.5, 2.0])
    both, observed = np.concatenate([x, y]), x.mean() - y.mean()
    all_ = [list(chosen) for chosen in combinations(range(7), 4)]
    values = [both[chosen].mean() - np.delete(both, chosen).mean() for chosen in all_]
    above = np.mean([value >= observed - 1e-12 for value in values])
    below = np.mean([value <= observed + 1e-12 for value in values])
    p = compare({"m": x}, {"m": y}, test="permutation")["m"].p
    assert p == pytest.approx(2 * min(above, below))
    # Of pairs the signs are turned: 2^3 ways.
    x = x[:3]
    values = [np.mean((x - y) * [s, t, u]) for s in (1, -1) for t in (1, -1) for u in (1, -1)]
    above = np.mean([value >= (x - y).mean() - 1e-12 for value in values])
    keys = ("p", "q", "r")
    p = compare({"m": x}, {"m": y}, pair=(keys, keys), test="permutation")["m"].p
    assert p == pytest.approx(min(1, 2 * above))


def test_pairs_are_compared_with_each_other() -> None:
    draw = np.random.default_rng(3)
    size = 12
    hard = draw.normal(0, 10, size)  # what pairs have in common hides the difference from who takes them apart
    a = {"m": hard + draw.normal(1, 0.5, size)}
    b = {"m": hard + draw.normal(0, 0.5, size)}
    order = draw.permutation(size)
    b = {"m": np.append(b["m"][order], 77.0)}
    keys = ([f"id{i}" for i in range(size)], [*(f"id{i}" for i in order), "alone"])
    found = compare(a, b, pair=keys)
    x, y = a["m"], b["m"][np.argsort(order)]
    one = found["m"]
    assert (found.pairs, found.unpaired) == (size, (0, 1))
    assert one.difference == pytest.approx((x - y).mean())
    assert one.p == stats.wilcoxon(x, y).pvalue
    assert one.p < 0.01 < 0.5 < compare(a, b)["m"].p
    assert one.cohens_d == pytest.approx((x - y).mean() / (x - y).std(ddof=1))
    ranks = stats.rankdata(abs(x - y))
    assert one.rank_biserial == pytest.approx((ranks[x > y].sum() - ranks[x < y].sum()) / ranks.sum())
    assert one.low < one.difference < one.high
    assert one.high - one.low < 1.5, "pairs are drawn together"
    assert one.examples[0][0].label == f"id{int((x - y).argmax())}"
    assert one.examples[0][0].value == pytest.approx((x - y).max())
    assert one.examples[1][0].label == f"id{int((x - y).argmin())}"
    few = compare(a, b, pair=keys, examples=size)["m"]
    assert [len(side) for side in few.examples] == [size // 2] * 2, "no pair is at both ends"
    assert not {one.label for one in few.examples[0]} & {one.label for one in few.examples[1]}


def test_rows_with_the_same_key_count_as_their_mean() -> None:
    a = {"m": [1.0, 3.0, np.nan, 5.0, 7.0]}
    b = {"m": [1.0, 2.0, 4.0, 4.0]}
    found = compare(a, b, pair=([1, 1, 1, 2, 3], [1, 2, 3, 3]))
    assert found["m"].n == (3, 3)
    assert found["m"].mean == pytest.approx(((2 + 5 + 7) / 3, (1 + 2 + 4) / 3))
    # A pair of which one half is missing is none.
    lost = compare({"m": [np.nan, 5.0, 7.0]}, {"m": [1.0, 2.0, 4.0]}, pair=([1, 2, 3], [1, 2, 3]))["m"]
    assert (lost.n, lost.missing) == ((2, 2), (1, 1))
    alike = compare({"m": [1.0, 2.0, 3.0]}, {"m": [1.0, 2.0, 3.0]}, pair=([1, 2, 3], [1, 2, 3]))["m"]
    assert (alike.p, alike.rank_biserial, alike.cohens_d, alike.low, alike.high) == (1, 0, 0, 0, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_examples_stand_at_the_far_ends(sign: int) -> None:
    a, b = sign * np.array([5.0, 9.0, np.nan, 7.0]), sign * np.array([1.0, 3.0, 2.0])
    one = compare({"m": a}, {"m": b}, labels=(list("abcd"), list("xyz")), examples=2)["m"]
    assert [(example.label, example.value, example.row) for example in one.examples[0]] == [
        ("b", sign * 9, 1),
        ("d", sign * 7, 3),
    ]
    assert [example.label for example in one.examples[1]] == ["x", "z"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "t"}, "test must be one of 'rank', 'permutation', got 't'"),
        ({"interval": "basic"}, "interval must be"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"resamples": 0}, "resamples must be at least 1"),
        ({"labels": (["one"], ["two"])}, r"labels must have one entry per row, \(3, 3\), got 1 and 1"),
        ({"pair": ([1, 2, 3], [4, 5, 6])}, "no key in common"),
        ({"b": {"other": [1.0]}}, r"no measure in common: \['m'\] and \['other'\]"),
        ({"b": {}}, "b has no measures"),
        ({"b": {"m": []}}, "b has no rows"),
        ({"b": {"m": [1.0, np.inf]}}, r"b\['m'\] is infinite at row 1"),
        ({"b": {"m": [1.0], "n": [1.0, 2.0]}}, r"b\['n'\] must be \[1\] like 'm', got \[2\]"),
    ],
)
def test_what_cannot_be_compared_is_named(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"a": {"m": [1.0, 2.0, 3.0]}, "b": {"m": [1.0, 2.0, 4.0]}} | changes
    with pytest.raises(ValueError, match=message):
        compare(given.pop("a"), given.pop("b"), **given)


def test_measures_of_one_group_alone_are_said() -> None:
    found = compare({"m": [1.0, 2.0], "left": [1.0, 2.0]}, {"m": [1.0, 2.0], "right": [1.0, 2.0]})
    assert found.unshared == ["left", "right"]
    assert [one.measure for one in found] == ["m"]
    with pytest.raises(KeyError, match="no measure 'left'"):
        found["left"]


def test_files_hold_everything_and_no_nan(tmp_path: Path) -> None:
    a, b = groups()
    a["short"], b["short"] = np.full(14, np.nan), np.ones(11)
    found = compare(a, b, names=("right", "wrong"))
    shown = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert shown["names"] == ["right", "wrong"]
    assert shown["measures"][0]["p"] == found["gini"].p
    assert shown["measures"][0]["examples"][0][0] == found["gini"].examples[0][0]._asdict()
    assert shown["measures"][3]["p"] is None
    pq.write_table(found.to_table(), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["measure"].to_pylist() == ["gini", "ties", "same", "short"]
    assert table["mean_b"][0].as_py() == found["gini"].mean[1]
    assert table["p"].null_count == 1
    assert table.schema.metadata[b"flowgraph.a"] == b"right"


def test_numbers_of_a_table() -> None:
    table = pa.table(
        {
            "line": [1, 2],
            "id": ["a", "b"],
            "right": [True, False],
            "n": [3, None],
            "x": pa.array([0.5, 1], pa.float32()),
        }
    )
    found = numbers(table)
    assert list(found) == ["n", "x"]
    assert found["n"][0] == 3 and np.isnan(found["n"][1])
    assert found["x"].dtype == np.float64


def test_a_table_is_divided_by_a_column() -> None:
    table = pa.table({"m": [1, 2, 3, 4], "ok": [True, False, None, True], "from": ["x", "y", "z", "x"]})
    (first, one), (second, other) = divide(table, "ok")
    assert (first, one["m"].to_pylist()) == ("true", [1, 4])
    assert (second, other["m"].to_pylist()) == ("false", [2])
    (first, one), (second, other) = divide(table, "from", ["z", "x"])
    assert (first, one["m"].to_pylist(), second, other["m"].to_pylist()) == ("z", [3], "x", [1, 4])
    for by, chosen, message in (
        ("who", None, "there is no column 'who'; there are m, ok, from"),
        ("from", None, r"must have two values, it has 3: x \(2\)"),
        ("from", ["x", "w"], "no row has 'w'"),
        ("from", ["x", "x"], "two different values"),
    ):
        with pytest.raises(ValueError, match=message):
            divide(table, by, chosen)


def test_the_interval_of_a_mean() -> None:
    x = np.random.default_rng(5).normal(3, 1, 200)
    mean, low, high = mean_interval(np.append(x, np.nan))
    assert mean == pytest.approx(x.mean())
    assert [low, high] == pytest.approx([mean - 1.96 * x.std() / 200**0.5, mean + 1.96 * x.std() / 200**0.5], abs=0.03)
    assert mean_interval([2.0])[0] == 2
    assert np.isnan(mean_interval([2.0])[1:]).all()
    assert np.isnan(mean_interval([np.nan])).all()
    assert mean_interval([4.0, 4.0]) == (4, 4, 4)
