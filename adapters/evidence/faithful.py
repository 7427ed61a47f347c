"""The job of `flowgraph faithful`: token scores compared by what hiding the chosen tokens does to the answer.

    rows -> tokens, spans -> Reading -> scores of every signal -> hidden sets -> answer_logp, regenerate, curves
         -> DIR/traces.jsonl, a line per row -> summarise (summary.py) -> DIR/faithful.json, .md, .png

All signals are judged alike: the same tokens may be chosen (`choices`), the same number of them is hidden, ties go the
same way, and all hidden sets of a trace are judged in one call. A line is synced before the next row begins, and the
same command goes on after a stop. A row that can't be used becomes a line with the reason.

Left out: which tokens may be chosen (traces.py), what a signal reads (signals.py), how tokens are hidden (hiding.py),
and what the lines say together (summary.py).

Shapes: N tokens of one trace, M hidden sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from flowgraph import __version__
from flowgraph.adapters import shards
from flowgraph.adapters.evidence import plots
from flowgraph.adapters.evidence.hiding import answer_logp, curves, end_ids, pick, regenerate
from flowgraph.adapters.evidence.signals import (
    SIGNALS,
    Place,
    Reading,
    Signal,
    heads_of,
    random_twin,
    scores_of,
)
from flowgraph.adapters.evidence.summary import FLOW, RUN, TRACES, markdown, read_lines, summarise
from flowgraph.adapters.evidence.traces import Case, Found, Rows, prepare, short, written_answer
from flowgraph.adapters.evidence.workers import judging
from flowgraph.answers import FINDERS, Finder
from flowgraph.rl.baselines import HeadGroups, Predictions
from flowgraph.tracer import Tracer

SCHEMA = "flowgraph-faithful/1"
"""Of run.json and traces.jsonl."""

RESULT, PAGE, PICTURE = "faithful.json", "faithful.md", "faithful.png"
SHARES, ENDS, RESTATED = (0.05, 0.1, 0.2, 0.4), ("top", "bottom"), ("exclude", "include")

ALWAYS = (FLOW, "random", "random/1", "random/2")
"""What all others are compared with."""

DEFAULT = (
    *("flow", "flow/paper", "flow/value_norm", "flow/sparse"),
    *("reach", "reach/paper", "reach/value_norm", "reach/sparse", "mix"),
    *("answer_attention", "answer_attention/paper", "rollout", "routes", "gradient_input"),
    *("entropy", "future_attention", "windowed_distance", "recency", "random", "random/1", "random/2"),
    *("flow/positions", "flow/shuffled", "flow/random_model"),
    *("reach/positions", "reach/shuffled", "reach/random_model"),
)  # fmt: skip
"""Signals, if none are named: every kind of them, and the controls of flow and reach."""

CALIBRATION = 8
"""Traces on which the local and global heads are found, once for a whole run."""

_MORE_TOKENS = 8
"""Tokens that a regenerated answer may have more than the stated one."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class FaithfulConfig:
    """What a run compares.

    Attributes:
        signals: names of signals.SIGNALS, or "all". Flow, random, and what a control is made from are always there.
        shares: of the tokens that may be chosen, how many are hidden. ends: "top", "bottom".
        restated: "exclude": tokens that restate the answer are left out of the choice; "include"; or "both" tables.
        regenerate, curves: how many traces have greedy regeneration, and deletion and insertion curves: the first ones.
        limit: stop after so many traces that can be used. None: all. A larger one goes on with an earlier run.
        carriers: field of a row with the character ranges [[start, stop], ...] of the response that are known to carry
            the answer; None: nothing is known.
        answer, max_tokens: as in `Options`.
        chat: a prompt in text form is a chat message; None: if there is a template.
        seed: of the bootstrap and of the model with random weights.
    """

    signals: Sequence[str] | str = DEFAULT
    shares: Sequence[float] = (0.2,)
    ends: Sequence[str] = ("top",)
    restated: str = "exclude"
    regenerate: int = 20
    curves: int = 20
    limit: int | None = None
    carriers: str | None = None
    answer: Finder = "auto"
    chat: bool | None = None
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("shares", SHARES), ("ends", ENDS)):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given) or any(value not in allowed for value in given):
                raise ValueError(f"{name} must be different ones of {', '.join(map(str, allowed))}, got {given!r}")
        if self.restated not in (*RESTATED, "both"):
            raise ValueError(f'restated must be "exclude", "include" or "both", got {self.restated!r}')
        for name in ("regenerate", "curves", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        self.names()

    def names(self) -> list[str]:
        """Every signal of the run, in the order of `SIGNALS`."""
        if isinstance(self.signals, str):
            if self.signals != "all":
                raise ValueError(f'signals must be names or "all", got the text {self.signals!r}')
            asked = set(SIGNALS) - {"flashtrace"}
        else:
            asked = set(self.signals)
        if unknown := sorted(asked - set(SIGNALS)):
            raise ValueError(f"signals: there is no {unknown[0]!r}; there are {', '.join(SIGNALS)}, or all")
        asked |= {*ALWAYS, *controls_of(asked).values()}
        return [name for name in SIGNALS if name in asked]

    def kinds(self) -> tuple[str, ...]:
        """What becomes of restatements, in each of the tables."""
        return RESTATED if self.restated == "both" else (self.restated,)


def controls_of(names: Iterable[str]) -> dict[str, str]:
    """The controls among some signals, and of which signal each one is."""
    found = {}
    for name in names:
        signal: Any = SIGNALS[name]
        if getattr(signal, "control", None) is not None:
            found[name] = replace(signal, control=None).name()
    return found


# ------------------------------------------------------------------------- the job


def faithful(
    model: nn.Module,
    tokenizer: Any,
    rows: str | Path | Sequence[Mapping[str, Any]],
    out: str | Path,
    config: FaithfulConfig | None = None,
    *,
    name: str | None = None,
    flashtrace: Signal | None = None,
    plot: bool | None = None,
    workers: int = 1,
    advance: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compare token scores of a model on some traces; go on where an earlier run in `out` has stopped.

    Args:
        rows: a file of JSON lines or Parquet, or rows as `flowgraph score` reads them; `answer` of a row is the right
            answer (default: what the response states).
        out: a folder, new or of an earlier run with the same settings.
        name: of the model, for the tables. flashtrace: the signal of that name.
        plot: draw out/faithful.png. None: if matplotlib is there.
        workers: processes that judge traces, each trace whole; 1: this one. They share out its threads. The lines are
            the same, in the same order, and a run may go on with another number. More than one start this program's
            main module anew, so scripts need `if __name__ == "__main__":`.
        advance: called with every line, those of an earlier run included.

    Returns:
        What `summarise(out)` gives, and out/faithful.json holds.

    Raises:
        ValueError: `out` is of a run with other settings, no row can be used, or an option is wrong.
        RuntimeError: a worker died.
    """
    config, folder = config or FaithfulConfig(), Path(out)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if plot:
        plots.check()
    source = Rows.of(rows, config.carriers)
    judge = _Judge(model, tokenizer, config, flashtrace)
    folder.mkdir(parents=True, exist_ok=True)
    with shards.locked(folder):
        header = _begin(folder, judge, source, name or _name_of(model))
        judge.heads = None if header["heads"] is None else HeadGroups.from_dict(header["heads"])
        _remove_unfinished(folder)
        _go_on(folder, judge, source, workers, advance or (lambda line: None))
        summary = summarise(folder)
        _write(folder / RESULT, json.dumps(summary, allow_nan=False, indent=1) + "\n")
        _write(folder / PAGE, markdown(summary))
        if plot or (plot is None and plots.possible()):
            plots.draw(summary, folder / PICTURE)
    return summary


def _go_on(
    folder: Path, judge: _Judge, source: Rows, workers: int, advance: Callable[[Mapping[str, Any]], None]
) -> None:
    """A line for every row that has none yet, up to the limit."""
    done = {_key(line): line for line in read_lines(folder)}
    with (
        (folder / TRACES).open("a", encoding="utf-8", newline="\n") as file,
        closing(_lines(judge, source, workers, done)) as lines,  # ends the workers, whatever happens
    ):
        for line in lines:
            if _key(line) not in done:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            advance(line)


def _lines(
    judge: _Judge, source: Rows, workers: int, done: Mapping[tuple[Any, ...], dict[str, Any]]
) -> Generator[dict[str, Any], None, None]:
    """The lines of all rows in their order, up to the limit; several rows are being judged at a time.

    What is done for a trace depends on how many before it could be used, which isn't known yet while these are being
    judged. It is taken for granted that they can, and a line for which that made a difference is judged again.
    """
    limit, used = judge.config.limit, 0
    records = source.records()
    asked: deque[tuple[dict[str, Any], Found | ValueError, int, Future[dict[str, Any]] | None]] = deque()
    with judging(judge, workers) as ask:
        while True:
            while len(asked) < (1 if workers == 1 else 2 * workers):
                number = used + len(asked)
                if number == limit or (record := next(records, None)) is None:
                    break
                where, found = record
                nothing_to_judge = isinstance(found, ValueError) or _key(where) in done
                asked.append((where, found, number, None if nothing_to_judge else ask(found, number)))
            if not asked:
                return
            where, found, number, future = asked.popleft()
            if _key(where) in done:
                line = done[_key(where)]
            elif future is None or isinstance(found, ValueError):
                line = where | judge.line(found, used)
            else:
                if judge.parts(number) != judge.parts(used):
                    future = ask(found, used)
                line = where | future.result()
            used += "reason" not in line
            yield line


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["file"], line["line"], line["choice"]


def _remove_unfinished(folder: Path) -> None:
    """The line that was being written when the job was killed."""
    path = folder / TRACES
    if path.is_file():
        raw = path.read_bytes()
        os.truncate(path, raw.rfind(b"\n") + 1)


def _write(path: Path, text: str) -> None:
    with shards.whole(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------- what a run is of


def _begin(folder: Path, judge: _Judge, source: Rows, name: str) -> dict[str, Any]:
    """run.json, written or read: the settings of a run never change."""
    config = judge.config
    settings: dict[str, Any] = {
        "model": name,
        "signals": judge.names,
        "controls": controls_of(judge.names),
        **{key: getattr(config, key) for key in ("shares", "ends", "restated", "regenerate", "curves", "carriers")},
        "answer": config.answer if isinstance(config.answer, str) else str(config.answer),
        **{"chat": judge.chat, "max_tokens": config.max_tokens, "seed": config.seed},
    }
    header = {
        "schema": SCHEMA,
        "settings": settings,
        "input": source.fingerprint,
        "weights": _weights_of(judge.tracer.model),
        "versions": {"flowgraph": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
    }
    header = json.loads(json.dumps(header))
    path = folder / RUN
    if not path.is_file():
        if other := sorted(one.name for one in folder.iterdir() if one.name != shards.LOCK):
            raise ValueError(f"out: {folder} is a folder of something else, it holds {', '.join(other[:3])}")
        header |= {"heads": judge.calibrated(source)}
        _write(path, json.dumps(header, indent=1) + "\n")
        return header
    before = json.loads(path.read_text(encoding="utf-8"))
    old, new = _flat(before), _flat(header)
    changes = [
        f"{name}: {short(old.get(name))} there, {short(new.get(name))} here"
        for name in dict.fromkeys((*old, *new))
        if not name.startswith("heads") and old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(f"out: {folder} holds a run of something else ({'; '.join(changes)}); give another folder")
    return before


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _name_of(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _weights_of(model: nn.Module) -> str:
    """A hash of the names, shapes, types and first numbers of all weights: tells models apart in no time."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------- one trace


class _Alone(Reading):
    """A reading that shares with another the model's passes, and what signals ask for `once`.

    Attributes:
        saved: seconds that it was spared because another signal had asked for the same.
    """

    def __init__(self, base: Reading, heads: HeadGroups | None, shared: dict[Hashable, tuple[Any, float]]) -> None:
        how = {"heads": heads, "other": base.other, "flashtrace": base.flashtrace}
        super().__init__(base.model, base.token_ids, base.place, **how)  # type: ignore[arg-type]
        self._base, self._shared, self.saved = base, shared, 0.0

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        if key in self._shared:
            found, seconds = self._shared[key]
            self.saved += seconds
        else:
            begun = time.perf_counter()
            found = compute()
            self._shared[key] = found, time.perf_counter() - begun
        return found

    def captured(self, *, of_other: bool = False) -> Any:
        return self._base.captured(of_other=of_other)

    def predictions(self) -> Predictions:
        return self._base.predictions()


class _Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 4)


class _Judge:
    """One model, and what is the same for all traces."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: FaithfulConfig, flashtrace: Signal | None) -> None:
        self.config, self.names, self.flashtrace = config, config.names(), flashtrace
        if flashtrace is not None and "flashtrace" not in self.names:
            self.names.append("flashtrace")
        if "flashtrace" in self.names and flashtrace is None:
            raise ValueError(
                "signals: flashtrace is a package of its own: call flowgraph.adapters.evidence.faithful.faithful with "
                "flashtrace=, a function from a Reading to the scores of its tokens"
            )
        self.tracer = Tracer(model, tokenizer, answer=config.answer, max_tokens=config.max_tokens)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = has_template if config.chat is None else config.chat
        self.heads: HeadGroups | None = None
        by_random = [name for name in self.names if getattr(SIGNALS[name], "control", None) == "random_model"]
        self.other = random_twin(model, config.seed) if by_random else None
        self.reads_heads = {"future_attention", "windowed_distance"} & set(self.names)
        self.reads_predictions = {"entropy", "gradient_norm"} & set(self.names)
        end = getattr(tokenizer, "eos_token_id", None)
        self.stop_ids = {*end_ids(model), *([] if end is None else [end])}

    @property
    def models(self) -> list[nn.Module]:
        """The model, and the untrained one of a control."""
        return [self.tracer.model] + ([] if self.other is None else [self.other])

    def calibrated(self, source: Rows) -> dict[str, Any] | None:
        """The local and global heads, found on the first traces."""
        if not self.reads_heads:
            return None
        traces: list[Case] = []
        for _, found in source.records():
            if len(traces) == CALIBRATION:
                break
            try:
                traces.append(self.prepared(found))
            except ValueError:  # its line will say why
                continue
        if not traces:
            return None
        return heads_of(self.tracer.model, [(trace.token_ids, trace.spans) for trace in traces]).to_dict()

    def prepared(self, found: Found | ValueError) -> Case:
        return prepare(self.tracer, found, self.chat, self.config.kinds(), self.config.carriers)

    def line(self, found: Found | ValueError, number: int) -> dict[str, Any]:
        """What a row comes to; `number` counts the traces that could be used before it."""
        try:
            trace = self.prepared(found)
            return self.judged(trace, number)
        except ValueError as error:
            return {"reason": " ".join(str(error).split())}

    def parts(self, number: int) -> tuple[bool, bool]:
        """Does a trace before which so many could be used have regeneration, and curves?"""
        return number < self.config.regenerate, number < self.config.curves

    def judged(self, trace: Case, number: int) -> dict[str, Any]:
        clock, each = _Clock(), _Clock()
        model, ids, answer = self.tracer.model, trace.token_ids, trace.spans.answer_tokens
        place = Place.of(trace.spans)
        reading = Reading(model, ids, place, heads=self.heads, other=self.other, flashtrace=self.flashtrace)
        with clock("passes"):
            reading.captured()
            if self.other is not None:
                reading.captured(of_other=True)
            if self.reads_predictions:
                reading.predictions()
        scores: dict[str, Tensor] = {}
        shared: dict[Hashable, tuple[Any, float]] = {}
        with clock("signals"):
            for name in self.names:
                alone = _Alone(reading, self.heads, shared)
                with each(name):
                    scores |= scores_of(alone, [name])
                each.seconds[name] = round(each.seconds[name] + alone.saved, 4)  # what it takes by itself
        tables, hidden = self.tables(trace, scores)
        with clock("log_probability"):
            logp = answer_logp(model, ids, hidden, answer)
        if not logp.isfinite().all():
            raise ValueError("the answer's log-probability is not finite")
        line: dict[str, Any] = {
            "tokens": len(ids),
            "prompt_tokens": int(trace.spans.prompt_mask.sum()),
            "answer": trace.spans.answer_text,
            "logp": float(logp[0]),
        }
        for table in tables:
            picked = table["picked"]
            table["drop"] = {name: float(logp[0] - logp[variant]) for name, variant in picked.items()}
        regenerates, draws_curves = self.parts(number)
        if regenerates:
            with clock("regeneration"):
                texts = self.regenerated(trace, hidden)
            line["regenerated"] = {"answer": texts[0], "right": trace.right}
            for table in tables:
                table["answers"] = {name: texts[variant] for name, variant in table["picked"].items()}
        if trace.carriers is not None:
            line["carriers"] = {
                kind: {name: average_precision(one, trace.carriers, mask) for name, one in scores.items()}
                for kind, mask in trace.choices.items()
                if (mask & trace.carriers).any()
            }
        line["tables"] = [{key: value for key, value in table.items() if key != "picked"} for table in tables]
        if draws_curves:
            # A curve costs as much as twenty tables: none of the controls, which the tables have judged.
            real = {name: one for name, one in scores.items() if name not in controls_of(self.names)}
            with clock("curves"):
                line["curves"] = {
                    kind: _rounded(curves(model, ids, real, mask, answer)) for kind, mask in trace.choices.items()
                }
        line["seconds"] = {"steps": clock.seconds, "signals": each.seconds}
        return line

    def tables(self, trace: Case, scores: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], Tensor]:
        """Which signal hides what in which table; and the hidden sets [M, N], the first of them empty."""
        found = [torch.zeros_like(trace.spans.answer_tokens)]
        tables: list[dict[str, Any]] = []
        for kind, mask in trace.choices.items():
            for share in self.config.shares:
                for end in self.config.ends:
                    picks = {name: pick(one, mask, share, end) for name, one in scores.items()}
                    table: dict[str, Any] = {"restated": kind, "share": share, "end": end}
                    table |= {"hidden": int(picks[FLOW].sum()), "of": int(mask.sum())}
                    table["picked"] = dict(zip(picks, range(len(found), len(found) + len(picks)), strict=True))
                    found += picks.values()
                    if trace.carriers is not None and (known := mask & trace.carriers).any():
                        total = int(known.sum())
                        table["recall"] = {name: int((one & known).sum()) / total for name, one in picks.items()}
                    tables.append(table)
        return tables, torch.stack(found)

    def regenerated(self, trace: Case, hidden: Tensor) -> list[str]:
        """The answer that is written from the cut on, for every hidden set."""
        tokenizer, cut = self.tracer.tokenizer, trace.cut
        length = int(trace.spans.answer_tokens.sum()) + _MORE_TOKENS
        new = regenerate(
            self.tracer.model, trace.token_ids, hidden, cut, new_tokens=length, stop_ids=sorted(self.stop_ids)
        )
        response = trace.spans.response_mask.clone()
        response[cut:] = False
        ids = trace.token_ids[response].tolist()

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        before = decode(ids)
        finder = trace.spans.finder if trace.spans.finder in FINDERS else self.config.answer
        texts = []
        for continuation in new:
            written = continuation.tolist()
            end = next((k for k, i in enumerate(written) if i in self.stop_ids), len(written))
            text = decode(ids + written[:end])
            # Half a character at the end of one may become a whole one in the other.
            start = len(before) if text.startswith(before) else len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
            texts.append(written_answer(text[:start], text[start:], finder))
        return texts


def average_precision(scores: Tensor, carriers: Tensor, mask: Tensor) -> float:
    """Mean over the carriers in the mask of the share of carriers among the tokens ranked as high; ties as `pick`."""
    order = scores[mask].sort(descending=True, stable=True).indices
    hits = carriers[mask][order].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def _rounded(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """To six digits, for files."""

    def six(value: Any) -> Any:
        return [round(float(one), 6) for one in value] if isinstance(value, Sequence) else round(float(value), 6)

    return {name: {key: six(value) for key, value in one.items()} for name, one in found.items()}
