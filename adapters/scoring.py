"""The job of `flowgraph score`: shards of rows to rows of credits, in one process; engines.py has more of them.

    Job -> Worker: read and tokenise the next shard (in a thread) | trace this one -> its rows in order -> written

Within a shard rows of similar length are traced together, up to a number of tokens with their pads. What can't be
traced together is tried in halves and then alone: a row that can't be traced at all is set aside with the reason, and
no other row with it. Rows are those of a trace by itself, up to what the model's own forward pass does with pads (about
1e-6 in float32); `reproducible` traces each by itself, in one thread, and the files are the same to the byte.

Shapes: N tokens of one row, B rows of a batch, T their length with pads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowgraph import __version__
from flowgraph.adapters.inputs import Shard, Source, read, unchanged
from flowgraph.adapters.records import Record, ScoreFile, records_of
from flowgraph.adapters.shards import Attempt, Later, Manifest, finished, schema, write_shard
from flowgraph.certificate import certify
from flowgraph.interface import window_of
from flowgraph.measures import MEASURES, measures, rows
from flowgraph.rl.scorer import chunks
from flowgraph.spans import conversation, encode_messages, encode_text, question_of_messages
from flowgraph.trace import Trace
from flowgraph.tracer import Tracer


@dataclass(frozen=True)
class Model:
    """How a worker gets its tracer: `load(given)` is (tracer, is a prompt in text form a chat message?)."""

    load: Callable[[Mapping[str, Any]], tuple[Tracer, bool]]
    given: dict[str, Any]

    def __call__(self, device: str | None = None) -> tuple[Tracer, bool]:
        return self.load(self.given | {"quiet": True} | ({} if device is None else {"device": device}))


@dataclass(frozen=True)
class Limits:
    """What a job may take; none of it changes a row by more than rounding.

    Attributes:
        batch_tokens: tokens, pads included, of one forward pass. A longer row goes alone.
        max_row_bytes: larger rows are set aside before they are parsed.
        io_timeout: seconds in which a shard must be read and tokenised, and in which it must be written.
    """

    batch_tokens: int = 4096
    max_row_bytes: int = 1 << 24
    io_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_row_bytes", "io_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs; it travels to other processes and machines.

    Attributes:
        sources: by name. manifest: the plan. out: the folder of shards.
        measures, graphs: further columns, and the graphs themselves.
        reproducible: one row per forward pass, in one thread, by deterministic algorithms.
        overwrite: begin anew, whatever is in the folder.
    """

    sources: dict[str, Source]
    manifest: Manifest
    out: Path
    model: Model
    limits: Limits = field(default_factory=Limits)
    measures: bool = False
    graphs: bool = False
    reproducible: bool = False
    overwrite: bool = False


# ------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Encoded:
    """A response that can be traced: its record, ids [N] and masks [N]."""

    record: Record
    token_ids: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    question_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Failure:
    """A row that was set aside; `choice` is None where the row could not be read at all."""

    line: int
    choice: int | None
    id: str | None
    reason: str


@dataclass(frozen=True)
class Done:
    """A row of credits, by the names of its columns, and its graph where graphs are kept."""

    values: dict[str, Any]
    tokens: int
    graph: Any = None

    @property
    def line(self) -> int:
        return self.values["line"]

    @property
    def choice(self) -> int:
        return self.values["choice"]


Result = Done | Failure


def encode(tracer: Tracer, record: Record, chat: bool) -> Encoded:
    """Tokenise a record as `Tracer` does.

    Raises:
        ValueError: there is nothing to trace in it, or too much.
    """
    prompt, response = record.prompt, record.response
    by_user = tracer.options.question == "user"
    if record.has_ids:
        assert isinstance(response, list)
        if by_user:
            raise ValueError("--question user needs chat messages: token ids don't say what the user wrote")
        _check_length(tracer, len(prompt) + len(response))
        ids = torch.tensor([*prompt, *response])
        words = tracer.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if int(ids.max()) >= words:
            raise ValueError(f"token id {int(ids.max())} is unknown to the model, which has {words}")
        is_prompt = torch.arange(len(ids)) < len(prompt)
        return Encoded(record, ids, is_prompt, ~is_prompt)
    if isinstance(prompt, str) and (record.as_is or not chat):
        if by_user:
            raise ValueError("--question user needs chat messages, got a text that is taken as it is")
        assert isinstance(response, str)
        found = encode_text(tracer.tokenizer, prompt, response)
        _check_length(tracer, len(found.token_ids))
        return Encoded(record, found.token_ids, found.prompt_mask, found.response_mask)
    asked: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said: Any = response
    messages, first = conversation(asked, said)
    found = encode_messages(tracer.tokenizer, messages, first)
    _check_length(tracer, len(found.token_ids))
    question = question_of_messages(tracer.tokenizer, messages, found, first) if by_user else None
    return Encoded(record, found.token_ids, found.prompt_mask, found.response_mask, question)


def _check_length(tracer: Tracer, tokens: int) -> None:
    """As the tracer checks it, but before a row gets into a batch, whose others it would cost a second pass."""
    most = tracer.options.max_tokens
    if most is None:
        most = window_of(tracer.model)
        why = "that the model can see; --max-tokens sets another limit"
    else:
        why = "of --max-tokens"
    if most is not None and tokens > most:
        raise ValueError(f"the row has {tokens:,} tokens, more than the {most:,} {why}")


def certificate(trace: Trace, estimates: bool) -> dict[str, float | None]:
    """How exact a row is, by the names of records.CERTIFICATE.

    `dropped`: attention per token that is in no edge of the graph; `lost`: what of it went nowhere, neither through
    pools nor into an exact flow. `unabsorbed`: flow that was sent and did not arrive. `unlisted`: flow on edges that
    the graph does not list. `reach_bound`, `flow_bound`, `top_overlap`: of `flowgraph.Certificate`, the first two at
    their largest; the last takes some solves more, and is None without `estimates`.
    """
    flow, absorb = trace.flow, trace.options.absorb_at_prompt
    found = trace.certificate if estimates else certify(flow, absorb_at_prompt=absorb)
    summary = found.summary()
    return {
        "dropped": float(trace.graph.dropped.double().mean()),
        "lost": float(found.lost.double().mean()),
        "unabsorbed": float(flow.unabsorbed.double().abs().sum()),
        "unlisted": float(flow.unlisted_inflow.double().sum()),
        **{name: summary[name] for name in ("reach_bound", "flow_bound", "top_overlap")},
    }


def row_of_trace(record: Record, trace: Trace, source: str, estimates: bool = False) -> dict[str, Any]:
    """The columns of records.COLUMNS and shards.schema but measures.

    Raises:
        ValueError: there are NaN or infinite values in it.
    """
    graph, response = trace.graph, trace.graph.response_mask
    lists = {
        name: values[response].float().cpu().numpy()
        for name, values in (("weights", trace.weights), ("throughput", trace.throughput), ("reach", trace.reach))
    }
    for name, values in lists.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has NaN or infinite values: does the model overflow in its dtype?")
    return {
        "file": source,
        "line": record.line,
        "choice": record.choice,
        "id": record.id,
        "prompt_tokens": int(graph.prompt_mask.sum()),
        "response_tokens": int(response.sum()),
        "response_token_ids": graph.token_ids[response].to(torch.int32).cpu().numpy(),
        **lists,
        "answer": trace.answer,
        "flags": list(trace.flags),
        **certificate(trace, estimates),
    }


# ------------------------------------------------------------------------- one process


Advance = Callable[[float, Sequence[Result]], None]
"""Hears of rows when they are done: how many rows of the input they stand for, and what became of them."""


class Worker:
    """Scores shards with one model, on one device."""

    def __init__(self, job: Job, device: str | None = None, model: tuple[Tracer, bool] | None = None) -> None:
        self.job = job
        with deterministic(job.reproducible):  # some of it has to be said before the model runs for the first time
            self.tracer, self.chat = job.model(device) if model is None else model
        self.batch_tokens = job.limits.batch_tokens
        self._attempts: dict[int, Attempt] = {}
        self._schema = schema(MEASURES if job.measures else (), job.graphs)

    def run(self, shards: Iterable[Shard], advance: Advance | None = None) -> Iterator[dict[str, Any]]:
        """Score shards and write them to the job's folder; what is there already is not done again.

        Yields:
            What the metadata of each shard says: "job", "shard", "written", "failed", "tokens", "flags", "version".
        """
        digest = self.job.manifest.digest
        todo: list[Shard] = []
        for shard in shards:
            if (about := finished(self.job.out, shard, digest)) is not None:
                yield about
            else:
                todo.append(shard)
        try:
            for shard, found in self.results(todo, advance, note=True):
                about = {"job": digest, "version": __version__, **_counts(found)}
                write = Later(lambda shard=shard, found=found, about=about: self._write(shard, found, about))  # type: ignore[misc]
                write.value(self.job.limits.io_timeout, f"writing part {shard.number} of {self.job.out}")
                self._attempts.pop(shard.number).over()
                yield {**about, "shard": shard.to_dict()}
        except RuntimeError as error:
            if device_is_lost(error):
                self._attempts.clear()  # the notes stay: a row that costs the device is like one that ends its process
            raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop in order: an exception, or the wish of somebody else, is not the fault of the row in work."""
        for attempt in list(self._attempts.values()):
            attempt.leave()
        self._attempts.clear()

    def results(
        self, shards: Iterable[Shard], advance: Advance | None = None, note: bool = False
    ) -> Iterator[tuple[Shard, list[Result]]]:
        """Each shard with what became of its rows, in their order. The next one is read while this one is traced.

        Args:
            note: in the job's folder, which shard and row are in work; see `Attempt`.
        """
        ahead: tuple[Shard, Later] | None = None
        with deterministic(self.job.reproducible):
            for shard in [*shards, None]:
                following = None if shard is None else (shard, Later(lambda shard=shard: self.prepare(shard)))  # type: ignore[misc]
                if ahead is not None:
                    now, later = ahead
                    entries = later.value(self.job.limits.io_timeout, f"reading rows of {now.source}")
                    attempt = None
                    if note:
                        attempt = self._attempts[now.number] = Attempt(self.job.out, now)
                    yield now, self._traced(now, entries, advance, attempt)
                ahead = following

    def prepare(self, shard: Shard) -> list[Encoded | Failure]:
        """The rows of a shard, read and tokenised, or why they can't be.

        Raises:
            OSError: the file can't be read, or is not what was planned with.
        """
        source = self.job.sources[shard.source]
        unchanged(source, self.job.manifest.inputs[shard.source])
        entries: list[Encoded | Failure] = []
        seen = 0
        for line, row in read(source, shard, self.job.limits.max_row_bytes):
            seen += 1
            if isinstance(row, ValueError):
                entries.append(Failure(line, None, None, reason(row)))
                continue
            try:
                records = records_of(line, row)
            except Exception as error:  # nothing in one row may stop the job; the reason is kept
                entries.append(Failure(line, None, _name_of(row), reason(error)))
                continue
            for record in records:
                try:
                    entries.append(encode(self.tracer, record, self.chat))
                except Exception as error:
                    entries.append(Failure(line, record.choice, record.id, reason(error)))
        if seen != shard.rows:
            raise OSError(f"{source.path} has {seen} rows from line {shard.line} on where there were {shard.rows}")
        return entries

    # --- one shard ----------------------------------------------------------------------------------------------------

    def _traced(
        self, shard: Shard, entries: list[Encoded | Failure], advance: Advance | None, attempt: Attempt | None
    ) -> list[Result]:
        results: dict[int, Result] = {k: one for k, one in enumerate(entries) if isinstance(one, Failure)}
        share = shard.rows / max(1, len(entries))

        def note(places: Sequence[int]) -> None:
            if advance is not None:
                advance(share * len(places), [results[place] for place in places])

        note(list(results))
        encoded = {k: one for k, one in enumerate(entries) if isinstance(one, Encoded)}
        places = list(encoded)
        one_by_one = self.job.reproducible or (attempt is not None and attempt.again)
        batches: Iterable[list[int]] = ([place] for place in places)
        if not one_by_one:
            found = chunks([len(encoded[place]) for place in places], self.batch_tokens)
            batches = ([places[k] for k in chunk] for chunk in found)
        for batch in batches:
            if attempt is not None and attempt.again:
                record = encoded[batch[0]].record
                name = f"{record.line}/{record.choice}"
                if attempt.killed(name):
                    why = f"{Attempt.DEATHS} processes died while they traced it; is it too large for the memory?"
                    results[batch[0]] = Failure(record.line, record.choice, record.id, why)
                    note(batch)
                    continue
                attempt.at(name)
            self._attempt(shard.source, encoded, batch, results)
            note(batch)
        return [results[place] for place in range(len(entries))]

    def _attempt(
        self, source: str, encoded: Mapping[int, Encoded], places: list[int], results: dict[int, Result]
    ) -> None:
        """Trace rows together; what can't be in halves, then alone, and what can't be alone is set aside."""
        stack = [places]
        while stack:
            some = stack.pop()
            rows_of_batch = [encoded[place] for place in some]
            try:
                results |= zip(some, self._trace(source, rows_of_batch), strict=True)
                continue
            except Exception as error:
                if device_is_lost(error):
                    raise
                short = is_out_of_memory(error)
                why = reason(error)
            # Out of the handler, where nothing holds on to the tensors of the attempt any more.
            if short:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                size = len(some) * max(map(len, rows_of_batch))
                if len(some) > 1 and size // 2 < self.batch_tokens:
                    self.batch_tokens = size // 2
            if len(some) > 1:
                stack += [some[len(some) // 2 :], some[: len(some) // 2]]
                continue
            record = rows_of_batch[0].record
            if short:
                why = f"out of memory with this row alone, {len(rows_of_batch[0]):,} tokens: {why}"
            results[some[0]] = Failure(record.line, record.choice, record.id, why)

    def _trace(self, source: str, batch: Sequence[Encoded]) -> list[Done]:
        lengths = [len(one) for one in batch]
        padded = min(lengths) < max(lengths)
        traces = self.tracer.from_ids(
            _laid_out([one.token_ids for one in batch]),
            _laid_out([torch.ones(n, dtype=torch.bool) for n in lengths]) if padded else None,
            _laid_out([one.prompt_mask for one in batch]),
            response_mask=_laid_out([one.response_mask for one in batch]),
            question_mask=None
            if batch[0].question_mask is None
            else _laid_out([one.question_mask for one in batch if one.question_mask is not None]),
        )
        found = [
            row_of_trace(one.record, trace, source, self.job.measures) for one, trace in zip(batch, traces, strict=True)
        ]
        if self.job.measures:
            numbers = rows(measures(traces.flow, [trace.text for trace in traces]))
            for row, measured in zip(found, numbers, strict=True):
                row |= {name: value if value == value else None for name, value in measured.items()}
        graphs = [trace.graph.cpu() if self.job.graphs else None for trace in traces]
        return [Done(*one) for one in zip(found, lengths, graphs, strict=True)]

    def _write(self, shard: Shard, found: Sequence[Result], about: Mapping[str, Any]) -> bool:
        done = [one for one in found if isinstance(one, Done)]
        failed = [
            {"file": shard.source, "line": one.line, "choice": one.choice, "id": one.id, "reason": one.reason}
            for one in found
            if isinstance(one, Failure)
        ]
        graphs = None
        if self.job.graphs:
            graphs = [one.graph for one in done]
            for place, one in enumerate(done):
                one.values["graph"] = f"part-{shard.number:06}/{place}"
        table = pa.Table.from_pylist([one.values for one in done], schema=self._schema)
        write_shard(self.job.out, shard, table, failed, about, graphs)
        return True


def _laid_out(values: list[Tensor]) -> Tensor:
    """[B, T], pads (0 or False) on the right."""
    return pad_sequence(values, batch_first=True)


def _counts(found: Sequence[Result]) -> dict[str, Any]:
    done = [one for one in found if isinstance(one, Done)]
    flags = Counter(flag for one in done for flag in one.values["flags"])
    return {
        "written": len(done),
        "failed": len(found) - len(done),
        "tokens": sum(one.tokens for one in done),
        "flags": dict(sorted(flags.items())),
    }


def _name_of(row: Mapping[str, Any]) -> str | None:
    """The id of a row in which something else is wrong."""
    name = row.get("id")
    return str(name) if isinstance(name, str | int) else None


def to_file(worker: Worker, file: ScoreFile, advance: Advance) -> None:
    """All rows of a job of one source into one file.

    Raises:
        ValueError: a row has several responses, which that file could not tell apart.
    """
    for _, found in worker.results(worker.job.manifest.shards, advance):
        for one in found:
            if one.choice:
                raise ValueError(
                    f"line {one.line} has several responses: give a folder as OUT, where the column `choice` "
                    "tells them apart"
                )
            if isinstance(one, Done):
                file.add(one.values)
            else:
                file.set_aside(one.line, one.reason)


# ------------------------------------------------------------------------- what goes wrong


def reason(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text}"
    text = text.encode("utf-8", "replace").decode() or type(error).__name__
    return text if len(text) <= 1000 else text[:1000] + " ..."


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of this machine where it says so instead of ending the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error)
        for text in ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def device_is_lost(error: BaseException) -> bool:
    """After an error on a GPU every later call of the process fails, too; but not after one of memory."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return any(f"{name} error" in str(error) for name in ("CUDA", "HIP"))


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, ends the block by `SystemExit(143)`: half files are removed, and
    no row is taken for the cause. In other threads than the main one, or where SIGTERM has a handler, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop the stopping; SIGKILL still ends it
    raise SystemExit(128 + number)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """One thread and deterministic algorithms, for as long as the block runs."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    threads, algorithms = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms)


# ------------------------------------------------------------------------- what has been done


class Tally:
    """What a job has done so far, and how fast."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.rows = 0.0  # of the input
        self.written = self.failed = self.tokens = 0
        self.flags: Counter[str] = Counter()
        self._begun, self._kept, self._kept_tokens = time.perf_counter(), 0.0, 0

    def add(self, rows: float, written: int, failed: int, tokens: int, flags: Mapping[str, int]) -> None:
        self.rows += rows
        self.written, self.failed, self.tokens = self.written + written, self.failed + failed, self.tokens + tokens
        self.flags.update(flags)

    def add_results(self, rows: float, results: Sequence[Result]) -> None:
        self.add(rows, **_counts(results))

    def add_shard(self, about: Mapping[str, Any]) -> None:
        counts = {name: about[name] for name in ("written", "failed", "tokens", "flags")}
        self.add(about["shard"]["rows"], **counts)

    def begin(self) -> None:
        """The clock starts now; what is there already was done by an earlier run."""
        self._begun, self._kept, self._kept_tokens = time.perf_counter(), self.rows, self.tokens

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._begun, 1e-9)

    @property
    def rate(self) -> float:
        """Rows per second of this run."""
        return (self.rows - self._kept) / self.seconds

    @property
    def token_rate(self) -> float:
        """Tokens per second of this run, pads not counted."""
        return (self.tokens - self._kept_tokens) / self.seconds

    def __str__(self) -> str:
        text = f"{self.rows:,.0f} of {self.total:,} rows, {self.rate:.1f}/s"
        if self.failed:
            text += f", {self.failed:,} set aside"
        if self.rate > 0 and self.rows < self.total:
            left = int((self.total - self.rows) / self.rate)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text
