"""The rows of `flowgraph score`: what a row of responses may look like, and their scores in one Parquet file.

    lines(path) -> line number, bytes -> parse -> Record -> (traced by the caller) -> ScoreFile -> Parquet
    read_scores(path) -> its columns of one value per response -> with_labels -> those and fields of the JSON lines

`records_of` reads a row wherever it comes from: a line of JSON, a row of a table (inputs.py). To Parquet a record at a
time: memory does not grow with the file. A row that can't be used raises a ValueError that says why, and `ScoreFile`
keeps such reasons in a file beside its own. Scores in many files: shards.py.

Left out: models and scores. This file knows what a row looks like, and nothing of how it is traced.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("weights", pa.list_(pa.float32()), nullable=False),
        pa.field("throughput", pa.list_(pa.float32()), nullable=False),
        pa.field("reach", pa.list_(pa.float32()), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
    ]
)
"""One row per response: `line` (of the input, from 1) and its `id`; how many tokens; and, over the response's tokens in
their order, their ids, credits (`weights`), `throughput` and `reach`; the `answer` that was found, and the `flags`.

After these, `flowgraph score --measures` puts the numbers of flowgraph/measures.py, one float64 column for each name of
its MEASURES; null stands for NaN: what this trace has not got."""

CERTIFICATE = ("dropped", "lost", "unabsorbed", "unlisted", "reach_bound", "flow_bound", "top_overlap")
"""Columns of a folder of scores that say how exact a row is; scoring.certificate fills them in."""

_GROUP_ROWS, _GROUP_TOKENS = 1024, 1 << 20  # a row group is written when it holds so many


# ------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Record:
    """One response and the prompt to it.

    Attributes:
        line: the number of its line or row, from 1. id: the caller's name for it.
        prompt: text, chat messages, or token ids. response: text, chat messages (turns of an agent), token ids (as the
            prompt), or None, where the response is among the messages: all that the assistant says there.
        choice: which response of its row, from 0. as_is: a text that no chat template is to be laid around.
    """

    line: int
    id: str | None
    prompt: str | list[dict[str, Any]] | list[int]
    response: str | list[dict[str, Any]] | list[int] | None
    choice: int = 0
    as_is: bool = False

    @property
    def has_ids(self) -> bool:
        """It comes as token ids, not as text."""
        return isinstance(self.response, list) and not any(isinstance(one, dict) for one in self.response)


FIELDS = (
    "id", "prompt_ids", "response_ids", "completion_ids", "prompt", "question", "messages", "input", "response",
    "completion", "responses", "output",
)  # fmt: skip
"""The fields of a row that are looked at."""


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line that is not blank. Numbers count from 1, blank lines too."""
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors put it
            if raw.strip():
                yield number, raw


def record_at(path: str | Path, line: int) -> Record:
    """The record on one line.

    Raises:
        ValueError: there is no such line, or nothing usable on it.
    """
    last = 0
    for last, raw in lines(path):
        if last == line:
            return parse(line, raw)
        if last > line:
            raise ValueError(f"line {line} of {path} is blank")
    raise ValueError(f"{path} has no line {line}" + (f"; its last one is {last}" if last else ": it is empty"))


def parse(line: int, raw: bytes) -> Record:
    """Read one line with one response; see `row_of` and `records_of`.

    Raises:
        ValueError: what is wrong with the line.
    """
    found = records_of(line, row_of(raw))
    if len(found) > 1:
        raise ValueError(f'"responses" holds {len(found)} texts; give a file in which each has a line of its own')
    return found[0]


def row_of(raw: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        ValueError: there is none.
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold one JSON object {{...}}, got {_kind(row)}")
    return row


def records_of(line: int, row: Mapping[str, Any]) -> list[Record]:
    """The responses of one row. Its fields are one of these, the first that is there; others are ignored:

        {"prompt_ids": [..], "response_ids": [..]}       token ids; also "completion_ids"
        {"prompt": text or messages, "response": text}
        {"question": text, "response": text}
        {"messages": [.., {"role": "assistant", "content": text}]}     or without the last one and with "response"
        {"prompt": text, "completion": text}             TRL: taken as it is, without a chat template
        {"prompt": messages, "completion": messages}     TRL
        {"prompt": messages, "responses": [text, ..]}    verl: each response is a record of its own
        {"input": text, "output": text}                  verl's dumps: taken as it is, without a chat template

    and in each an `id`, if you like. A field that is null is not there: tables fill it in where other rows have one.

    Raises:
        ValueError: what is wrong with the row.
    """
    row = {key: value for key, value in row.items() if value is not None}
    name = _name(row.get("id"))
    if "prompt_ids" in row or "response_ids" in row:
        written = "completion_ids" if "response_ids" not in row and "completion_ids" in row else "response_ids"
        return [Record(line, name, _ids(row, "prompt_ids"), _ids(row, written))]
    key = next((key for key in ("prompt", "question", "messages", "input") if key in row), None)
    if key is None:
        raise ValueError(
            'no prompt: a line needs "prompt", "question", "messages" or "prompt_ids"; '
            f"this one has {', '.join(map(repr, row)) or 'no field'}"
        )
    prompt = row[key]
    of_input = ("output",) if key == "input" else ()
    said = next((name for name in ("response", "completion", "responses", *of_input) if name in row), None)
    if isinstance(prompt, list) and key in ("prompt", "messages"):
        prompt = _messages(key, prompt)
        if key == "messages" and said is None:
            return [Record(line, name, prompt, None)]
    elif key == "messages" or not isinstance(prompt, str):
        wanted = {"prompt": "text or a list of messages", "messages": "a list of messages"}.get(key, "text")
        raise ValueError(f'"{key}" must be {wanted}, got {_kind(prompt)}')
    else:
        _check_text(key, prompt)
    if said is None:
        if "chosen" in row:
            raise ValueError('"chosen" and "rejected" are a pair of preferences; give each a line with "response"')
        raise ValueError(f'no response: beside "{key}" a line needs "response", the text that the model wrote')
    response = row[said]
    if said == "responses":
        return _several(line, name, prompt, response)
    if said == "completion" and isinstance(response, list):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [Record(line, name, before, _messages(said, response))]
    if not isinstance(response, str):
        raise ValueError(f'"{said}" must be text, got {_kind(response)}')
    _check_text(said, response)
    as_is = isinstance(prompt, str) and said in ("completion", "output")
    return [Record(line, name, prompt, response, as_is=as_is)]


def _several(line: int, name: str | None, prompt: Any, responses: Any) -> list[Record]:
    if not isinstance(responses, list) or not responses:
        came = "an empty list" if responses == [] else _kind(responses)
        raise ValueError(f'"responses" must be a list of texts, got {came}')
    for choice, response in enumerate(responses):
        if not isinstance(response, str):
            raise ValueError(f'"responses"[{choice}] must be text, got {_kind(response)}')
        _check_text(f"responses[{choice}]", response)
    return [Record(line, name, prompt, response, choice) for choice, response in enumerate(responses)]


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'"id" must be a string or a number, got {_kind(value)}')
    if isinstance(value, str):
        _check_encodable("id", value)
    return str(value)


def _ids(row: Mapping[str, Any], key: str) -> list[int]:
    if key not in row:
        raise ValueError(f'no "{key}": "prompt_ids" and "response_ids" come together')
    ids = row[key]
    if not isinstance(ids, list) or not ids:
        raise ValueError(f'"{key}" must be a list of token ids, got {"an empty one" if ids == [] else _kind(ids)}')
    for place, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise ValueError(f'"{key}"[{place}] must be a token id, got {_short(value)}')
    return ids


def _messages(key: str, messages: list[Any]) -> list[dict[str, Any]]:
    """Chat messages, checked; without keys that are null, as tables fill them in."""
    if not messages:
        raise ValueError(f'"{key}" is an empty list of messages')
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'"{key}"[{place}] must be a message {{"role": .., "content": ..}}, got {_short(message)}')
        content = message.get("content")
        if isinstance(content, str):
            _check_encodable(f"{key}[{place}].content", content)
        elif not isinstance(content, list | None):  # a list of parts; None beside tool calls
            raise ValueError(f'"{key}"[{place}]: "content" must be text, got {_kind(content)}')
    keep = ("role", "content")
    return [{k: v for k, v in message.items() if v is not None or k in keep} for message in messages]


def _check_text(key: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f'"{key}" is empty')
    _check_encodable(key, text)


def _check_encodable(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" holds half of a surrogate pair at character {error.start + 1}') from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


# ------------------------------------------------------------------------- Parquet


def errors_path(out: str | Path) -> Path:
    """The file beside `out` that says which lines were set aside, and why."""
    return Path(f"{out}.errors.jsonl")


class ScoreFile:
    """Writes scores to `path`, row group by row group, and lines that were set aside to `errors_path(path)`.

        with ScoreFile("out.parquet", {"model": "..."}) as out:
            out.add({"line": 1, "id": None, ...})     # the fields of COLUMNS
            out.set_aside(2, "not JSON: ...")

    Both appear under their names when the block ends well, by a rename; when it ends with an exception nothing is
    left of either, and what was there before stays. Without lines set aside there is no file of them.

    Args:
        metadata: of the Parquet schema; keys get the prefix "flowgraph.".
        numbers: names of further columns, float64; a row may leave them out, and NaN becomes null.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, str], numbers: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.written = self.aside = 0
        self._numbers = tuple(numbers)
        schema = pa.schema([*COLUMNS, *(pa.field(name, pa.float64()) for name in numbers)])
        self._schema = schema.with_metadata({f"flowgraph.{key}": value for key, value in metadata.items()})
        self._rows: list[Mapping[str, Any]] = []
        self._tokens = 0
        self._partial = [
            final.with_name(f".{final.name}.{os.getpid()}.partial") for final in (self.path, errors_path(self.path))
        ]

    def __enter__(self) -> ScoreFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._errors: IO[str] | None = None
        try:
            self._writer = pq.ParquetWriter(self._partial[0], self._schema)
        except BaseException:  # Ctrl-C as well: the file may be there already, and no block will end
            self._remove_partial()
            raise
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        absent = {name: None for name in self._numbers if row.get(name) != row.get(name)}  # NaN is not itself
        self._rows.append({**row, **absent})
        self._tokens += len(row["weights"])
        self.written += 1
        if len(self._rows) >= _GROUP_ROWS or self._tokens >= _GROUP_TOKENS:
            self._flush()

    def set_aside(self, line: int, reason: str) -> None:
        if self._errors is None:
            self._errors = self._partial[1].open("w", encoding="utf-8", newline="\n")
        self._errors.write(json.dumps({"line": line, "reason": reason}) + "\n")
        self.aside += 1

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._tokens = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if self._errors is not None:
                self._errors.close()
            if kind is None:
                os.replace(self._partial[0], self.path)
                if self.aside:
                    os.replace(self._partial[1], errors_path(self.path))
                else:
                    errors_path(self.path).unlink(missing_ok=True)  # of an earlier run
        finally:
            self._remove_partial()

    def _remove_partial(self) -> None:
        for partial in self._partial:
            partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------- reading scores


def read_scores(path: str | Path) -> pa.Table:
    """The columns of a Parquet file, or of a folder of scores, that have one value per response.

    Lists per token are not read.

    Raises:
        ValueError: it is no Parquet file, or has no rows.
    """
    paths = sorted(Path(path).glob("part-*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not paths or not all(one.is_file() for one in paths):
        raise ValueError(f"there is no file {path}" if not Path(path).is_dir() else f"{path} has no part-*.parquet")
    tables = []
    for one in paths:
        try:
            with pq.ParquetFile(one) as file:
                plain = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
                tables.append(file.read(columns=plain).replace_schema_metadata())
        except (pa.ArrowException, OSError) as error:  # a damaged page is an OSError to pyarrow
            raise ValueError(f"{one} is no Parquet file, or a damaged one: {error}") from error
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"the parts of {path} have different columns: {error}") from error
    if not table.num_rows:
        raise ValueError(f"{path} has no rows")
    return table


def with_labels(table: pa.Table, path: str | Path, fields: Sequence[str], on: str = "line") -> pa.Table:
    """A table of scores with fields of JSON lines as further columns.

    Args:
        table: with the columns `line` and `id`. path: the file that was scored, or another that knows its ids; or the
            folder, whose files the column `file` names.
        fields: of the objects on its lines; true or false, numbers or text. Null where a line has it not.
        on: what rows and lines have in common: "line" (the number of the line) or "id".

    Raises:
        ValueError: a row's line or id is not in the file, an id stands there twice, or is not that of the row on
            that line; the scores are of several files, and `path` is one; a field has several types of values, or none
            at all.
    """
    if on not in ("line", "id"):
        raise ValueError(f'on must be "line" or "id", got {on!r}')
    if on not in table.column_names:
        raise ValueError(f"the scores have no column {on!r}")
    keys = table[on].to_pylist()
    files: list[str | None] = [None] * len(keys)
    if "file" in table.column_names and Path(path).is_dir():
        files = table["file"].to_pylist()
    elif Path(path).is_dir():
        raise ValueError(f"{path} is a folder, and the scores have no column 'file'; give the file that was scored")
    elif on == "line" and "file" in table.column_names and len(names := table["file"].unique()) > 1:
        raise ValueError(
            f"the scores are of {len(names)} files, {names[0]}, {names[1]}, ..., whose lines have the same numbers; "
            f"give the folder that was scored instead of {path}, or join by id"
        )
    wanted: dict[str | None, set[Any]] = defaultdict(set)
    for file, key in zip(files, keys, strict=True):
        wanted[file].add(key)
    places = {file: _in_folder(path, file) for file in wanted}
    found = {file: _fields_of_lines(places[file], set(fields), some, on) for file, some in wanted.items()}
    ids = table["id"].to_pylist() if "id" in table.column_names else [None] * len(keys)
    rows = []
    for file, key, name in zip(files, keys, ids, strict=True):
        place = places[file]
        if key not in found[file]:
            raise ValueError(f"{place} has no {on} {key}, which the scores have: was it another file that was scored?")
        row_name, row = found[file][key]
        if name != row_name and name is not None:
            raise ValueError(f"{place} has id {row_name!r} on line {key}, the scores have {name!r}: it is another file")
        rows.append(row)
    for field in fields:
        values = [row.get(field) for row in rows]
        kinds = sorted({_kind(value) for value in values if value is not None})
        if len(kinds) != 1 or kinds[0] in ("a list", "an object"):
            came = " and ".join(kinds) or "nothing but null"
            raise ValueError(f'"{field}" of {path} must be text, a number, or true or false on every line, got {came}')
        if any(isinstance(value, float) for value in values):
            values = [None if value is None else float(value) for value in values]
        if field in table.column_names:
            table = table.drop_columns([field])
        table = table.append_column(field, pa.array(values))
    return table


def _in_folder(path: str | Path, file: str | None) -> Path:
    """A file that scores name, below the folder that was scored."""
    if file is None:
        return Path(path)
    if not (Path(path) / file).is_file():
        raise ValueError(f"{path} has no file {file}, which the scores are of: was it another folder that was scored?")
    return Path(path) / file


def _fields_of_lines(
    path: str | Path, fields: set[str], keys: set[Any], on: str
) -> dict[Any, tuple[str | None, dict[str, Any]]]:
    """Line number or id -> (id, the fields that it has), of those in `keys`."""
    found: dict[Any, tuple[str | None, dict[str, Any]]] = {}
    for number, raw in lines(path):
        if on == "line" and number not in keys:
            continue
        try:
            row = json.loads(raw)
            if not isinstance(row, dict):
                raise ValueError(f"a line must hold one JSON object {{...}}, got {_kind(row)}")
            name = _name(row.get("id"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} cannot be used: {error}") from error
        key = number if on == "line" else name
        if key is None or key not in keys:
            continue
        if key in found:
            raise ValueError(f"id {key!r} stands in {path} twice, the second time on line {number}")
        found[key] = (name, {field: row[field] for field in fields & set(row)})
    return found
