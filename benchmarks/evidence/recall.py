"""`python -m benchmarks.evidence.recall`: does a signal find the tokens that are known to carry the answer?

A problem of a task (benchmarks/evidence/tasks.py) has units, ranges of tokens such as statements or steps, and some of
them are carriers. Every signal scores the tokens of the trace; tokens are summed up to units in two ways that are
reported apart, the best token ("max") and the mean token ("mean"); units are ranked; and of k carriers

    recall       the share that is among the k best units (all of them, and those of each hop apart)
    precision    average precision: the mean over carriers of the share of carriers among all units up to this one

Ties are no luck: both are the expectation over all orders of tied units, so a signal that says nothing gets what chance
gets, which is worked out exactly in the same way. Only problems count that the decoder solves and whose carriers hiding
confirms (construction and intervention agree); the shares are reported. Differences to "flow" are paired by problem.

Signals that are defined by response tokens alone (windowed_distance) can only do as chance does where the units are in
the prompt; read them on scratchpad.

Problems for choosing (split "choose") and for reporting ("report") come from different seeds. Choices
(benchmarks/evidence/choices.py) are made on chains and needles; all four tasks are reported.

Log: benchmarks/results/evidence/recall-<task>.jsonl (split "choose": recall-<task>-choose.jsonl). First a line with the
names of the signals, the model's fingerprint, machine and commit, then one line per problem; a run that was stopped
goes on from there, with the same model. A ranking is a word with one character per unit, in base 36: how many units
have a higher score ("0110": the first and the last unit tie at the top). Rankings stand in the order of the names.
`summarise` turns lines into numbers and does nothing else.

Shapes: N tokens of a trace, U units, k carriers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.evidence.decoders import load_decoder
from benchmarks.evidence.tasks import EVERY, TASKS, Problem
from benchmarks.evidence.verify import Tried, tried
from flowgraph.adapters.evidence.signals import SIGNALS, Place, Reading, heads_of, random_twin, scores_of
from flowgraph.adapters.evidence.statistics import Interval, interval, paired
from flowgraph.adapters.evidence.summary import grid, number

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
SPLITS = ("choose", "report", "calibrate")
AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {"max": Tensor.max, "mean": Tensor.mean}
CALIBRATED_ON = 16
"""Traces of split "calibrate", whose carriers nobody looks at: for what a signal has to know about a model."""
RESAMPLES = 2000
_TRIED_TOGETHER = 25
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

Line = dict[str, Any]

# --- ranks and what they are worth ------------------------------------------------------------------------------------


def unit_scores(scores: Tensor, units: Sequence[tuple[int, int]], how: str) -> Tensor:
    """[U] the score of each unit: of its best token ("max") or of its mean token ("mean"). scores: [N]."""
    return torch.stack([AGGREGATIONS[how](scores[start:stop]) for start, stop in units])


def ranking(scores: Tensor) -> list[int]:
    """For each of U units how many have a higher score: 0 for the best, the same number for equal scores."""
    return (scores[None] > scores[:, None]).sum(1).tolist()


def found(ranks: Sequence[int], carriers: Sequence[int]) -> list[float]:
    """For each of the k carriers the chance to be among the k best units, tied units in any order: 0, 1 or between."""
    k = len(carriers)
    ties = [ranks.count(ranks[carrier]) for carrier in carriers]
    return [min(1.0, max(0, k - ranks[carrier]) / tied) for carrier, tied in zip(carriers, ties, strict=True)]


def precision(ranks: Sequence[int], carriers: Sequence[int]) -> float:
    """Average precision, expected over all orders of tied units (McSherry & Najork 2008).

    Of a group of n tied units behind `above` others, r are carriers. One of them stands at the j-th place of the group
    with chance r / n, and then (j - 1) (r - 1) / (n - 1) carriers of the group are expected before it.
    """
    total = before = 0.0
    for above in sorted(set(ranks)):
        n = ranks.count(above)
        r = sum(ranks[carrier] == above for carrier in carriers)
        for j in range(1, n + 1):
            within = (j - 1) * (r - 1) / (n - 1) if n > 1 else 0.0
            total += r / n * (before + within + 1) / (above + j)
        before += r
    return total / len(carriers)


def measure(ranks: Sequence[int], carriers: Sequence[int], hops: Sequence[int]) -> dict[str, float]:
    """ "recall" and "precision", and the recall of some carriers, where there are any: "early" (hop 2 and up), "hop 1",
    "hop 2", .."""
    hits = found(ranks, carriers)
    some = {"early": [hit for hit, hop in zip(hits, hops, strict=True) if hop >= 2]}
    some |= {f"hop {h}": [hit for hit, hop in zip(hits, hops, strict=True) if hop == h] for h in sorted(set(hops))}
    by_hop = {name: float(np.mean(part)) for name, part in some.items() if part}
    return {"recall": float(np.mean(hits)), "precision": precision(ranks, carriers), **by_hop}


def write_ranking(ranks: Sequence[int]) -> str:
    """One character per unit."""
    if len(ranks) > len(DIGITS):
        raise ValueError(f"a problem has {len(ranks)} units, and the log holds at most {len(DIGITS)}: make it smaller")
    return "".join(DIGITS[rank] for rank in ranks)


def read_ranking(word: str) -> list[int]:
    return [DIGITS.index(character) for character in word]


# --- problems as readings ---------------------------------------------------------------------------------------------


def problem_of(task: str, split: str, number: int) -> Problem:
    """Problem `number` of a split. The levels take turns; the seed is of the task, the split and the number."""
    levels = EVERY[task].levels
    return EVERY[task].sample(Random(f"{task} {split} {number}"), levels[number % len(levels)])


def place_of(problem: Problem) -> Place:
    """Credit may go to the units where these are in the prompt, else to all of the response before the answer."""
    position = torch.arange(len(problem.tokens))
    prompt = position < problem.prompt
    start, stop = problem.answer
    answer = (position >= start) & (position < stop)
    if all(stop <= problem.prompt for _, stop in problem.units):
        credit = torch.zeros_like(prompt)
        for begin, end in problem.units:
            credit[begin:end] = True
    else:
        credit = ~prompt & (position < start)
    return Place(prompt_mask=prompt, response_mask=~prompt, answer_tokens=answer, credit_mask=credit)


class Subject:
    """The decoder of a task, and what has to be known of it once."""

    def __init__(self, task: str, model: Any = None) -> None:
        self.task, self.model = task, load_decoder(task) if model is None else model
        self.other = random_twin(self.model, seed=0)
        self.unlabelled = [problem_of(task, "calibrate", number) for number in range(CALIBRATED_ON)]
        traces = [(torch.tensor(one.tokens), place_of(one).spans()) for one in self.unlabelled]
        self.heads = heads_of(self.model, traces)
        self._tried: dict[tuple[str, int], Tried] = {}

    def reading(self, problem: Problem) -> Reading:
        ids = torch.tensor(problem.tokens)
        return Reading(self.model, ids, place_of(problem), heads=self.heads, other=self.other)

    def tried(self, split: str, number: int) -> Tried:
        """What the decoder makes of the problem; some are tried together, which takes a fraction of the time."""
        if (split, number) not in self._tried:
            numbers = range(number, number + _TRIED_TOGETHER)
            several = tried(self.model, [problem_of(self.task, split, one) for one in numbers])
            self._tried = {(split, one): found for one, found in zip(numbers, several, strict=True)}
        return self._tried[split, number]

    def line(self, split: str, number: int, score: Callable[[Problem, Reading], dict[str, Tensor]]) -> Line:
        """The log line of a problem; rankings only if the problem counts."""
        tested = self.tried(split, number)
        problem = tested.problem
        line: Line = {"task": self.task, "split": split, "problem": number, "level": problem.level}
        line |= {"solved": tested.right, "verified": tested.agrees}
        if tested.agrees:
            scores = score(problem, self.reading(problem))
            line |= {"units": len(problem.units), "carriers": problem.carriers, "hops": problem.hops}
            for how in AGGREGATIONS:
                words = [write_ranking(ranking(unit_scores(one, problem.units, how))) for one in scores.values()]
                line[how] = " ".join(words)
        return line


# --- the log ----------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[Line]:
    """The whole lines of a log; none if there is no file. A last line without an end was cut off and is taken away."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, line: Line) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


ABOUT = ("model", "machine", "commit")
"""What a header says beside what its lines are of. Logs of the first versions don't say it: they can be read, and no
line can be added."""


def fingerprint(model: Any) -> str:
    """12 hex digits of all weights of a model."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def about() -> Line:
    """When, on what and by which code."""
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    asked = [["git", "rev-parse", "--short", "HEAD"], status] if shutil.which("git") else [["true"]] * 2
    here, cpus = Path(__file__).parent, Path("/proc/cpuinfo")
    known = cpus.read_text().splitlines() if cpus.is_file() else []
    said = [subprocess.run(one, cwd=here, capture_output=True, text=True).stdout.strip() for one in asked]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": (said[0] or "unknown") + ("-dirty" if said[1] else ""),
        "cpu": next(
            (line.split(":")[1].strip() for line in known if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def begin(path: Path, header: Line, numbers: Iterable[int], model: Callable[[], Any] | None) -> list[int]:
    """Writes the header of a new log; the numbers of which the log has no line.

    Args:
        model: gives what makes the lines; not called if there is none to make. None: the header says nothing of it.

    Raises:
        ValueError: the log has another header, or its lines are of another model.
    """
    lines = read_log(path)
    known = {key: value for key, value in lines[0].items() if key not in ABOUT} if lines else None
    if known is not None and known != json.loads(json.dumps(header)):
        raise ValueError(f"{path} was made with other signals or another split: delete it, or write elsewhere (--out)")
    done = {line["problem"] for line in lines[1:]}
    left = [number for number in numbers if number not in done]
    if not left:
        return []
    found = None if model is None else fingerprint(model())
    if known is None:
        machine = about()
        more = {"model": found, "commit": machine.pop("commit"), "machine": machine}
        append(path, header | (more if found else {}))
    elif found != (before := lines[0].get("model")):
        raise ValueError(
            f"{path} holds lines of the model {before or '(it does not say which)'}, and this one is {found}: they "
            "don't belong into one table. Delete it, or write elsewhere (--out)"
        )
    return left


def run(
    path: Path,
    header: Line,
    numbers: Iterable[int],
    line_of: Callable[[int], Line],
    model: Callable[[], Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[Line]:
    """Writes the header and the lines that the log lacks; all its lines.

    Raises: as `begin`.
    """
    began = time.perf_counter()
    for count, problem in enumerate(begin(path, header, numbers, model), 1):
        append(path, line_of(problem))
        if count % 50 == 0:
            say(f"{path.stem}: {count} problems, {(time.perf_counter() - began) / count:.2f} s each")
    return read_log(path)


# --- summary ----------------------------------------------------------------------------------------------------------


def summarise(lines: Iterable[Line], *, against: str = "flow") -> dict[str, Any]:
    """Means over problems with their intervals, from the lines of one split, of any tasks, in any order.

    Returns:
        task -> {"split", "problems", "solved" (a share), "verified" (a share of the solved), "counted",
                 "chance": measures, "chance by level": level -> measures,
                 "signals": name -> {"max" | "mean": measures | {"levels": level -> measures, "difference": measures}}}
        where measures are those of `measure`; of signals as {"mean", "low", "high"}, and
        "difference" is the signal's minus that of `against` (left out where there is none of that name).

    Raises:
        ValueError: two splits of a task, a problem twice, or lines without the header that names the signals.
    """
    names: dict[str, Line] = {}
    problems: dict[str, dict[int, Line]] = {}
    for line in lines:
        task = line["task"]
        if "signals" in line:
            if names.setdefault(task, line) != line:
                raise ValueError(f"{task}: two logs with other signals or splits; summarise them one by one")
            continue
        if line["problem"] in problems.setdefault(task, {}):
            raise ValueError(f"{task}: problem {line['problem']} stands in the log twice")
        problems[task][line["problem"]] = line
    if missing := sorted(problems.keys() - names.keys()):
        raise ValueError(f"no header line for {', '.join(missing)}: it names the signals")
    out = {}
    for task, of_task in sorted(problems.items()):
        ordered = [of_task[number] for number in sorted(of_task)]
        if {line["split"] for line in ordered} != {names[task]["split"]}:
            raise ValueError(f"{task}: lines of another split than that of the header, {names[task]['split']!r}")
        out[task] = _of_task(ordered, names[task], against)
    return out


def _of_task(lines: list[Line], header: Line, against: str) -> dict[str, Any]:
    counted = [line for line in lines if line["verified"]]
    solved = sum(line["solved"] for line in lines)
    out: dict[str, Any] = {
        "split": header["split"],
        "problems": len(lines),
        "solved": solved / len(lines),
        "verified": len(counted) / solved if solved else None,
        "counted": len(counted),
    }
    if not counted:
        return out
    levels = sorted({line["level"] for line in counted})
    chance = [measure([0] * line["units"], line["carriers"], line["hops"]) for line in counted]
    out["chance"] = _means(chance)
    out["chance by level"] = {
        str(level): _means([one for one, line in zip(chance, counted, strict=True) if line["level"] == level])
        for level in levels
    }
    signals: dict[str, Any] = {name: {} for name in header["signals"]}
    for how in AGGREGATIONS:
        words = [line[how].split() for line in counted]
        measured = {
            name: [
                measure(read_ranking(word[place]), line["carriers"], line["hops"])
                for word, line in zip(words, counted, strict=True)
            ]
            for place, name in enumerate(header["signals"])
        }
        for name, values in measured.items():
            signals[name][how] = _intervals(values)
            signals[name][how]["levels"] = {
                str(level): _intervals(
                    [one for one, line in zip(values, counted, strict=True) if line["level"] == level]
                )
                for level in levels
            }
            if against in measured and name != against:
                signals[name][how]["difference"] = _intervals(values, measured[against])
    return out | {"signals": signals}


def _keys(values: list[dict[str, float]]) -> list[str]:
    known = {key for one in values for key in one}
    return [key for key in dict.fromkeys(("recall", "precision", "early", *sorted(known))) if key in known]


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in values if key in one])) for key in _keys(values)}


def _intervals(values: list[dict[str, float]], minus: list[dict[str, float]] | None = None) -> dict[str, Any]:
    """Of each measure, over the problems that have it."""

    def of(key: str) -> Interval:
        mine = [one[key] for one in values if key in one]
        if minus is None:
            return interval(mine, resamples=RESAMPLES)
        return paired(mine, [one[key] for one in minus if key in one], resamples=RESAMPLES)

    return {key: {name: four_digits(x) for name, x in asdict(of(key)).items()} for key in _keys(values)}


def four_digits(x: float) -> float | None:
    """Rounded to them; None for NaN, which JSON lacks (the interval of a single problem)."""
    return None if np.isnan(x) else round(float(x), 4)


def show(summary: dict[str, Any], how: str) -> Iterator[str]:
    """A table of lines for the eye."""
    for task, one in summary.items():
        yield (
            f"{task} ({one['split']}, {how} token): {one['problems']} problems, solved {one['solved']:.0%}, "
            f"of these verified {one['verified'] or 0:.0%}, {one['counted']} count"
        )
        if "signals" not in one:
            continue
        keys = list(one["chance"])
        yield f"  {'':34}" + "".join(f"{key:>20}" for key in keys)
        yield f"  {'chance':34}" + "".join(f"{one['chance'][key]:>20.2f}" for key in keys)
        for name, values in one["signals"].items():
            cells = [values[how][key] for key in keys]
            shown = [f"{x['mean']:.2f} [{x['low'] or 0:.2f} {x['high'] or 0:.2f}]" for x in cells]
            yield f"  {name:34}" + "".join(f"{text:>20}" for text in shown)


def word(difference: Mapping[str, Any] | None) -> str:
    """What an interval of a difference says, where more is better."""
    if difference is None or difference["low"] is None:
        return ""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "no difference"


def carriers_table(one: Mapping[str, Any]) -> str:
    """What signals find in one task, of `recall.summarise`."""
    verified = "" if one["verified"] is None else f", of these {one['verified']:.0%} agree with intervention"
    counted = f"{one['problems']} problems, of which the decoder solves {one['solved']:.0%}{verified}: {one['counted']}"
    if "signals" not in one:
        return f"{counted} count."
    hops = [key for key in one["chance"] if key.startswith("hop ")]
    keys = ["precision", "recall", *(hops if len(hops) > 1 else [])]
    rows = []
    ordered = sorted(one["signals"].items(), key=lambda item: -item[1]["max"]["precision"]["mean"])
    for name, by in ordered:
        best, difference = by["max"], by["max"].get("difference", {}).get("precision")
        cells = [number(best["precision"]), number(difference, "+.2f"), word(difference)]
        cells += [number(best["recall"]), *(f"{best[hop]['mean']:.2f}" for hop in keys[2:])]
        rows.append([f"`{name}`", *cells, f"{by['mean']['precision']['mean']:.2f}"])
    chance = {key: f"{value:.2f}" for key, value in one["chance"].items()}
    rows.append(["*chance*", chance["precision"], "", "", chance["recall"], *(chance[hop] for hop in keys[2:]), ""])
    heads = ("signal", "average precision", "- flow", "against flow", "recall", *keys[2:], "precision, mean token")
    return f"{counted} count.\n\n{grid(heads, rows)}"


# --- the command ------------------------------------------------------------------------------------------------------


def default_signals() -> list[str]:
    """All but those that a decoder of this size can't tell apart (sparse: such traces are kept whole) or can't run."""
    return [name for name in SIGNALS if name != "flashtrace" and "sparse" not in name]


def recall(task: str, split: str, problems: int, names: Sequence[str], folder: Path = RESULTS) -> list[Line]:
    """The log of a task, with at least so many problems."""
    suffix = "" if split == "report" else f"-{split}"
    subject = cache(Subject)  # the decoder is only needed if a line is

    def line_of(number: int) -> Line:
        return subject(task).line(split, number, lambda _, reading: scores_of(reading, names))

    header = {"task": task, "split": split, "signals": list(names)}
    path = folder / f"recall-{task}{suffix}.jsonl"
    return run(path, header, range(problems), line_of, lambda: subject(task).model)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--problems", type=int, default=200, help="of each task, its levels in turn")
    parser.add_argument("--split", choices=SPLITS[:2], default="report")
    parser.add_argument("--signals", nargs="+", choices=list(SIGNALS), metavar="NAME", default=default_signals())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the logs")
    options = parser.parse_args()
    for task in options.tasks:
        lines = recall(task, options.split, options.problems, options.signals, options.out)
        summary = summarise(lines)
        for how in AGGREGATIONS:
            print(*show(summary, how), sep="\n")


if __name__ == "__main__":
    main()
