"""The command line: flowgraph trace, score, doctor and demo.

Results go to stdout, progress and messages to stderr. Exit codes: 0 all fine; 1 it could not be done, and one line
says why; 2 wrong usage; 3 `score` finished, but set some lines aside; 130 stopped by Ctrl-C.

Torch and transformers take seconds to import, so everything heavy is imported inside functions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flowgraph._version import __version__

if TYPE_CHECKING:
    from flowgraph.tracer import Options, Trace, Tracer

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


# ------------------------------------------------------------------------- options


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _parse_layers(text: str) -> Any:
    if text in ("middle", "all"):
        return text
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise typer.BadParameter(f"{text!r} is not middle, all, or layer numbers like 10,11,12")
    return [int(number) for number in text.split(",")]


def _parse_edges(text: str) -> tuple[str, float]:
    """The name of a rule of flowgraph.sparsify, and its number; ("auto", 0) for none."""
    try:
        if text in ("auto", "all"):
            return ("auto" if text == "auto" else "Threshold"), 0
        if text.startswith("top:"):
            return "TopK", int(text[4:])
        if text.startswith("mass:"):
            return "Mass", float(text[5:])
        above, _, below = text.partition("/")
        return "Threshold", float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not auto, all, a threshold like 1/1024, top:32 or mass:0.9") from None


def _parse_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}") from None


_IN, _MODEL, _METHOD, _CREDIT, _OUT = "What to trace", "Model", "Graph and flow", "Credit", "Output"


def _choice(name: str, choices: Sequence[str], help: str, panel: str) -> Any:
    # A parser in place of an Enum: values hold "####" and the like.
    return typer.Option(name, parser=_one_of(*choices), metavar="NAME", help=help, rich_help_panel=panel)


SOLVERS = ("auto", "scatter", "scipy", "reference")
FINDERS = ("auto", "boxed", "####", "A:", "<answer>", "answer is")
RULES = ("top", "proportional", "rank", "softmax")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Folder or hub name of a causal language model, or smollm2, the small one of the demo.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    str,
    _choice(
        "--dtype",
        ("auto", "float32", "bfloat16"),
        "Of its weights: float32, bfloat16, or auto: float32 on the CPU and as stored elsewhere.",
        _MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps, or auto: CUDA where there is one, else the CPU.",
        rich_help_panel=_MODEL,
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Give the prompt as a user message to the chat template, or as it is.",
        show_default="chat if there is a template",
        rich_help_panel=_MODEL,
    ),
]
Layers = Annotated[
    Any,
    typer.Option(
        "--layers",
        parser=_parse_layers,
        metavar="WHICH",
        help="Layers whose attention counts: middle (third), all, or numbers like 10,11,12.",
        rich_help_panel=_METHOD,
    ),
]
EdgeRule = Annotated[
    Any,
    typer.Option(
        "--edges",
        parser=_parse_edges,
        metavar="RULE",
        help="Which attention weights become edges: all, those over a threshold like 1/1024, the top:32 or the "
        "mass:0.9 of each token. auto is all up to 2,048 tokens, above that 1/1024.",
        rich_help_panel=_METHOD,
    ),
]
AnswerFinder = Annotated[
    str,
    _choice(
        "--answer",
        FINDERS,
        "How the answer is found: auto (the first that finds one), boxed, ####, A:, <answer>, answer is.",
        _METHOD,
    ),
]
AnswerRegex = Annotated[
    Any,
    typer.Option(
        "--answer-regex",
        parser=_parse_pattern,
        metavar="REGEX",
        help="Find it with a regular expression: its group 1, if it has one.",
        rich_help_panel=_METHOD,
    ),
]
Preset = Annotated[
    str,
    _choice(
        "--preset",
        ("flowgraph", "paper"),
        "Where flow ends: at the tokens that predict the answer (flowgraph) or at its own (paper).",
        _METHOD,
    ),
]
Solver = Annotated[
    str,
    _choice(
        "--solver",
        SOLVERS,
        "scatter, scipy, reference (dense), or auto: scipy on the CPU and scatter elsewhere.",
        _METHOD,
    ),
]
Score = Annotated[
    str, _choice("--score", ("throughput", "reach"), "What tokens are ranked by: throughput or reach.", _CREDIT)
]
Rule = Annotated[str, _choice("--rule", RULES, "How scores become weights: top, proportional, rank, softmax.", _CREDIT)]
Top = Annotated[
    float,
    typer.Option(
        "--top", metavar="SHARE", help="Share of the tokens that the rule top picks.", rich_help_panel=_CREDIT
    ),
]
Gain = Annotated[
    float,
    typer.Option("--gain", metavar="WEIGHT", help="The highest weight; 1 is neutral.", rich_help_panel=_CREDIT),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Show what transformers and torch have to say.", rich_help_panel=_OUT),
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback",
        envvar="FLOWGRAPH_TRACEBACK",
        show_envvar=False,
        help="Show where in the code an error came up (or set FLOWGRAPH_TRACEBACK=1).",
        rich_help_panel=_OUT,
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"flowgraph {__version__}")
        raise typer.Exit


@app.callback()
def _flowgraph(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def _options(**given: Any) -> Options:
    """The tracer's options; what the library refuses in them is wrong usage, and known before a model is loaded."""
    import torch

    from flowgraph.credit import weights_from_scores
    from flowgraph.sparsify import Mass, Threshold, TopK
    from flowgraph.tracer import Options

    regex = given.pop("answer_regex")
    rule, number = given.pop("edges")
    try:
        rules: dict[str, Any] = {"Threshold": Threshold, "TopK": TopK, "Mass": Mass}
        given["edges"] = None if rule == "auto" else rules[rule](number)
        if regex is not None:
            given["answer"] = regex
        options = Options(**given)
        weights_from_scores(
            torch.ones(1), torch.ones(1, dtype=torch.bool), options.rule, top=options.top, gain=options.gain
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return options


# ------------------------------------------------------------------------- errors and messages


def _out() -> Console:
    return Console(highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _say(message: str) -> None:
    _err().print(Text(_clean(message), style="dim"), soft_wrap=True)


def _command(function: Function) -> Function:
    """Turns what goes wrong in a command into one line and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer and whoever reads our output know what to do with them
        except KeyboardInterrupt:
            _err().print("stopped", style="yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs["traceback"]:
                raise
            _err().print(Text("error: ", style="bold red") + Text(_clean(_reason(error))), soft_wrap=True)
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif not isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text} (--traceback shows where)"
    elif not text:
        text = type(error).__name__
    return text if len(text) <= 1000 else text[:1000] + " ..."


def _clean(text: str) -> str:
    """Without what a terminal would obey: escape sequences, and marks that turn the direction of writing."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


@contextmanager
def _hushed(verbose: bool) -> Iterator[None]:
    """Keeps transformers' bars and everyone's warnings off the terminal."""
    if verbose:
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------- model and records


@dataclass(frozen=True)
class _Loaded:
    tracer: Tracer
    chat: bool

    def trace(self, record: Any) -> Trace:
        """One `Record` of adapters/records.py, in whichever form it came."""
        import torch

        if record.has_ids:
            prompt, response = torch.tensor(record.prompt), torch.tensor(record.response)
            ids = torch.cat([prompt, response])
            known = self.tracer.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
            if int(ids.max()) >= known:
                raise ValueError(f"token id {int(ids.max())} is unknown to the model, which has {known}")
            return self.tracer.from_ids(ids[None], prompt_mask=(torch.arange(len(ids)) < len(prompt))[None])[0]
        prompt_text: Any = record.prompt
        if isinstance(prompt_text, str) and self.chat:
            prompt_text = [{"role": "user", "content": prompt_text}]
        return self.tracer(prompt_text, record.response)


def _load(name: str, options: Options, dtype: str, device: str, chat: bool | None) -> _Loaded:
    """The model and tokenizer, tried out on two tokens: what fails there would fail on every trace."""
    import torch

    from flowgraph.tracer import Tracer

    where = _device(device)
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and where.type == "cpu":
        wanted = torch.float32
    if name == "smollm2":
        from flowgraph import smollm2

        model, tokenizer = smollm2.load(torch.bfloat16 if wanted == "auto" else wanted, say=_say)
    else:
        model, tokenizer = _pretrained(name, wanted)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {name} has no chat template; leave --chat out, or use --no-chat")
    tracer = Tracer(model.eval().to(where), tokenizer)
    mask = torch.tensor([[True, False]])
    Tracer(model, layers=options.layers, edges=options.edges, solver=options.solver).from_ids(
        torch.zeros(1, 2, dtype=torch.long), prompt_mask=mask, sink_mask=~mask
    )
    tracer.options = options
    return _Loaded(tracer, bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"--device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= found.get(device.type, 0):
        raise ValueError(f"there is no device {name} here; flowgraph doctor lists what there is")
    return device


def _check_model(name: str) -> None:
    """Refuse a folder that isn't one before anything slow begins."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith((".", "/", "~"))):
        raise ValueError(f"--model {name}: there is no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: the folder has no config.json; save_pretrained of transformers makes one")


def _pretrained(name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype), tokenizer
    except Exception as error:
        raise RuntimeError(f"--model {name} cannot be loaded: {_reason(error)}") from error


# ------------------------------------------------------------------------- a trace in the terminal

FLAGS = {
    "no_answer": "no answer was found, so every weight is 1; see --answer and --answer-regex",
    "tail_answer": "no answer was found: the last tokens of the response stand for it",
    "cut_off": "the response seems to be cut off before its end",
    "several_answers": "several answers were found; the last one counts",
    "no_flow": "no flow passes a token that could get credit, so every weight is 1",
}

# From cold to hot, each readable on dark and on light terminals.
_SHADES = ("#ffffff on #3b6fb5", "#000000 on #6bb3ad", "#000000 on #e3cf57", "#000000 on #f0923b", "#ffffff on #c92a1e")
_SHADES_OF_16 = ("white on blue", "black on cyan", "black on green", "black on yellow", "white on red")
_ANSWER = "bold underline green"
_SHOWN_PROMPT = 300  # tokens


def _show(trace: Trace, seconds: float | None = None) -> None:
    """Heat map (where there are colours), facts, flags and top tokens, to stdout."""
    out = _out()
    coloured = out.color_system is not None and not out.no_color
    if coloured:
        shades = _SHADES_OF_16 if out.color_system in ("standard", "windows") else _SHADES
        out.print(_heat_map(trace, shades))
        out.print(_legend(trace.options.score, shades))
        out.print()
    out.print(_facts(trace, seconds), soft_wrap=True)
    for flag in trace.flags:
        out.print(Text(f"{flag}: ", style="bold yellow") + Text(FLAGS[flag]), soft_wrap=True)
    table = _top_tokens(trace, coloured)
    if table.row_count:
        out.print()
        out.print(table)


def _heat_map(trace: Trace, shades: Sequence[str]) -> Text:
    graph, credit = trace.graph, trace.credit
    pieces = trace.text or []
    passed = (credit.mask & (credit.scores > 0)).nonzero().flatten()
    order = credit.scores[passed].argsort(stable=True)
    level = {int(passed[k]): rank * len(shades) // len(order) for rank, k in enumerate(order.tolist())}
    answer = trace.spans.answer_tokens
    prompt = graph.prompt_mask.nonzero().flatten().tolist()
    hidden = (
        set(prompt[_SHOWN_PROMPT // 3 : len(prompt) - _SHOWN_PROMPT * 2 // 3]) if len(prompt) > _SHOWN_PROMPT else set()
    )
    text = Text()
    for k, piece in enumerate(pieces):
        if k in hidden:
            if k - 1 not in hidden:
                text.append(f" ... {len(hidden):,} tokens ... ", style="dim italic")
            continue
        piece = _clean(piece)
        if k in level:
            # A line break carries flow like any token: give its shade something to be seen on.
            text.append(piece.replace("\n", "↵\n"), style=shades[level[k]])
        else:
            style = _ANSWER if answer[k] else "" if graph.response_mask[k] else "dim"
            text.append(piece, style=style)
    text.rstrip()
    return text


def _legend(score: str, shades: Sequence[str]) -> Text:
    text = Text(f"{score} in this response: low ")
    for shade in shades:
        text.append("  ", style=shade)
    text.append(" high   ")
    text.append("answer", style=_ANSWER)
    text.append("   ")
    text.append("prompt", style="dim")
    return text


def _facts(trace: Trace, seconds: float | None) -> Text:
    facts, graph = trace.summary(), trace.graph
    layers = graph.layers
    numbers = (
        f"{layers[0]}-{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1 else None
    )
    parts = [
        Path(graph.model).name,
        f"layers {numbers or ','.join(map(str, layers))}",
        f"{facts['prompt_tokens']:,} prompt + {facts['response_tokens']:,} response tokens",
        f"{facts['edges']:,} edges ({graph.rule})",
        "no answer" if trace.answer is None else f'answer "{_visible(trace.answer)}" ({trace.spans.finder})',
        f"{facts['credited']:,} tokens credited",
        f"solver {trace.flow.solver}",
    ]
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    return Text(_clean(" | ".join(parts)), style="bold")


def _top_tokens(trace: Trace, coloured: bool, count: int = 10) -> Table:
    table = Table(
        title=f"Top tokens by {trace.options.score}", title_style="bold", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("token", no_wrap=True)
    table.add_column("at", justify="right")
    table.add_column(trace.options.score, justify="right")
    table.add_column("weight", justify="right")
    table.add_column("in its context", no_wrap=True, overflow="ellipsis")
    pieces = trace.text or []
    for place, piece, score in trace.top(count):
        if score <= 0:
            break
        before = _visible("".join(pieces[max(0, place - 8) : place]))[-24:]
        after = _visible("".join(pieces[place + 1 : place + 9]))[:24]
        context = Text()
        context.append(before, style="dim")
        context.append(_visible(piece) if coloured else f"»{_visible(piece)}«", style="bold reverse")
        context.append(after, style="dim")
        table.add_row(
            Text(_visible(piece, edges=True)), str(place), f"{score:.4g}", f"{float(trace.weights[place]):.3g}", context
        )
    return table


def _visible(text: str, edges: bool = False) -> str:
    """On one line; with `edges`, blanks at its ends are marked."""
    text = _clean(text).replace("\n", "↵").replace("\t", "⇥")
    if edges and text != text.strip(" "):
        inner = text.strip(" ")
        start = len(text) - len(text.lstrip(" "))
        text = "␣" * (start if inner else len(text)) + inner + "␣" * (len(text) - start - len(inner) if inner else 0)
    return text


# ------------------------------------------------------------------------- trace


@app.command("trace")
@_command
def trace_command(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What the model was asked.", rich_help_panel=_IN),
    ] = None,
    response: Annotated[
        str | None,
        typer.Option("--response", "-r", metavar="TEXT", help="What it answered.", rich_help_panel=_IN),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The prompt from a file; - is stdin.", rich_help_panel=_IN),
    ] = None,
    response_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The response likewise.", rich_help_panel=_IN)
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Both from one line of a file, in any form that score reads.",
            rich_help_panel=_IN,
        ),
    ] = None,
    line: Annotated[int, typer.Option(metavar="N", min=1, help="Which line, from 1.", rich_help_panel=_IN)] = 1,
    layers: Layers = "middle",
    preset: Preset = "flowgraph",
    answer: AnswerFinder = "auto",
    answer_regex: AnswerRegex = None,
    edges: EdgeRule = "auto",
    score: Score = "throughput",
    rule: Rule = "top",
    top: Top = 0.4,
    gain: Gain = 1.5,
    solver: Solver = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    chat: Chat = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the trace as JSON; - is stdout, and then nothing else goes there.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the trace as one page.", rich_help_panel=_OUT),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Show nothing, only write files.", rich_help_panel=_OUT),
    ] = False,
    verbose: Verbose = False,
    traceback: Traceback = False,
) -> None:
    """Trace one response: its tokens as a heat map, and as JSON or a page if you like.

    [bold]Examples[/]
    flowgraph trace -m smollm2 -p "6 times 7?" -r "It is 42. The answer is 42."
    flowgraph trace -m ./model --jsonl rollouts.jsonl --line 12 --html trace.html
    flowgraph trace -m ./model --jsonl rollouts.jsonl --json - -q | jq .summary

    Without colours (NO_COLOR, a pipe) a table of the top tokens stands for
    the heat map.
    """
    _check_model(model)
    record = _given(prompt, prompt_file, response, response_file, jsonl, line)
    with _hushed(verbose):
        options = _options(
            layers=layers, preset=preset, answer=answer, answer_regex=answer_regex, edges=edges,
            score=score, rule=rule, top=top, gain=gain, solver=solver,
        )  # fmt: skip
        with _status(f"Loading {model}", quiet):
            loaded = _load(model, options, dtype, device, chat)
        begun = time.perf_counter()
        with _status("Tracing", quiet):
            traced = loaded.trace(record)
        seconds = time.perf_counter() - begun
        if html is not None:
            traced.to_html(html)
        if json_file is not None:
            _write_json(traced, json_file)
    if not quiet and str(json_file) != "-":
        _show(traced, seconds)
    for path in (html, json_file):
        if path is not None and str(path) != "-" and not quiet:
            _say(f"wrote {path}")


def _given(
    prompt: str | None,
    prompt_file: Path | None,
    response: str | None,
    response_file: Path | None,
    jsonl: Path | None,
    line: int,
) -> Any:
    """The `Record` that the options name."""
    from flowgraph.adapters.records import Record, record_at

    texts = {"--prompt": prompt, "--prompt-file": prompt_file, "--response": response, "--response-file": response_file}
    given = [name for name, value in texts.items() if value is not None]
    if jsonl is not None:
        if given:
            raise typer.BadParameter(f"--jsonl has prompt and response in it; leave out {', '.join(given)}")
        return record_at(jsonl, line)
    for one, other in (("--prompt", "--prompt-file"), ("--response", "--response-file")):
        if (one in given) == (other in given):
            raise typer.BadParameter(f"give {one} or {other}" + (", not both" if one in given else ", or --jsonl"))
    prompt = _read(prompt_file) if prompt_file is not None else prompt
    response = _read(response_file) if response_file is not None else response
    for name, text in (("prompt", prompt), ("response", response)):
        if not (text or "").strip():
            raise ValueError(f"the {name} is empty")
    assert prompt is not None and response is not None
    return Record(line, None, prompt, response)


def _read(path: Path) -> str:
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from error
    return text.removesuffix("\n").removesuffix("\r")  # the end of the last line is the file's, not the text's


def _write_json(trace: Trace, path: Path) -> None:
    from flowgraph.tracer import options_dict

    text = json.dumps(trace.to_dict() | {"options": options_dict(trace.options)}, allow_nan=False)
    if str(path) == "-":
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _status(message: str, quiet: bool) -> Iterator[None]:
    err = _err()
    if quiet or not err.is_terminal:
        yield
    else:
        with err.status(Text(message)):
            yield


# ------------------------------------------------------------------------- score


@app.command("score")
@_command
def score_command(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One response per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="One row per response that could be traced.")],
    model: Model,
    layers: Layers = "middle",
    preset: Preset = "flowgraph",
    answer: AnswerFinder = "auto",
    answer_regex: AnswerRegex = None,
    edges: EdgeRule = "auto",
    score: Score = "throughput",
    rule: Rule = "top",
    top: Top = 0.4,
    gain: Gain = 1.5,
    solver: Solver = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    chat: Chat = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.", rich_help_panel=_OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary.", rich_help_panel=_OUT)
    ] = False,
    verbose: Verbose = False,
    traceback: Traceback = False,
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
    _check_model(model)
    with _hushed(verbose):
        options = _options(
            layers=layers, preset=preset, answer=answer, answer_regex=answer_regex, edges=edges,
            score=score, rule=rule, top=top, gain=gain, solver=solver,
        )  # fmt: skip
        with _status(f"Loading {model}", quiet):
            loaded = _load(model, options, dtype, device, chat)
        done = _Done()
        with ScoreFile(out, _metadata(model, loaded)) as file, _progress(source, done, quiet) as advance:
            for number, raw in lines(source):
                try:
                    record = parse(number, raw)
                    traced = loaded.trace(record)
                    row = _row(record, traced)
                except Exception as error:  # nothing in one line may stop the run; the reason is kept
                    file.set_aside(number, _reason(error))
                    done.aside += 1
                else:
                    file.add(row)
                    done.rows += 1
                    done.tokens += len(traced)
                    done.flags.update(traced.flags)
                advance(len(raw))
            if not file.written + file.aside:
                raise ValueError(f"{source} is empty: there is no line to score")
    if not quiet:
        console, seconds = _out(), done.seconds
        rates = f"{done.rows / seconds:.1f} rows/s, {done.tokens / seconds:,.0f} tokens/s"
        text = f"{out}: {done.rows:,} rows in {seconds:.1f} s ({rates})"
        console.print(Text(_clean(text)), soft_wrap=True)
        for flag, count in done.flags.most_common():
            console.print(Text(f"{flag}: {count:,} of {done.rows:,} rows"))
        if done.aside:
            text = f"set aside: {done.aside:,} of {done.rows + done.aside:,} lines, see {errors_path(out)}"
            console.print(Text(_clean(text), style="yellow"), soft_wrap=True)
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


def _metadata(model: str, loaded: _Loaded) -> dict[str, str]:
    from flowgraph.tracer import options_dict

    options = options_dict(loaded.tracer.options) | {"chat": loaded.chat}
    return {"version": __version__, "model": model, "options": json.dumps(options)}


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


@contextmanager
def _progress(source: Path, done: _Done, quiet: bool, every: float = 60) -> Iterator[Callable[[int], None]]:
    """Gives a function to call after each line, with its bytes: a bar on a terminal, a line a minute in a log."""
    err = _err()
    if quiet or not err.is_terminal:
        told = time.perf_counter()

        def tell(size: int) -> None:
            nonlocal told
            if not quiet and time.perf_counter() - told >= every:
                told = time.perf_counter()
                _say(str(done))

        yield tell
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(str(done), total=source.stat().st_size)
        yield lambda size: bar.update(task, advance=size, description=str(done))


# ------------------------------------------------------------------------- doctor

_REQUIRED = ("torch", "torch-geometric", "transformers", "numpy", "scipy", "pyarrow")
_EXTRAS = {  # extra of pyproject.toml -> module: distribution, as far as it is known
    "scatter": {"torch_scatter": "torch-scatter"},
    "cuda": {"cupy": "cupy-cuda12x", "triton": "triton"},
    "trl": {"trl": "trl"},
    "ray": {"ray": "ray"},
    "report": {"plotly": "plotly"},
    "demo": {"gguf": "gguf"},
}


@app.command("doctor")
@_command
def doctor_command(verbose: Verbose = False, traceback: Traceback = False) -> None:
    """Say what is installed and which devices there are, and try everything out on a tiny model.

    Downloads nothing. The exit code is 1 if something is wrong.
    """
    import torch

    out = _out()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("[bold]versions[/]")
    table.add_row("flowgraph", __version__)
    table.add_row("python", platform.python_version())
    for name in _REQUIRED:
        table.add_row(name, importlib.metadata.version(name))
    table.add_row()
    table.add_row("[bold]devices[/]")
    for name, what in _devices():
        table.add_row(name, Text(what))
    table.add_row()
    table.add_row("[bold]extras[/]")
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        parts = [f"{module} {_version_of(modules[module])}" for module in modules if module not in missing]
        if missing:
            parts.append(f'no {" and no ".join(missing)}: pip install "flowgraph-llm[{extra}]"')
        table.add_row(extra, Text(", ".join(parts), style="dim" if missing else ""))
    table.add_row()
    table.add_row("[bold]self-test[/]")
    wrong = 0
    with _hushed(verbose):
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for what, error, limit in self_test(device):
                good = error <= limit  # False for NaN
                wrong += not good
                verdict = Text("OK", style="green") if good else Text("WRONG", style="bold red")
                table.add_row(f"{device}, {what}", verdict + Text(f", differs by {error:.1e} of {limit:.0e} allowed"))
    out.print(table)
    out.print()
    if wrong:
        raise RuntimeError(f"{wrong} of the self-tests went wrong: please report it, with the table above")
    out.print("OK: everything that FlowGraph needs works here.", style="bold green")


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        yield "cuda", "none"
    yield "mps", "yes" if torch.backends.mps.is_available() else "none"


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def self_test(device: str) -> Iterator[tuple[str, float, float]]:
    """(what, largest error, error allowed): a tiny random model captured and traced with each solver.

    The truth is the attention that the model itself gives out, and the dense float64 solver.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flowgraph import TokenGraph, Tracer, trace_flow

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"  # the kernel that gives its attention out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(3, 64, (1, 48))
    model.to(device)
    place = torch.arange(48)[None]
    answer = (place >= 40) & (place < 44)
    trace = Tracer(model).from_ids(ids, prompt_mask=place < 16, answer_tokens=answer)[0]
    with torch.no_grad():
        attention = model(ids.to(device), output_attentions=True).attentions
    dense = torch.stack([attention[layer][0].double().mean(0) for layer in trace.graph.layers]).mean(0).cpu()
    masks = {name: getattr(trace.graph, name).cpu() for name in ("prompt_mask", "answer_mask", "response_mask")}
    truth = trace_flow(TokenGraph.from_dense(dense, **masks), "reference")
    captured = torch.zeros(48, 48, dtype=torch.float64)
    source, target = trace.graph.edge_index.cpu()
    captured[target, source] = trace.graph.edge_weight.double().cpu()
    yield "capture", float((captured - dense.tril(-1)).abs().max()), 1e-5
    for solver in SOLVERS[1:]:
        if solver == "scipy" and device != "cpu":
            continue
        flow = trace_flow(trace.graph, solver)
        errors = [
            (getattr(flow, name).double().cpu() - getattr(truth, name)).abs().max() / getattr(truth, name).max()
            for name in ("reach", "throughput")
        ]
        yield f"solver {solver}", float(max(errors)), 1e-4


# ------------------------------------------------------------------------- demo


@app.command("demo")
@_command
def demo_command(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where demo.html and demo.json go.", rich_help_panel=_OUT),
    ] = Path("out"),
    verbose: Verbose = False,
    traceback: Traceback = False,
) -> None:
    """Trace right and wrong solutions, and an answer of the model's own, with a small real model.

    The first run fetches SmolLM2-135M-Instruct (98 MB) and converts it, which
    takes about a minute. It is kept in a cache folder ($FLOWGRAPH_CACHE, else
    ~/.cache/flowgraph), and later runs take seconds.
    """
    with _hushed(verbose):
        import torch

        from flowgraph import Tracer, page, smollm2
        from flowgraph.demo import ITEMS

        _say("Loading SmolLM2-135M-Instruct")
        model, tokenizer = smollm2.load(torch.float32, say=_say)
        tracer = Tracer(model, tokenizer)
        traces, dicts = [], []
        err = _err()
        columns = (SpinnerColumn(), BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("", total=len(ITEMS) + 1)
            for item in ITEMS:
                step = f"{'Tracing' if item.response else 'Answering and tracing'}: {item.title}"
                bar.update(task, description=step)
                if not err.is_terminal:
                    _say(step)
                messages = [{"role": "user", "content": item.question}]
                if item.response is not None:
                    traces.append(tracer(messages, item.response))
                else:
                    ids, prompt_mask, cut = _generate(model, tokenizer, messages)
                    traces.append(tracer.from_ids(ids, prompt_mask=prompt_mask, truncated=[cut])[0])
                dicts.append(traces[-1].to_dict() | {"title": item.title})
                bar.advance(task)
            bar.update(task, description="Writing the page")
            path = page.write(out / "demo.html", dicts, title="FlowGraph demo").resolve()
            (out / "demo.json").write_text(json.dumps(dicts, allow_nan=False) + "\n", encoding="utf-8")
    console = _out()
    console.print(Text(f"{ITEMS[0].title}\n", style="bold"))
    _show(traces[0])
    console.print()
    console.print(Text(f"{len(dicts)} traces on one page: {_shown(path)}"), soft_wrap=True)
    console.print(Text(f"Open it in a browser: {path.as_uri()}"), soft_wrap=True)


def _generate(model: Any, tokenizer: Any, messages: list[dict[str, str]], length: int = 120) -> tuple[Any, Any, bool]:
    """The model's own greedy answer: ids [1, T] with the prompt, its mask [1, T], and whether it was cut off."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    cut = ids.shape[1] == start + length and int(ids[0, -1]) != tokenizer.eos_token_id
    return ids, (torch.arange(ids.shape[1]) < start)[None], cut


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    main()
