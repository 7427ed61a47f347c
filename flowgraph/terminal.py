"""What the command line shows: traces and tables on stdout; messages, progress and errors on stderr.

Text of a model or a file passes through `clean` or `visible` before it is shown: it may hold anything, escape
sequences too. Where there are no colours (NO_COLOR, a pipe), a table of the top tokens stands for the heat map.
"""

from __future__ import annotations

import re
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from flowgraph.compare import Comparison, Example
    from flowgraph.stability import Stability
    from flowgraph.trace import Trace

# ------------------------------------------------------------------------- text and messages


def clean(text: str) -> str:
    """Without what a terminal would obey: escape sequences, and marks that turn the direction of writing."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def visible(text: str, edges: bool = False) -> str:
    """Clean and on one line; with `edges`, blanks at its ends are marked."""
    text = clean(text).replace("\n", "↵").replace("\t", "⇥")
    return re.sub("^ +| +$", lambda blanks: "␣" * len(blanks[0]), text) if edges else text


def reason(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif not isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError):
        text = f"{type(error).__name__}: {text} (--traceback shows where)"
    elif not text:
        text = type(error).__name__
    return text if len(text) <= 1000 else text[:1000] + " ..."


_WIDE = 120  # columns that a table of numbers may take in a narrow terminal or a pipe: a cut number is worse


def stdout(wide: bool = False) -> Console:
    """For results; `wide`: for tables of numbers."""
    out = Console(highlight=False)
    if wide:
        out.width = max(out.width, _WIDE)
    return out


def stderr() -> Console:
    """For everything else."""
    return Console(stderr=True, highlight=False)


def tell(message: str, style: str = "") -> None:
    """One line of a result."""
    stdout().print(Text(clean(message), style=style), soft_wrap=True)


def say(message: str, style: str = "dim") -> None:
    """One line about what goes on."""
    stderr().print(Text(clean(message), style=style), soft_wrap=True)


def complain(message: str) -> None:
    """One line about what went wrong."""
    stderr().print(Text("error: ", style="bold red") + Text(clean(message)), soft_wrap=True)


# ------------------------------------------------------------------------- while something runs


@contextmanager
def hushed(verbose: bool) -> Iterator[None]:
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


@contextmanager
def status(message: str, quiet: bool) -> Iterator[None]:
    """Something turns beside the message, on a terminal."""
    err = stderr()
    if quiet or not err.is_terminal:
        yield
    else:
        with err.status(Text(message)):
            yield


@contextmanager
def progress(total: int, state: object, quiet: bool, every: float = 60) -> Iterator[Callable[[float], None]]:
    """Gives a function to call with how much of `total` has just been done.

    Shows `str(state)` beside a bar on a terminal, and in a line each `every` seconds in a log.
    """
    err = stderr()
    if err.is_terminal and not quiet:
        percent, now = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
        with Progress(BarColumn(), percent, now, TimeRemainingColumn(), console=err, transient=True) as bar:
            task = bar.add_task(str(state), total=total)
            yield lambda size: bar.update(task, advance=size, description=str(state))
        return
    said = time.perf_counter()

    def advance(size: float) -> None:
        nonlocal said
        if not quiet and time.perf_counter() - said >= every:
            said = time.perf_counter()
            say(str(state))

    yield advance


# ------------------------------------------------------------------------- a trace

FLAGS = {
    "no_answer": "no answer was found; --answer-regex says how to find it, --no-answer what to do without one",
    "tail_answer": "the last tokens of the response stand for the answer",
    "cut_off": "the response seems to be cut off before its end",
    "several_answers": "several answers were found; the last one counts",
    "no_flow": "no flow passes a token that could get credit, so every weight is 1",
}

# From cold to hot, each readable on dark and on light terminals.
SHADES = ("#ffffff on #3b6fb5", "#000000 on #6bb3ad", "#000000 on #e3cf57", "#000000 on #f0923b", "#ffffff on #c92a1e")
SHADES_OF_16 = ("white on blue", "black on cyan", "black on green", "black on yellow", "white on red")
ANSWER, PROMPT = "bold underline green", "dim"
SHOWN_PROMPT = 300  # tokens; of a longer prompt, the middle is left out


def show(trace: Trace, seconds: float | None = None) -> None:
    """Heat map (where there are colours), facts, flags and top tokens, to stdout."""
    out = stdout()
    coloured = out.color_system is not None and not out.no_color
    if coloured:
        shades = SHADES_OF_16 if out.color_system in ("standard", "windows") else SHADES
        out.print(_heat_map(trace, shades))
        out.print(_legend(trace.options.score_name, shades))
        out.print()
    out.print(_facts(trace, seconds), soft_wrap=True)
    _show_flags(trace.flags)
    table = _top_tokens(trace, coloured)
    if table.row_count:
        out.print()
        out.print(table)


def _show_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        stdout().print(Text(f"{flag}: ", style="bold yellow") + Text(FLAGS[flag]), soft_wrap=True)


def _heat_map(trace: Trace, shades: Sequence[str]) -> Text:
    scores = trace.credit.scores
    passed = (trace.credit.mask & (scores > 0)).nonzero().flatten()
    ranked = passed[scores[passed].argsort(stable=True)].tolist()
    shade = {token: shades[rank * len(shades) // len(ranked)] for rank, token in enumerate(ranked)}
    prompt = trace.graph.prompt_mask.nonzero().flatten().tolist()
    hidden = prompt[SHOWN_PROMPT // 3 : -(SHOWN_PROMPT * 2 // 3)] if len(prompt) > SHOWN_PROMPT else []
    style = dict.fromkeys(trace.spans.answer_tokens.nonzero().flatten().tolist(), ANSWER)
    style |= dict.fromkeys((~trace.graph.response_mask).nonzero().flatten().tolist(), PROMPT)
    text = Text()
    for token, piece in enumerate(trace.text or []):
        if token in shade:
            # A line break carries flow like any token: give its shade something to be seen on.
            text.append(clean(piece).replace("\n", "↵\n"), style=shade[token])
        elif not hidden or not hidden[0] <= token <= hidden[-1]:
            text.append(clean(piece), style=style.get(token))
        elif token == hidden[0]:
            text.append(f" ... {len(hidden):,} tokens ... ", style="dim italic")
    text.rstrip()
    return text


def _legend(score: str, shades: Sequence[str]) -> Text:
    scale = [("  ", shade) for shade in shades]
    return Text.assemble(
        f"{score} in this response: low ", *scale, " high   ", ("answer", ANSWER), "   ", ("prompt", PROMPT)
    )


def _facts(trace: Trace, seconds: float | None) -> Text:
    facts, graph = trace.summary(), trace.graph
    first, last = graph.layers[0], graph.layers[-1]
    in_a_row = first < last and graph.layers == list(range(first, last + 1))
    parts = [
        Path(graph.model).name,
        "layers " + (f"{first}-{last}" if in_a_row else ",".join(map(str, graph.layers))),
        f"{facts['prompt_tokens']:,} prompt + {facts['response_tokens']:,} response tokens",
        f"{facts['edges']:,} edges ({graph.rule})",
        "no answer" if trace.answer is None else f'answer "{visible(trace.answer)}" ({trace.spans.finder})',
        f"{facts['credited']:,} tokens credited",
        f"solver {trace.flow.solver}",
        *([] if seconds is None else [f"{seconds:.1f} s"]),
    ]
    return Text(clean(" | ".join(parts)), style="bold")


def _top_tokens(trace: Trace, coloured: bool, count: int = 10) -> Table:
    score_name = trace.options.score_name
    table = Table(
        title=f"Top tokens by {score_name}", title_style="bold", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("token", no_wrap=True)
    for name in ("at", score_name, "weight"):
        table.add_column(name, justify="right")
    table.add_column("in its context", no_wrap=True, overflow="ellipsis")
    pieces = trace.text or []
    for token, piece, score in trace.top(count):
        if score <= 0:
            break
        context = Text.assemble(
            (visible("".join(pieces[max(0, token - 8) : token]))[-24:], "dim"),
            (visible(piece) if coloured else f"»{visible(piece)}«", "bold reverse"),
            (visible("".join(pieces[token + 1 : token + 9]))[:24], "dim"),
        )
        weight = float(trace.weights[token])
        table.add_row(Text(visible(piece, edges=True)), str(token), f"{score:.4g}", f"{weight:.3g}", context)
    return table


# ------------------------------------------------------------------------- two groups

SURE = 0.05  # a corrected p up to this is shown in bold
ENDS = 3  # measures whose traces at the ends are named


def show_comparison(comparison: Comparison, pair: str | None = None) -> None:
    """A row per measure, the surest first, and what is at the ends of the first few, to stdout.

    That is traces, or pairs: those are named by what they have in the column `pair`.
    """
    out, (a, b) = stdout(wide=True), (clean(name) for name in comparison.names)
    sizes = f"{a}: {comparison.sizes[0]:,} traces | {b}: {comparison.sizes[1]:,} traces"
    if comparison.pairs is not None:
        sizes += (
            f" | {comparison.pairs:,} pairs; without a partner: {comparison.unpaired[0]:,}, {comparison.unpaired[1]:,}"
        )
    out.print(Text(sizes, style="bold"), soft_wrap=True)
    missing = any(sum(one.missing) for one in comparison)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("measure", no_wrap=True)
    interval = f"{comparison.settings['confidence']:.0%} interval"
    columns = [a, b, "difference", interval, "AUC", "d", "p", *(["without"] if missing else [])]
    means = max(len(_number(mean)) for one in comparison for mean in one.mean)
    for name in columns:
        is_group = name in (a, b)  # a name may be long and is folded; its numbers are not
        table.add_column(
            Text(name), justify="right", no_wrap=not is_group, overflow="fold", min_width=means if is_group else None
        )
    for one in comparison.ranked():
        ends = "" if one.low != one.low else f"{one.low:+.3g} .. {one.high:+.3g}"
        cells = [
            *map(_number, one.mean),
            _number(one.difference, "+.3g"),
            ends,
            _number(one.auc, ".2f"),
            _number(one.cohens_d, "+.2f"),
            _number(one.p_corrected, ".2g"),
            *(["{}, {}".format(*one.missing) if sum(one.missing) else ""] if missing else []),
        ]
        table.add_row(one.measure, *cells, style="bold" if one.p_corrected <= SURE else None)
    out.print(table)
    if comparison.unshared:
        out.print(Text(clean(f"in one file only: {', '.join(comparison.unshared)}"), style="dim"), soft_wrap=True)
    titles = (a, b) if comparison.pairs is None else ("highest differences", "lowest")
    for one in comparison.ranked()[:ENDS]:
        if one.examples[0] or one.examples[1]:
            sides = (
                f"{name}: " + ", ".join(_example(example, pair) for example in side)
                for name, side in zip(titles, one.examples, strict=True)
            )
            out.print(Text(clean(f"{one.measure}  " + " | ".join(sides))), soft_wrap=True)


def _number(value: float, how: str = ".3g") -> str:
    return "" if value != value else format(value, how)


def _example(example: Example, pair: str | None) -> str:
    """What a trace is called, and its value; what a pair has in common, and its difference."""
    if pair is not None:
        return f"{pair} {example.label} ({example.value:+.3g})"
    label = example.label
    if isinstance(label, Mapping):
        label = f"line {label['line']}" if "line" in label else label.get("id", f"row {example.row}")
    return f"{label} ({example.value:.3g})"


# ------------------------------------------------------------------------- stability


def show_stability(found: Stability) -> None:
    """One trace under all variants, to stdout."""
    answer = "no answer" if found.answer is None else f'answer "{visible(found.answer)}"'
    facts = f"{found.tokens:,} tokens | {found.mask_tokens:,} may get credit | {answer}"
    stdout().print(Text(facts, style="bold"), soft_wrap=True)
    _show_flags(found.flags)
    rows = [
        (one.group, one.name, _number(one.spearman, ".3f"), _number(one.overlap, ".0%"), _found(one))
        for one in found.variants
    ]
    if rows:
        _stability_table(rows, found.top)
    for name, value in (("layers", found.layer_agreement), ("halves of heads", found.head_agreement)):
        if value == value:
            tell(f"Two {name} agree by a mean rank correlation of {value:.3f}.")


def _found(one: Any) -> str:
    if one.group != "answer":
        return ""
    return "finds nothing" if one.same_answer is None else "the same answer" if one.same_answer else "another answer"


def show_stabilities(found: Sequence[Stability], summary: Sequence[Mapping[str, Any]]) -> None:
    """Means over many traces, to stdout."""
    blind = sum(not one.variants for one in found)
    facts = f"{len(found):,} traces" + (f", {blind:,} without an answer left out" if blind else "")
    stdout().print(Text(facts, style="bold"), soft_wrap=True)
    rows = []
    for one in summary:
        is_finder, same = one["group"] == "answer", one["same_answer"]
        note = f"{one['n']:,} traces" + (f", the same answer in {same:.0%}" if is_finder else "")
        rows.append((one["group"], one["name"], _mean(one["spearman"], ".3f"), _mean(one["overlap"], ".0%"), note))
    _stability_table(rows, found[0].top)


def _mean(values: tuple[float, float, float], how: str) -> str:
    mean, low, high = values
    return _number(mean, how) + (f" [{low:{how}}, {high:{how}}]" if low == low else "")


def _stability_table(rows: Sequence[tuple[str, ...]], top: float) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("changed", "to"):
        table.add_column(name, no_wrap=True)
    for name in ("rank correlation", f"overlap of top {top:.0%}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    before = None
    for group, *cells in rows:
        table.add_row(group if group != before else "", *map(Text, cells))
        before = group
    stdout(wide=True).print(table)


# ------------------------------------------------------------------------- what hiding tokens does


def show_faithful(found: Mapping[str, Any]) -> None:
    """The controls, then a table for every choice of tokens, the best signals first, to stdout."""
    out = stdout(wide=True)
    aside = sum(found["set_aside"].values())
    facts = f"{found['traces']:,} traces" + (f", {aside:,} rows set aside" if aside else "")
    out.print(Text(facts, style="bold"), soft_wrap=True)
    for reason_why, count in found["set_aside"].items():
        out.print(Text(clean(f"set aside: {count:,} rows: {reason_why}"), style="yellow"), soft_wrap=True)
    if found["sanity"]:
        controls = Table("control", "tokens hidden", "the real signal's lead", "control", box=None, pad_edge=False)
        for row in found["sanity"]:
            style = {"loses": "green", "does not lose": "bold red"}.get(row["verdict"])
            cells = (row["control"], _choice_of(row), _cell(row["difference"]), row["verdict"])
            controls.add_row(*map(Text, cells), style=style)
        out.print("")
        out.print(controls)
    for one in found["tables"]:
        out.print("")
        out.print(Text(f"{_choice_of(one)} hidden, {one['traces']:,} traces", style="bold"))
        out.print(_drops(one))


def _choice_of(where: Mapping[str, Any]) -> str:
    restated = "" if where["restated"] == "exclude" else ", restatements too"
    return f"{where['end']} {where['share']:.0%}{restated}"


def _drops(one: Mapping[str, Any]) -> Table:
    metrics = one["metrics"]
    others = [name for name in ("changed", "lost", "recall") if name in metrics]
    table = Table(box=None, pad_edge=False)
    table.add_column("signal", no_wrap=True)
    for name in ("drop", "minus flow", "against flow", *others):
        table.add_column(name, justify="left" if name == "against flow" else "right", no_wrap=True)
    drop = metrics["drop"]
    for name in sorted(drop, key=lambda name: drop[name]["mean"], reverse=one["end"] == "top"):
        flow = drop[name].get("minus_flow")
        verdict = "" if flow is None else flow["verdict"]
        cells = (name, _cell(drop[name]), _cell(flow), verdict, *(_cell(metrics[other].get(name)) for other in others))
        style = "bold" if name == "flow" else {"better": "green", "worse": "red"}.get(verdict)
        table.add_row(*map(Text, cells), style=style)
    return table


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return ""
    low, high = (float("nan") if found[end] is None else found[end] for end in ("low", "high"))
    return _mean((found["mean"], low, high), ".2f")
