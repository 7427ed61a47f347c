"""Where the answer is in the text of a response: finders for the ways in which models mark it.

Each finder gives all its matches; the last one wins. Nothing here knows tokens: `flowgraph.spans` maps characters to
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

Span = tuple[int, int]  # half-open
Finder = str | re.Pattern[str] | Callable[[str], Sequence[Span] | Span | None]
Found = tuple[list[Span], int | None]  # complete answers in text order; where a never closed marker opens

FLAGS = ("no_answer", "tail_answer", "cut_off", "several_answers")


@dataclass(frozen=True)
class Match:
    """Half-open character range of an answer: no marker, no blanks around it, no trailing full stop."""

    start: int
    stop: int
    finder: str


@dataclass(frozen=True)
class Answer:
    """`flags` is a subset of "no_answer", "cut_off" (a marker opens and never ends), "several_answers"."""

    match: Match | None
    flags: tuple[str, ...]


def find_answer(text: str, finder: Finder = "auto") -> Answer:
    """Find the answer in a response; the last match of a finder wins.

    Args:
        finder: a key of `FINDERS` ("answer is" takes "Answer:" and "Final answer:" too); "auto": the first of them, in
            that order, that matches; a regular expression: group 1 if it has one, else the whole match; a function of
            the text that returns one (start, stop), a sequence of them, or None. What these two give is taken as it
            is, untrimmed.

    With "auto", what follows a marker that never ends is not searched for other markers: `the answer is
    \\boxed{4` is cut off and answers nothing.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    check_finder(finder)
    if isinstance(finder, str):
        spans: list[Span] = []
        cut_off = False
        name = finder
        for name in FINDERS if finder == "auto" else (finder,):
            spans, opened = FINDERS[name](text)
            cut_off |= opened is not None
            if spans:
                break
            text = text[:opened]
    elif isinstance(finder, re.Pattern):
        group = 1 if finder.groups else 0
        spans = [m.span(group) for m in finder.finditer(text) if m[group]]
        name, cut_off = finder.pattern, False
    else:
        name, cut_off = getattr(finder, "__name__", repr(finder)), False
        spans = _spans_of_function(finder, name, text)
    raised = {"no_answer": not spans, "cut_off": cut_off, "several_answers": len(spans) > 1}
    return Answer(Match(*spans[-1], name) if spans else None, tuple(f for f in FLAGS if raised.get(f)))


def check_finder(finder: Finder) -> None:
    """Refuse what `find_answer` can't take. A function is not called.

    Raises:
        ValueError: there is no finder of that name. TypeError: it is no name, no pattern of text and no function.
    """
    if isinstance(finder, str):
        if finder != "auto" and finder not in FINDERS:
            known = ["auto", *FINDERS]
            raise ValueError(f"unknown finder {finder!r}; use one of {known}, a re.Pattern or a function")
    elif isinstance(finder, re.Pattern):
        if not isinstance(finder.pattern, str):
            raise TypeError(f"finder must be a pattern of text, not of bytes: {finder.pattern!r}")
    elif not callable(finder):
        raise TypeError(f"finder must be a name, a regular expression or a function, not {type(finder).__name__}")


def _spans_of_function(finder: Callable[[str], Any], name: str, text: str) -> list[Span]:
    found = finder(text)
    pairs = [] if found is None else found
    if isinstance(found, tuple) and len(found) == 2 and not any(isinstance(x, Sequence) for x in found):
        pairs = [found]

    def good(pair: object) -> bool:
        return (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(x, SupportsIndex) and not isinstance(x, bool) for x in pair)
            and 0 <= pair[0] < pair[1] <= len(text)
        )

    if not isinstance(pairs, Sequence) or not all(map(good, pairs)):
        raise ValueError(
            f"finder {name!r} returned {found!r}; it must return (start, stop) with 0 <= start < stop <= "
            f"{len(text)}, the length of the text, a sequence of such pairs, or None"
        )
    return [(int(start), int(stop)) for start, stop in pairs]


def _trim(text: str, start: int, stop: int) -> list[Span]:
    """The range without blanks around it and full stops at its end, or nothing if that leaves it empty."""
    stop = start + len(text[start:stop].rstrip().rstrip(".").rstrip())
    start = stop - len(text[start:stop].lstrip())
    return [(start, stop)] if start < stop else []


# Every finder reads the text once: no pattern here can back up over what another of its matches has read.
_BOX = re.compile(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE)
_HASHES = re.compile(r"(?<!#)####(?!#)")
_A_COLON = re.compile(r"^[ \t]*(?:\*\*)?A:(?:\*\*)?", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"^[ \t]*(?:\*\*)?(?:final[ \t]+)?answer(?:\*\*)?[ \t]*:(?:\*\*)?(?:[ \t]*(?:the[ \t]+)?answer[ \t]+is\b)?"
    r"|\banswer\s+is\b",
    re.IGNORECASE | re.MULTILINE,
)  # "the answer is", or "Answer:" at the start of a line, or one after the other
_LEAD = re.compile(r"(?:\s|:|\*\*(?=[\s:]))*")  # between "answer is" and the answer
_WRAPPED = re.compile(
    r"\*\*(?=\S)([^\n]*?\S)\*\*|\$\$(.+?)\$\$|\$(?=\S)((?:\\.|[^\n$\\])+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"\.(?!\w)|[!?](?=\s+[A-Z]|\s*\Z)|[。\uff01\uff1f\n]")  # \uff01\uff1f: full-width ! and ?


def _boxed(text: str) -> Found:
    r"""`\boxed{...}` or `\fbox{...}`, braces nested; of a box in a box the inner one."""
    spans: list[Span] = []
    stack: list[tuple[int, int, int] | None] = []  # open boxes (start, content's start, number) and braces
    boxes = 0
    for m in _BOX.finditer(text):
        if m[1]:
            boxes += 1
            stack.append((m.start(), m.end(), boxes))
        elif m[0] == "{":
            stack.append(None)
        elif m[0] == "}" and stack:
            box = stack.pop()
            if box and box[2] == boxes:  # no box opened inside it: what is trimmed never overlaps
                spans += _trim(text, box[1], m.start())
    return spans, next((box[0] for box in stack if box), None)


def _tagged(text: str) -> Found:
    """`<answer>...</answer>`; of several opening tags in a row the last counts."""
    spans: list[Span] = []
    opened = None
    for m in TAG.finditer(text):
        if not m[1]:
            opened = m
        elif opened:
            spans += _trim(text, opened.end(), m.start())
            opened = None
    return spans, opened.start() if opened else None


def _after(marker: re.Pattern[str], inside: Callable[[str, int, int], Span]) -> Callable[[str], Found]:
    """A finder of what follows a marker, up to the next one at most; `inside` says where that ends."""

    def find(text: str) -> Found:
        marks = list(marker.finditer(text))
        spans: list[Span] = []
        limits = [*(m.start() for m in marks), len(text)]
        for m, limit in zip(marks, limits[1:], strict=True):
            spans += _trim(text, *inside(text, m.end(), limit))
        bare = bool(marks) and not text[marks[-1].end() :].strip()
        return spans, marks[-1].start() if bare else None

    return find


def _line(text: str, start: int, limit: int) -> Span:
    end = text.find("\n", start, limit)
    end = start + len(text[start : limit if end < 0 else end].rstrip())
    opened_before = text.count("**", start, end) % 2 == 1 and text.endswith("**", start, end)  # **A: 5**
    return start, end - 2 if opened_before else end


def _sentence(text: str, start: int, limit: int) -> Span:
    lead = _LEAD.match(text, start, limit)
    start = lead.end() if lead else start
    wrapped = _WRAPPED.match(text, start, limit)
    if not wrapped:
        end = _SENTENCE_END.search(text, start, limit)
        limit = end.start() if end else limit
        return start, start + len(text[start:limit].rstrip().rstrip("*"))
    for _ in range(3):  # **$x$**
        if wrapped:
            start, limit = wrapped.span(wrapped.lastindex or 0)
            wrapped = _WRAPPED.match(text, start, limit)
    return start, limit


def _stated(text: str, start: int, limit: int) -> Span:
    """A sentence after "answer is", a line after "Answer:"."""
    return (_line if text[start - 1] in ":*" else _sentence)(text, start, limit)


FINDERS: dict[str, Callable[[str], Found]] = {
    "boxed": _boxed,
    "####": _after(_HASHES, _line),
    "A:": _after(_A_COLON, _line),
    "<answer>": _tagged,
    "answer is": _after(_ANSWER_IS, _stated),
}
