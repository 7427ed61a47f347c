"""`python -m benchmarks.evidence.gpu`: the evidence on larger models, for one GPU, in runs of minutes that go on.

    train      larger decoders for the tasks, and for longer tasks (tasks.LONG)
    verify     their carriers by intervention (verify.py)
    recall     signals against known carriers (recall.py)
    choices    variants of flow and reach (choices.py)
    faithful   `flowgraph faithful` with the model folders that are given (--model, --traces)
    rl         GRPO with larger policies (benchmarks/rl_gain.py)

Nothing needs a network. A run does what fits into --minutes and says what is left; the same command goes on. Every unit
of work is logged when it is done, with seconds, machine and commit, and never done twice: trainings go on from a
checkpoint, logs from their last line. What can't go on, a run of GRPO, is begun only if runs before it would fit. A
unit that fails is said, tried again by the next run, and in nobody's way.

    OUT/units.jsonl                         what is done, and what it took
    OUT/recall-*.jsonl, choices-*.jsonl, rl-*.jsonl, faithful-*/           logs as the scripts above write them
    OUT/table.md                            all of them as tables
    OUT/state/                              decoders and checkpoints, not for version control

Decoders are kept in bfloat16, half the size, and what is measured is measured with these weights. If OUT/state is lost,
they are trained anew, and logs that were not complete are refused: they are of other weights. Several decoders are
trained at a time, since each leaves the GPU waiting for commands; for the same reason small models, once trained, run
on the CPU, in as many processes as there are cores. Policies of GRPO are kept where `flowgraph.smollm2` keeps them
($FLOWGRAPH_CACHE).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.evidence import choices, gsm8k, recall
from benchmarks.evidence.decoders import RECIPES, Recipe, Training, accuracy
from benchmarks.evidence.recall import Line, about, append, read_log
from benchmarks.evidence.tasks import EVERY, LONG, TASKS, Task
from benchmarks.evidence.verify import rates, tried
from flowgraph.adapters.evidence import summary
from flowgraph.adapters.evidence.faithful import FaithfulConfig, faithful
from flowgraph.adapters.evidence.signals import scores_of

RESULTS = Path(__file__).parents[1] / "results" / "evidence-gpu"
UNITS, TABLE, STATE = "units.jsonl", "table.md", "state"
KINDS = ("train", "verify", "recall", "choices", "faithful", "rl")
AT_LEAST = 15.0
"""Seconds without which nothing is begun, even if it can go on later."""
UNSEEN = 30.0
"""Seconds that a unit is taken to need if none of its kind is done, and it can't go on later."""
AT_A_TIME = 4
"""Decoders that are trained at a time, if there are as many processes."""
GRACE = 60.0
"""Seconds after the end in which they write their checkpoints."""
TOGETHER = 25
"""Problems that a process does at a time: as many as are tried together."""

T = TypeVar("T")


class OutOfTime(Exception):
    """The rest is for the next run."""


# --- what there is to do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        decoders: name -> (task, recipe). every: steps between checkpoints. counted: problems per level behind an
            accuracy. problems, candidates: per decoder, of recall and of choices. signals: of recall and faithful.
        traces: per model. policy: what the recipes of the policies of GRPO have otherwise. rl: settings of its runs.
    """

    decoders: Mapping[str, tuple[str, Recipe]]
    every: int
    counted: int
    problems: int
    candidates: int
    signals: Sequence[str] | str
    traces: int
    policy: Mapping[str, Any]
    rl: Mapping[str, Any]
    rl_tasks: Sequence[str]
    arms: Sequence[str]
    seeds: int


def _larger() -> dict[str, tuple[str, Recipe]]:
    shape: dict[str, Any] = {"layers": 6, "width": 256, "heads": 8, "batch": 64, "rate": 3e-3}
    same = {f"{task}-larger": (task, replace(RECIPES[task], **shape)) for task in TASKS}
    easier = {
        "chains-long": ((1, 300), (2, 450), (3, 450), (4, 400)),
        "needles-long": ((1, 300), (2, 400), (3, 500)),
        "addition-long": ((1, 400), (2, 400)),
        "scratchpad-long": ((3, 900),),
    }
    longer = {
        task: (task, replace(RECIPES[task.removesuffix("-long")], **shape, steps=3000, stages=easier[task]))
        for task in LONG
    }
    return same | longer


SIZES = {
    "full": Size(
        decoders=_larger(), every=250, counted=1000, problems=200, candidates=100, signals="all", traces=100,
        policy={"layers": 6, "width": 192, "heads": 6}, rl={}, rl_tasks=("scratchpad", "countdown"),
        arms=("uniform", "random", "entropy", "answer_attention", "reach", "flow", "reach/paper", "flow/paper"),
        seeds=4,
    ),
    "tiny": Size(
        decoders={
            "needles-larger": ("needles", Recipe(layers=1, width=16, heads=2, steps=12, batch=4, questions=2)),
            "needles-long": ("needles-long", Recipe(layers=1, width=16, heads=2, steps=8, batch=4, questions=2)),
        },
        every=5, counted=4, problems=3, candidates=2, signals=("flow", "reach", "recency"), traces=2,
        policy={"layers": 1, "width": 16, "heads": 2, "steps": 4, "careful": 2, "batch": 4},
        rl={"steps": 1, "every": 1, "prompts": 2, "group": 2, "held_out": 4}, rl_tasks=("countdown",),
        arms=("uniform", "flow"), seeds=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of minutes."""

    out: Path
    size: Size
    device: str
    ends: float
    """By time.monotonic()."""
    processes: int
    models: Sequence[Path] = ()
    traces: Path | None = None
    dtype: torch.dtype = torch.float32

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raises OutOfTime if less is left than what is needed."""
        if self.left() <= needed:
            raise OutOfTime

    def decoder(self, name: str) -> Path:
        return self.out / STATE / name


@dataclass(frozen=True)
class Unit:
    """Work that is logged as one.

    Attributes:
        work: does it, or what is left of it; gives what there is to log. Raises OutOfTime if it can go on later.
        goes_on: can it? Then it is begun in any time.
        after: units that come first.
    """

    kind: str
    of: str
    work: Callable[[], Line]
    goes_on: bool = True
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.of}"


def units_of(run: Run) -> list[Unit]:
    """All units, in their order."""
    size, units = run.size, []
    for name, (task, recipe) in size.decoders.items():
        units.append(Unit("train", name, partial(_train, run, name, EVERY[task], recipe)))
    for name, (task, _) in size.decoders.items():
        trained = (f"train {name}",)
        units.append(Unit("verify", name, partial(_verify, run, name, task), goes_on=False, after=trained))
        units.append(Unit("recall", name, partial(_recall, run, name, task), after=trained))
        units.append(Unit("choices", name, partial(_choices, run, name, task), after=trained))
    for folder in run.models:
        units.append(Unit("faithful", folder.resolve().name, partial(_faithful, run, folder)))
    for task in size.rl_tasks:
        units.append(Unit("rl", task, partial(_rl, run, task)))
    return units


# --- the queue --------------------------------------------------------------------------------------------------------


def go_on(run: Run, say: Callable[[str], None] = print, kinds: Sequence[str] = KINDS) -> list[str]:
    """Do what fits into the time; the names of units that failed."""
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / STATE).mkdir(exist_ok=True)
    (run.out / STATE / ".gitignore").write_text("*\n")
    try:
        return _go_on(run, say, kinds)
    finally:
        end_processes()


def _go_on(run: Run, say: Callable[[str], None], kinds: Sequence[str]) -> list[str]:
    path = run.out / UNITS
    failed = _trained_together(run, say) if run.processes > 1 and "train" in kinds else []
    for unit in units_of(run):
        if unit.kind not in kinds:
            continue
        lines = read_log(path)
        done = {line["unit"] for line in lines if line["done"]}
        if unit.name in (*done, *failed) or not done.issuperset(unit.after):
            continue
        needed = AT_LEAST if unit.goes_on else 1.2 * (estimate(lines, unit.kind) or UNSEEN)
        if run.left() < needed:
            continue  # a later one may be shorter
        began, found, over = time.monotonic(), {}, False
        try:
            found = unit.work()
        except OutOfTime:
            over = True
        except Exception as error:
            traceback.print_exc()
            failed.append(unit.name)
            say(f"{unit.name}: FAILED, {error}")
            continue
        _note(run, unit.kind, unit.of, not over, time.monotonic() - began, found, say)
    return failed


def _note(run: Run, kind: str, of: str, done: bool, seconds: float, found: Line, say: Callable[[str], None]) -> None:
    name, seconds = f"{kind} {of}", round(seconds, 1)
    append(run.out / UNITS, {"unit": name, "kind": kind, "done": done, "seconds": seconds, **about(), **found})
    say(f"{name}: {'done' if done else 'goes on next time'}, {seconds} s")


def estimate(lines: Sequence[Line], kind: str) -> float | None:
    """Mean seconds of the units of a kind that are done, all runs of each taken together; None: there are none."""
    taken: dict[str, float] = {}
    for line in lines:
        if line["kind"] == kind:
            taken[line["unit"]] = taken.get(line["unit"], 0.0) + line["seconds"]
    whole = [taken[line["unit"]] for line in lines if line["kind"] == kind and line["done"]]
    return statistics.fmean(whole) if whole else None


def left_over(run: Run) -> list[str]:
    """A line for every unit that isn't done: what was spent on it, and what it may need."""
    lines = read_log(run.out / UNITS)
    done = {line["unit"] for line in lines if line["done"]}
    said = []
    for unit in units_of(run):
        if unit.name not in done:
            spent = sum(line["seconds"] for line in lines if line["unit"] == unit.name)
            guess = estimate(lines, unit.kind)
            more = "nobody knows" if guess is None else f"about {max(guess - spent, 0):.0f} s more"
            said.append(f"{unit.name}: {spent:.0f} s spent, {more}")
    return said


def spread(
    work: Callable[[T], Any], jobs: Iterable[T], processes: int, run: Run, needed: Callable[[], float] = lambda: 0.0
) -> Iterator[tuple[T, Any]]:
    """(job, its result) of each, as they come, from so many processes; one process or one job: from this one.

    None is begun with less time left than is needed, and when time is over nobody waits for those at work. Processes
    stay for the next call: `end_processes` ends them.

    Raises:
        OutOfTime: jobs are left.
        RuntimeError: a process died.
    """
    waiting = list(jobs)[::-1]
    if processes == 1 or len(waiting) == 1:
        while waiting:
            run.check(needed())
            job = waiting.pop()
            yield job, work(job)
        return
    at_work: dict[Future[Any], T] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < processes and run.left() > needed():
                job = waiting.pop()
                at_work[_processes(run.processes).submit(work, job)] = job
            if not at_work:
                raise OutOfTime
            ready, _ = wait(at_work, timeout=max(run.left(), 0), return_when=FIRST_COMPLETED)
            if not ready:
                raise OutOfTime
            for future in ready:
                yield at_work.pop(future), future.result()
    except BrokenProcessPool as error:
        end_processes()
        raise RuntimeError("a process died; is there too little memory for so many (--processes)?") from error


_pool: list[ProcessPoolExecutor] = []
"""None, or the one of this run: processes start in seconds, not in no time."""


def _processes(count: int) -> ProcessPoolExecutor:
    if not _pool:
        _pool.append(ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_process))
    return _pool[0]


def _begin_process() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def end_processes() -> None:
    """And what they are at."""
    while _pool:
        pool = _pool.pop()
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


# --- decoders ---------------------------------------------------------------------------------------------------------


def _train(run: Run, name: str, task: Task, recipe: Recipe) -> Line:
    folder = run.decoder(name)
    checkpoint = folder / "checkpoint.pt"
    with torch.device(run.device):  # all tensors of training are made there
        training = Training(task, recipe)
        if checkpoint.is_file():
            training.load(checkpoint)
        loss = math.nan
        while training.step < recipe.steps:
            loss = training.advance()
            over = run.left() <= 0
            if training.step % run.size.every == 0 or over:
                print(f"{name}  step {training.step}  loss {loss:.3f}", flush=True)
                training.save(checkpoint)
            if over and training.step < recipe.steps:
                raise OutOfTime
        model: Any = training.model
        model.to(torch.bfloat16).float().eval()
        found = accuracy(task, model, run.size.counted)
    model.to(torch.bfloat16).save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    weights = recall.fingerprint(_decoder(folder))
    return {"model": weights, "parameters": model.num_parameters(), "loss": round(loss, 4), "accuracy": found}


def _trained_together(run: Run, say: Callable[[str], None]) -> list[str]:
    """Train what is not trained, some at a time; the names of units that failed."""
    done = {line["unit"] for line in read_log(run.out / UNITS) if line["done"]}
    names = [name for name in run.size.decoders if f"train {name}" not in done]
    failed = []
    if len(names) > 1 and run.left() > AT_LEAST:
        later = replace(run, ends=run.ends + GRACE)
        needed = GRACE + AT_LEAST
        try:
            found = spread(partial(_train_apart, run), names, min(run.processes, AT_A_TIME), later, lambda: needed)
            for name, (whole, seconds, one) in found:
                if "error" in one:
                    failed.append(f"train {name}")
                    say(f"train {name}: FAILED, {one['error']}")
                else:
                    _note(run, "train", name, whole, seconds, one, say)
        except OutOfTime:
            pass  # the queue says what is left
    return failed


def _train_apart(run: Run, name: str) -> tuple[bool, float, Line]:
    """In a process of its own: is it trained, seconds, what there is to log."""
    began = time.monotonic()
    task, recipe = run.size.decoders[name]
    try:
        found, whole = _train(run, name, EVERY[task], recipe), True
    except OutOfTime:
        found, whole = {}, False
    except Exception as error:
        traceback.print_exc()
        found, whole = {"error": f"{type(error).__name__}: {error}"}, False
    return whole, time.monotonic() - began, found


def _decoder(folder: Path) -> LlamaForCausalLM:
    """On the CPU, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _known(run: Run, name: str) -> Path:
    """The folder of a decoder, trained anew if it is lost."""
    folder = run.decoder(name)
    if not (folder / "config.json").is_file():
        task, recipe = run.size.decoders[name]
        _train(run, name, EVERY[task], recipe)
    return folder


def _verify(run: Run, name: str, task: str) -> Line:
    folder, some = _known(run, name), EVERY[task]
    problems = [
        some.sample(Random(f"verify {task} {level} {n}"), level)
        for level in some.levels
        for n in range(min(40, run.size.counted))
    ]
    with torch.device(run.device):
        found = rates(tried(_decoder(folder).to(run.device), problems))  # type: ignore[arg-type]
    return {"rates": {what: round(rate, 4) for what, rate in found.items()}}


# --- known carriers ---------------------------------------------------------------------------------------------------

Problems = tuple[str, str, str, str, tuple[int, ...]]
"""What is done with them ("recall" or "choices"), the folder of the decoder, task, split, and their numbers."""


def _recall(run: Run, name: str, task: str) -> Line:
    names = recall.default_signals() if run.size.signals == "all" else list(run.size.signals)
    header = {"task": task, "split": "report", "signals": names}
    return _logged(run, "recall", name, header, run.size.problems)


def _choices(run: Run, name: str, task: str) -> Line:
    split = "choose" if task.removesuffix("-long") in choices.CHOOSE else "report"
    return _logged(run, "choices", name, choices.task_header(task, split), run.size.candidates)


def _logged(run: Run, kind: str, name: str, header: Line, problems: int) -> Line:
    folder, path = _known(run, name), run.out / f"{kind}-{name}.jsonl"
    missing = recall.begin(path, header, range(problems), lambda: _decoder(folder))
    lots: dict[int, list[int]] = {}
    for number in missing:
        lots.setdefault(number // TOGETHER, []).append(number)
    jobs = [(kind, str(folder), header["task"], header["split"], tuple(lot)) for lot in lots.values()]
    for _, lines in spread(partial(_lines, tuple(header["signals"])), jobs, run.processes, run):
        for line in lines:
            append(path, line)
    return {"problems": problems}


@cache
def _subject(folder: str, task: str) -> tuple[recall.Subject, Any]:
    """Of a process; and the scores of candidates."""
    subject = recall.Subject(task, _decoder(Path(folder)))
    return subject, cache(lambda: choices.scorer(subject))


def _lines(names: Sequence[str], job: Problems) -> list[Line]:
    kind, folder, task, split, numbers = job
    subject, scorer = _subject(folder, task)
    score = scorer() if kind == "choices" else lambda _, reading: scores_of(reading, names)
    return [subject.line(split, number, score) for number in numbers]


# --- hiding -----------------------------------------------------------------------------------------------------------


def _faithful(run: Run, folder: Path) -> Line:
    if run.traces is None:
        raise ValueError("--model needs --traces: a file with a question, a response and an answer in each row")
    first = json.loads(run.traces.read_text(encoding="utf-8").split("\n", 1)[0])
    rows: Any = gsm8k.rows_of(run.traces) if {"problem", "source"} <= first.keys() else run.traces
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    signals: dict[str, Any] = {} if run.size.signals == "all" else {"signals": run.size.signals}
    config = FaithfulConfig(limit=run.size.traces, regenerate=0, curves=0, **signals)
    name = folder.resolve().name
    before, longest = time.monotonic(), 0.0

    def heard(line: Mapping[str, Any]) -> None:
        nonlocal before, longest
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
        run.check(longest)

    out = run.out / f"faithful-{name}"
    found = faithful(model.to(run.device).eval(), tokenizer, rows, out, config, name=name, plot=False, advance=heard)
    return {"traces": found["traces"], "weights": found["run"]["weights"]}


# --- RL ---------------------------------------------------------------------------------------------------------------


def _rl(run: Run, task: str) -> Line:
    from benchmarks import rl_gain, rl_tasks

    own = rl_tasks.TASKS[task]
    settings = rl_gain.Settings(**run.size.rl, imitation=replace(own.recipe, **run.size.policy)).of(own)
    with torch.device(run.device):  # a policy is trained there if the cache lacks it
        _, policy = rl_tasks.load_policy(own, 0, settings.imitation)
    path = run.out / f"rl-{task}.jsonl"
    lines = read_log(path)
    if others := {(line["settings"], line["policy"]) for line in lines} - {(settings.key, policy)}:
        raise ValueError(f"{path} holds runs of other settings or of another policy than {policy}: {sorted(others)}")
    done = {(line["arm"], line["seed"]) for line in lines}
    jobs = [(arm, seed) for seed in range(run.size.seeds) for arm in run.size.arms if (arm, seed) not in done]
    taken = [line["wall_seconds"] for line in lines]

    def needed() -> float:
        return 1.2 * max(taken) if taken else min(UNSEEN, AT_LEAST * run.size.rl.get("steps", 60))

    for _, line in spread(partial(_rl_run, task, settings), jobs, run.processes, run, needed):
        taken.append(line["wall_seconds"])
        append(path, line | {key: value for key, value in about().items() if key in ("commit", "cpu", "date")})
    return {"policy": policy, "settings": settings.key, "runs": len(run.size.arms) * run.size.seeds}


def _rl_run(task: str, settings: Any, job: tuple[str, int]) -> Line:
    from benchmarks import rl_gain, rl_tasks

    began = time.monotonic()
    line = rl_gain.train(rl_tasks.TASKS[task], *job, settings)
    return line | {"wall_seconds": round(time.monotonic() - began, 1)}


# --- tables -----------------------------------------------------------------------------------------------------------


def table(out: Path) -> str:
    """All logs of a folder as one page."""
    parts = ["# Evidence on larger models"]
    done = [line for line in read_log(out / UNITS) if line["done"]]
    rows = [(line["unit"], f"{line['seconds']:.0f}", line["gpu"] or line["cpu"], line["commit"]) for line in done]
    parts.append(summary.grid(("unit", "seconds of its last run", "machine", "commit"), rows))
    for line in done:
        if line["kind"] == "train":
            levels = ", ".join(f"level {level} {rate:.1%}" for level, rate in line["accuracy"].items())
            parts.append(f"`{line['unit']}`: {line['parameters']:,} parameters; right answers: {levels}.")
        if line["kind"] == "verify":
            said = ", ".join(f"{what} {rate:.1%}" for what, rate in line["rates"].items())
            parts.append(f"`{line['unit']}`: {said}.")
    for path in sorted(out.glob("recall-*.jsonl")):
        (found,) = recall.summarise(read_log(path)).values()
        parts += [f"## {path.stem}", recall.carriers_table(found)]
    for group in ("larger", "long"):
        lines = [
            line | {"task": line["task"].removesuffix("-long")}
            for path in sorted(out.glob(f"choices-*-{group}.jsonl"))
            for line in read_log(path)
        ]
        if any(line.get("verified") for line in lines):
            parts += [f"## choices, {group}", "```\n" + "\n".join(choices.show(choices.summarise(lines))) + "\n```"]
    for path in sorted(out.glob("faithful-*")):
        if any("reason" not in line for line in summary.read_lines(path)):
            found = summary.summarise(path)
            parts.append(f"## {path.name}")
            for one in found["tables"]:
                parts += [f"{summary.title(one)}.", summary.table_text(one, found["seconds"]["signals"])]
    for path in sorted(out.glob("rl-*.jsonl")):
        from benchmarks import rl_gain

        parts += [f"## {path.stem}", rl_gain.arms_table(rl_gain.summarise(read_log(path)))]
    return "\n\n".join(parts) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="begin and go on with nothing after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders of models, for faithful")
    parser.add_argument("--traces", type=Path, help="JSON lines with question, response, answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of these models")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="for small models")
    parser.add_argument("--stages", nargs="+", choices=KINDS, default=KINDS, help="default: all, in this order")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * options.minutes
    transformers.utils.logging.disable_progress_bar()
    size = SIZES[options.size]
    run = Run(
        options.out, size, options.device, ends, options.processes, options.model, options.traces,
        getattr(torch, options.dtype),
    )  # fmt: skip
    failed = go_on(run, partial(print, flush=True), options.stages)
    text = table(run.out)
    (run.out / TABLE).write_text(text, encoding="utf-8")
    print(text)
    left = left_over(run)
    print(*(left or ["Nothing is left."]), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
