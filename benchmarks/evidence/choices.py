"""`python -m benchmarks.evidence.choices`: which rows, layers, heads and scores should stand behind credits?

Each candidate changes the default, "flow" (throughput, sinks at the positions that predict the answer, bare attention,
middle third of the layers), in one thing or a few. All are evaluated on one half of the material to choose, and the
choice is reported on the other half:

                        choose                                          report
    known carriers      chains, needles (split "choose")                addition, scratchpad (split "report")
    hiding              GSM8K solutions to even-numbered problems       odd-numbered problems

Hiding: the drop of the answer's log-probability, SmolLM2, when the 20 % of the response with the highest scores are
hidden from all later tokens; tokens that restate the answer can't be picked (the rule of `flowgraph faithful`).

THE RULE, stated before anything was measured. Four numbers per candidate, all on the choose half: average precision on
chains, recall of carriers at hop 2 and beyond on chains, average precision on needles (units scored by their best
token), and the mean drop on GSM8K. Candidates are ranked by each (ties share the mean rank); the winner has the lowest
mean of the four ranks, of equal ones the first in `CANDIDATES`. Candidates without all of these numbers (contrast
"group" needs solutions of the same problem) and `REFERENCES`, which are no candidates, are shown and can't win. Without
the GSM8K file the first three decide. The winner is then compared with "flow" on the report half, paired.

Names put what differs from the default behind a slash:

    flow, reach, mix      throughput, reach, and the geometric mean of their shares
    paper, both           sinks: the answer's tokens; these and the positions that predict them
    value_norm            attention times the norm of what it moves
    first_dropped         nothing attends to the first token
    early, late, all      layers: the first third, the last third, all; else the middle third
    moving                the third of the layers with the most moving mass, see `moving_mass`
    moving_heads          the half of the middle third's heads with the most moving mass
    moving_all            the half of all heads of the model with the most moving mass
    minus, times          contrast with wrong answers, see `contrast`
    group                 a statement counts less the more wrong solutions to the same problem make it too
    layered               the graph of (token, layer), see benchmarks/evidence/layered.py

What is chosen without supervision is chosen on traces of which only the tokens are read (for GSM8K: of even problems).

A wrong answer changes only rows from its first token on. With sinks at the predicting positions the first of them is
the row *before* the answer, which no answer changes, and an answer of one token has no other; so contrasts are for
"paper" and "both".

Logs: benchmarks/results/evidence/choices-<task>.jsonl as in recall.py, and choices-gsm8k.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence import recall
from benchmarks.evidence.layered import LayeredSignal
from benchmarks.evidence.recall import RESULTS, Line, Subject, measure, read_ranking
from benchmarks.evidence.tasks import Problem
from flowgraph.adapters.evidence import traces
from flowgraph.adapters.evidence.hiding import answer_logp, pick
from flowgraph.adapters.evidence.signals import SIGNALS, Place, Reading, Signal, heads_of, mixed, shares
from flowgraph.adapters.evidence.statistics import interval, paired
from flowgraph.adapters.evidence.summary import same_answer
from flowgraph.exact import exact_flow
from flowgraph.rl.baselines import by_layer
from flowgraph.spans import Spans, encode_messages, locate, token_offsets, tokens_of
from flowgraph.sparsify import TopK

DEFAULT = "flow"
SHARE = 0.2
CHOOSE, REPORT = ("chains", "needles"), ("addition", "scratchpad")
RULE = (("chains", "precision"), ("chains", "early"), ("needles", "precision"), ("gsm8k choose", "drop"))
REPORTED = (
    *((task, key) for task in REPORT for key in ("precision", "early")),
    ("gsm8k report", "drop"),
)
WRONG = 2
"""Wrong answers that a contrast takes the mean of."""
UNLABELLED = 8
"""GSM8K solutions, to even problems, for what is chosen without supervision; they are evaluated on no more."""
REFERENCES = ("answer_attention", "recency", "random")

# --- what is chosen without supervision -------------------------------------------------------------------------------

Heads = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Chosen:
    """Layers and heads of a model that a candidate's `where` names."""

    layers: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, Heads]


def moving_mass(readings: Sequence[Reading]) -> dict[tuple[int, int], float]:
    """(layer, head) -> the mean, over all rows of all traces, of the attention that goes to other tokens than the row's
    own and the first: what a head moves, as against what it leaves where it is or parks."""
    sums: dict[tuple[int, int], float] = {}
    rows = sum(len(reading) for reading in readings)
    for reading in readings:
        place = torch.arange(len(reading))
        captured = reading.captured()
        for layer, count in captured.num_heads.items():
            for head in range(count):
                for start, weight in captured.rows(0, place, heads={layer: [head]}).blocks():
                    moved = weight[:, 1:].sum() - weight.diagonal(start)[1 if start == 0 else 0 :].sum()
                    sums[layer, head] = sums.get((layer, head), 0.0) + float(moved)
    return {key: total / rows for key, total in sums.items()}


def choose(mass: Mapping[tuple[int, int], float]) -> Chosen:
    """Thirds of the layers, and the third and the halves with the most mass; ties go to the lower numbers."""
    layers = sorted({layer for layer, _ in mass})
    n = len(layers)
    a, b = n // 3, max(2 * n // 3, n // 3 + 1)
    thirds = {"early": tuple(layers[: max(a, 1)]), "middle": tuple(layers[a:b]), "late": tuple(layers[min(b, n - 1) :])}

    def mean(third: str) -> float:
        return float(np.mean([value for (layer, _), value in mass.items() if layer in thirds[third]]))

    def half(among: Sequence[int]) -> Heads:
        candidates = sorted((key for key in mass if key[0] in among), key=lambda key: (-mass[key], key))
        best = candidates[: math.ceil(len(candidates) / 2)]
        return by_layer(sorted(best))

    moving = thirds[max(("early", "middle", "late"), key=mean)]
    return Chosen(
        layers=thirds | {"all": tuple(layers), "moving": moving},
        heads={"moving_heads": half(thirds["middle"]), "moving_all": half(layers)},
    )


# --- candidates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One trace and what candidates may read beside it.

    Attributes:
        wrong: the trace with wrong answers in place of its own; the same tokens up to the answer.
        shared: [N] the share of wrong solutions to the same problem that make the statement in which a token stands; or
            None.
    """

    reading: Reading
    chosen: Chosen
    wrong: Sequence[Reading] = ()
    shared: Tensor | None = None


@dataclass(frozen=True)
class Candidate:
    """A score [N] of the tokens of a case; fields as in the list of names above."""

    score: str = "flow"
    sinks: str = "flowgraph"
    weights: str = "attention"
    first: str = "kept"
    where: str = "middle"
    contrast: str | None = None

    def name(self) -> str:
        first = f"first_{self.first}"
        parts = (self.sinks, self.weights, first, self.where, self.contrast)
        defaults = ("flowgraph", "attention", "first_kept", "middle", None)
        changed = [str(part) for part, default in zip(parts, defaults, strict=True) if part != default]
        return "/".join([self.score, *changed])

    def __call__(self, case: Case) -> Tensor:
        own = self.bare(case.reading, case.chosen)
        if self.contrast is None:
            return own
        if self.contrast == "group":
            if case.shared is None:
                raise ValueError("contrast 'group' needs a case with shared statements")
            return own * (1 - case.shared)
        if not case.wrong:
            raise ValueError(f"contrast {self.contrast!r} needs a case with wrong answers")
        return contrast(case.reading, own, [self.bare(one, case.chosen) for one in case.wrong], self.contrast)

    def bare(self, reading: Reading, chosen: Chosen) -> Tensor:
        """[N] without contrast."""
        flow, reach = reading.once(replace(self, score="mix", contrast=None), lambda: self._solve(reading, chosen))
        if self.score == "mix":
            mask = reading.place.credit_mask
            return mixed(flow, reach, mask)
        return {"flow": flow, "reach": reach}[self.score]

    def _solve(self, reading: Reading, chosen: Chosen) -> tuple[Tensor, Tensor]:
        if self.sinks == "both":
            sinks = reading.sinks("flowgraph") | reading.sinks("paper")
        else:
            sinks = reading.sinks(self.sinks)
        heads = chosen.heads.get(self.where)
        layers = chosen.layers["all"] if heads is not None else chosen.layers[self.where]
        rows = reading.rows(layers, self.weights, heads, first=self.first)
        found = exact_flow(rows, prompt_mask=reading.place.prompt_mask, answer_mask=sinks, edges=TopK(1))
        return found.throughput.double(), found.reach.double()


def contrast(reading: Reading, own: Tensor, others: Sequence[Tensor], how: str) -> Tensor:
    """What a token's score has to do with this very answer, [N].

        a = the score's share of the sum over the tokens before the answer that may get credit
        b = the mean of a over wrong answers in place of the answer
        minus: max(a - b, 0)            times: a * a / (a + b)

    Args:
        own: [N] scores. others: scores of the same trace with wrong answers, each at least as long as all before it.
    """
    start = int(reading.place.answer_tokens.nonzero()[0])
    mask = reading.place.credit_mask[:start]
    a = shares(own[:start], mask)
    b = torch.stack([shares(other[:start], mask) for other in others]).mean(0)
    kept = (a - b).clamp(min=0) if how == "minus" else a * a / (a + b).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.cat([kept, kept.new_zeros(len(own) - start)])


def _candidates() -> dict[str, Callable[[Case], Tensor]]:
    plain = [Candidate("flow"), Candidate("reach"), Candidate("mix")]
    for score in ("flow", "reach"):
        one = Candidate(score)
        plain += [replace(one, sinks=sinks) for sinks in ("paper", "both")]
        plain += [replace(one, weights="value_norm"), replace(one, first="dropped")]
        plain += [
            replace(one, where=where) for where in ("early", "late", "all", "moving", "moving_heads", "moving_all")
        ]
        plain += [replace(one, sinks="paper", contrast=how) for how in ("minus", "times")]
        plain += [replace(one, contrast="group")]
    # What looks best apart, together.
    plain += [Candidate("mix", weights="value_norm"), Candidate("mix", sinks="both", weights="value_norm")]
    plain += [
        Candidate("reach", weights="value_norm", where="all"),
        Candidate("mix", weights="value_norm", where="all"),
    ]
    layered: dict[str, Signal] = {
        f"{score}/layered{'' if weights == 'attention' else '/' + weights}": LayeredSignal(score, weights=weights)
        for weights in ("attention", "value_norm")
        for score in ("flow", "reach", "rollout")
    }
    named: dict[str, Callable[[Case], Tensor]] = {one.name(): one for one in plain}
    return named | {
        name: _of_reading(signal) for name, signal in (layered | {n: SIGNALS[n] for n in REFERENCES}).items()
    }


def _of_reading(signal: Signal) -> Callable[[Case], Tensor]:
    return lambda case: signal(case.reading)


CANDIDATES: dict[str, Callable[[Case], Tensor]] = _candidates()
"""All that are evaluated, `REFERENCES` last."""

GROUP = [name for name in CANDIDATES if name.endswith("/group")]

# --- known carriers ---------------------------------------------------------------------------------------------------


def wrong_readings(subject: Subject, problem: Problem) -> list[Reading]:
    """The problem with answers of other problems of its task in place of its own."""
    start, stop = problem.answer
    own = problem.tokens[start:stop]
    others: list[list[int]] = []
    for other in subject.unlabelled:
        answer = other.tokens[slice(*other.answer)]
        if len(answer) == len(own) and answer != own and answer not in others:
            others.append(answer)
    if len(others) < WRONG:
        raise ValueError(f"{problem.task}: {len(others)} wrong answers found, {WRONG} needed: calibrate on more traces")
    tokens = [[*problem.tokens[:start], *answer, *problem.tokens[stop:]] for answer in others[:WRONG]]
    return [subject.reading(replace(problem, tokens=one)) for one in tokens]


def task_log(task: str, split: str, problems: int, folder: Path = RESULTS) -> list[Line]:
    """The log of all candidates on a task."""

    @cache
    def known() -> tuple[Subject, Callable[[Problem, Reading], dict[str, Tensor]]]:
        subject = Subject(task)
        return subject, scorer(subject)

    def line_of(number: int) -> Line:
        subject, scores = known()
        return subject.line(split, number, scores)

    path = folder / f"choices-{task}.jsonl"
    return recall.run(path, task_header(task, split), range(problems), line_of, lambda: known()[0].model)


def task_header(task: str, split: str) -> Line:
    """Of a log of all candidates that need no solutions to the same problem."""
    return {"task": task, "split": split, "signals": [name for name in CANDIDATES if name not in GROUP]}


def scorer(subject: Subject) -> Callable[[Problem, Reading], dict[str, Tensor]]:
    """Gives the scores of these candidates for a problem."""
    chosen = choose(moving_mass([subject.reading(problem) for problem in subject.unlabelled]))

    def scores(problem: Problem, reading: Reading) -> dict[str, Tensor]:
        case = Case(reading, chosen, wrong_readings(subject, problem))
        return {name: candidate(case) for name, candidate in CANDIDATES.items() if name not in GROUP}

    return scores


# --- hiding, on GSM8K -------------------------------------------------------------------------------------------------


def groups(source: Path) -> dict[int, list[dict[str, Any]]]:
    """Problem -> its solutions, of problems with a right one and a wrong one whose answer is a number of its own."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["problem"], []).append(row)
    return {
        problem: rows
        for problem, rows in found.items()
        if any(row["correct"] for row in rows) and any(not answer.startswith("-") for answer in wrong_answers(rows))
    }


def wrong_answers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Different answers of the wrong solutions, in their order."""
    stated = [final_answer(row["response"]) for row in rows if not row["correct"]]
    return list(dict.fromkeys(one for one in stated if one is not None and not same_answer(one, rows[0]["answer"])))


def final_answer(response: str) -> str | None:
    """The number that a solution ends in, as it is written."""
    found = re.search(r"A: (-?\d[\d,]*(?:\.\d+)?)\s*$", response)
    return found[1] if found else None


def right_solution(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first right solution that a model wrote, or else the reference."""
    right = [row for row in rows if row["correct"]]
    return next((row for row in right if row["source"] != "reference"), right[0])


_STATEMENT = re.compile(r"<<([^>]*)>>")


def shared_statements(tokenizer: Any, token_ids: Tensor, response_mask: Tensor, wrong: Sequence[str]) -> Tensor:
    """[N] float64: for each token of the response, the share of the wrong solutions that hold the same computation as
    the line in which it stands. A line's computations are its calculator marks (`<<16-3=13>>`), spaces aside; of
    several the least shared counts; a line without any is shared by none."""
    told = [{mark.replace(" ", "") for mark in _STATEMENT.findall(solution)} for solution in wrong]
    text, offsets = token_offsets(tokenizer, token_ids.tolist())
    shared = torch.zeros(len(token_ids), dtype=torch.float64)
    for line in re.finditer(r"[^\n]+", text):
        marks = [mark.replace(" ", "") for mark in _STATEMENT.findall(line[0])]
        if marks:
            share = min(float(np.mean([mark in one for one in told])) for mark in marks)
            shared[slice(*tokens_of(offsets, *line.span()))] = share
    return shared * response_mask


class Solutions:
    """SmolLM2 and the cases that are made of GSM8K solutions."""

    def __init__(self, model: Any, tokenizer: Any, by_problem: Mapping[int, list[dict[str, Any]]]) -> None:
        self.model, self.tokenizer, self.by_problem = model, tokenizer, by_problem
        picked = problems_of(by_problem, 0, UNLABELLED)
        unlabelled = [self.encoded(right_solution(by_problem[problem])) for problem in picked]
        self.heads = heads_of(model, unlabelled)
        self.chosen = choose(moving_mass([self.reading(ids, spans) for ids, spans in unlabelled]))

    def encoded(self, row: dict[str, Any]) -> tuple[Tensor, Spans]:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["response"]}]
        encoded = encode_messages(self.tokenizer, messages)
        spans = locate(encoded.token_ids, encoded.prompt_mask, encoded.response_mask, tokenizer=self.tokenizer)
        stated = final_answer(row["response"])
        if stated is None or spans.answer_text is None or not same_answer(spans.answer_text, stated):
            raise ValueError(f"problem {row['problem']}: found the answer {spans.answer_text!r}, it states {stated!r}")
        return encoded.token_ids, spans

    def reading(self, ids: Tensor, spans: Spans) -> Reading:
        return Reading(self.model, ids, Place.of(spans), heads=self.heads)

    def case(self, problem: int) -> tuple[Case, Spans]:
        """The right solution's case, and where things stand in it."""
        rows = self.by_problem[problem]
        right = right_solution(rows)
        ids, spans = self.encoded(right)
        answer = str(final_answer(right["response"]))
        start = int(spans.answer_tokens.nonzero()[0])
        wrong: list[Reading] = []
        for other in wrong_answers(rows):
            if len(wrong) == WRONG:
                break
            text = right["response"].rstrip()[: -len(answer)] + other
            other_ids, other_spans = self.encoded(right | {"response": text})
            # A sign may be one token with the blank before it: then the tokens before the answer are others.
            if torch.equal(other_ids[:start], ids[:start]):
                wrong.append(self.reading(other_ids, other_spans))
        if not wrong:
            raise ValueError(f"problem {problem}: with every wrong answer the tokens before it are others")
        told = [row["response"] for row in rows if not row["correct"]]
        shared = shared_statements(self.tokenizer, ids, spans.response_mask, told)
        return Case(self.reading(ids, spans), self.chosen, wrong, shared), spans

    def line(self, problem: int, names: Sequence[str]) -> Line:
        """Drops of the answer's log-probability, in nats."""
        case, spans = self.case(problem)
        ids, tokens = case.reading.token_ids, spans.answer_tokens
        mask = traces.choices(self.tokenizer, ids, spans)["exclude"]
        hidden = torch.stack([torch.zeros_like(mask), *(pick(CANDIDATES[name](case), mask, SHARE) for name in names)])
        logp = answer_logp(self.model, ids, hidden, tokens)
        drops = {name: round(float(logp[0] - one), 4) for name, one in zip(names, logp[1:], strict=True)}
        about = {"task": "gsm8k", "problem": problem, "tokens": len(ids), "may be hidden": int(mask.sum())}
        return about | {"logp": round(float(logp[0]), 4), "drop": drops}


def problems_of(by_problem: Iterable[int], parity: int, count: int) -> list[int]:
    """Some problems of a parity, in an order that a fixed seed gives."""
    numbers = sorted(problem for problem in by_problem if problem % 2 == parity)
    Random(0).shuffle(numbers)
    return numbers[:count]


def gsm8k_log(source: Path, count: int, folder: Path = RESULTS) -> list[Line]:
    """The log of all candidates on so many even and so many odd problems."""
    by_problem = groups(source)
    names = list(CANDIDATES)

    @cache
    def solutions() -> Solutions:
        from flowgraph.smollm2 import load

        return Solutions(*load(), by_problem)

    header = {
        "task": "gsm8k",
        "split": "even problems to choose, odd ones to report",
        "signals": names,
        "unlabelled": problems_of(
            by_problem, 0, UNLABELLED
        ),  # lines whose heads were chosen on others don't belong here
    }
    numbers = [
        *problems_of(by_problem, 0, UNLABELLED + count)[UNLABELLED:],
        *problems_of(by_problem, 1, count),
    ]
    path = folder / "choices-gsm8k.jsonl"
    return recall.run(path, header, numbers, lambda number: solutions().line(number, names), lambda: solutions().model)


# --- summary ----------------------------------------------------------------------------------------------------------

Columns = dict[tuple[str, str], dict[str, list[float]]]
"""(task, measure) -> candidate -> one value per problem, in the same order for all."""


def columns(lines: Iterable[Line]) -> Columns:
    """Values by problem out of log lines of any tasks, in any order."""
    ordered = sorted(lines, key=lambda line: (line["task"], line.get("problem", -1)))
    names = {line["task"]: line["signals"] for line in ordered if "signals" in line}
    out: Columns = {}
    for line in ordered:
        if "signals" in line:
            continue
        task, measured = line["task"], {}
        if task == "gsm8k":
            task = "gsm8k report" if line["problem"] % 2 else "gsm8k choose"
            measured = {name: {"drop": drop} for name, drop in line["drop"].items()}
        elif line["verified"]:
            words = line["max"].split()
            for name, word in zip(names[task], words, strict=True):
                measured[name] = measure(read_ranking(word), line["carriers"], line["hops"])
        for name, values in measured.items():
            for key, value in values.items():
                out.setdefault((task, key), {}).setdefault(name, []).append(value)
    return out


def summarise(lines: Iterable[Line]) -> dict[str, Any]:
    """The choice and the report, from the lines of all logs.

    Returns:
        {"rule": the numbers that decided, "winner": name, "candidates": name -> {"choose", "report", "difference":
        {"<task> <measure>": {"mean", "low", "high"}}, "ranks": .., "mean rank": None where it can't win},
        "traces": how many problems stand behind each number}. "difference" is to `DEFAULT`, paired, on the report half.

    Raises:
        ValueError: no number of the rule can be had from the lines.
    """
    table = columns(lines)
    rule = [key for key in RULE if key in table]
    if not rule:
        raise ValueError(f"lines hold none of the numbers that decide: {', '.join(map(' '.join, RULE))}")
    known = list(dict.fromkeys(name for by_name in table.values() for name in by_name))
    known.sort(key=lambda name: list(CANDIDATES).index(name))
    able = [name for name in known if name not in REFERENCES and all(name in table[key] for key in rule)]
    ranks = {key: _ranks({name: float(np.mean(table[key][name])) for name in able}) for key in rule}
    mean_rank = {name: float(np.mean([ranks[key][name] for key in rule])) for name in able}
    out: dict[str, Any] = {}
    for name in known:

        def cells(keys: Iterable[tuple[str, str]], name: str = name) -> dict[str, Any]:
            return {" ".join(key): _cell(table[key][name]) for key in keys if name in table.get(key, {})}

        out[name] = {
            "choose": cells(RULE),
            "report": cells(REPORTED),
            "difference": {
                " ".join(key): _cell(table[key][name], table[key][DEFAULT])
                for key in REPORTED
                if name != DEFAULT and name in table.get(key, {}) and DEFAULT in table[key]
            },
            "ranks": {" ".join(key): ranks[key][name] for key in rule if name in able},
            "mean rank": mean_rank.get(name),
        }
    return {
        "rule": [" ".join(key) for key in rule],
        "winner": min(able, key=lambda name: mean_rank[name]),
        "candidates": out,
        "traces": {" ".join(key): max(map(len, table[key].values())) for key in (*RULE, *REPORTED) if key in table},
    }


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the highest; equal ones share the mean of their ranks."""
    return {
        name: 1 + sum(other > own for other in values.values()) + (list(values.values()).count(own) - 1) / 2
        for name, own in values.items()
    }


def _cell(values: Sequence[float], minus: Sequence[float] | None = None) -> dict[str, float | None]:
    made = interval(values) if minus is None else paired(values, minus)
    return {name: recall.four_digits(x) for name, x in asdict(made).items()}


def show(summary: dict[str, Any]) -> Iterable[str]:
    """A table of lines for the eye."""
    keys = [*summary["rule"], *(" ".join(key) for key in REPORTED if " ".join(key) in summary["traces"])]
    yield f"{'':30}{'mean rank':>10}" + "".join(f"{key:>24}" for key in keys)
    for name, one in summary["candidates"].items():
        cells = [(one["choose"] | one["report"]).get(key) for key in keys]
        shown = ["" if x is None else f"{x['mean']:.2f} [{x['low'] or 0:.2f} {x['high'] or 0:.2f}]" for x in cells]
        rank = "" if one["mean rank"] is None else f"{one['mean rank']:.1f}"
        yield f"{name:30}{rank:>10}" + "".join(f"{text:>24}" for text in shown)
    winner = summary["winner"]
    yield f"winner: {winner}; on the report half, minus {DEFAULT}:"
    for key, x in summary["candidates"][winner]["difference"].items():
        yield f"  {key}: {x['mean']:.3f} [{x['low'] or 0:.3f} {x['high'] or 0:.3f}]"


# --- the command ------------------------------------------------------------------------------------------------------


def solutions_file() -> Path:
    folder = os.environ.get("FLOWGRAPH_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(folder) / "gsm8k_solutions.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--problems", type=int, default=200, help="of each task, its levels in turn")
    parser.add_argument("--traces", type=int, default=30, help="GSM8K solutions of each half")
    parser.add_argument(
        "--gsm8k", type=Path, default=solutions_file(), help="solutions, as benchmarks.study takes them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the logs")
    options = parser.parse_args()
    lines: list[Line] = []
    for split, tasks in (("choose", CHOOSE), ("report", REPORT)):
        for task in tasks:
            lines += task_log(task, split, options.problems, options.out)
    if options.gsm8k.is_file():
        lines += gsm8k_log(options.gsm8k, options.traces, options.out)
    else:
        print(f"no hiding on GSM8K: {options.gsm8k} is missing (--gsm8k); the other numbers decide")
    print(*show(summarise(lines)), sep="\n")


if __name__ == "__main__":
    main()
