"""What `flowgraph faithful` judges: responses out of files, and the tokens that may be chosen in them.

    rows -> Rows.records -> Found -> prepare -> Case: ids, spans, choices, the right answer, known carriers
    a continuation -> written_answer

Shapes: N tokens of one trace.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgraph.adapters import inputs
from flowgraph.adapters.evidence.hiding import hideable
from flowgraph.adapters.records import FIELDS, Record, records_of
from flowgraph.adapters.scoring import encode
from flowgraph.answers import Finder, find_answer
from flowgraph.spans import Spans, locate, token_offsets, tokens_of
from flowgraph.tracer import Tracer

FEWEST_TOKENS = 5
"""Tokens to choose from, without which a trace tells nothing."""

# ------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Found:
    """A response, and what its row says beside it."""

    record: Record
    right: str | None
    carriers: Any


class Rows:
    """Where rows come from, and what tells them from others."""

    def __init__(
        self, read: Callable[[], Iterator[tuple[str, int, Any]]], fingerprint: dict[str, Any], carriers: str | None
    ) -> None:
        self._read, self.fingerprint, self._carriers = read, fingerprint, carriers

    @classmethod
    def of(cls, rows: str | Path | Sequence[Mapping[str, Any]], carriers: str | None = None) -> Rows:
        """
        Raises:
            ValueError: there are none, or they can't be read.
        """
        if not isinstance(rows, str | Path):
            given = [dict(row) for row in rows]
            digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()
            about = {"rows": {"size": len(given), "sha256": digest}}
            return cls(lambda: (("rows", number, row) for number, row in enumerate(given, 1)), about, carriers)
        found = inputs.sources(rows)
        for one in found:
            if one.kind == "dataset":
                raise ValueError(f"{one.path} is a data set on disk: save it as Parquet (to_parquet) for this command")
        about = {one.name: inputs.fingerprint(one, "full") for one in found}
        wanted = {*FIELDS, "answer", *([carriers] if carriers else [])}

        def read() -> Iterator[tuple[str, int, Any]]:
            for one in found:
                for shard in inputs.plan([one]):
                    yield from ((one.name, number, row) for number, row in inputs.read(one, shard, fields=wanted))

        return cls(read, about, carriers)

    def records(self) -> Iterator[tuple[dict[str, Any], Found | ValueError]]:
        """Where each response stands, and the response or why there is none."""
        for file, number, row in self._read():
            where = {"file": file, "line": number, "choice": None, "id": None}
            if isinstance(row, ValueError):
                yield where, row
                continue
            try:
                records = records_of(number, row)
            except ValueError as error:
                yield where, error
                continue
            right = None if row.get("answer") is None else str(row["answer"])
            carriers = row.get(self._carriers) if self._carriers else None
            for record in records:
                yield where | {"choice": record.choice, "id": record.id}, Found(record, right, carriers)


# ------------------------------------------------------------------------- what may be chosen


@dataclass(frozen=True, eq=False)
class Case:
    """A response that can be used."""

    token_ids: Tensor  # [N]
    spans: Spans
    choices: dict[str, Tensor]  # "exclude", "include" -> [N] bool, the tokens that may be chosen
    right: str
    carriers: Tensor | None

    @property
    def cut(self) -> int:
        """The first token of the answer."""
        return int(self.spans.answer_tokens.nonzero()[0])


def choices(tokenizer: Any, token_ids: Tensor, spans: Spans) -> dict[str, Tensor]:
    """The tokens that may be chosen, the same for every signal: [N] bool for "include" and for "exclude".

    Of the response, what stands before the answer and can be hidden: not the answer, not the tokens whose rows predict
    it, no special tokens, no tool output. What comes after the answer can't matter, and only some signals know that.
    "exclude" leaves out what restates the answer too: tokens that overlap an earlier occurrence of it as a whole word.
    """
    answer = spans.answer_tokens.nonzero().flatten()
    before = torch.arange(len(token_ids)) < int(answer[0])
    include = hideable(spans.credit_mask, spans.answer_tokens) & before
    return {"exclude": include & ~_restating(tokenizer, token_ids, spans, before), "include": include}


def _restating(tokenizer: Any, token_ids: Tensor, spans: Spans, before: Tensor) -> Tensor:
    """[N] bool: tokens of the response, before the answer, that overlap an occurrence of its text."""
    restating = torch.zeros_like(before)
    places = (spans.response_mask & before).nonzero().flatten()
    text, offsets = token_offsets(tokenizer, token_ids[places].tolist())
    for form in forms_of(spans.answer_text or ""):
        for found in whole_word(form).finditer(text):
            restating[places[slice(*tokens_of(offsets, *found.span()))]] = True
    return restating


_EDGES = re.compile(r"^\W+|\W+$")
_NUMBERS = re.compile(r"\d[\d,]*(?:\.\d+)?")


def forms_of(answer: str) -> list[str]:
    """What restates an answer: "$1,000 dollars" is also "1,000 dollars", "1,000" and "1000"."""
    core = _EDGES.sub("", answer)
    forms = [answer.strip(), core]
    numbers = _NUMBERS.findall(core)
    if len(numbers) == 1:
        forms += [numbers[0], numbers[0].replace(",", "")]
    return [form for form in dict.fromkeys(forms) if form]


def whole_word(form: str) -> re.Pattern[str]:
    """Finds a text where it is no part of a longer word or number. Case counts for single letters only: "A" and "a"."""
    before = r"(?<!\w)(?<!\d[.,])" if re.match(r"\w", form) else ""
    after = r"(?!\w)(?![.,]\d)" if re.search(r"\w$", form) else ""
    return re.compile(before + re.escape(form) + after, 0 if len(form) == 1 else re.IGNORECASE)


def prepare(
    tracer: Tracer, found: Found | ValueError, chat: bool, kinds: Collection[str], field: str | None = None
) -> Case:
    """A response as it is judged.

    Args:
        tracer: its options say how the answer is found and how long a trace may be. chat: a prompt in text form is a
            chat message. kinds: of tables, "exclude" and "include". field: the name of the one with carriers.

    Raises:
        ValueError: why it can't be used.
    """
    if isinstance(found, ValueError):
        raise found
    tokenizer = tracer.tokenizer
    encoded = encode(tracer, found.record, chat)
    ids = encoded.token_ids
    spans = locate(ids, encoded.prompt_mask, encoded.response_mask, tokenizer=tokenizer, answer=tracer.options.answer)
    if not spans.answer_tokens.any():
        raise ValueError("no answer was found in the response")
    masks = {kind: mask for kind, mask in choices(tokenizer, ids, spans).items() if kind in kinds}
    fewest = min(int(mask.sum()) for mask in masks.values())
    if fewest < FEWEST_TOKENS:
        raise ValueError(f"fewer than {FEWEST_TOKENS} tokens before the answer may be hidden")
    right = _marked(found.right) if found.right is not None else spans.answer_text or ""
    carriers = None
    if found.carriers is not None:
        carriers = _ranges(tokenizer, ids, spans.response_mask, found, field)
    return Case(ids, spans, masks, right, carriers)


def written_answer(before: str, new: str, finder: Finder) -> str:
    """The answer in a continuation: what the finder finds that reaches into its first line, else that line."""
    line = next((one for one in new.splitlines() if one.strip()), "")
    found = find_answer(before + line, finder).match
    if found is not None and found.stop > len(before):
        return (before + line)[found.start : found.stop]
    return line.strip()


def _marked(answer: str) -> str:
    """A row's right answer, which may be a whole solution with the answer marked, as those of GSM8K are."""
    found = find_answer(answer).match
    return answer if found is None else answer[found.start : found.stop]


def _ranges(tokenizer: Any, ids: Tensor, response_mask: Tensor, found: Found, field: str | None) -> Tensor:
    """[N] bool: the tokens of the response that hold the characters of known carriers."""
    record, ranges = found.record, found.carriers
    places = response_mask.nonzero().flatten()
    text, offsets = token_offsets(tokenizer, ids[places].tolist())
    said = record.response if isinstance(record.response, str) else text
    shift = text.find(said)
    if shift < 0:
        raise ValueError(f'"{field}": the tokens of the response do not spell its text, so ranges mean nothing in it')
    carriers = torch.zeros_like(response_mask)
    good = isinstance(ranges, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(place) is int for place in pair)
        and 0 <= pair[0] < pair[1] <= len(said)
        for pair in ranges
    )
    if not good:
        raise ValueError(
            f'"{field}" must be character ranges [[start, stop], ...] in the {len(said)} of the response, got '
            f"{short(ranges)}"
        )
    for start, stop in ranges:
        carriers[places[slice(*tokens_of(offsets, start + shift, stop + shift))]] = True
    return carriers


def short(value: Any) -> str:
    """A value of JSON, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
