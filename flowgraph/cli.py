"""The command line: flowgraph trace, score, doctor and demo.

Results go to stdout, progress and messages to stderr. Exit codes: 0 all fine; 1 it could not be done, and one line
says why; 2 wrong usage; 3 `score` finished, but set some lines aside; 130 stopped by Ctrl-C.

Here are the commands, what they read and write, and what becomes of errors. Their options are in cli_options.py, what
they show in terminal.py. Torch and transformers take seconds to import, so everything heavy is imported inside
functions.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flowgraph import cli_options as options
from flowgraph import doctor, terminal
from flowgraph._version import __version__
from flowgraph.cli_options import INPUT, OUTPUT, option

if TYPE_CHECKING:
    from flowgraph.trace import Trace
    from flowgraph.tracer import Tracer

Function = TypeVar("Function", bound=Callable[..., Any])

app = typer.Typer(
    name="flowgraph",
    help="Which tokens of a reasoning trace carried the question to the answer?\n\n"
    "Start with [bold]flowgraph doctor[/] (is all in place?) and [bold]flowgraph demo[/] (real traces of a small "
    "model, as a page).",
    epilog="Exit codes: 0 all fine, 1 it could not be done, 2 wrong usage, 3 score set some lines aside, 130 Ctrl-C.",
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
    app()


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
    prompt: Annotated[str | None, option(INPUT, "--prompt -p", "What the model was asked.", "TEXT")] = None,
    response: Annotated[str | None, option(INPUT, "--response -r", "What it answered.", "TEXT")] = None,
    prompt_file: Annotated[Path | None, option(INPUT, "--prompt-file", "From a file; - is stdin.", "FILE")] = None,
    response_file: Annotated[Path | None, option(INPUT, "--response-file", "The response likewise.", "FILE")] = None,
    jsonl: Annotated[
        Path | None, option(INPUT, "--jsonl", "Both from one line of a file, in any form that score reads.", "FILE")
    ] = None,
    line: Annotated[int, option(INPUT, "--line", "Which line, from 1.", "N", min=1)] = 1,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "throughput",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
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
    record = _given(context.params)
    with terminal.hushed(verbose):
        tracer, is_chat = options.load(context.params)
        begun = time.perf_counter()
        with terminal.status("Tracing", quiet):
            trace = _trace(tracer, record, is_chat)
        seconds = time.perf_counter() - begun
        if html is not None:
            trace.to_html(html)
        if json_file is not None:
            _write_json(trace, json_file)
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
    if given["jsonl"] is not None:
        if set(texts.values()) != {(None, None)}:
            raise typer.BadParameter("--jsonl has both in it: leave out --prompt, --response and their files")
        return record_at(given["jsonl"], given["line"])
    for name, (text, file) in texts.items():
        if (text is None) == (file is None):
            remedy = "or --jsonl" if text is None else "not both"
            raise typer.BadParameter(f"give --{name} or --{name}-file, {remedy}")
    return Record(1, None, *[_text(name, *pair) for name, pair in texts.items()])


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

    if record.has_ids:
        if tracer.options.question == "user":
            raise ValueError("--question user needs chat messages: token ids don't say what the user wrote")
        ids = torch.tensor(record.prompt + record.response)
        known = tracer.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if int(ids.max()) >= known:
            raise ValueError(f"token id {int(ids.max())} is unknown to the model, which has {known}")
        return tracer.from_ids(ids[None], prompt_mask=(torch.arange(len(ids)) < len(record.prompt))[None])[0]
    prompt = record.prompt
    if isinstance(prompt, str) and chat:
        prompt = [{"role": "user", "content": prompt}]
    return tracer(prompt, record.response)


def _write_json(trace: Trace, path: Path) -> None:

    text = json.dumps(trace.to_dict() | {"options": trace.options.to_dict()}, allow_nan=False)
    if str(path) == "-":
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------- score


@app.command("score")
@_command
def score_command(
    context: typer.Context,  # holds all of these by name; options.load picks out what it needs
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One response per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="One row per response that could be traced.")],
    model: options.Model,
    layers: options.Layers = "middle",
    preset: options.Preset = "flowgraph",
    mode: options.Mode = "auto",
    edges: options.Edges = "auto",
    answer: options.Answer = "auto",
    answer_regex: options.AnswerRegex = None,
    question: options.Question = "prompt",
    score: options.Score = "throughput",
    rule: options.Rule = "top",
    top: options.Top = 0.4,
    gain: options.Gain = 1.5,
    no_answer: options.NoAnswer = "uniform",
    tail_tokens: options.TailTokens = 16,
    max_tokens: options.MaxTokens = None,
    solver: options.Solver = "auto",
    absorb_at_prompt: options.AbsorbAtPrompt = False,
    temperature: options.Temperature = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat: options.Chat = None,
    overwrite: Annotated[bool, option(OUTPUT, "--overwrite", "Replace OUT if it exists.")] = False,
    quiet: Annotated[bool, option(OUTPUT, "--quiet -q", "No progress and no summary.")] = False,
    verbose: options.Verbose = False,
    traceback: options.Traceback = False,
) -> None:
    """Score every response of a file: one row of per-token credits each.

    [bold]Example[/]
    flowgraph score rollouts.jsonl scores.parquet -m Qwen/Qwen3-4B --answer boxed

    [bold]IN[/] has one of these on each line, with an "id" if you like:
      {"prompt": text or messages, "response": text}
      {"question": text, "response": text}
      {"messages": \\[..., {"role": "assistant", "content": text}]}
      {"prompt_ids": \\[...], "response_ids": \\[...]}

    [bold]OUT[/] has the columns
      line                 number of the line in IN, from 1
      id                   as in IN, or null
      prompt_tokens, response_tokens
      response_token_ids   and, for each of these tokens, three lists:
      weights              the credit: what to multiply the token's loss with
      throughput           the flow through it, in plus out; the whole flow is 1
      reach                its influence on the answer
      answer               the text that was found, or null
      flags                list, empty where all is fine

    Lines that can't be used go to OUT.errors.jsonl as {"line", "reason"}, and
    the exit code is 3. OUT appears when it is complete: a run that was stopped
    leaves none.
    """
    from flowgraph.adapters.records import ScoreFile, errors_path, lines, parse

    _check_files(source, out, overwrite)
    with terminal.hushed(verbose):
        tracer, is_chat = options.load(context.params)
        done = _Done()
        with (
            ScoreFile(out, _metadata(model, tracer, is_chat)) as file,
            terminal.progress(source.stat().st_size, done, quiet) as advance,
        ):
            for number, raw in lines(source):
                try:
                    record = parse(number, raw)
                    trace = _trace(tracer, record, is_chat)
                    row = _row(record, trace)
                except Exception as error:  # nothing in one line may stop the run; the reason is kept
                    file.set_aside(number, terminal.reason(error))
                    done.aside += 1
                else:
                    file.add(row)
                    done.rows += 1
                    done.tokens += len(trace)
                    done.flags.update(trace.flags)
                advance(len(raw))
            if not done.rows + done.aside:
                raise ValueError(f"{source} is empty: there is no line to score")
    if not quiet:
        seconds = done.seconds
        rates = f"{done.rows / seconds:.1f} rows/s, {done.tokens / seconds:,.0f} tokens/s"
        terminal.tell(f"{out}: {done.rows:,} rows in {seconds:.1f} s ({rates})")
        for flag, count in done.flags.most_common():
            terminal.tell(f"{flag}: {count:,} of {done.rows:,} rows")
        if done.aside:
            lines_read = done.rows + done.aside
            terminal.tell(f"set aside: {done.aside:,} of {lines_read:,} lines, see {errors_path(out)}", style="yellow")
    if done.aside:
        raise typer.Exit(3)


class _Done:
    """What `score` has done so far."""

    def __init__(self) -> None:
        self.rows = self.aside = self.tokens = 0
        self.flags: Counter[str] = Counter()
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._begun, 1e-9)

    def __str__(self) -> str:
        aside = f", {self.aside:,} set aside" if self.aside else ""
        return f"{self.rows:,} rows, {self.rows / self.seconds:.1f}/s{aside}"


def _check_files(source: Path, out: Path, overwrite: bool) -> None:
    if not source.is_file():
        raise ValueError(f"IN: {source} is a folder" if source.is_dir() else f"IN: there is no file {source}")
    if source.stat().st_size == 0:
        raise ValueError(f"IN: {source} is empty: there is no line to score")
    if out.is_dir():
        raise ValueError(f"OUT: {out} is a folder; give the name of a file")
    if out.exists() and out.samefile(source):
        raise ValueError(f"IN and OUT are the same file, {out}")
    if out.exists() and not overwrite:
        raise ValueError(f"OUT: {out} exists; --overwrite replaces it")


def _metadata(model: str, tracer: Tracer, chat: bool) -> dict[str, str]:

    settings = tracer.options.to_dict() | {"chat": chat}
    return {"version": __version__, "model": model, "options": json.dumps(settings)}


def _row(record: Any, trace: Trace) -> dict[str, Any]:
    graph, response = trace.graph, trace.graph.response_mask
    return {
        "line": record.line,
        "id": record.id,
        "prompt_tokens": int(graph.prompt_mask.sum()),
        "response_tokens": int(response.sum()),
        "response_token_ids": graph.token_ids[response].tolist(),
        "weights": trace.weights[response].tolist(),
        "throughput": trace.throughput[response].tolist(),
        "reach": trace.reach[response].tolist(),
        "answer": trace.answer,
        "flags": list(trace.flags),
    }


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
            dicts.append(traces[-1].to_dict() | {"title": item.title})
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
