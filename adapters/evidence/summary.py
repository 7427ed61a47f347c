"""What the lines of `flowgraph faithful` say together: means over traces, with paired bootstrap intervals.

    DIR/run.json, DIR/traces.jsonl -> summarise -> {"sanity", "tables", "curves", "carriers", ...} -> markdown

A pure function of the files: nothing is computed by a model here. Every number of a signal is a cell: its mean over
traces, its difference from flow and from random on the same traces, and the word that the first of these earns it:
"better" or "worse" if the interval of the difference leaves out 0, else "no difference". Random stands for the mean of
its seeds in each trace. With fewer than `FEWEST` traces an interval says nothing, and so the word is "too few traces".

Intervals are of one comparison each, 95 %: of twenty comparisons without any difference one looks like one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowgraph.adapters.evidence.statistics import Interval, interval, paired

RUN, TRACES = "run.json", "traces.jsonl"
"""In DIR: what the job was told, and a line for every row that is done."""

FEWEST = 10
"""Traces without which nothing is called better or worse."""

RESAMPLES = 2000
"""Of the bootstrap: an end of an interval is then known to about a twentieth of its length."""

FLOW, RANDOM = "flow", "random"
"""What every signal is compared with."""

Line = Mapping[str, Any]
Cell = dict[str, Any]
Values = Mapping[str, np.ndarray]
"""Per signal an array [n], one number per trace; NaN where a trace has none."""


def read_lines(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of traces.jsonl. What stands after the last line break was being written when the job was killed."""
    path = Path(folder) / TRACES
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def summarise(folder: str | Path) -> dict[str, Any]:
    """All tables of a run, finished or not.

    Raises:
        ValueError: the folder holds no run, or no trace that could be used.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no run of flowgraph faithful: there is no {RUN}")
    return summary_of(json.loads(path.read_text(encoding="utf-8")), read_lines(folder))


def summary_of(run: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    """The same of a header and lines in memory."""
    done = [line for line in lines if "reason" not in line]
    aside = Counter(line["reason"] for line in lines if "reason" in line)
    if not done:
        first = next(iter(aside), "there is no line")
        raise ValueError(f"none of {len(lines):,} rows could be used; the first: {first}")
    seed, controls = run["settings"]["seed"], run["settings"]["controls"]
    tables = [_table(where, found, seed) for where, found in _by_table(done).items()]
    return {
        "run": dict(run),
        "traces": len(done),
        "tokens": _plain(interval(np.array([line["tokens"] for line in done], dtype=float), seed=seed)),
        "set_aside": dict(aside.most_common()),
        "sanity": [row for where, found in _by_table(done).items() for row in _sanity(where, found, controls, seed)],
        "tables": tables,
        "curves": _curves(done, seed),
        "carriers": _carriers(done, seed),
        "seconds": _seconds(done),
    }


# ------------------------------------------------------------------------- the parts of a summary

_Where = tuple[str, float, str]  # restated, share, end


def _by_table(lines: Iterable[Line]) -> dict[_Where, list[tuple[Line, Line]]]:
    """(line, its table) for every table that lines have, in the order in which they come."""
    found: dict[_Where, list[tuple[Line, Line]]] = {}
    for line in lines:
        for table in line["tables"]:
            found.setdefault((table["restated"], table["share"], table["end"]), []).append((line, table))
    return found


def _table(where: _Where, found: Sequence[tuple[Line, Line]], seed: int) -> dict[str, Any]:
    restated, share, end = where
    sign = 1 if end == "top" else -1  # the tokens that matter least should cost little
    tables = [table for _, table in found]
    metrics = {"drop": cells(_columns(table["drop"] for table in tables), sign, seed)}
    regenerated = [(line, table) for line, table in found if "answers" in table]
    if regenerated:
        changed = [_outcomes(line, table, _changed) for line, table in regenerated]
        lost = [_outcomes(line, table, _lost) for line, table in regenerated]
        metrics |= {"changed": cells(_columns(changed), sign, seed), "lost": cells(_columns(lost), sign, seed)}
    recall = [table["recall"] for table in tables if "recall" in table]
    if recall:
        metrics["recall"] = cells(_columns(recall), sign, seed)
    return {
        "restated": restated,
        "share": share,
        "end": end,
        "traces": len(tables),
        "hidden": float(np.mean([table["hidden"] for table in tables])),
        "of": float(np.mean([table["of"] for table in tables])),
        "metrics": metrics,
    }


def _sanity(
    where: _Where, found: Sequence[tuple[Line, Line]], controls: Mapping[str, str], seed: int
) -> list[dict[str, Any]]:
    """Each control against the signal that it is a control of, by the drop."""
    restated, share, end = where
    drops = _columns(table["drop"] for _, table in found)
    rows = []
    for control, real in controls.items():
        sign = 1 if end == "top" else -1
        difference, count = _difference(drops[real], drops[control], seed)
        word = _verdict(difference, count, sign)
        verdict = word if count < FEWEST else "loses" if word == "better" else "does not lose"
        rows.append(
            {"control": control, "of": real, "restated": restated, "share": share, "end": end}
            | {"difference": _plain(difference), "traces": count, "verdict": verdict}
        )
    return rows


def _outcomes(line: Line, table: Line, outcome: Callable[[str, str, Line], float]) -> dict[str, float]:
    """1 or 0 per signal: what hiding its tokens did to the regenerated answer. NaN where there was nothing to lose."""
    return {name: outcome(text, line["regenerated"]["answer"], line) for name, text in table["answers"].items()}


def _changed(text: str, before: str, line: Line) -> float:
    return float(not same_answer(text, before))


def _lost(text: str, before: str, line: Line) -> float:
    right = line["regenerated"]["right"]
    return float(not same_answer(text, right)) if same_answer(before, right) else float("nan")


def _curves(lines: Sequence[Line], seed: int) -> list[dict[str, Any]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        for restated, curves in line.get("curves", {}).items():
            found.setdefault(restated, []).append(curves)
    rows = []
    for restated, curves in found.items():
        parts = {}
        for place, (kind, sign) in enumerate((("deletion", -1), ("insertion", 1))):  # falls early, rises early
            areas = _columns({name: one["area"][place] for name, one in trace.items()} for trace in curves)
            parts[kind] = cells(areas, sign, seed)
            for name, cell in parts[kind].items():
                points = [_mean_of_seeds({k: one[kind] for k, one in trace.items()})[name] for trace in curves]
                cell["curve"] = np.mean(points, axis=0).tolist()
        rows.append({"restated": restated, "traces": len(curves), "metrics": parts})
    return rows


def _carriers(lines: Sequence[Line], seed: int) -> list[dict[str, Any]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        for restated, precision in line.get("carriers", {}).items():
            found.setdefault(restated, []).append(precision)
    return [
        {"restated": restated, "traces": len(rows), "metrics": {"precision": cells(_columns(rows), 1, seed)}}
        for restated, rows in found.items()
    ]


def _seconds(lines: Sequence[Line]) -> dict[str, Any]:
    """Mean seconds per trace: of each signal, of what signals share, and of each step of the job."""
    columns = _columns((line["seconds"]["signals"] for line in lines), seeds=True)
    steps = _columns((line["seconds"]["steps"] for line in lines), seeds=True)
    return {
        "signals": {name: float(np.nanmean(values)) for name, values in columns.items()},
        "steps": {name: float(np.nanmean(values)) for name, values in steps.items()},
    }


# ------------------------------------------------------------------------- cells


def cells(values: Values, sign: int, seed: int) -> dict[str, Cell]:
    """A cell for every signal.

    Args:
        values: arrays [n] over the same traces. sign: 1 if more is better, -1 if less is.
    """
    found = {}
    for name, column in values.items():
        known = column[np.isfinite(column)]
        cell: Cell = {"traces": len(known), "mean": None, "low": None, "high": None}
        if len(known):
            cell |= _plain(interval(known, seed=seed, resamples=RESAMPLES))
        for other in (FLOW, RANDOM):
            if other in values and other != name:
                difference, count = _difference(column, values[other], seed)
                cell[f"minus_{other}"] = _plain(difference) | {"verdict": _verdict(difference, count, sign)}
        found[name] = cell
    return found


def _difference(one: np.ndarray, other: np.ndarray, seed: int) -> tuple[Interval, int]:
    """Of the traces that have both, and how many these are."""
    both = np.isfinite(one) & np.isfinite(other)
    if not both.any():
        return Interval(float("nan"), float("nan"), float("nan")), 0
    return paired(one[both], other[both], seed=seed, resamples=RESAMPLES), int(both.sum())


def _verdict(difference: Interval, traces: int, sign: int) -> str:
    if traces < FEWEST:
        return "too few traces"
    if difference.low <= 0 <= difference.high:
        return "no difference"
    return "better" if sign * difference.mean > 0 else "worse"


def _plain(found: Interval) -> dict[str, float | None]:
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def is_random(name: str) -> bool:
    """Is it one of the seeds of random? They stand in the tables as one, by their mean in each trace."""
    return name.split("/")[0] == RANDOM


def _mean_of_seeds(row: Mapping[str, Any]) -> dict[str, Any]:
    """One trace, with the mean of all seeds as "random"; numbers or lists of numbers."""
    seeds = [value for name, value in row.items() if is_random(name)]
    rest = {name: value for name, value in row.items() if not is_random(name)}
    return rest | ({RANDOM: np.mean(seeds, axis=0)} if seeds else {})


def _columns(rows: Iterable[Mapping[str, float]], seeds: bool = False) -> dict[str, np.ndarray]:
    """One array [n] per signal, from one row per trace; `seeds` keeps those of random apart."""
    merged = [row if seeds else _mean_of_seeds(row) for row in rows]
    names = list(dict.fromkeys(name for row in merged for name in row))
    return {name: np.array([row.get(name, np.nan) for row in merged], dtype=float) for name in names}


# ------------------------------------------------------------------------- answers

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?![\d/:^%]|\.\d)")  # no fraction, time, power or percentage


def same_answer(one: str, other: str) -> bool:
    """Do two texts give the same answer? Numbers by value ("$1,000" is "1000.0"), else letter by letter.

    Of texts that both begin with a number only that counts: a model may go on ("28 per gallon", "28 = 30 - 2"). Case,
    blanks, and what stands around an answer ($, **, a full stop) make no difference.
    """
    first, second = (_bare(text) for text in (one, other))
    numbers = [_NUMBER.match(text) for text in (first, second)]
    if numbers[0] and numbers[1]:
        values = [float(found[0].replace(",", "")) for found in numbers if found]
        return values[0] == values[1]
    return first == second


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(" $*`.\"'").casefold()


# ------------------------------------------------------------------------- as text

RESTATED = {
    "exclude": "tokens that restate the answer are left out of the choice",
    "include": "tokens that restate the answer may be chosen",
}
_HEADINGS = {
    "drop": "drop of log p(answer)", "changed": "answer changed", "lost": "right answer lost",
    "recall": "recall of carriers", "deletion": "deletion area", "insertion": "insertion area",
    "precision": "average precision",
}  # fmt: skip


def title(table: Mapping[str, Any]) -> str:
    """What a table is of, in words."""
    end = "highest" if table["end"] == "top" else "lowest"
    return f"The {table['share']:.0%} of tokens with the {end} scores hidden; {RESTATED[table['restated']]}"


def ranked(cells: Mapping[str, Cell], least_first: bool = False) -> list[str]:
    """Names of signals, the best first."""
    known = [name for name, cell in cells.items() if cell["mean"] is not None]
    return sorted(known, key=lambda name: cells[name]["mean"], reverse=not least_first)


def number(cell: Mapping[str, Any] | None, how: str = ".2f") -> str:
    """A mean with its interval."""
    if cell is None or cell["mean"] is None:
        return ""
    if cell["low"] is None or np.isnan(cell["low"]):  # of a single trace
        return f"{cell['mean']:{how}}"
    return f"{cell['mean']:{how}} [{cell['low']:{how}}, {cell['high']:{how}}]"


def markdown(summary: Mapping[str, Any]) -> str:
    """All of it as one page of tables."""
    settings = summary["run"]["settings"]
    counted = f"{summary['traces']:,} traces of {summary['tokens']['mean']:.0f} tokens on average"
    parts = [
        f"# What hiding tokens does to the answer of {settings['model']}",
        f"{counted}. Intervals: 95 %, bootstrap over traces. Differences are of the same traces, and so are their "
        "intervals; a word is said if the interval leaves out 0. Nothing is corrected for the number of comparisons.",
        "## Sanity: controls against the signals that they are made from",
        _sanity_text(summary["sanity"]) if summary["sanity"] else "No control was among the signals.",
    ]
    for table in summary["tables"]:
        parts += [f"## {title(table)}", table_text(table, summary["seconds"]["signals"])]
    for heading, rows in (("Curves", summary["curves"]), ("Known carriers", summary["carriers"])):
        for table in rows:
            parts += [f"## {heading}; {RESTATED[table['restated']]}", metrics_text(table)]
    steps = summary["seconds"]["steps"].items()
    parts += ["## Seconds per trace", grid(("step", "seconds"), [(name, f"{value:.2f}") for name, value in steps])]
    if summary["set_aside"]:
        rows = [(f"{count:,}", reason) for reason, count in summary["set_aside"].items()]
        parts += ["## Rows set aside", grid(("rows", "reason"), rows)]
    return "\n\n".join(parts) + "\n"


def _sanity_text(rows: Sequence[Mapping[str, Any]]) -> str:
    headings = ("control", "of", "share", "end", "restated", "drop of the real one - of the control", "the control")
    named = [[row["control"], row["of"], f"{row['share']:.0%}", row["end"], row["restated"]] for row in rows]
    said = [[number(row["difference"]), row["verdict"]] for row in rows]
    return grid(headings, [[*one, *other] for one, other in zip(named, said, strict=True)])


def table_text(table: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    drop = table["metrics"]["drop"]
    others = [name for name in table["metrics"] if name != "drop"]
    headings = [
        "signal",
        _HEADINGS["drop"],
        "- flow",
        "against flow",
        "- random",
        *(_HEADINGS[name] for name in others),
    ]
    rows = []
    for name in ranked(drop, least_first=table["end"] == "bottom"):
        cell = drop[name]
        flow = cell.get("minus_flow")
        rest = [number(table["metrics"][other].get(name)) for other in others]
        verdict = "" if flow is None else flow["verdict"]
        row = [name, number(cell), number(flow), verdict, number(cell.get("minus_random")), *rest]
        rows.append((*row, f"{_seconds_of(name, seconds):.2f}"))
    said = f"{table['traces']:,} traces; hidden are {table['hidden']:.1f} of {table['of']:.1f} tokens on average."
    for name in others:
        traces = max(cell["traces"] for cell in table["metrics"][name].values())
        said += f" {_HEADINGS[name].capitalize()}: of {traces:,} traces."
    return said + "\n\n" + grid((*headings, "seconds"), rows)


def _seconds_of(name: str, seconds: Mapping[str, float]) -> float:
    return seconds[name] if name in seconds else float(np.mean([s for one, s in seconds.items() if is_random(one)]))


def metrics_text(table: Mapping[str, Any]) -> str:
    metrics: Mapping[str, Mapping[str, Cell]] = table["metrics"]
    first = next(iter(metrics))
    headings = ["signal"]
    for name in metrics:
        headings += [_HEADINGS[name], "- flow", "against flow"]
    rows = []
    for name in ranked(metrics[first], least_first=first == "deletion"):
        row = [name]
        for one in metrics.values():
            flow = one[name].get("minus_flow")
            row += [number(one[name]), number(flow), "" if flow is None else flow["verdict"]]
        rows.append(row)
    return f"{table['traces']:,} traces.\n\n" + grid(headings, rows)


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in shown)
