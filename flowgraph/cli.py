"""The command line: flowgraph trace, report, score, compare, stability, faithful, plan, doctor and demo.

Results go to stdout, progress and messages to stderr. Exit codes: 0 all fine; 1 it could not be done, and one line
says why; 2 wrong usage; 3 `score`, `stability` or `faithful` finished, but set some lines aside; 130 stopped by Ctrl-C;
143 `score` was stopped by SIGTERM.

Here are the commands, what they read and write, and what becomes of errors. Their options are in cli_options.py, what
they show in terminal.py. Torch and transformers take seconds to import, so everything heavy is imported inside
functions.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flowgraph import cli_options as options
from flowgraph import doctor, terminal
from flowgraph._version import __version__
from flowgraph.cli_options import METHOD, OUTPUT, option

if TYPE_CHECKING:
    from flowgraph.stability import Stability
    from flowgraph.trace import Trace
    from flowgraph.tracer import Tracer

Function = TypeVar("Function", bound=Callable[..., Any])

app = typer.Typer(
    name="flowgraph",
    help="Which tokens of a reasoning trace carried the question to the answer?\n\n"
    "Start with [bold]flowgraph doctor[/] (is all in place?) and [bold]flowgraph demo[/] (real traces of a small "
    "model, as a page).",
    epilog="Exit codes: 0 all fine, 1 it could not be done, 2 wrong usage, 3 some lines were set aside, 130 Ctrl-C, "
    "143 SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The program `flowgraph`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character gets a "?"
    try:
        app()
    except SystemExit as stopped:
        if stopped.code in (130, 143):
            # After Ctrl-C or SIGTERM the end of the interpreter aborts now and then in the C++ of a library, and then
            # the exit code would be another. Every file is closed or removed by now.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(stopped.code))
        raise


def _version(asked: bool) -> None:
    if asked:
        print(f"flowgraph {__version__}")
        raise typer.Exit


@app.callback()
def _flowgraph(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def _command(function: Function) -> Function:
    """Turns what goes wrong in a command into one line and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer and whoever reads our output know what to do with them
        except KeyboardInterrupt:
            terminal.say("stopped", style="yellow")
            raise typer.Exit(130) from None
        except SystemExit as ended:
            if ended.code == 143:
                terminal.say("stopped by SIGTERM", style="yellow")
            raise
        except Exception as error:
            if kwargs["traceback"]:
                raise
            terminal.complain(terminal.reason(error))
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


# ------------------------------------------------------------------------- trace


@app.command("trace")
@_command
def trace_command(
    context: typer.Context,  # holds all of these by name; options.load and _given pick out what they need
    model: options.Model,
    prompt: options.Prompt = None,
    response: options.Response = None,
    prompt_file: options.PromptFile = None,
    response_file: options.ResponseFile = None,
    jsonl: options.Jsonl = None,
    line: options.Line = 1,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    weights: options.Weights = "attention",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "auto",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
    backend: options.Backend = "auto",
    chunk: options.Chunk = "auto",
    offload: options.Offload = False,
    memory: options.Memory = None,
    absorb_at_prompt: options.AbsorbAtPrompt = False,
    temperature: options.Temperature = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    json_file: Annotated[
        Path | None, option(OUTPUT, "--json", "Write the trace as JSON; - is stdout, then for nothing else.", "FILE")
    ] = None,
    html: Annotated[Path | None, option(OUTPUT, "--html", "Write the trace as one page.", "FILE")] = None,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "Show nothing, only write files.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Trace one response: its tokens as a heat map, and as JSON or a page if you like.

    [bold]Examples[/]
    flowgraph trace -m smollm2 -p "6 times 7?" -r "It is 42. The answer is 42."
    flowgraph trace -m ./model --jsonl rollouts.jsonl --line 12 --html trace.html
    flowgraph trace -m ./model --jsonl rollouts.jsonl --json - -q | jq .summary

    Without colours (NO_COLOR, a pipe) a table of the top tokens stands for
    the heat map.
    """
    _check_apart({"--html": html, "--json": json_file}, jsonl, prompt_file, response_file)
    record = _given(context.params)
    with terminal.hushed(verbose):
        # The page, like that of report, has what is lost without a part, worked out on the whole attention.
        tracer, is_chat = options.load({**context.params, "keep_attention": html is not None})
        begun = time.perf_counter()
        with terminal.status("Tracing", quiet):
            trace = _trace(tracer, record, is_chat)
        seconds = time.perf_counter() - begun
        if html is not None:
            trace.to_html(html)
        if json_file is not None:
            _write_json(trace.to_dict() | {"options": trace.options.to_dict()}, json_file)
    if quiet:
        return
    if str(json_file) != "-":
        terminal.show(trace, seconds)
    for path in (html, json_file):
        if path is not None and str(path) != "-":
            terminal.say(f"wrote {path}")


def _given(given: Mapping[str, Any]) -> Any:
    """The `Record` that the parameters of `trace` name."""
    from flowgraph.adapters.records import Record, record_at

    texts = {name: (given[name], given[f"{name}_file"]) for name in ("prompt", "response")}
    if given.get("jsonl") is not None:
        if set(texts.values()) != {(None, None)}:
            raise typer.BadParameter("--jsonl has both in it: leave out --prompt, --response and their files")
        return record_at(given["jsonl"], given["line"])
    for name, (text, file) in texts.items():
        if (text is None) == (file is None):
            remedy = ("or --jsonl" if "jsonl" in given else "or IN") if text is None else "not both"
            raise typer.BadParameter(f"give --{name} or --{name}-file, {remedy}")
    return Record(1, None, _text("prompt", *texts["prompt"]), _text("response", *texts["response"]))


def _text(name: str, text: str | None, file: Path | None) -> str:
    """What was given, or else stands in the file; stdin for "-"."""
    if file is not None:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from error
        text = text.removesuffix("\n").removesuffix("\r")  # the end of the last line is the file's, not the text's
    if text is None or not text.strip():
        raise ValueError(f"the {name} is empty")
    return text


def _trace(tracer: Tracer, record: Any, chat: bool) -> Trace:
    """One `Record` of adapters/records.py, in whichever form it came."""
    import torch

    prompt, response = _texts(tracer, record, chat)
    if record.has_ids:
        ids = torch.cat([prompt, response])
        return tracer.from_ids(ids[None], prompt_mask=(torch.arange(len(ids)) < len(prompt))[None])[0]
    return tracer(prompt, response)


def _texts(tracer: Tracer, record: Any, chat: bool) -> tuple[Any, Any]:
    """Its prompt and response, as text, as chat messages, or both as tensors of token ids."""
    import torch

    if record.has_ids:
        if tracer.options.question == "user":
            raise ValueError("--question user needs chat messages: token ids don't say what the user wrote")
        prompt, response = torch.tensor(record.prompt), torch.tensor(record.response)
        known, most = tracer.model.get_input_embeddings().num_embeddings, max(map(int, (prompt.max(), response.max())))  # type: ignore[operator]
        if most >= known:
            raise ValueError(f"token id {most} is unknown to the model, which has {known}")
        return prompt, response
    if isinstance(record.prompt, str) and chat:
        return [{"role": "user", "content": record.prompt}], record.response
    return record.prompt, record.response


def _check_apart(written: Mapping[str, Path | None], *read: Path | None) -> None:
    """What a command writes, by the names of its options, may be none of the files that it reads."""
    for name, path in written.items():
        if path is not None and path.exists() and any(one and one.exists() and path.samefile(one) for one in read):
            raise ValueError(f"{name} {path} is one of the files to read; give another name")


def _write_json(values: Any, path: Path) -> None:
    text = json.dumps(values, allow_nan=False)
    if str(path) == "-":
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------- report


@app.command("report")
@_command
def report_command(
    context: typer.Context,  # holds all of these by name; options.load and _records pick out what they need
    files: Annotated[list[Path], typer.Argument(metavar="[IN.jsonl] OUT.html", help="Traces; the page, .html.")],
    model: options.Model,
    lines: options.Lines = None,
    prompt: options.Prompt = None,
    response: options.Response = None,
    prompt_file: options.PromptFile = None,
    response_file: options.ResponseFile = None,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    weights: options.Weights = "attention",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "auto",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
    backend: options.Backend = "auto",
    chunk: options.Chunk = "auto",
    offload: options.Offload = False,
    memory: options.Memory = None,
    absorb_at_prompt: options.AbsorbAtPrompt = False,
    temperature: options.Temperature = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    by: Annotated[str, options.choice(OUTPUT, "--by", options.DIVISIONS, "What to divide traces into.")] = "sentences",
    title: Annotated[str, option(OUTPUT, "--title", "Of the page.", "TEXT")] = "FlowGraph",
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "Show nothing, only write the page.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Trace responses and put them on one page, to be read in a browser.

    [bold]Examples[/]
    flowgraph report rollouts.jsonl page.html -m smollm2 --lines 1,5,8-10
    flowgraph report page.html -m smollm2 -p "6 times 7?" -r "It is 42. The answer is 42."

    IN has the lines that flowgraph score reads. Without --lines it may have
    at most 20. The page needs no network.
    """
    if len(files) > 2:
        raise typer.BadParameter(f"give [IN.jsonl] OUT.html, not {len(files)} files")
    *source, out = files
    if out.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"OUT: the page comes last and ends in .html, got {out}")
    if out.is_dir():
        raise ValueError(f"OUT: {out} is a folder; give the name of a file")
    _check_apart({"OUT": out}, *source, prompt_file, response_file)
    records = list(_records(source[0] if source else None, context.params, most=None if lines else _ON_A_PAGE))
    with terminal.hushed(verbose):
        from flowgraph import page, report

        # What is lost without a part of a long trace is worked out on its whole attention.
        tracer, is_chat = options.load({**context.params, "keep_attention": True})
        dicts = []
        for record in records:
            with terminal.status(f"Tracing line {record.line}" if source else "Tracing", quiet):
                try:
                    found = report(_trace(tracer, record, is_chat), by)
                except ValueError as error:
                    raise ValueError(f"line {record.line}: {error}" if source else str(error)) from error
            name = f"line {record.line}" + (f", {record.id}" if record.id else "")
            dicts.append(found | ({"title": name} if source else {}))
        page.write(out, dicts, title=title)
    if not quiet:
        terminal.tell(f"{len(dicts)} trace{'s' * (len(dicts) > 1)} on one page: {out}")
        terminal.tell(f"Open it in a browser: {out.resolve().as_uri()}")


_ON_A_PAGE = 20


def _records(source: Path | None, given: Mapping[str, Any], most: int | None) -> Iterator[Any]:
    """The `Record`s of the chosen lines of a file, or without one what `trace` takes."""
    from flowgraph.adapters.records import parse

    _check_source(source, given)
    if source is None:
        yield _given(given)
        return
    for count, (number, raw) in enumerate(_chosen(source, given["lines"])):
        if most is not None and count == most:
            raise ValueError(f"{source} has more than {most} lines: choose some with --lines, as in --lines 1,5,8-10")
        try:
            yield parse(number, raw)
        except ValueError as error:
            raise ValueError(f"line {number} of {source}: {error}") from error


def _check_source(source: Path | None, given: Mapping[str, Any]) -> None:
    """Prompt and response come from a file or from the command line, not from both."""
    if source is None:
        if given["lines"] is not None:
            raise typer.BadParameter("--lines needs IN, the file that they are of")
    elif any(given[name] is not None for name in ("prompt", "response", "prompt_file", "response_file")):
        raise typer.BadParameter("IN has prompts and responses: leave out --prompt, --response and their files")
    elif not source.is_file():
        raise ValueError(f"IN: {source} is a folder" if source.is_dir() else f"IN: there is no file {source}")


def _chosen(source: Path, ranges: Sequence[range] | None) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the lines of a file in some ranges (None: of all).

    Raises:
        ValueError: at the end, if a range had none of them.
    """
    from flowgraph.adapters.records import lines

    missing = set(ranges or ())
    empty = True
    for number, raw in lines(source):
        of = [one for one in ranges or () if number in one]
        missing.difference_update(of)
        if of or ranges is None:
            empty = False
            yield number, raw
    if missing:
        first = min(missing, key=lambda one: one.start)
        raise ValueError(f"{source} has no line {first.start}" + (f"-{first.stop - 1}" if len(first) > 1 else ""))
    if empty:
        raise ValueError(f"{source} is empty: there is no line to trace")


# ------------------------------------------------------------------------- score

SCALE = "Many rollouts"
_WORKERS = "Processes or actors, each with a model. Default: one per GPU of this machine, or of the cluster."
_GPUS = "Of each Ray actor. Default: 1 where the cluster has any."
_SHARD_ROWS = "Rows of one part of OUT, which is a folder then. Default: 1000; 32 with --graphs."
_ROW_BYTES = "Set larger rows aside before they are parsed."
_REPRODUCIBLE = "One row at a time in one thread: the same files to the byte on one kind of device."
_FINGERPRINT = "Of IN: quick (size, time, both ends) or full (a hash of all of it, which copies share)."
_IO_TIMEOUT = "Stop if reading or writing a part takes so long."
_FORMATS = (
    ".arrow", ".csv", ".feather", ".gz", ".html", ".json", ".jsonl", ".ndjson", ".parq", ".pq", ".tsv", ".txt", ".zst",
)  # fmt: skip
"""Ends of names that nobody gives to a folder."""


@app.command("score")
@_command
def score_command(
    context: typer.Context,  # holds all of these by name; options.load picks out what it needs
    source: Annotated[Path, typer.Argument(metavar="IN", help="Responses: a file, a folder, a data set on disk.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.parquet, or a folder of such files.")],
    model: options.Model,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    weights: options.Weights = "attention",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "auto",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
    backend: options.Backend = "auto",
    chunk: options.Chunk = "auto",
    offload: options.Offload = False,
    memory: options.Memory = None,
    absorb_at_prompt: options.AbsorbAtPrompt = False,
    temperature: options.Temperature = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    engine: Annotated[str, options.choice(SCALE, "--engine", ("local", "ray"), "local, or ray: Ray Data.")] = "local",
    workers: Annotated[int | None, option(SCALE, "--workers", _WORKERS, "N", min=1)] = None,
    address: Annotated[str | None, option(SCALE, "--address", "Of the Ray cluster: auto, or a host.", "HOST")] = None,
    gpus: Annotated[float | None, option(SCALE, "--gpus-per-worker", _GPUS, "N", min=0)] = None,
    shard_rows: Annotated[int | None, option(SCALE, "--shard-rows", _SHARD_ROWS, "N", min=1)] = None,
    batch_tokens: Annotated[int, option(SCALE, "--batch-tokens", "Of one forward pass, with pads.", "N", min=1)] = 4096,
    max_row_bytes: Annotated[int, option(SCALE, "--max-row-bytes", _ROW_BYTES, "N", min=1)] = 1 << 24,
    reproducible: Annotated[bool, option(SCALE, "--reproducible", _REPRODUCIBLE)] = False,
    fingerprint: Annotated[str, options.choice(SCALE, "--fingerprint", ("quick", "full"), _FINGERPRINT)] = "quick",
    io_timeout: Annotated[float, option(SCALE, "--io-timeout", _IO_TIMEOUT, "SECONDS", min=0.1)] = 600,
    with_measures: Annotated[bool, option(OUTPUT, "--measures", "Add the measures of each trace as columns.")] = False,
    with_graphs: Annotated[bool, option(OUTPUT, "--graphs", "Keep each graph too, in a folder OUT.")] = False,
    overwrite: Annotated[bool, option(OUTPUT, "--overwrite", "Replace OUT, or what is in it.")] = False,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "No progress and no summary.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Score every response of a file or of many files: one row of per-token credits each.

    [bold]Examples[/]
    flowgraph score rollouts.jsonl scores.parquet -m Qwen/Qwen3-4B --answer boxed
    flowgraph score rollouts.jsonl scores.parquet -m ./model --measures
    flowgraph score rollouts/ scores/ -m ./model     # again after a stop: goes on
    flowgraph score rollouts/ scores/ -m ./model --engine ray --workers 8

    [bold]IN[/] has JSON lines, Parquet or data sets on disk. A row has one of
    these, with an "id" if you like; docs/scale.md lists those of trainers:
      {"prompt": text or messages, "response": text}
      {"question": text, "response": text}
      {"messages": \\[..., {"role": "assistant", "content": text}]}
      {"prompt_ids": \\[...], "response_ids": \\[...]}

    [bold]OUT[/] has the columns
      line                 number of the line or row in IN, from 1
      id                   as in IN, or null
      prompt_tokens, response_tokens
      response_token_ids   and, for each of these tokens, three lists:
      weights              the credit: what to multiply the token's loss with
      throughput           flow in plus out: 2 at a token that all flow passes
      reach                its influence on the answer
      answer               the text that was found, or null
      flags                list, empty where all is fine
    and with --measures these too, a number per response, null where it has
    none (flowgraph/measures.py says what each one is):
      path_length_mean, path_length_p90, path_length_max, direct_share,
      effective_tokens, effective_share, entropy, gini, top_tenth,
      distance_mean, distance_relative, local_share,
      width_mean, width_min, width_min_place,
      width_quarter_1, width_quarter_2, width_quarter_3, width_quarter_4,
      place_mean, quarter_1, quarter_2, quarter_3, quarter_4,
      near_8, near_32, near_128, near_512,
      question_share, prompt_share, response_share, sink_share,
      digit_share, operator_share, delimiter_share, word_share,
      digit_lift, operator_lift, delimiter_lift, word_lift, unlisted_share
    and in a folder these, which make the join exact and say how exact a row is
    (docs/scale.md says what each one is):
      file, choice, dropped, lost, unabsorbed, unlisted, reach_bound,
      flow_bound, top_overlap

    Rows that can't be used go to OUT.errors.jsonl, or to OUT/_failed/, with
    the reason, and the exit code is 3. OUT.parquet appears when it is complete;
    a folder keeps every part that was finished, and the same command goes on.
    """
    from flowgraph.adapters.inputs import passed_over
    from flowgraph.adapters.records import errors_path

    if out.suffix.lower() in _FORMATS and not out.exists():
        raise typer.BadParameter(f"OUT: {out} would be a folder; the name of one file must end in .parquet")
    is_folder = shard_rows is not None or out.suffix != ".parquet"
    if not is_folder and (engine != "local" or (workers or 1) > 1 or with_graphs):
        raise typer.BadParameter("--engine ray, --workers and --graphs need a folder as OUT: a name without .parquet")
    others = passed_over(source)
    if others and not quiet:
        terminal.say(f"passed over in {source}: {others}", style="yellow")
    with terminal.hushed(verbose):
        tally = (_score_to_folder if is_folder else _score_to_file)(source, out, context.params)
    if not quiet:
        rates = f"{tally.rate:.1f} rows/s, {tally.token_rate:,.0f} tokens/s"
        terminal.tell(f"{out}: {tally.written:,} rows in {tally.seconds:.1f} s ({rates})")
        for flag, count in tally.flags.most_common():
            terminal.tell(f"{flag}: {count:,} of {tally.written:,} rows")
        if tally.failed:
            total, where = tally.written + tally.failed, out / "_failed" if is_folder else errors_path(out)
            terminal.tell(f"set aside: {tally.failed:,} of {total:,} lines, see {where}", style="yellow")
        if others:
            terminal.tell(f"passed over: {others}", style="yellow")
    if tally.failed:
        raise typer.Exit(3)


def _score_to_file(source: Path, out: Path, given: Mapping[str, Any]) -> Any:
    """All rows into one file, in this process."""
    from flowgraph.adapters import inputs, scoring, shards
    from flowgraph.adapters.records import ScoreFile
    from flowgraph.measures import MEASURES

    _check_files(source, out, given["overwrite"])
    (one,) = inputs.sources(source)
    known = {one.name: inputs.fingerprint(one)}
    plan = shards.Manifest({}, known, inputs.plan([one], max_row_bytes=given["max_row_bytes"]))
    with scoring.deterministic(given["reproducible"]):
        tracer, chat = options.load(given)
    worker = scoring.Worker(_job(given, [one], plan), model=(tracer, chat))
    settings = tracer.options.to_dict() | {"chat": chat}
    metadata = {"version": __version__, "model": given["model"], "options": json.dumps(settings)}
    tally = scoring.Tally(plan.rows)
    with (
        scoring.in_order(),
        ScoreFile(out, metadata, MEASURES if given["with_measures"] else ()) as file,
        terminal.progress(plan.rows, tally, given["quiet"]) as advance,
    ):

        def heard(rows: float, results: Sequence[Any]) -> None:
            tally.add_results(rows, results)
            advance(rows)

        scoring.to_file(worker, file, heard)
    return tally


def _score_to_folder(source: Path, out: Path, given: Mapping[str, Any]) -> Any:
    """All rows into a folder of shards, by an engine; those that are there already stay."""
    from flowgraph.adapters import engines, inputs, scoring

    names = ("engine", "workers", "address", "gpus", "device")
    engine = engines.Engine(**{"name" if name == "engine" else name: given[name] for name in names})
    settings = {
        "version": __version__,
        "model": given["model"],
        "options": options.tracer_options(given).to_dict(),
        **{name: given[name] for name in ("chat", "dtype", "with_measures", "with_graphs", "reproducible")},
    }
    manifest, goes_on = engines.prepare(
        source,
        out,
        settings,
        how=given["fingerprint"],
        # Graphs of a part are in memory until it is written, some ten megabytes for each thousand tokens.
        shard_rows=given["shard_rows"] or (32 if given["with_graphs"] else 1000),
        max_row_bytes=given["max_row_bytes"],
        overwrite=given["overwrite"],
    )
    job = _job(given, inputs.sources(source), manifest, out)
    tally = scoring.Tally(manifest.rows)
    if goes_on and not given["quiet"]:
        terminal.say(f"going on with {out}: what is finished stays")
    with terminal.progress(manifest.rows, tally, given["quiet"]) as advance:
        engines.score(job, engine, tally, advance=advance)
    return tally


def _job(given: Mapping[str, Any], found: Sequence[Any], manifest: Any, out: Path | None = None) -> Any:
    """A `Job` of adapters/scoring.py as the command's parameters have it."""
    from flowgraph.adapters import scoring

    limits = {name: given[name] for name in ("batch_tokens", "max_row_bytes", "io_timeout")}
    return scoring.Job(
        {one.name: one for one in found},
        manifest,
        out or Path(),
        # Workers on other machines have other working directories.
        scoring.Model(options.load, {**given, "model": options.place_of(given["model"])}),
        scoring.Limits(**limits),
        measures=given["with_measures"],
        graphs=given["with_graphs"],
        reproducible=given["reproducible"],
        overwrite=given["overwrite"],
    )


def _check_files(source: Path, out: Path, overwrite: bool) -> None:
    if not source.is_file():
        raise ValueError(
            f"IN: {source} is a folder: OUT has to be one, too" if source.is_dir() else f"IN: there is no file {source}"
        )
    if out.is_dir():
        raise ValueError(f"OUT: {out} is a folder; give the name of a file")
    if out.exists() and out.samefile(source):
        raise ValueError(f"IN and OUT are the same file, {out}")
    if out.exists() and not overwrite:
        raise ValueError(f"OUT: {out} exists; --overwrite replaces it")


# ------------------------------------------------------------------------- compare

COMPARE = "What to compare"
STATISTICS = "Statistics"


@app.command("compare")
@_command
def compare_command(
    files: Annotated[list[Path], typer.Argument(metavar="A.parquet [B.parquet]", help="Scores of each group, or all.")],
    by: Annotated[str | None, option(COMPARE, "--by", "Divide one file by this column or label.", "NAME")] = None,
    groups: Annotated[
        Any,
        option(
            COMPARE, "--groups", "The two values of --by, if there are more: a,b.", "A,B", parser=options.parse_names
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        option(COMPARE, "--labels", "JSON lines that have --by, --pair or --also: what score read.", "IN"),
    ] = None,
    join: Annotated[str, options.choice(COMPARE, "--join", ("line", "id"), "How rows find their labels.")] = "line",
    also: Annotated[
        Any, option(COMPARE, "--also", "Numbers of --labels to compare too.", "NAMES", parser=options.parse_names)
    ] = None,
    only: Annotated[
        Any, option(COMPARE, "--only", "Compare these measures and no others.", "NAMES", parser=options.parse_names)
    ] = None,
    pair: Annotated[
        str | None, option(COMPARE, "--pair", "Compare rows with the same value of this: id, problem, ...", "NAME")
    ] = None,
    test: Annotated[
        str,
        options.choice(STATISTICS, "--test", ("rank", "permutation"), "rank (Mann-Whitney, Wilcoxon) or permutation."),
    ] = "rank",
    confidence: Annotated[float, option(STATISTICS, "--confidence", "Of the intervals.", "SHARE")] = 0.95,
    resamples: Annotated[int, option(STATISTICS, "--resamples", "Of bootstrap and permutation.", "N", min=1)] = 2000,
    seed: Annotated[int, option(STATISTICS, "--seed", "The same one gives the same result.", "N", min=0)] = 0,
    examples: Annotated[int, option(OUTPUT, "--examples", "Traces to name at each end.", "N", min=0)] = 3,
    out: Annotated[Path | None, option(OUTPUT, "--out", "Write all of it, as OUT.json or OUT.parquet.", "OUT")] = None,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "Show nothing, only write OUT.")] = False,
    traceback: options.Traceback = False,
) -> None:
    """Compare two groups of scored traces, measure by measure.

    [bold]Examples[/]
    flowgraph score rollouts.jsonl scores.parquet -m ./model --measures
    flowgraph compare scores.parquet --labels rollouts.jsonl --by correct
    flowgraph compare scores.parquet --labels rollouts.jsonl --by correct --pair problem
    flowgraph compare before.parquet after.parquet --pair id --out result.json

    Compared are all columns of numbers that both groups have, without those
    that say which response a row is and how exact. In the table
      difference   of the means, with its bootstrap interval
      AUC          how well the measure alone tells the groups apart: 0.5 not
                   at all, 1 the first group always has more, 0 always less
      d            Cohen's: the difference in standard deviations
      p            corrected for the number of measures (Benjamini, Hochberg)
    Medians, rank-biserial correlation (Cliff's delta), uncorrected p and
    the traces at both ends of each measure are in OUT.
    """
    if len(files) > 2:
        raise typer.BadParameter(f"give A.parquet [B.parquet], not {len(files)} files")
    if out is not None and out.suffix not in (".json", ".parquet"):
        raise typer.BadParameter(f"--out {out}: the name must end in .json or .parquet")
    if groups is not None and len(groups) != 2:
        raise typer.BadParameter(f"--groups takes two values, got {len(groups)}")
    if len(files) == 2 and (by or groups or labels or also):
        raise typer.BadParameter("--by, --groups, --labels and --also go with one file, that is divided")
    if len(files) == 1 and by is None:
        raise typer.BadParameter("give a second file, or --by to divide this one")
    if also and labels is None:
        raise typer.BadParameter("--also needs --labels, the file that has them")
    _check_apart({"--out": out}, *files, labels)
    from flowgraph.adapters.records import CERTIFICATE, read_scores, with_labels
    from flowgraph.compare import compare, divide, numbers

    tables = [read_scores(path) for path in files]
    if labels is not None:
        wanted = [name for name in (by, pair, *(also or ())) if name and name not in tables[0].column_names]
        tables = [with_labels(tables[0], labels, list(dict.fromkeys(wanted)), join)]
    if by is not None:
        (first, one), (second, other) = divide(tables[0], by, groups)
        names = (f"{by}={first}", f"{by}={second}")
        if left_out := tables[0].num_rows - one.num_rows - other.num_rows:
            terminal.say(f"{left_out:,} rows are in neither group")
    else:
        one, other = tables
        same = files[0].stem == files[1].stem
        names = (str(files[0]), str(files[1])) if same else (files[0].stem, files[1].stem)
    measured = [
        {name: values for name, values in numbers(table).items() if name not in (by, pair)} for table in (one, other)
    ]
    if only is None:
        places = {"choice", *CERTIFICATE} - set(also or ())  # of a row of scores, not of its flow
        measured = [{name: values for name, values in group.items() if name not in places} for group in measured]
    elif unknown := [name for name in only if name not in measured[0] or name not in measured[1]]:
        raise ValueError(f"--only {unknown[0]}: no such numbers in both; there are {', '.join(measured[0])}")
    else:
        measured = [{name: values[name] for name in only} for values in measured]
    for table in (one, other):
        if pair is not None and pair not in table.column_names:
            raise ValueError(f"--pair {pair}: there is no such column; there are {', '.join(table.column_names)}")
    comparison = compare(
        measured[0],
        measured[1],
        names=names,
        labels=(_labels(one), _labels(other)),
        pair=None if pair is None else (one[pair].to_pylist(), other[pair].to_pylist()),
        test=test,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        examples=examples,
    )
    if out is not None:
        if out.suffix == ".json":
            _write_json(comparison.to_dict() | {"version": __version__}, out)
        else:
            import pyarrow.parquet

            out.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(comparison.to_table(), out)
    if quiet:
        return
    terminal.show_comparison(comparison, pair)
    if only is None and {one.measure for one in comparison} <= {"prompt_tokens", "response_tokens", *(also or ())}:
        terminal.say("there are no measures in these files: flowgraph score --measures puts them there")
    if out is not None:
        terminal.say(f"wrote {out}")


def _labels(table: Any) -> list[dict[str, Any]]:
    """What to call each row: its line and its id, if it has one."""
    columns = {name: table[name].to_pylist() for name in ("line", "id") if name in table.column_names}
    rows = [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


# ------------------------------------------------------------------------- stability


class _Done:
    """What `stability` has done so far."""

    def __init__(self) -> None:
        self.rows = self.aside = 0
        self._begun = time.perf_counter()

    def __str__(self) -> str:
        aside = f", {self.aside:,} set aside" if self.aside else ""
        return f"{self.rows:,} rows, {self.rows / max(time.perf_counter() - self._begun, 1e-9):.1f}/s{aside}"


@app.command("stability")
@_command
def stability_command(
    context: typer.Context,  # holds all of these by name; options.load and _records pick out what they need
    model: options.Model,
    source: Annotated[Path | None, typer.Argument(metavar="[IN.jsonl]", help="One response per line.")] = None,
    lines: options.Lines = None,
    prompt: options.Prompt = None,
    response: options.Response = None,
    prompt_file: options.PromptFile = None,
    response_file: options.ResponseFile = None,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    weights: options.Weights = "attention",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "auto",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
    backend: options.Backend = "auto",
    chunk: options.Chunk = "auto",
    offload: options.Offload = False,
    memory: options.Memory = None,
    absorb_at_prompt: options.AbsorbAtPrompt = False,
    temperature: options.Temperature = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    groups: Annotated[
        Any,
        option(
            METHOD, "--vary", "Of edges, layers, heads, preset, answer, question.", "NAMES", parser=options.parse_names
        ),
    ] = None,
    halves: Annotated[int, option(METHOD, "--halves", "Random divisions of the heads in two.", "N", min=1)] = 4,
    seed: Annotated[int, option(METHOD, "--seed", "Of the halves and the bootstrap.", "N", min=0)] = 0,
    json_file: Annotated[
        Path | None, option(OUTPUT, "--json", "Write all of it as JSON; - is stdout, then for nothing else.", "FILE")
    ] = None,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "Show nothing, only write the file.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Trace again with other thresholds, layers, heads, presets and finders: do the credits stay?

    [bold]Examples[/]
    flowgraph stability -m smollm2 -p "6 times 7?" -r "It is 42. The answer is 42."
    flowgraph stability rollouts.jsonl -m ./model --lines 1-50 --json stability.json

    Each variant changes one choice of the default, which the options set. In
    the table
      rank correlation   of the scores of all tokens that may get credit
      overlap            of the tokens with the --top highest scores, the share
                         that both have; by chance it would be --top
    For a file, these are means over its traces with bootstrap intervals. The
    model runs once per trace; the rest takes about 30 times as long as one.
    """
    _check_source(source, context.params)
    _check_apart({"--json": json_file}, source, prompt_file, response_file)
    record = _given(context.params) if source is None else None
    aside: dict[int, str] = {}
    found: list[tuple[Any, Stability]] = []
    with terminal.hushed(verbose):
        from flowgraph.adapters.records import parse
        from flowgraph.compare import plain
        from flowgraph.stability import GROUPS, stability, summarize

        if unknown := [group for group in groups or () if group not in GROUPS]:
            raise typer.BadParameter(f"--vary {unknown[0]}: there are {', '.join(GROUPS)}")
        tracer, is_chat = options.load(context.params)
        how: dict[str, Any] = {"groups": GROUPS if groups is None else groups, "halves": halves, "seed": seed}
        if source is None:
            with terminal.status("Tracing", quiet):
                found.append((record, stability(tracer, *_texts(tracer, record, is_chat), **how)))
        else:
            done = _Done()
            with terminal.progress(source.stat().st_size, done, quiet) as advance:
                for number, raw in _chosen(source, lines):
                    try:
                        record = parse(number, raw)
                        found.append((record, stability(tracer, *_texts(tracer, record, is_chat), **how)))
                    except Exception as error:  # as in score: nothing in one line may stop the run
                        aside[number] = terminal.reason(error)
                        done.aside += 1
                    else:
                        done.rows += 1
                    advance(len(raw))
    summary = summarize([one for _, one in found], seed=seed) if source is not None and found else None
    if json_file is not None:
        about: dict[str, Any] = {
            "version": __version__,
            "model": model,
            "options": tracer.options.to_dict(),
            "vary": how,
        }
        if source is None:
            about |= found[0][1].to_dict()
        else:
            traces = [{"line": record.line, "id": record.id} | one.to_dict() for record, one in found]
            bad = [{"line": line, "reason": why} for line, why in aside.items()]
            about |= {"summary": plain(summary or []), "traces": traces, "set_aside": bad}
        _write_json(about, json_file)
    if not quiet and str(json_file) != "-":
        if source is None:
            terminal.show_stability(found[0][1])
        elif summary is not None:
            terminal.show_stabilities([one for _, one in found], summary)
        if json_file is not None:
            terminal.say(f"wrote {json_file}")
    for line, why in aside.items():
        terminal.say(f"line {line} set aside: {why}", style="yellow")
    if aside:
        raise typer.Exit(3)


# ------------------------------------------------------------------------- faithful

FAITHFUL = "What to compare"
_SIGNALS = "Names with commas between, or all. Default: every kind, and the controls of flow and reach."
_SHARES = "How many of the tokens that may be chosen are hidden: of 0.05,0.1,0.2,0.4."
_ENDS = "top: the tokens with the highest scores; bottom: the lowest; or top,bottom."
_RESTATED = "Tokens that restate the answer: exclude them from the choice, include them, or both: two tables."
_CARRIERS = "Field of IN with character ranges [[start, stop], ...] of the response that carry the answer."


@app.command("faithful")
@_command
def faithful_command(
    context: typer.Context,  # holds all of these by name; options.load picks out what it needs
    source: Annotated[Path, typer.Argument(metavar="TRACES", help="Responses: a file or a folder of files.")],
    model: options.Model,
    out: Annotated[Path, option(OUTPUT, "--out", "A new folder, or that of a run to go on with.", "DIR")],
    signals: Annotated[Any, option(FAITHFUL, "--signals", _SIGNALS, "NAMES", parser=options.parse_names)] = None,
    shares: Annotated[Any, option(FAITHFUL, "--shares", _SHARES, "SHARES", parser=options.parse_shares)] = "0.2",
    ends: Annotated[Any, option(FAITHFUL, "--ends", _ENDS, "ENDS", parser=options.parse_names)] = "top",
    restated: Annotated[
        str, options.choice(FAITHFUL, "--restated", ("exclude", "include", "both"), _RESTATED)
    ] = "exclude",
    regenerate: Annotated[
        int, option(FAITHFUL, "--regenerate", "Write the answer anew in the first N traces.", "N", min=0)
    ] = 20,
    curves: Annotated[
        int, option(FAITHFUL, "--curves", "Deletion and insertion curves of the first N traces.", "N", min=0)
    ] = 20,
    limit: Annotated[
        int | None, option(FAITHFUL, "--limit", "Traces, rows set aside not counted. Default: all.", "N", min=1)
    ] = None,
    carriers: Annotated[str | None, option(FAITHFUL, "--carriers", _CARRIERS, "FIELD")] = None,
    seed: Annotated[
        int, option(FAITHFUL, "--seed", "Of the bootstrap and the model with random weights.", "N", min=0)
    ] = 0,
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    max_tokens: options.MaxTokens = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    workers: Annotated[
        int, option(SCALE, "--workers", "Processes that judge traces; they share out the threads.", "N", min=1)
    ] = 1,
    plot: Annotated[
        bool | None,
        option(OUTPUT, "--plot/--no-plot", "Draw DIR/faithful.png.", show_default="if matplotlib is there"),
    ] = None,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "Show nothing, only write files.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Compare token scores by what hiding the tokens that they choose does to the answer.

    [bold]Examples[/]
    flowgraph faithful traces.jsonl -m smollm2 --out faithful --limit 100 --workers 2
    flowgraph faithful traces.jsonl -m ./model --out faithful --shares 0.05,0.2 --ends top,bottom
    flowgraph faithful traces.jsonl -m ./model --out faithful     # again after a stop: goes on

    TRACES has the rows that flowgraph score reads. A field "answer" is the
    right answer; without it that is what the response states. All signals
    choose among the same tokens, before the answer; the chosen ones are
    hidden from all later attention. In the tables
      drop           of the answer's log-probability, in nats
      against flow   better or worse, if the interval of the difference on the
                     same traces leaves out 0
      changed, lost  share of answers that greedy regeneration from the cut
                     gives otherwise, and of right ones that it loses
    Controls come first: a signal that they equal has not been shown to see
    anything. DIR has traces.jsonl, faithful.json, .md and .png.

    Rows that can't be used are counted with the reason, and the exit code is 3.
    """
    with terminal.hushed(verbose):
        from flowgraph.adapters import inputs
        from flowgraph.adapters.evidence.faithful import DEFAULT, PAGE, PICTURE, RESULT, FaithfulConfig, faithful
        from flowgraph.adapters.evidence.plots import check

        named: Any = DEFAULT if signals is None else "all" if signals == ["all"] else signals
        names = ("restated", "regenerate", "curves", "limit", "carriers", "max_tokens", "seed")
        try:
            given = {name: context.params[name] for name in names}
            config = FaithfulConfig(named, tuple(shares), tuple(ends), **given)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if plot:
            check()
        rows = sum(shard.rows for one in inputs.sources(source) for shard in inputs.plan([one]))
        rest = {"edges": ("auto", 0), "rule": "top", "top": 0.4, "gain": 1.5, "temperature": 1.0}
        tracer, is_chat = options.load({**context.params, **rest})
        config = replace(config, answer=tracer.options.answer, chat=is_chat)
        done = _Done()
        with terminal.progress(min(rows, limit or rows), done, quiet) as advance:

            def heard(line: Mapping[str, Any]) -> None:
                done.aside += "reason" in line
                done.rows += "reason" not in line
                advance(float(limit is None or "reason" not in line))

            summary = faithful(
                tracer.model,
                tracer.tokenizer,
                source,
                out,
                config,
                name=model,
                plot=plot,
                workers=workers,
                advance=heard,
            )
    if not quiet:
        terminal.show_faithful(summary)
        for name in (RESULT, PAGE, PICTURE):
            if (out / name).is_file():
                terminal.say(f"wrote {out / name}")
    if summary["set_aside"]:
        raise typer.Exit(3)


# ------------------------------------------------------------------------- plan


@app.command("plan")
@_command
def plan_command(
    context: typer.Context,  # holds all of these by name; options.tracer_options picks out what it needs
    model: options.Model,
    tokens: Annotated[int, option(options.INPUT, "--tokens -n", "Length of the trace.", "N", min=2)],
    memory: options.Memory = None,
    layers: options.Layers = "middle",
    mode: options.Mode = "auto",
    weights: options.Weights = "attention",
    edges: options.Edges = "auto",
    chunk: options.Chunk = "auto",
    offload: options.Offload = False,
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Predict the peak of memory of a trace in every mode, and what fits a budget. Nothing runs, no weights are read.

    [bold]Examples[/]
    flowgraph plan -m smollm2 --tokens 8192
    flowgraph plan -m ./model --tokens 32768 --memory 2GB

    Memory is that above the model. With --memory the setting that a trace
    would take comes last; if none fits, the exit code is 1.

    On a CPU that is the peak of a trace with --memory: then freed tensors go
    back to the system at once. Without it malloc keeps their pages, and the
    same trace may take up to 2 times as much.
    """
    rest = {"answer_regex": None, "rule": "top", "top": 0.4, "gain": 1.5, "temperature": 1.0}
    asked = options.tracer_options({**context.params, **rest})
    with terminal.hushed(verbose):
        skeleton, place = options.outline(model, dtype, device)
        from itertools import product

        from rich.table import Table

        from flowgraph.memory import in_words, plan

        modes = ["edges", "sparse", "exact"] if mode == "auto" else [mode]
        chunks = [None, *(size for size in (4096, 1024, 256) if size < tokens)] if chunk == "auto" else [chunk]
        offloads = [False, True] if place.type != "cpu" and not offload else [offload]
        table = Table(box=None, pad_edge=False)
        for heading in ("mode", "chunk", "offload", "peak", "at", "of which"):
            table.add_column(heading, justify="right" if heading in ("chunk", "peak") else "left")
        for setting in product(modes, chunks, offloads):
            free = replace(asked, memory=None, mode=setting[0], chunk=setting[1], offload=setting[2])
            one = plan(skeleton, tokens, free, device=place)
            part = max(one.parts, key=lambda name: one.parts[name])
            fits = "" if memory is None else "green" if one.peak_bytes <= memory else "red"
            where = (in_words(one.peak_bytes), one.largest, f"{part} {in_words(one.parts[part])}")
            table.add_row(one.mode, str(one.chunk or "none"), "yes" if one.offload else "no", *where, style=fits)
        terminal.stdout().print(table)
        chosen = plan(skeleton, tokens, asked, device=place)
    if chosen.rough:
        terminal.say(f"these numbers are rough: the model has {chosen.rough}")
    said = f"mode {chosen.mode}, chunk {chosen.chunk or 'none'}{', offload' * chosen.offload}: "
    said += in_words(chosen.peak_bytes) + ("" if memory is None else f" of {in_words(memory)}")
    terminal.tell(said, style="" if memory is None else "bold green")
    if memory is None and place.type == "cpu":
        terminal.say(
            "peaks are those of traces with --memory; without it malloc keeps freed pages: up to 2 times as much"
        )


# ------------------------------------------------------------------------- doctor


@app.command("doctor")
@_command
def doctor_command(verbose: options.Verbose = False, traceback: options.Traceback = False) -> None:
    """Say what is installed and which devices there are, and try everything out on a tiny model.

    Downloads nothing. The exit code is 1 if something is wrong.
    """
    with terminal.hushed(verbose):
        table, wrong = doctor.examine()
    terminal.stdout().print(table, "")
    if wrong:
        raise RuntimeError(f"{wrong} of the self-tests went wrong: please report it, with the table above")
    terminal.tell("OK: everything that FlowGraph needs works here.", style="bold green")


# ------------------------------------------------------------------------- demo


@app.command("demo")
@_command
def demo_command(
    out: Annotated[Path, option(OUTPUT, "--out", "Where demo.html and demo.json go.", "FOLDER")] = Path("out"),
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Trace right and wrong solutions, and an answer of the model's own, with a small real model.

    The first run fetches SmolLM2-135M-Instruct (98 MB) and converts it, which
    takes about a minute. It is kept in a cache folder ($FLOWGRAPH_CACHE, else
    ~/.cache/flowgraph), and later runs take seconds.
    """
    with terminal.hushed(verbose):
        import torch

        from flowgraph import Tracer, page, smollm2
        from flowgraph.demo import ITEMS

        terminal.say("Loading SmolLM2-135M-Instruct")
        tracer = Tracer(*smollm2.load(torch.float32, say=terminal.say))
        traces, dicts = [], []
        for item in ITEMS:
            terminal.say(f"{'Tracing' if item.response else 'Answering and tracing'}: {item.title}")
            messages = [{"role": "user", "content": item.question}]
            traces.append(tracer(messages, item.response) if item.response else _answer_and_trace(tracer, messages))
            dicts.append(traces[-1].report() | {"title": item.title})
        path = page.write(out / "demo.html", dicts, title="FlowGraph demo")
        (out / "demo.json").write_text(json.dumps(dicts, allow_nan=False) + "\n", encoding="utf-8")
    terminal.tell(f"{ITEMS[0].title}\n", style="bold")
    terminal.show(traces[0])
    terminal.tell(f"\n{len(dicts)} traces on one page: {path}")
    terminal.tell(f"Open it in a browser: {path.resolve().as_uri()}")


def _answer_and_trace(tracer: Tracer, messages: list[dict[str, str]], length: int = 120) -> Trace:
    """The model's own greedy answer of at most `length` tokens, traced."""
    import torch

    model: Any = tracer.model
    tokenizer = tracer.tokenizer
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    cut_off = ids.shape[1] == start + length and int(ids[0, -1]) != tokenizer.eos_token_id
    prompt_mask = (torch.arange(ids.shape[1]) < start)[None]
    return tracer.from_ids(ids, prompt_mask=prompt_mask, truncated=[cut_off])[0]


if __name__ == "__main__":
    main()
