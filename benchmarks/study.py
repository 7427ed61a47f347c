"""`python -m benchmarks.study ROLLOUTS.jsonl`: what sets right solutions apart from wrong ones, measure by measure.

Takes a file of solutions to problems (fields problem, question, response, correct, source), several per problem, and
traces those of the odd-numbered problems that a model wrote. Beside the measures of `flowgraph.measures` stand two
plain predictors: the number of tokens of the response, and the mean log-probability that the model gives to them.

    rows    -> out/study.jsonl, a line of numbers per solution; a run that was stopped goes on from there
    compare -> results/study-gsm8k.json: right against wrong, all solutions, and paired within each problem

docs/study-gsm8k.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import RESULTS, machine
from flowgraph import Tracer, measures
from flowgraph.compare import compare
from flowgraph.measures import MEASURES
from flowgraph.rl.baselines import predictions
from flowgraph.smollm2 import load

PLAIN = ("response_tokens", "mean_logprob")


def rows_of(source: Path, limit: int | None) -> list[dict[str, Any]]:
    """Solutions of odd-numbered problems that models wrote; references are right by construction and left out."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["problem"] % 2 and row["source"] != "reference"][:limit]


def trace_all(rows: list[dict[str, Any]], out: Path) -> None:
    """A line of numbers for each solution; goes on where an earlier run was stopped."""
    done = len(out.read_text().splitlines()) if out.exists() else 0
    if done >= len(rows):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load()
    tracer = Tracer(model, tokenizer, question="user")
    began = time.perf_counter()
    for number, row in enumerate(rows[done:], done):
        trace = tracer([{"role": "user", "content": row["question"]}], row["response"])
        values = {name: float(value) for name, value in measures(trace.flow, [trace.text]).items()}
        logp = predictions(model, trace.graph.token_ids[None]).logp[0]
        values["response_tokens"] = float(trace.graph.response_mask.sum())
        values["mean_logprob"] = float(logp[trace.graph.response_mask].mean())
        with out.open("a") as file:
            known = {name: row[name] for name in ("problem", "source", "correct")}
            file.write(json.dumps(known | values) + "\n")
        if number % 100 == 99:
            seconds = (time.perf_counter() - began) / (number + 1 - done)
            print(f"{number + 1} of {len(rows)}, {seconds:.2f} s each", flush=True)


def groups(table: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Right against wrong: all solutions, and within problems that have both."""
    right = table["correct"].astype(bool)
    names = [name for name in (*PLAIN, *MEASURES) if name in table]
    sides = [{name: table[name][mask] for name in names} for mask in (right, ~right)]
    keys = [table["problem"][mask].tolist() for mask in (right, ~right)]
    how: dict[str, Any] = {"names": ("right", "wrong"), "seed": 0}
    return {
        "all": compare(*sides, **how),
        "within problems": compare(*sides, pair=(keys[0], keys[1]), **how),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """How well each number tells right from wrong, and what is left of it within problems."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    everyone = {one["measure"]: one for one in results["all"]["measures"] if one["auc"] is not None}
    paired = {one["measure"]: one for one in results["within problems"]["measures"] if one["cohens_d"] is not None}
    names = sorted(everyone.keys() & paired.keys(), key=lambda name: everyone[name]["auc"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.24 * len(names) + 1.2), sharey=True)
    for place, name in enumerate(names):
        colour = "#b5460f" if name in PLAIN else "#1d5c99"
        left.plot(everyone[name]["auc"], place, "o", color=colour, markersize=5)
        one = paired[name]
        # The interval is that of the mean difference; in units of its standard deviation, as d is.
        scale = one["cohens_d"] / one["difference"] if one["difference"] else 0.0
        right.plot([one["low"] * scale, one["high"] * scale], [place, place], color=colour, linewidth=1.5)
        filled = one["p_corrected"] is not None and one["p_corrected"] < 0.05
        right.plot(one["cohens_d"], place, "o", color=colour, markersize=5, fillstyle="full" if filled else "none")
    left.axvline(0.5, color="grey", linewidth=0.8)
    right.axvline(0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xlabel("all solutions: AUC (below 0.5: wrong ones have more)", fontsize=9)
    right.set_xlabel("within problems: right - wrong, in standard deviations (filled: p < 0.05)", fontsize=9)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("out/study.jsonl"), help="written, or continued")
    parser.add_argument("--limit", type=int, help="solutions to take; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "study-gsm8k.json")
    parser.add_argument("--plot", type=Path, help="a picture of it")
    options = parser.parse_args()
    rows = rows_of(options.source, options.limit)
    trace_all(rows, options.rows)
    read = [json.loads(line) for line in options.rows.read_text().splitlines()][: len(rows)]
    table = {name: np.array([one[name] for one in read]) for name in read[0]}
    results = {name: found.to_dict() for name, found in groups(table).items()}
    for found in results.values():
        for one in found["measures"]:
            one.pop("examples", None)  # of other people's data
    about = {"machine": machine(), "model": "SmolLM2-135M-Instruct", "solutions": len(table["correct"])}
    about |= {"right": int(table["correct"].sum()), "problems": len(set(table["problem"].tolist()))}
    options.out.write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
