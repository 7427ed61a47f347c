"""What `flowgraph score` reads: files of rows, cut into shards that depend on nothing but the files and the cut.

    sources(IN) -> Source (JSON lines, Parquet, a Hugging Face data set on disk) -> fingerprint
    plan(sources) -> Shard: consecutive rows of one file -> read(source, shard) -> (line, row) -> records.records_of

JSON lines are cut at bytes, so that a shard is read without what stands before it; one pass over the file finds the
cuts. A row is measured before it is parsed; in place of one that is too large comes a ValueError that says so.

Left out: what a row means (records.py), and what is written (shards.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from flowgraph.adapters.records import FIELDS, row_of

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, ".parquet")
SHARD_BYTES = 32 << 20
"""A shard ends when it holds so much input, whatever the number of its rows: it has to fit in memory."""
_BOM = b"\xef\xbb\xbf"  # a byte order mark, as some editors put it
_ENDS = 1 << 16  # bytes at both ends of a file that its quick fingerprint reads


@dataclass(frozen=True)
class Source:
    """One file (or data set on disk) of rows.

    Attributes:
        path: where it is. name: what rows and messages call it: its path below IN, with "/".
        kind: "jsonl", "parquet" or "dataset".
    """

    path: str
    name: str
    kind: str

    def files(self) -> list[Path]:
        """The files that it consists of."""
        if self.kind != "dataset":
            return [Path(self.path)]
        return sorted(one for one in Path(self.path).iterdir() if one.suffix in (".arrow", ".json"))


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one source.

    Attributes:
        number: its place in the plan, from 0. source: the name of its file.
        line: number of its first line or row, from 1. rows: how many rows; blank lines don't count.
        start, stop: where they are: bytes of JSON lines, rows of a table from 0.
    """

    number: int
    source: str
    line: int
    rows: int
    start: int
    stop: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Row = tuple[int, "dict[str, Any] | ValueError"]
"""The number of a line or row, and the row, or why it can't be read."""


# ------------------------------------------------------------------------- which files


def sources(path: str | Path) -> list[Source]:
    """The source at a path, or those below a folder, in the order of their names.

    A folder with `state.json` is a data set of `datasets.save_to_disk`; one with `dataset_dict.json` holds several.
    Hidden files, and names that begin with "_", are no input; of other kinds of files and of links to folders
    `passed_over` tells.

    Raises:
        ValueError: there is nothing, or nothing that can be read.
    """
    root = Path(path)
    if root.is_file():
        if root.suffix not in SUFFIXES:
            came = f"ends in {root.suffix}" if root.suffix else "has no ending"
            raise ValueError(f"IN: {root} {came}; files that can be read end in {', '.join(SUFFIXES)}")
        return [_file(root, root.parent)]
    if not root.is_dir():
        raise ValueError(f"IN: there is no file {root}")
    found = [one for one in _below(root, root) if isinstance(one, Source)]
    if not found:
        others = passed_over(root)
        raise ValueError(
            f"IN: {root} is a folder without {', '.join(SUFFIXES)} or a data set on disk"
            + (f"; it has {others}" if others else "")
        )
    return found


def passed_over(path: str | Path) -> str:
    """What below a folder `sources` does not take, in words; "" where it takes all."""
    root = Path(path)
    others = [one for one in _below(root, root) if isinstance(one, Path)] if root.is_dir() else []
    links = [one for one in others if one.is_symlink() and not one.is_file()]
    endings = sorted({one.suffix or "no ending" for one in others if one not in links})
    counts = [(len(others) - len(links), "file", f" ({', '.join(endings[:5])})"), (len(links), "link", "")]
    return ", ".join(f"{count:,} {what}{'s' * (count > 1)}{more}" for count, what, more in counts if count)


def _below(folder: Path, root: Path) -> Iterator[Source | Path]:
    """Each source, and each path that is none."""
    name = folder.relative_to(root).as_posix()
    if (folder / "state.json").is_file():
        yield Source(str(folder), folder.name if name == "." else name, "dataset")
        return
    for one in sorted(folder.iterdir(), key=lambda one: one.name):
        if one.name.startswith((".", "_")) or one.name == "dataset_dict.json":
            continue
        if one.is_dir() and not one.is_symlink():
            yield from _below(one, root)
        else:
            yield _file(one, root) if one.is_file() and one.suffix in SUFFIXES else one


def _file(path: Path, root: Path) -> Source:
    return Source(str(path), path.relative_to(root).as_posix(), "parquet" if path.suffix == ".parquet" else "jsonl")


# ------------------------------------------------------------------------- has a file changed?


def fingerprint(source: Source, how: str = "quick") -> dict[str, Any]:
    """What tells a source from another, or from itself after a change.

    Args:
        how: "quick": size, time of the last change, and a hash of both ends of each file. "full": size and a hash of
            all of it, which a copy shares.
    """
    size, changed, digest = 0, 0, hashlib.sha256()
    for path in source.files():
        state = path.stat()
        size, changed = size + state.st_size, max(changed, _changed(state))
        digest.update(f"{path.name} {state.st_size}\n".encode() if source.kind == "dataset" else b"")
        with path.open("rb") as file:
            if how == "full":
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(file.read(_ENDS))
                file.seek(max(0, state.st_size - _ENDS))
                digest.update(file.read(_ENDS))
    return {"size": size, "sha256": digest.hexdigest()} | ({} if how == "full" else {"changed": changed})


def _changed(state: os.stat_result) -> int:
    """When a file was changed last, in ns, to the microsecond: some file systems round it further on other machines."""
    return state.st_mtime_ns // 1000 * 1000


# ------------------------------------------------------------------------- plan


def plan(
    found: list[Source], *, rows: int = 1000, most_bytes: int = SHARD_BYTES, max_row_bytes: int = 1 << 24
) -> list[Shard]:
    """Cut sources into shards of at most `rows` rows and about `most_bytes` of input, but at least one row.

    Where it can, a shard of Parquet ends with a row group: what stands before a shard in its group is decoded with it.

    Raises:
        ValueError: a file can't be read, or there is no row at all.
    """
    shards: list[Shard] = []
    for source in found:
        cut = _cut_lines if source.kind == "jsonl" else _cut_table
        for line, count, start, stop in cut(source, rows, most_bytes, max_row_bytes):
            shards.append(Shard(len(shards), source.name, line, count, start, stop))
    if not shards:
        names = ", ".join(source.path for source in found[:3])
        raise ValueError(f"{names} is empty: there is no line to score")
    return shards


_Cut = tuple[int, int, int, int]  # line, rows, start, stop


def _cut_lines(source: Source, rows: int, most_bytes: int, max_row_bytes: int) -> Iterator[_Cut]:
    with Path(source.path).open("rb") as file:
        line = count = start = place = 0
        for number, raw, size in _lines(file, 1, max_row_bytes):
            if not _blank(raw):
                if count and (count == rows or place + size - start > most_bytes):
                    yield line, count, start, place
                    count = 0
                if not count:
                    line, start = number, place
                count += 1
            place += size
        if count:
            yield line, count, start, place


def _cut_table(source: Source, rows: int, most_bytes: int, max_row_bytes: int) -> Iterator[_Cut]:
    ends, size = _extent(source)
    total = ends[-1]
    step = max(1, min(rows, most_bytes * total // max(1, size)))
    start = 0
    while start < total:
        last = bisect_right(ends, start + step) - 1  # of the groups that end within a step
        if last >= 0 and ends[last] > start:
            stop = ends[last]
        else:  # the group is larger: in equal parts, or there would be a small one at the end of each
            rest = ends[last + 1] - start
            stop = start + -(-rest // -(-rest // step))
        yield start + 1, stop - start, start, stop
        start = stop


def _extent(source: Source) -> tuple[list[int], int]:
    """(rows up to the end of each row group, bytes in memory) of a table, without reading it."""
    if source.kind == "dataset":
        return [len(_dataset(source))], sum(one.stat().st_size for one in source.files())
    with _parquet(source) as file:
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        return list(accumulate((one.num_rows for one in groups), initial=0)), sum(one.total_byte_size for one in groups)


# ------------------------------------------------------------------------- rows


def read(source: Source, shard: Shard, max_row_bytes: int = 1 << 24, fields: Collection[str] = FIELDS) -> Iterator[Row]:
    """The rows of a shard, with no more in memory than a few of them.

    Args:
        fields: what is read of a Parquet file; rows of JSON lines and of data sets come with what they have there.
    """
    if source.kind == "jsonl":
        return _read_lines(source, shard, max_row_bytes)
    return _read_table(source, shard, max_row_bytes, fields)


def _read_lines(source: Source, shard: Shard, max_row_bytes: int) -> Iterator[Row]:
    with Path(source.path).open("rb") as file:
        file.seek(shard.start)
        place = shard.start
        for number, raw, size in _lines(file, shard.line, max_row_bytes):
            if place >= shard.stop:
                return
            place += size
            if _blank(raw):
                continue
            try:
                if len(raw) > max_row_bytes:
                    raise _too_large(size, max_row_bytes)
                yield number, row_of(raw)
            except ValueError as error:
                yield number, error


def _lines(file: IO[bytes], number: int, most: int) -> Iterator[tuple[int, bytes, int]]:
    """(number, its first `most` + 1 bytes, its size) of every line from here on."""
    while raw := file.readline(most + 1):
        size, last = len(raw), raw
        while not last.endswith(b"\n") and (last := file.readline(1 << 20)):
            size += len(last)
        yield number, raw.removeprefix(_BOM) if number == 1 else raw, size
        number += 1


def _blank(raw: bytes) -> bool:
    return not raw.strip()


def _too_large(size: int, most: int) -> ValueError:
    return ValueError(f"the row has {size:,} bytes, more than --max-row-bytes {most:,}")


def _read_table(source: Source, shard: Shard, max_row_bytes: int, fields: Collection[str]) -> Iterator[Row]:
    number = shard.line
    for batch in _batches(source, shard, fields):
        for place in range(len(batch)):
            row = batch.slice(place, 1)
            size = row.nbytes
            if size > max_row_bytes:
                yield number, _too_large(size, max_row_bytes)
            else:
                try:
                    (values,) = row.to_pylist()
                    yield number, {name: value for name, value in values.items() if value is not None}
                except (ValueError, pa.ArrowException) as error:  # text that is not UTF-8
                    yield number, ValueError(f"the row cannot be read: {error}")
            number += 1


def _batches(source: Source, shard: Shard, fields: Collection[str]) -> Iterator[Any]:
    """The rows of a shard as record batches of the fields that are looked at."""
    if source.kind == "dataset":
        table = _dataset(source).with_format("arrow")
        for start in range(shard.start, shard.stop, _STEP):
            yield table[start : min(shard.stop, start + _STEP)]
        return
    with _damage_named(source), _parquet(source) as file:
        names = [name for name in file.schema_arrow.names if name in fields]
        first = 0
        for group in range(file.metadata.num_row_groups):
            begin, first = first, first + file.metadata.row_group(group).num_rows
            if first <= shard.start or begin >= shard.stop:
                continue
            if not names:
                yield from _nameless(file, min(first, shard.stop) - max(begin, shard.start))
                continue
            for batch in file.iter_batches(_STEP, row_groups=[group], columns=names):
                end = begin + len(batch)
                low, high = max(begin, shard.start), min(end, shard.stop)
                if low < high:
                    yield batch.slice(low - begin, high - low)
                begin = end
                if begin >= shard.stop:
                    break  # else the rest of the group is decoded for nothing


_STEP = 64


def _nameless(file: Any, count: int) -> Iterator[Any]:
    """Rows with none of the fields: their names all the same, for the message."""
    names = file.schema_arrow.names[:20]
    if count:
        yield pa.table({name: pa.array([""] * count) for name in names})


def _parquet(source: Source) -> Any:
    with _damage_named(source):
        return pq.ParquetFile(source.path, buffer_size=1 << 20)  # not a whole column of a row group at once


@contextlib.contextmanager
def _damage_named(source: Source) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file system; else pyarrow's word for damage
            raise
        raise ValueError(f"{source.path} is no Parquet file, or a damaged one: {error}") from error


def _dataset(source: Source) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f'{source.path} is a data set of Hugging Face: pip install "flowgraph-llm[datasets]"') from (
            error
        )
    try:
        found = datasets.load_from_disk(source.path)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError, pa.ArrowInvalid) as error:
        raise ValueError(f"{source.path} is no data set that can be read: {error}") from error
    names = [name for name in found.column_names if name in FIELDS]
    return found.select_columns(names) if names else found


def unchanged(source: Source, known: Mapping[str, Any]) -> None:
    """Check that a source still has the size and time of its fingerprint.

    Raises:
        OSError: it has not.
    """
    states = [path.stat() for path in source.files()]
    size, changed = sum(state.st_size for state in states), max(map(_changed, states))
    if size != known["size"] or changed != known.get("changed", changed):
        raise OSError(f"{source.path} has changed while it was scored")


def same_place(one: Path, other: Path) -> bool:
    """Are these the same file or folder, or is one inside the other?"""
    first, second = (Path(os.path.realpath(path)) for path in (one, other))
    return first == second or first in second.parents or second in first.parents
