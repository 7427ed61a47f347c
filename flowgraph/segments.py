r"""Words, lines, sentences, steps and turns: a trace as consecutive runs of tokens.

A splitter reads the text and says where segments begin. Whatever it says, a segment never mixes prompt, response and
what is neither (tool output), and sinks of flow stand alone, so that flow ends in segments that do nothing else. A
token belongs where its last character is: the token " The" begins a sentence, the token ".\n" ends one.

    words      a word with the blanks after it
    lines      up to and with the line break
    sentences  up to . ! ? and a blank, or the line break; no break within 3.14, e.g. or 1. at the start of a line
    steps      <think> and tool blocks, code blocks, numbered steps, list items and headings, paragraphs
    turns      the messages of a chat, by the markers of common chat templates

Shapes: N tokens, M segments.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Begin = tuple[int, str]
"""(character at which a segment begins, its kind)."""
Splitter = Callable[[str], Sequence[tuple[int, int]]]
"""Your own: text -> (start, stop) of its segments, in characters; what lies between them is a segment too."""


@dataclass(frozen=True)
class Segments:
    """N tokens as M consecutive runs.

    Attributes:
        ptr: [M + 1] int64, ascending: segment m holds the tokens ptr[m] .. ptr[m + 1] - 1, at least one.
        names: M short texts. kinds: M words: "prompt", "response", "other" or "answer" (sinks), or what the splitter
            knows better: "think", "tool", "code", "step", "item", "heading", "system", "user", "assistant".
    """

    ptr: Tensor
    names: list[str]
    kinds: list[str]

    def __post_init__(self) -> None:
        if self.ptr.ndim != 1 or len(self.ptr) < 2 or int(self.ptr[0]) != 0 or not (self.ptr[1:] > self.ptr[:-1]).all():
            raise ValueError(f"ptr must be [M + 1], start at 0 and go up, got {self.ptr.tolist()[:8]}")
        for name in ("names", "kinds"):
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{name} must have one entry per segment, {len(self)}, got {len(getattr(self, name))}")

    def __len__(self) -> int:
        """Number of segments, M."""
        return len(self.ptr) - 1

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.ptr[-1])

    @property
    def index(self) -> Tensor:
        """[N] the segment of each token."""
        return torch.repeat_interleave(torch.arange(len(self)), self.ptr[1:] - self.ptr[:-1])

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each segment, in tokens."""
        edges = self.ptr.tolist()
        return list(pairwise(edges))


def split(
    text: Sequence[str],
    by: str | Splitter = "sentences",
    *,
    prompt_mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    sink_mask: Tensor | None = None,
) -> Segments:
    """Divide a trace into segments.

    Args:
        text: the N tokens as pieces of text that join to the whole, as in `Trace.text`.
        by: "words", "lines", "sentences", "steps" or "turns"; or a function from the text to (start, stop) spans.
        prompt_mask, response_mask, sink_mask: [N] bool, the borders that no segment crosses; default: all response, no
            sinks.

    Raises:
        ValueError: an unknown `by`, masks of another length, or spans of your own that overlap or leave the text.
    """
    pieces = list(text)
    if not pieces:
        raise ValueError("text is empty: there is nothing to divide")
    whole = "".join(pieces)
    roles = _roles(len(pieces), prompt_mask, response_mask, sink_mask)
    if callable(by):
        begins = _begins_of(by(whole), len(whole))
    elif by in _SPLITTERS:
        begins = sorted(_SPLITTERS[by](whole))
    else:
        raise ValueError(f"by must be one of {', '.join(map(repr, _SPLITTERS))} or a function, got {by!r}")
    if not begins or begins[0][0] > 0:
        begins.insert(0, (0, ""))
    places = [place for place, _ in begins]
    stops = list(accumulate(map(len, pieces)))
    ptr, kinds = [0], []
    last: tuple[int, int] | None = None
    for token, (stop, piece) in enumerate(zip(stops, pieces, strict=True)):
        # A token without text stays with the one before it.
        found = bisect_right(places, max(stop - 1, 0)) - 1 if piece or last is None else last[0]
        here = (found, roles[token])
        if last is not None and (found, roles[token]) != last:
            ptr.append(token)
        if last is None or here != last:
            kinds.append("answer" if roles[token] >= _SINK else begins[found][1] or _ROLES[roles[token]])
        last = here
    ptr.append(len(pieces))
    names = [_short("".join(pieces[start:stop])) for start, stop in pairwise(ptr)]
    return Segments(torch.tensor(ptr), names, kinds)


_ROLES = ("prompt", "response", "other")
_SINK = 3
"""Added to the role of a sink."""


def _roles(size: int, prompt: Tensor | None, response: Tensor | None, sinks: Tensor | None) -> list[int]:
    for name, mask in (("prompt_mask", prompt), ("response_mask", response), ("sink_mask", sinks)):
        if mask is not None and (mask.shape != (size,) or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool [N] = [{size}] like text, got {list(mask.shape)} {mask.dtype}")
    before = torch.zeros(size, dtype=torch.bool) if prompt is None else prompt.cpu()
    said = ~before if response is None else response.cpu()
    roles = torch.where(before, 0, torch.where(said, 1, 2))
    # A sink keeps its role: where the answer is the first thing said, the last token of the prompt is a sink too.
    return (roles if sinks is None else roles + _SINK * sinks.cpu()).tolist()


def _short(text: str, most: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _begins_of(spans: Sequence[tuple[int, int]], size: int) -> list[Begin]:
    """Of a splitter of the user's own."""
    begins: list[Begin] = []
    done = 0
    for start, stop in spans:
        if not done <= start < stop <= size:
            raise ValueError(
                f"by gave the span ({start}, {stop}) after one that ends at {done}, in a text of {size} characters; "
                "spans must ascend, not overlap and not be empty"
            )
        if start > done:
            begins.append((done, ""))
        begins.append((start, ""))
        done = stop
    if done < size:
        begins.append((done, ""))
    return begins


# --- splitters: text -> where segments begin --------------------------------------------------------------------------

_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|etc|vs|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Eq|approx)|(?:^|\n)\s*\w{1,3})$")
_SENTENCE_END = re.compile(r"""(?<![.!?])[.!?]+["'”’)\]*_]*\s+|[。！？]+[”’）」』]*\s*|\n+""")  # noqa: RUF001
_LEAD = 64  # characters before a full stop that are looked at: a text of many sentences is read once, not once for each
_MARKER = re.compile(  # of the chat templates of Qwen, Llama 3, Gemma, Phi, Mistral, Zephyr, gpt-oss, DeepSeek
    r"<\|im_start\|>\s*(?P<a>\w+)|<\|start_header_id\|>\s*(?P<b>\w+)|<start_of_turn>\s*(?P<c>\w+)"
    r"|<\|(?P<d>system|user|assistant|tool)\|>|\[(?P<e>INST)\]|\[/(?P<f>INST)\]"
    r"|<\|start\|>(?P<g>\w+)|<\uff5c(?P<h>User|Assistant)\uff5c>"
)
_TURN = {"INST": "user", "/INST": "assistant", "model": "assistant", "ipython": "tool", "functions": "tool"}
_BLOCK = re.compile(
    r"<(?P<open>think|thinking|reasoning|tool_call|tool_response|tool_result|tool_output|answer)>.*?(?:</(?P=open)>\s*|\Z)"
    r"|(?:^|(?<=\n))```.*?(?:\n```[^\n]*(?:\n|\Z)|\Z)",
    re.DOTALL,
)
_BLOCK_KINDS = {"think": "think", "thinking": "think", "reasoning": "think", "answer": "step"}
_STEP_LINE = re.compile(
    r"(?P<heading>\#{1,6}\s|\*\*[^*\n]+\*\*\s*(?:\n|$))"
    r"|(?P<step>(?:\*\*)?(?:step|stage|part|case)\s+\w+\b|\(?\d{1,3}[.):]\s|(?:first|second|third|next|then|finally)[a-z]*,)"
    r"|(?P<item>[-*+\u2022]\s)",
    re.IGNORECASE,
)


def _words(text: str) -> Iterator[Begin]:
    return ((match.start(), "") for match in re.finditer(r"\S+\s*", text))


def _lines(text: str) -> Iterator[Begin]:
    return ((match.start(), "") for match in re.finditer(r"[^\n]*\n|[^\n]+", text))


def _sentences(text: str) -> Iterator[Begin]:
    yield 0, ""
    for match in _SENTENCE_END.finditer(text):
        if (
            match[0][0] == "."
            and "\n" not in match[0]
            and _ABBREVIATION.search(text, max(0, match.start() - _LEAD), match.start())
        ):
            continue
        if match.end() < len(text):
            yield match.end(), ""


def _steps(text: str) -> Iterator[Begin]:
    """Blocks, and outside code and tool blocks the paragraphs and the lines that look like the beginning of a step."""
    done = 0
    for block in _BLOCK.finditer(text):
        yield from _paragraphs(text, done, block.start())
        name = block["open"]
        kind = "code" if name is None else _BLOCK_KINDS.get(name, "tool")
        yield block.start(), kind
        if kind == "think":
            inner = block.start() + len(name) + 2
            _first, *others = [*_paragraphs(text, inner, block.end()), (inner, "")]
            yield from ((place, "think") for place, _ in others if place > inner)
        done = block.end()
    yield from _paragraphs(text, done, len(text))


def _paragraphs(text: str, start: int, stop: int) -> Iterator[Begin]:
    blank = True
    for match in re.compile(r"[^\n]*\n|[^\n]+").finditer(text, start, stop):
        line = match[0].strip()
        found = _STEP_LINE.match(line) if line else None
        if line and (found or blank):
            yield match.start(), (found.lastgroup or "") if found else ""
        blank = not line


def _turns(text: str) -> Iterator[Begin]:
    yield 0, ""
    for match in _MARKER.finditer(text):
        name = next(group for group in match.groupdict().values() if group)
        name = "/INST" if match["f"] else name
        yield match.start(), _TURN.get(name, name.lower())


_SPLITTERS: dict[str, Callable[[str], Iterator[Begin]]] = {
    "words": _words,
    "lines": _lines,
    "sentences": _sentences,
    "steps": _steps,
    "turns": _turns,
}
