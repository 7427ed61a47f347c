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
    names = (*PLAIN, *MEASURES)
    sides = [{name: table[name][mask] for name in names} for mask in (right, ~right)]
    keys = [table["problem"][mask].tolist() for mask in (right, ~right)]
    how: dict[str, Any] = {"names": ("right", "wrong"), "seed": 0}
    return {
        "all": compare(*sides, **how),
        "within problems": compare(*sides, pair=(keys[0], keys[1]), **how),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("out/study.jsonl"), help="written, or continued")
    parser.add_argument("--limit", type=int, help="solutions to take; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "study-gsm8k.json")
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
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
