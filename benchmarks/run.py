"""`make bench`: time and memory of credits against a plain forward, eager attention and FlashTrace, as one JSON file.

First the equality check: credits must equal a dense float64 computation, or nothing is timed. Then each case runs in a
process of its own (see cases.py; from 16K tokens on the cases of one length share a process and its plain forward
pass), and its result is in benchmarks/results/cpu.json as soon as it is known. A run that was stopped goes on from
there. At the end tables and pictures are made of the file: the goals, docs/long-contexts.md, docs/img.

    --fresh        measure everything anew
    --only X ...   measure the cases whose name contains X anew: exact, sparse@8192, flashtrace, solve
    --tables       measure nothing: tables and pictures from the file as it is
    --lengths N .. other lengths, to try things out; with --out elsewhere

About 50 minutes on two quiet cores, 20 of them for 32K tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
FLASHTRACE = Path(".venv-flashtrace/bin/python")
FORMAT = 2
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LONGEST_ALONE = 8192
"""Up to here each case has a process to itself; above, a plain forward pass takes minutes and is run once."""
COMPARED = (1000, 4000)
"""400 + 600 and 400 + 3,600 tokens: against FlashTrace."""

TOLERANCE = {"exact": ("largest", 1e-3), "edges": ("largest", 1e-3), "sparse": ("misplaced", 0.02)}
"""What the equality check asks of each mode: the largest relative error of throughput, or the share of all throughput
that lies on the wrong token."""


@dataclass(frozen=True)
class Job:
    """One process: some cases at one length."""

    tokens: int
    cases: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        return [f"{case}@{self.tokens}" for case in self.cases]


def plan(lengths: tuple[int, ...] = LENGTHS, compared: tuple[int, ...] = COMPARED) -> list[Job]:
    """What is measured, shortest first."""
    jobs = [Job(0, ("bandwidth",))]
    for num_tokens in lengths:
        if num_tokens <= LONGEST_ALONE:
            processes = ("forward", "exact"), ("sparse",), ("edges",), ("captured:sparse", "captured:exact"), ("eager",)
            jobs += [Job(num_tokens, cases) for cases in processes]
        else:
            jobs += [Job(num_tokens, ("forward", "sparse", "exact"))]
    for num_tokens in compared:
        jobs += [Job(num_tokens, (case,)) for case in ("exact", "sparse", "flashtrace", "flashtrace:recompute")]
        jobs += [Job(num_tokens, ("flashtrace:span",))] if num_tokens <= 2048 else []
    jobs.sort(key=lambda job: job.tokens)
    return [*jobs, Job(32768, ("solve",))]


def check_equality(num_tokens: int = 300) -> dict[str, Any]:
    """Throughput of each mode against eager attention of a float64 model, dense, token by token.

    Returns:
        Per mode `largest`, the largest relative error, and `misplaced`, half the sum of absolute differences over the
        sum; or `failed`, where the mode can't be had.

    Raises:
        SystemExit: a mode is further off than `TOLERANCE`.
    """
    from benchmarks.cases import ANSWER, prompt_of
    from benchmarks.text import tokens
    from flowgraph import TokenGraph, Tracer, trace_flow
    from flowgraph.smollm2 import load

    model, tokenizer = load(torch.float32)
    prompt = prompt_of(num_tokens)
    ids = torch.tensor([tokens(tokenizer, num_tokens, prompt)[0]])
    place = torch.arange(num_tokens)
    roles: dict[str, Any] = {"prompt_mask": place < prompt, "answer_mask": place >= num_tokens - ANSWER}
    precise, _ = load(torch.float64)
    precise.set_attn_implementation("eager")
    with torch.no_grad():
        maps = precise(ids, output_attentions=True, use_cache=False).attentions
    found: dict[str, Any] = {}
    for mode, (measure, tolerance) in TOLERANCE.items():
        try:
            tracer = Tracer(model, mode=mode)
        except ValueError as error:
            found[mode] = {"failed": str(error)}
            continue
        trace = tracer.from_ids(ids, prompt_mask=roles["prompt_mask"][None], sink_mask=roles["answer_mask"][None])[0]
        W = torch.stack([maps[layer][0] for layer in trace.graph.layers]).mean((0, 1))
        exact = trace_flow(TokenGraph.from_dense(W, **roles), "reference").throughput
        off = (trace.throughput.double() - exact).abs()
        found[mode] = {
            "largest": float((off / exact.clamp(min=1e-12)).max()),
            "misplaced": float(off.sum() / exact.sum() / 2),
            "tolerance": {measure: tolerance},
        }
        if not found[mode][measure] <= tolerance:
            raise SystemExit(
                f"credits in mode {mode!r} differ from the dense computation: {measure} {found[mode][measure]:.1e}, "
                f"allowed {tolerance:.0e}. No speed is worth printing."
            )
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import scipy
    import torch_geometric
    import transformers

    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_geometric": torch_geometric.__version__,
        "scipy": scipy.__version__,
        "model": "SmolLM2-135M-Instruct, float32",
    }


def commit() -> str:
    """The commit of the code; "-dirty" if code that is measured differs from it. Results and docs don't count."""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = ["flowgraph", "adapters", "rl", ":(glob)benchmarks/*.py"]
    status = ["git", "status", "--porcelain", "--", *code]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return shown + ("-dirty" if changed else "")


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """The results of one process, each as soon as it prints it; and what killed it, if something did."""
    missing = list(job.cases)
    flashtrace = job.cases[0].startswith("flashtrace")
    if flashtrace and not FLASHTRACE.exists():
        yield {"case": job.cases[0], "tokens": job.tokens, "failed": f"{FLASHTRACE} is missing: make bench-flashtrace"}
        return
    module = ["benchmarks.flashtrace", *job.cases] if flashtrace else ["benchmarks.cases", str(job.tokens), *job.cases]
    python = str(FLASHTRACE) if flashtrace else sys.executable
    pipe = subprocess.PIPE
    errors = Path("out/bench/stderr.txt")
    errors.parent.mkdir(parents=True, exist_ok=True)
    with (
        errors.open("w+") as stderr,
        subprocess.Popen([python, "-m", *module], stdin=pipe, stdout=pipe, stderr=stderr, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        if flashtrace:
            json.dump(flashtrace_request(job.tokens), process.stdin)
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
                missing.remove(result["case"])
                yield result
        code = process.wait()
        stderr.seek(0)
        last = stderr.read().strip().rpartition("\n")[2][-200:]
    for case in missing:
        yield {"case": case, "tokens": job.tokens, "failed": f"exit {code}: {last}"}


def flashtrace_request(num_tokens: int) -> dict[str, Any]:
    """The same tokens and spans as in the other cases, as FlashTrace takes them."""
    from transformers import AutoTokenizer

    from benchmarks.cases import ANSWER, prompt_of
    from benchmarks.text import tokens
    from flowgraph.smollm2 import folder

    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    ids, prompt, target = tokens(tokenizer, num_tokens, prompt_of(num_tokens))
    spans = {"prompt_tokens": prompt_of(num_tokens), "answer_tokens": ANSWER}
    repeat = 2 if num_tokens <= 2048 else 1
    return {"folder": str(folder()), "prompt": prompt, "target": target, "ids": ids, "repeat": repeat} | spans


class Store:
    """The results, kept in a file as they come."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "results": []}
        if path.exists() and not fresh:
            read = json.loads(path.read_text())
            if read.get("format") == FORMAT:
                self.content = read

    def has(self, key: str) -> bool:
        return any(key == key_of(one) for one in self.content["results"])

    def put(self, result: dict[str, Any]) -> None:
        results = [one for one in self.content["results"] if key_of(one) != key_of(result)]
        self.content["results"] = [*results, result]
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def key_of(result: dict[str, Any]) -> str:
    return f"{result['case']}@{result['tokens']}"


def measure_all(store: Store, jobs: list[Job], only: list[str], console: Console) -> None:
    """Run what is missing (or what `only` names) and keep it."""
    from benchmarks.text import source

    todo = []
    for job in jobs:
        wanted = [key for key in job.keys if (any(part in key for part in only) if only else not store.has(key))]
        if wanted:
            todo.append(Job(job.tokens, tuple(key.rpartition("@")[0] for key in wanted)))
    if not todo:
        console.print("everything is measured already; --fresh or --only to do it anew")
        return
    store.content["equality"] = check_equality()
    console.print("equal to the dense float64 computation")
    about = machine()
    store.content |= {"machine": about, "text": source()[0]}
    for number, job in enumerate(todo, 1):
        console.print(
            f"[{number}/{len(todo)}] {job.tokens:,} tokens: {', '.join(job.cases)}", highlight=False, soft_wrap=True
        )
        began = time.perf_counter()
        for result in run_job(job):
            store.put(result | {"commit": about["commit"], "date": about["date"]})
            said = result.get("failed") or f"{result['seconds']:.3g} s"
            if "time_over_forward" in result:
                said += f", {result['time_over_forward']:.2f} of a forward, {result['peak_bytes'] / 1e6:,.0f} MB"
            console.print(f"    {key_of(result)}: {said}", highlight=False, markup=False, soft_wrap=True)
        took = store.content.setdefault("process_seconds", {})
        took[f"{'+'.join(job.cases)}@{job.tokens}"] = time.perf_counter() - began
        store.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--only", nargs="+", default=[], metavar="X", help="only cases whose name contains X, anew")
    parser.add_argument("--tables", action="store_true", help="measure nothing; tables and pictures from the file")
    parser.add_argument("--lengths", type=int, nargs="+", help="other lengths, to try things out (with --out)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    if options.lengths and options.out == RESULTS / "cpu.json":
        parser.error("--lengths is for trying things out: give --out another file")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log of it is up to date
    console = Console()
    store = Store(options.out, options.fresh)
    if not options.tables:
        jobs = plan() if not options.lengths else plan(tuple(options.lengths), ())
        if options.only and not any(part in key for job in jobs for key in job.keys for part in options.only):
            parser.error(f"--only {' '.join(options.only)}: no case has that in its name")
        measure_all(store, jobs, options.only, console)
    if not store.content["results"]:
        parser.error(f"{options.out} holds no results of this form: measure first, without --tables")
    from benchmarks import plots, tables

    if options.out == RESULTS / "cpu.json":
        tables.write_page(store.content)
        plots.draw(store.content)
    print(tables.report(store.content))


if __name__ == "__main__":
    main()
