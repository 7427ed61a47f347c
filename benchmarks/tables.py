"""What the numbers of a run say: exponents of growth, the goals, and tables for people. Nothing here measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path("docs/long-contexts.md")
NAME = "numbers"
"""Of the marks on that page."""
MODES = ("exact", "sparse", "edges")
LONG = 32768
NONE = "-"


class Goal(NamedTuple):
    """What was aimed at. `measured` is None where a case that it needs failed or wasn't run."""

    name: str
    limit: float
    measured: float | None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit


class Results:
    """The results of a file by case and length."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.all: list[dict[str, Any]] = content["results"]
        self._by_key = {(one["case"], one["tokens"]): one for one in self.all if "failed" not in one}
        self._failed = {(one["case"], one["tokens"]): one for one in self.all if "failed" in one}

    def get(self, case: str, tokens: int, field: str) -> Any:
        """A number, or None."""
        return self._by_key.get((case, tokens), {}).get(field)

    def failed(self, case: str, tokens: int) -> dict[str, Any] | None:
        return self._failed.get((case, tokens))

    def series(self, case: str, *path: str) -> list[tuple[int, float]]:
        """(tokens, number) of one case, ascending; the number lies at `path`, as in ("stages", "rows").

        Lengths that exist only for a comparison are left out.
        """
        found = []
        for (name, tokens), value in sorted(self._by_key.items()):
            if name == case and not _is_compared(tokens):
                for field in path:
                    value = (value or {}).get(field)
                if value is not None:
                    found.append((tokens, value))
        return found

    def lengths(self) -> list[int]:
        cases = ("forward", *MODES, "eager")
        found = {one["tokens"] for one in self.all if one["case"] in cases}
        return sorted(tokens for tokens in found if not _is_compared(tokens))


def _is_compared(tokens: int) -> bool:
    """1,000 and 4,000 tokens are for FlashTrace; the lengths of the other tables are powers of two."""
    return tokens & (tokens - 1) != 0


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """The `p` of `y = c N^p` by least squares in logarithms; None for fewer than three points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 3:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def against(results: Results, mode: str, other: str, tokens: int, field: str = "time_over_forward") -> float | None:
    """Our number over theirs. For times each side is first divided by the forward pass beside it."""
    return ratio(results.get(mode, tokens, field), results.get(other, tokens, field))


def flashtrace_setting(results: Results, tokens: int) -> str | None:
    """The faster of the two ways in which FlashTrace's own method ran."""
    ran = [case for case in ("flashtrace", "flashtrace:recompute") if results.get(case, tokens, "seconds")]
    return min(ran, key=lambda case: results.get(case, tokens, "time_over_forward"), default=None)


def goals(content: dict[str, Any]) -> list[Goal]:
    """Goals and what was measured, from the results alone."""
    results = Results(content)
    found: list[Goal] = []
    for mode, limits in (("sparse", {2048: 0.80, 8192: 0.95}), ("exact", {2048: 0.85, 8192: 1.2})):
        for tokens, limit in limits.items():
            measured = results.get(mode, tokens, "time_over_forward")
            found.append(Goal(f"{mode}, end to end, {tokens:,} tokens: time / forward", limit, measured))
    for tokens, limit in ((2048, 0.12), (8192, 0.28)):
        measured = results.get("captured:sparse", tokens, "time_over_forward")
        found.append(Goal(f"sparse, q and k captured already, {tokens:,} tokens: time / forward", limit, measured))
    for mode in ("sparse", "exact"):
        found += [
            Goal(f"{mode} / eager maps, 2,048 tokens: time", 1 / 6, against(results, mode, "eager", 2048)),
            Goal(f"{mode} / eager maps, 2,048 tokens: peak memory", 1 / 20,
                 against(results, mode, "eager", 2048, "peak_bytes")),
        ]  # fmt: skip
    for mode in ("sparse", "exact"):
        for tokens, limit in ((1000, 1 / 4), (4000, 1 / 8)):
            setting = flashtrace_setting(results, tokens)
            measured = against(results, mode, setting, tokens) if setting else None
            found.append(Goal(f"{mode} / FlashTrace, 400 + {tokens - 400:,} tokens: time", limit, measured))
    for mode in ("sparse", "exact"):
        measured = ratio(results.get(mode, LONG, "peak_bytes_above_forward"), 1e6)
        found.append(Goal(f"{mode}, {LONG:,} tokens: peak above that of a forward", 500, measured, " MB"))
    solve_seconds = results.get("solve", LONG, "seconds")
    found.append(Goal("both solves, 32,768 tokens, 2 M edges", 25, ratio(solve_seconds, 1e-3), " ms"))
    for mode in ("sparse", "exact"):
        measured = exponent(results.series(mode, "peak_bytes"))
        found.append(Goal(f"{mode}: growth of peak memory with N, exponent", 1.1, measured))
    return found


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def megabytes(value: float | None) -> str:
    return number(ratio(value, 1e6), 0)


def goals_table(content: dict[str, Any]) -> str:
    said = {True: "met", False: "not met", None: "not measured"}
    rows = []
    for goal in goals(content):
        digits = 0 if goal.unit == " MB" else 1 if goal.unit else 3 if goal.limit < 0.2 else 2
        shown = [number(value, digits, goal.unit) for value in (goal.limit, goal.measured)]
        rows.append([goal.name, f"<= {shown[0]}", shown[1], said[goal.met]])
    return markdown(["goal", "limit", "measured", ""], rows)


def time_table(results: Results) -> str:
    cases = [*MODES, "captured:sparse", "captured:exact", "eager"]
    names = ["exact", "sparse", "edges", "sparse, captured", "exact, captured", "eager maps"]
    rows = []
    for tokens in results.lengths():
        cells = [_cell(results, case, tokens, lambda one: number(one["time_over_forward"])) for case in cases]
        seconds = results.get("forward", tokens, "seconds")
        rows.append([f"{tokens:,}", number(seconds, 1), *cells])
    return markdown(["tokens", "forward, s", *names], rows)


def memory_table(results: Results) -> str:
    rows = []
    for tokens in results.lengths():
        cells = [_cell(results, case, tokens, lambda one: megabytes(one["peak_bytes"]))
                 for case in ("forward", *MODES, "eager")]  # fmt: skip
        above = [megabytes(results.get(mode, tokens, "peak_bytes_above_forward")) for mode in MODES]
        rows.append([f"{tokens:,}", *cells, *above])
    heads = ["tokens", "forward", *MODES, "eager maps", *(f"{mode} - forward" for mode in MODES)]
    return markdown(heads, rows)


def _cell(results: Results, case: str, tokens: int, show: Callable[[dict[str, Any]], str]) -> str:
    failed = results.failed(case, tokens)
    if failed is not None:
        needed = failed.get("needed_bytes")
        return f"no room for {needed / 1e9:.0f} GB" if needed else "failed"
    one = next((one for one in results.all if one["case"] == case and one["tokens"] == tokens), None)
    return NONE if one is None else show(one)


def stage_table(results: Results) -> str:
    """Seconds of every stage, and how they grow."""
    rows = []
    lengths = results.lengths()
    for mode in MODES:
        names = {name for one in results.all if one["case"] == mode for name in one.get("stages", {})}
        for name in sorted(names):
            points = results.series(mode, "stages", name)
            by_length = dict(points)
            cells = [number(by_length.get(tokens), 3) for tokens in lengths]
            rows.append([mode, name, *cells, number(exponent(points))])
    for case in ("forward", *MODES, "eager"):
        for what, field in (("all, s", "seconds"), ("peak, MB", "peak_bytes")):
            points = results.series(case, field)
            if not points:
                continue
            by_length = dict(points)
            show = megabytes if field == "peak_bytes" else partial(number, digits=3)
            cells = [show(by_length.get(tokens)) for tokens in lengths]
            rows.append([case, what, *cells, number(exponent(points))])
    return markdown(["case", "stage", *(f"{tokens:,}" for tokens in lengths), "exponent"], rows)


def flashtrace_table(results: Results) -> str:
    names = {
        "exact": "FlowGraph, exact",
        "sparse": "FlowGraph, sparse",
        "flashtrace": "FlashTrace, `flashtrace`, hops=1",
        "flashtrace:recompute": "FlashTrace, `flashtrace`, hops=1, `recompute_attention`",
        "flashtrace:span": "FlashTrace, `ifr-span`, `recompute_attention`",
    }
    rows = []
    for tokens in (1000, 4000):
        for case, name in names.items():
            time = _cell(results, case, tokens, lambda one: number(one["seconds"]))
            over = number(results.get(case, tokens, "time_over_forward"))
            peak = megabytes(results.get(case, tokens, "peak_bytes"))
            ratios = [number(against(results, mode, case, tokens), 3) for mode in ("exact", "sparse")]
            rows.append([f"400 + {tokens - 400:,}", name, time, over, peak, *ratios])
    heads = ["tokens", "", "seconds", "/ forward", "peak, MB", "exact takes", "sparse takes"]
    return markdown(heads, rows)


def solve_text(results: Results) -> str:
    get = partial(results.get, "solve", LONG)
    bandwidth = results.get("bandwidth", 0, "bytes_per_second")
    if get("seconds") is None or bandwidth is None:
        return "Solves: not measured."
    share = get("bytes_moved") / get("seconds") / bandwidth
    return (
        f"Both triangular solves at {LONG:,} tokens and {get('num_edges'):,} edges ({get('graph')}): reach "
        f"{get('reach_seconds') * 1e3:.1f} ms, flow {get('flow_seconds') * 1e3:.1f} ms. They must move "
        f"{get('bytes_per_edge'):.1f} bytes per edge and do so at {share:.0%} of the {bandwidth / 1e9:.1f} GB/s that a "
        f"triad reaches on this machine. The whole of `trace_flow` takes {get('trace_flow_seconds') * 1e3:.0f} ms."
    )


def equality_text(content: dict[str, Any]) -> str:
    parts = []
    for mode, one in content.get("equality", {}).items():
        if "failed" in one:
            parts.append(f"{mode}: not to be had")
        else:
            parts.append(f"{mode}: largest relative error {one['largest']:.1e}, misplaced {one['misplaced']:.1e}")
    return "Against dense float64 at 300 tokens: " + "; ".join(parts) + "."


def origin_text(content: dict[str, Any]) -> str:
    about = content.get("machine", {})
    commits = sorted({one["commit"] for one in content["results"] if "commit" in one})
    said = " and ".join(commits) + (" (not one run)" if len(commits) > 1 else "")
    return (
        f"{about.get('model')}, {about.get('cpu')}, {about.get('threads')} threads, torch {about.get('torch')}, "
        f"transformers {about.get('transformers')}, commit {said}. Text: {content.get('text')}. Above 8,192 tokens the "
        "model runs beyond the positions that it was trained on: there only time and memory mean something."
    )


def section(content: dict[str, Any]) -> str:
    """The part of the page that numbers fill."""
    results = Results(content)
    parts = [
        "Written by `make bench` from [cpu.json](../benchmarks/results/cpu.json); not to be edited by hand.",
        origin_text(content),
        equality_text(content),
        "### Goals",
        goals_table(content),
        "### Time",
        "Over a plain forward pass (sdpa, `logits_to_keep=1`, no cache) of the same tokens in the same process. "
        '"Captured": without the pass, as when queries and keys come out of one that ran anyway.',
        time_table(results),
        "![Time over a forward pass](img/long-contexts-time.png)",
        "### Memory",
        "Highest point above the model, MB.",
        memory_table(results),
        "![Peak memory](img/long-contexts-memory.png)",
        "### Stages and growth",
        "Seconds that each stage takes by itself; exponents `p` of `c N^p`, fitted over the lengths.",
        stage_table(results),
        "### FlashTrace",
        "FlashTrace 0.1.1 on the same tokens and spans, in float32. Its goals are against the faster setting of its "
        "own method; `ifr-span` leaves the hop through the reasoning out. The last two columns are ours over "
        "theirs, each divided by the forward pass beside it.",
        flashtrace_table(results),
        "### Solves",
        solve_text(results),
    ]
    return "\n\n".join(parts)


def write_page(content: dict[str, Any], path: Path = PAGE) -> None:
    """Put the numbers between the marks of the page.

    Raises:
        ValueError: the page lacks the marks.
    """
    text = path.read_text(encoding="utf-8")
    path.write_text(fill(text, NAME, section(content), path), encoding="utf-8")


def fill(text: str, name: str, content: str, path: Path) -> str:
    """The text of a page with other content between `<!-- name -->` and `<!-- /name -->`.

    Args:
        path: of the page, for the message.

    Raises:
        ValueError: the page does not hold both marks, once each and in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, once each")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def report(content: dict[str, Any]) -> str:
    """For the terminal."""
    results = Results(content)
    parts = [goals_table(content), time_table(results), memory_table(results), flashtrace_table(results)]
    failed = [f"{one['case']} at {one['tokens']:,}: {one['failed']}" for one in results.all if "failed" in one]
    took = sum(content.get("process_seconds", {}).values())
    return "\n\n".join([*parts, solve_text(results), *failed, f"measured in {took / 60:.0f} minutes"])
