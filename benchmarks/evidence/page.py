"""`make evidence`: docs/evidence.md and its pictures, from the committed logs alone. Nothing here runs a model.

    results/evidence/recall-*.jsonl, choices-*.jsonl, rl-*.jsonl, gsm8k*/{run.json,traces.jsonl}  ->  tables, pictures

The page holds its prose; what stands between `<!-- name -->` and `<!-- /name -->` is written here. A section whose log
is missing says so, and what would make it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rl_gain, rl_tasks, tables
from benchmarks.evidence import choices, gsm8k, recall
from benchmarks.evidence.recall import word
from benchmarks.evidence.tasks import TASKS
from flowgraph.adapters.evidence import plots, summary
from flowgraph.adapters.evidence.signals import CONTROLS
from flowgraph.adapters.evidence.statistics import interval, paired
from flowgraph.adapters.evidence.summary import grid, number

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/evidence.md")
PICTURES = Path("docs/img")
LOGS = Path("benchmarks/results/evidence")
HIDING = (*gsm8k.RUNS, gsm8k.FLASHTRACE)
"""Folders of the runs of `flowgraph faithful`."""
MAIN = HIDING[0]

HEADLINE = ("scratchpad", "addition", "chains", "needles")
"""Tasks in the order of the page: the carriers of the first stand in the response."""

Cell = Mapping[str, Any]


# --- small parts ------------------------------------------------------------------------------------------------------


def lines_of(*paths: Path) -> list[dict[str, Any]]:
    """The lines of some logs; those that are missing have none."""
    return [json.loads(line) for path in paths if path.is_file() for line in path.read_text().splitlines()]


# --- what the logs say: asked for by several sections, and bootstraps take their time -------------------------------


@cache
def recalled(logs: Path) -> dict[str, Any]:
    """Task -> its summary."""
    return recall.summarise(lines_of(*(logs / f"recall-{task}.jsonl" for task in TASKS)))


@cache
def hidden(logs: Path) -> dict[str, dict[str, Any]]:
    """Run of `flowgraph faithful` -> its summary, of those that are there."""
    return {run: summary.summarise(logs / run) for run in HIDING if (logs / run / summary.RUN).is_file()}


@cache
def trained(logs: Path) -> dict[str, dict[str, Any]]:
    """Task -> the summary of its runs with the settings of today, of those that have any."""
    found = {}
    for name, task in rl_tasks.TASKS.items():
        key = rl_gain.Settings().of(task).key
        if runs := [one for one in rl_gain.read(logs / f"rl-{name}.jsonl") if one["settings"] == key]:
            found[name] = rl_gain.summarise(runs)
    return found


# --- sections ---------------------------------------------------------------------------------------------------------


def carriers_section(logs: Path) -> str:
    """Recall of known carriers, task by task."""
    found = recalled(logs)
    parts = []
    for task in HEADLINE:
        if task not in found or "signals" not in found[task]:
            parts.append(missing(f"recall-{task}.jsonl", f"python -m benchmarks.evidence.recall --tasks {task}"))
            continue
        parts += [f"### {task}", recall.carriers_table(found[task])]
    return "\n\n".join(parts)


def choices_section(logs: Path) -> str:
    """Which variant of flow and reach wins where it may be chosen, and what it is worth where it is reported."""
    found = choices.summarise(lines_of(*(logs / f"choices-{name}.jsonl" for name in (*TASKS, "gsm8k"))))
    keys = [*found["rule"], *(key for key in map(" ".join, choices.REPORTED) if key in found["traces"])]
    rows = []
    ranked = sorted(found["candidates"].items(), key=lambda item: (item[1]["mean rank"] or 1e9, item[0]))
    for name, one in ranked:
        cells = one["choose"] | one["report"]
        rank = "" if one["mean rank"] is None else f"{one['mean rank']:.1f}"
        words = {key: word(one["difference"].get(key)) for key in keys}
        marks = {"better": " +", "worse": " -"}
        rows.append((f"`{name}`", rank, *(f"{_mean(cells.get(key))}{marks.get(words[key], '')}" for key in keys)))
    winner = found["winner"]
    differences = "; ".join(
        f"{key} {number(cell, '+.2f')}" for key, cell in found["candidates"][winner]["difference"].items()
    )
    return "\n\n".join(
        [
            f"The rule chooses `{winner}`. Minus `{choices.DEFAULT}`, on the report half: {differences or 'nothing'}.",
            "Columns: " + ", ".join(f"{key} ({found['traces'][key]} problems)" for key in keys) + ". The first "
            f"{len(found['rule'])} are for choosing; in the others + and - stand where the paired interval of the "
            f"difference from `{choices.DEFAULT}` lies above or below 0.",
            grid(("candidate", "mean rank", *keys), rows),
        ]
    )


def mix_section(logs: Path) -> str:
    """The mix against reach, the other of its halves, on the same problems or traces."""
    rows: list[tuple[str, ...]] = []

    def row(test: str, chosen_on: str, count: int, mix: Cell, reach: Cell, difference: Cell) -> None:
        cells = (number(mix), number(reach), number(difference, "+.2f"))
        rows.append((test, chosen_on, f"{count}", *cells, word(difference)))

    carriers = [line for task in HEADLINE for line in lines_of(logs / f"recall-{task}.jsonl")]
    found = recall.summarise(carriers, against="reach")
    for task in HEADLINE:
        signals = found.get(task, {}).get("signals", {})
        if {"mix", "reach"} <= signals.keys():
            mix, reach = (signals[name]["max"] for name in ("mix", "reach"))
            chosen_on = "other problems" if task in choices.CHOOSE else "other tasks"
            cells = (mix["precision"], reach["precision"], mix["difference"]["precision"])
            row(f"{task}, precision", chosen_on, found[task]["counted"], *cells)
    drops = {
        (f"GSM8K, `{run}`", "other problems"): [
            table["drop"]
            for line in summary.read_lines(logs / run)
            for table in line.get("tables", ())
            if {"mix", "reach"} <= table["drop"].keys()
        ]
        for run in HIDING
    }
    for line in lines_of(logs / "choices-gsm8k.jsonl"):
        if "drop" in line:
            half = "other problems" if line["problem"] % 2 else "these"
            drops.setdefault(("GSM8K, variants", half), []).append(line["drop"])
    for (test, chosen_on), of_test in drops.items():
        if of_test:
            one, other = (np.array([drop[name] for drop in of_test]) for name in ("mix", "reach"))
            how = {"resamples": summary.RESAMPLES}  # as in the tables of these runs
            intervals = (interval(one, **how), interval(other, **how), paired(one, other, **how))
            row(f"{test}, drop", chosen_on, len(of_test), *map(asdict, intervals))
    return grid(("test", "the mix was chosen on", "problems", "mix", "reach", "mix - reach", "against reach"), rows)


def _mean(cell: Cell | None) -> str:
    return "" if cell is None or cell["mean"] is None else f"{cell['mean']:.2f}"


def sanity_section(logs: Path) -> str:
    """Controls: by hiding, and by carriers."""
    parts = []
    if found := hidden(logs).get(MAIN):
        rows = [
            (f"`{row['control']}`", f"`{row['of']}`", number(row["difference"], "+.2f"), row["verdict"])
            for row in found["sanity"]
        ]
        parts.append(f"Drop of log p(answer) on GSM8K, {found['traces']} traces:")
        parts.append(grid(("control", "of", "real signal - control (nats)", "the control"), rows))
    carriers, rows = recalled(logs), []
    for task in HEADLINE:
        for name, by in carriers.get(task, {}).get("signals", {}).items():
            if name.startswith("flow/") and name.split("/")[-1] in CONTROLS:
                cell = by["max"]["difference"]["precision"]
                turned = {"mean": -cell["mean"], "low": -cell["high"], "high": -cell["low"]}
                verdict = "loses" if turned["low"] > 0 else "does not lose"
                rows.append((f"`{name}`", task, number(turned, "+.2f"), verdict))
    parts.append("Average precision of known carriers:")
    parts.append(grid(("control", "task", "`flow` - control", "the control"), rows))
    return "\n\n".join(parts)


def hiding_section(logs: Path) -> str:
    """The tables of the runs of `flowgraph faithful`."""
    parts = []
    for run in HIDING:
        if (found := hidden(logs).get(run)) is None:
            parts.append(missing(run, f"python -m benchmarks.evidence.gsm8k --runs {run}"))
            continue
        for table in found["tables"]:
            beside = "FlashTrace beside it. " if run == gsm8k.FLASHTRACE else ""
            parts += [f"### {beside}{summary.title(table)}", summary.table_text(table, found["seconds"]["signals"])]
        parts.append(f"![Drops of log p(answer) by signal, with intervals](img/evidence-{run}.png)")
        for table in found["curves"]:
            parts += [f"### Deletion and insertion; {summary.RESTATED[table['restated']]}", summary.metrics_text(table)]
    return "\n\n".join(parts)


def rl_section(logs: Path) -> str:
    """Does it help RL? One table per task."""
    parts = []
    for name, found in trained(logs).items():
        parts += [f"### {name}", rl_gain.arms_table(found), f"![Learning curves of {name}](img/evidence-rl-{name}.png)"]
    return "\n\n".join(parts) or missing("rl-*.jsonl", "python -m benchmarks.rl_gain")


def missing(log: str, command: str) -> str:
    return f"(There is no {log} yet: `{command}` makes it.)"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "sanity": sanity_section,
    "carriers": carriers_section,
    "hiding": hiding_section,
    "choices": choices_section,
    "mix": mix_section,
    "rl": rl_section,
}


# --- the page ---------------------------------------------------------------------------------------------------------


def fill(text: str, name: str, content: str) -> str:
    """The page with another content of one section."""
    return tables.fill(text, name, f"\n{content}\n", PAGE)


def page(text: str, logs: Path) -> str:
    """The page with all sections anew."""
    for name, section in SECTIONS.items():
        text = fill(text, name, section(logs))
    return text


def pictures(logs: Path, into: Path) -> None:
    """Learning curves, and drops and curves of hiding."""
    into.mkdir(parents=True, exist_ok=True)
    for name, curves in trained(logs).items():
        rl_gain.plot(curves, into / f"evidence-rl-{name}.png")
    for run, found in hidden(logs).items():
        plots.draw(found, into / f"evidence-{run}.png")


def main() -> None:
    path = ROOT / PAGE
    path.write_text(page(path.read_text(encoding="utf-8"), ROOT / LOGS), encoding="utf-8")
    pictures(ROOT / LOGS, ROOT / PICTURES)
    print(f"wrote {PAGE} and its pictures")


if __name__ == "__main__":
    main()
