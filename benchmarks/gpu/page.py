"""The section "Measured, and what was expected" of docs/gpu.md: from the files of results, and from predict.py.

What was not measured stands as "-". Nothing here measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import BARE, OFFLOAD, SOLVES, STAGES, TILES, Case, plan
from benchmarks.gpu.predict import H100, Work, credits_of, keep, least, rows, seconds
from benchmarks.gpu.shapes import SHAPES
from benchmarks.tables import NONE, Goal, exponent, fill, markdown, number, ratio

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
LOGS = ROOT / "benchmarks" / "results"
NAME = "gpu"
"""Of the marks on that page."""

SHOWN: dict[str, dict[str, str]] = {
    "machine": {
        "matrix_per_second": "bfloat16 products, FLOP/s",
        "memory_per_second": "memory, B/s",
        "powers_per_second": "powers of 2, 1/s",
        "launch_seconds": "a launch",
    },
    "kernels": {
        "rows_seconds": "rows",
        "edges_seconds": "rows and edges",
        "own_seconds": "rows, own log-sum-exp",
    },
    "credits": {
        "forward_seconds": "forward",
        "credits_over_forward": "credits / forward",
        "peak_bytes_above_forward": "peak above forward",
    },
    "solves": {"seconds": "both passes"},
    "scorer": {"seconds_per_rollout": "a rollout", "share_of_step": "share of a step"},
    "long": {"seconds": "time", "time_over_forward": "time / forward", "peak_bytes": "peak above model"},
}
"""Stage -> the numbers of its table, in words."""

PIECED = 8192
"""Tokens of the table of pieces."""

TITLES = {
    "machine": "The card",
    "kernels": "Rows and edges of a trace, log-sum-exp given",
    "credits": "Credits out of a forward pass that runs anyway",
    "solves": "Reach and flow of 64 graphs, 32 edges into each token",
    "scorer": "A batch of 64 rollouts through the `Scorer`; a step is forward and backward with checkpoints",
    "long": "One long trace by chunks of 4,096 tokens; offload: queries and keys in the host's memory",
}


class Numbers:
    """What a file of results says (`measured`), or what is expected where there is none."""

    def __init__(self, content: dict[str, Any] | None) -> None:
        self._results = {(one["case"], one["tokens"]): one for one in (content or {}).get("results", [])}
        self.is_expected = content is None

    def result(self, case: Case) -> dict[str, Any]:
        return self._results.get((case.name, case.tokens), {})

    def get(self, case: Case, name: str) -> float | None:
        found: dict[str, float] = case.expected if self.is_expected else self.result(case).get("measured", {})
        return found.get(name)

    def ceilings(self) -> Work:
        """Rates per second; the data sheet's where this card has no number."""
        card = Case("machine", "ceilings")
        rates = {name: self.get(card, f"{name}_per_second") for name in ("matrix", "memory", "powers")}
        known = {name: rate for name, rate in rates.items() if rate}
        return H100._replace(**known)


# --- goals ------------------------------------------------------------------------------------------------------------


def over_ceiling(numbers: Numbers, case: Case) -> float | None:
    """Time of rows and edges over the least that products, powers and memory allow, at the card's own rates."""
    return ratio(numbers.get(case, "edges_seconds"), ceiling(numbers, case)[1])


def ceiling(numbers: Numbers, case: Case) -> tuple[str, float]:
    """Which of the three binds, and the seconds that it takes."""
    needs = rows(SHAPES[case.shape], case.tokens, "triton").plus(keep(case.tokens))
    bound = Work(matrix=needs.attention, powers=needs.powers, memory=needs.memory)
    name, shortest = least(bound, numbers.ceilings())
    return {"matrix": "products", "powers": "powers of 2"}.get(name, name), shortest


def goals(numbers: Numbers) -> list[Goal]:
    """Goals for one H100, and what was measured or is expected."""
    found = [
        Goal(
            f"credits / forward, {mode}, Qwen3-4B, 8,192 tokens",
            limit,
            numbers.get(Case("credits", f"{mode} triton", "qwen3-4b", 8192), "credits_over_forward"),
        )
        for mode, limit in (("sparse", 0.06), ("exact", 0.10))
    ]
    bare = numbers.get(Case("credits", BARE, "qwen3-4b", 8192), "credits_over_forward")
    found.append(Goal("credits / forward, exact, no edges listed, Qwen3-4B, 8,192 tokens", 0.10, bare))
    kernel = Case("kernels", "triton", "qwen3-4b", 8192)
    found.append(Goal("rows and edges, 8,192 tokens: time / that of the ceiling", 2, over_ceiling(numbers, kernel)))
    solved = [numbers.get(Case("solves", what, "qwen3-4b", 8192), "seconds") for what in SOLVES]
    fastest = min((one for one in solved if one is not None), default=None)
    found.append(Goal("both solves, 64 graphs of 8,192 tokens, the fastest", 5, ratio(fastest, 1e-3), " ms"))
    lengths = ("qwen3-8b", 32_768), ("qwen3-4b", 131_072)
    for mode in ("sparse", "exact"):
        for shape, N in lengths:
            peak = numbers.get(Case("long", f"{mode} triton{OFFLOAD}", shape, N), "peak_bytes")
            name = f"{mode}, offload, {shape}, {N:,} tokens: peak above the model"
            found.append(Goal(name, 2, ratio(peak, 1e9), " GB"))
    for mode in ("sparse", "exact"):
        peaks = [
            (float(N), numbers.get(Case("long", f"{mode} triton{OFFLOAD}", "qwen3-4b", N), "peak_bytes"))
            for N in (8192, 32_768, 131_072)
        ]
        known = [(N, peak) for N, peak in peaks if peak is not None]
        found.append(Goal(f"{mode}, offload: growth of that peak with N, exponent", 1.1, exponent(known)))
    return found


def goals_table(measured: Numbers | None) -> str:
    said = {True: "yes", False: "no", None: "not measured"}
    both = zip(goals(Numbers(None)), goals(measured or Numbers({})), strict=True)
    lines = []
    for expected, found in both:
        digits = 3 if found.limit < 0.2 else 1 if found.unit else 2
        cells = [number(one, digits, found.unit) for one in (expected.limit, expected.measured, found.measured)]
        lines.append([found.name, f"<= {cells[0]}", *cells[1:], said[found.met]])
    return markdown(["goal", "limit", "expected", "measured", "reached"], lines)


# --- tables -----------------------------------------------------------------------------------------------------------


def show(name: str, value: float | None) -> str:
    """A number in the unit that its name asks for."""
    if value is None:
        return NONE
    if name.endswith("per_second"):
        return f"{value:.2e}"
    if name.endswith("seconds") or "seconds_per" in name:
        factor, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-4 else (1e6, "us")
        return f"{value * factor:,.{2 if unit == 's' else 1}f} {unit}"
    if name == "largest_error":
        return f"{value:.1e}"
    if "bytes" in name:
        return f"{value / 1e9:,.2f} GB"
    return f"{value:.1%}" if "share" in name or "credits_over" in name else f"{value:.2f}"


def stage_table(stage: str, cases: Iterable[Case], measured: Numbers) -> str:
    """A row per case; each number twice, as expected and as measured."""
    names, lines = SHOWN[stage], []
    for case in cases:
        cells = []
        for name in names:
            cells += [show(name, case.expected.get(name)), show(name, measured.get(case, name))]
        lines.append([case.what, case.shape, f"{case.tokens:,}", *cells, _trouble(measured.result(case))])
    heads = [head for words in names.values() for head in (f"{words}: expected", "measured")]
    return markdown(["", "shape", "tokens", *heads, ""], lines)


def _trouble(result: dict[str, Any]) -> str:
    for kind in ("failed", "skipped"):
        if kind in result:
            return f"{kind}: {result[kind]}"[:120].replace("|", "/").replace("\n", " ")
    return ""


def equality_text(measured: Numbers, cases: Iterable[Case]) -> str:
    """How many checks there were, and which went wrong."""
    lines = []
    for case in cases:
        result = measured.result(case)
        checks = result.get("measured", {}).get("checks")
        largest = result.get("measured", {}).get("largest_error")
        error = NONE if largest is None else f"{largest:.1e}"
        lines.append([case.what, number(checks, 0), error, _trouble(result) or ("equal" if checks else "not run")])
    return markdown(["against the slow twin", "checks", "largest error", ""], lines)


def tuning_text(measured: Numbers, cases: Iterable[Case]) -> str:
    """The default beside the best of what was tried."""
    times = [(measured.get(case, "rows_seconds"), case.what) for case in cases]
    tried = sorted((took, what) for took, what in times if took is not None)
    if not tried:
        return "Tiles and blocks: not measured."
    best = ", ".join(f"{what} {show('seconds', took)}" for took, what in tried[:4])
    default = TILES[0]
    usual = next((show("seconds", took) for took, what in tried if what == default), NONE)
    return f"Other tiles, other rows per block: the default ({default}) takes {usual} for all rows; best: {best}."


def pieces_table() -> str:
    """What is expected of the parts of credits, and how many launches are in it."""
    lines = []
    for way in ("sparse triton", "exact triton", BARE):
        pieces = credits_of(SHAPES["qwen3-4b"], PIECED, way)
        said = ", ".join(f"{name} {show('seconds', seconds(work))}" for name, work in pieces.items())
        lines.append([way, said, f"{sum(work.launches for work in pieces.values()):,.0f}"])
    return markdown(["", "expected", "launches"], lines)


def section(contents: list[dict[str, Any]]) -> str:
    """The part of the page that numbers fill."""
    parts = [
        "Written by `python -m benchmarks.gpu --tables` from `benchmarks/results/gpu-*.json` and "
        "`benchmarks/gpu/predict.py`; not to be edited by hand. Expected is what an H100 should take, by operations, "
        "bytes and its data sheet, worked out before there was a measurement."
    ]
    if not contents:
        parts.append("**Nothing has been measured yet**: no GPU has run any of this.")
    for content in contents:
        parts += _tables(content)
    if not contents:
        parts += _tables(None)
    return "\n\n".join(parts)


def _tables(content: dict[str, Any] | None) -> list[str]:
    measured = Numbers(content or {})
    by_stage: dict[str, list[Case]] = {stage: [] for stage in STAGES}
    for case in plan():
        by_stage[case.stage].append(case)
    parts = []
    if content is not None:
        about = content["machine"]
        commits = ", ".join(sorted({one["commit"] for one in content["results"]}))
        parts.append(
            f"Measured on {about['card']} ({about.get('driver', 'no driver')}; torch {about['torch']}, Triton "
            f"{about['triton']}, transformers {about['transformers']}), commit {commits}."
        )
    kernel = Case("kernels", "triton", "qwen3-4b", 8192)
    binds, shortest = ceiling(measured, kernel)
    where = "measured on this card" if content is not None else "of the data sheet"
    limit = (
        f"The ceiling of rows and edges is {binds}, {show('seconds', shortest)} at the rate {where}: of bfloat16 "
        "products, powers of 2 and memory it is what takes longest. Half of the ceiling is a time of twice as much."
    )
    parts += ["### Goals", goals_table(measured), limit, "### Equality", equality_text(measured, by_stage["equality"])]
    for stage, title in TITLES.items():
        parts += [f"### {title}", stage_table(stage, by_stage[stage], measured)]
        if stage == "kernels":
            parts.append(tuning_text(measured, by_stage["tune"]))
        if stage == "credits":
            parts += [f"Where the time of credits should go, Qwen3-4B, {PIECED:,} tokens:", pieces_table()]
    return parts


def write_page(path: Path = PAGE, logs: Path = LOGS) -> None:
    """Put the numbers between the marks of the page.

    Raises:
        ValueError: the page lacks the marks.
    """
    contents = [json.loads(file.read_text()) for file in sorted(logs.glob("gpu-*.json"))]
    text = path.read_text(encoding="utf-8")
    path.write_text(fill(text, NAME, section(contents), path), encoding="utf-8")


def report(content: dict[str, Any]) -> str:
    """For the terminal: all that is in the file, and the goals."""
    lines = []
    for one in content["results"]:
        found = one.get("measured", {})
        cells = [f"{name} {show(name, found[name])} ({show(name, one['expected'].get(name))})" for name in found]
        lines.append(f"{one['case']}@{one['tokens']}: {'; '.join(cells)} {_trouble(one)}".rstrip())
    said = "" if content["machine"]["device"] != "cpu" else "A trial on a CPU: no number here says anything of speed.\n"
    measured = Numbers(content)
    return "\n".join([said + "measured (expected of an H100)", *lines, "", goals_table(measured)])
