"""A folder of scores: shards that are whole or absent, and a manifest of what they are shards of.

    OUT/_manifest.json              the job: options, inputs with their fingerprints, and the plan
    OUT/part-000007.parquet          the rows of shard 7, in the order of the input
    OUT/_failed/part-000007.jsonl    its rows that were set aside, if any: {"file", "line", "choice", "id", "reason"}
    OUT/_graphs/part-000007.safetensors  its graphs, if asked for

A shard is there when its Parquet file is: everything else of it is written before, all under hidden names that are
synced and renamed. Its metadata says which job and rows it is of, so what is finished can be read from the folder
alone, after a kill at any moment. Names that begin with "_" or "." are passed over by pyarrow, pandas and Spark.

Left out: where rows come from (inputs.py) and how they are scored (scoring.py).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowgraph.adapters.inputs import Shard
from flowgraph.adapters.records import CERTIFICATE, COLUMNS
from flowgraph.graph import FORMAT, TokenGraph

SCHEMA = "flowgraph-scores/2"
"""Name and version of the folder's layout and columns; see docs/scale.md."""

MANIFEST, FAILED, GRAPHS, DOING, LOCK = "_manifest.json", "_failed", "_graphs", "_doing", "_lock"


def schema(numbers: Sequence[str] = (), graphs: bool = False) -> pa.Schema:
    """The columns of a shard: those of records.COLUMNS, where a row comes from, its certificate, what was asked for.

    `file`: its name below IN. `line`: of the file, from 1; for tables the number of the row. `choice`: which of
    the responses of that row. `graph`: its name in the shard's file of graphs.
    """
    fields = [
        pa.field("file", pa.string(), nullable=False),
        COLUMNS.field("line"),
        pa.field("choice", pa.int32(), nullable=False),
        *(one for one in COLUMNS if one.name != "line"),
        *(pa.field(name, pa.float64()) for name in CERTIFICATE),
        *(pa.field(name, pa.float64()) for name in numbers),
        *([pa.field("graph", pa.string(), nullable=False)] if graphs else []),
    ]
    return pa.schema(fields)


# ------------------------------------------------------------------------- whole or absent


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden path to write to, that takes its name when the block ends well and is gone when it doesn't."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield hidden
        _sync(hidden)
        os.replace(hidden, path)
        _sync(path.parent)
    finally:
        hidden.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Out of the caches of the machine, so that no power cut can take it back; a folder where the system can do so."""
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        return
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


_NO_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What Windows, SMB and FUSE answer where they can't sync a folder."""


class Later:
    """A function that runs in a thread of its own, and its value once that is asked for."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except BaseException as error:
            self._error = error

    def value(self, seconds: float, what: str) -> Any:
        """What the function returned or raised, if it does in time.

        A thread that hangs in the kernel can't be ended. It is left behind, so that the job can say so and end.

        Raises:
            TimeoutError: it doesn't.
        """
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        if not self._found:
            raise TimeoutError(f"{what} took longer than --io-timeout {seconds:g} s: does the file system hang?")
        return self._found[0]


# ------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Manifest:
    """What a folder of scores is made of.

    Attributes:
        settings: all that rows depend on: model, options, columns. inputs: name of a source -> fingerprint.
        shards: the plan.
    """

    settings: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    shards: list[Shard] = field(repr=False)

    @property
    def digest(self) -> str:
        """Of all that the rows depend on: every shard carries it."""
        # Not when a file was changed last: a copy of it gives the same shards.
        inputs = {name: [about["size"], about["sha256"]] for name, about in self.inputs.items()}
        text = json.dumps([SCHEMA, self.settings, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def write(self, out: Path, done: Mapping[str, Any] | None = None) -> None:
        """Into its folder; with what was done, once all is."""
        about = {"schema": SCHEMA, "settings": self.settings, "inputs": self.inputs, "done": done}
        text = json.dumps(about | {"shards": [shard.to_dict() for shard in self.shards]}, indent=1)
        with whole(out / MANIFEST) as path:
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path) -> Manifest:
        """
        Raises:
            ValueError: it is none, or of another version.
        """
        path = out / MANIFEST
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {about['schema']!r}, this version of FlowGraph writes {SCHEMA!r}")
            settings, inputs, shards = about["settings"], about["inputs"], [Shard(**one) for one in about["shards"]]
            if not isinstance(settings, dict) or not all(_is_fingerprint(one) for one in inputs.values()):
                raise ValueError("its settings or inputs are no objects of the kind that FlowGraph writes")
            for shard in shards:
                sizes = (shard.number, shard.line, shard.rows, shard.start, shard.stop)
                if shard.source not in inputs or not all(_is_count(size) for size in sizes):
                    raise ValueError(f"one of its shards is {shard}")
            return cls(settings, inputs, shards)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is no manifest of scores: {error}") from error

    def changes(self, other: Manifest) -> list[str]:
        """What `other` has otherwise, in words."""
        mine, others = ({**_flat(one.settings), **_flat(one.inputs)} for one in (self, other))
        return [
            f"{name}: {mine.get(name, 'nothing')} -> {others.get(name, 'nothing')}"
            for name in dict.fromkeys((*mine, *others))
            if mine.get(name) != others.get(name)
        ]


def _is_fingerprint(about: Any) -> bool:
    return isinstance(about, dict) and _is_count(about.get("size")) and isinstance(about.get("sha256"), str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def known(out: Path) -> Manifest | None:
    """The manifest of a folder of scores; None where there is no folder, or an empty one.

    Raises:
        ValueError: it is a folder of something else, or its manifest can't be read.
    """
    return Manifest.read(out) if is_ours(out) else None


def is_ours(out: Path) -> bool:
    """Is it a folder of scores, whatever its manifest says? No: there is no folder, or an empty one.

    Raises:
        ValueError: it is a folder of something else.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise ValueError(f"OUT: {out} is a file; the name of one must end in .parquet, and several files need a folder")
    if (out / MANIFEST).is_file():
        return True
    other = sorted(one.name for one in out.iterdir() if not (one.name == LOCK or one.name.startswith(f".{MANIFEST}.")))
    if other:
        raise ValueError(f"OUT: {out} is a folder of something else, it holds {', '.join(other[:3])}; give a new name")
    return False


def clear(out: Path) -> None:
    """Remove what a job has written to its folder, and nothing else. The manifest goes last."""
    for name in (FAILED, GRAPHS, DOING):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in (*out.glob("part-*.parquet"), *out.glob(".*.partial"), out / MANIFEST):
        path.unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """Remove hidden files that a killed run has left half written."""
    for folder in (out, out / FAILED, out / GRAPHS):
        for path in folder.glob(".*.partial"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time works on a folder. The kernel ends the lock with the process, however that ends.

    Raises:
        ValueError: another run does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"OUT: another run is writing to {out}") from None
        except OSError:  # a file system without locks
            pass
        yield


# ------------------------------------------------------------------------- shards


def part(out: Path, number: int) -> Path:
    return out / f"part-{number:06}.parquet"


def write_shard(
    out: Path,
    shard: Shard,
    table: pa.Table,
    failed: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    graphs: Sequence[TokenGraph] | None = None,
) -> None:
    """Write all of one shard, the Parquet file last.

    Args:
        about: goes into its metadata, beside the shard itself; `finished` gives it back.
        graphs: of the rows, in their order.
    """
    final = part(out, shard.number)
    if graphs is not None:
        (out / GRAPHS).mkdir(exist_ok=True)
        with whole(out / GRAPHS / f"{final.stem}.safetensors") as path:
            _save_graphs(path, graphs)
    notes = out / FAILED / f"{final.stem}.jsonl"
    if failed:
        (out / FAILED).mkdir(exist_ok=True)
        with whole(notes) as path:
            path.write_text("".join(json.dumps(one) + "\n" for one in failed), encoding="utf-8", newline="\n")
    else:
        notes.unlink(missing_ok=True)  # of an earlier attempt, that was killed before its rows were written
    text = json.dumps({**about, "shard": shard.to_dict()}, sort_keys=True)
    with whole(final) as path:
        pq.write_table(table.replace_schema_metadata({"flowgraph.schema": SCHEMA, "flowgraph.shard": text}), path)


def finished(out: Path, shard: Shard, digest: str) -> dict[str, Any] | None:
    """What the metadata of a shard says about it; None where it is not there, damaged, or of another job."""
    path = part(out, shard.number)
    try:
        about = json.loads((pq.read_metadata(path).metadata or {}).get(b"flowgraph.shard", b"{}"))
    except (FileNotFoundError, pa.ArrowException, ValueError, RecursionError):
        return None
    except OSError as error:
        if error.errno is not None:  # the file system; else pyarrow's word for a footer that is damaged
            raise
        return None
    mine = isinstance(about, dict) and about.get("job") == digest and about.get("shard") == shard.to_dict()
    return about if mine else None


def read_failed(out: str | Path) -> list[dict[str, Any]]:
    """All rows that were set aside, in the order of the input."""
    paths = sorted((Path(out) / FAILED).glob("part-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------- rows that end their process


def _note(path: Path, row: str | None, counts: Mapping[str, int]) -> None:
    hidden = path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
    hidden.write_text(json.dumps({"row": row, "deaths": counts}), encoding="utf-8")
    os.replace(hidden, path)


def _noted(path: Path) -> tuple[str | None, dict[str, int]]:
    """The row in work, and deaths by row; nothing where there is no note, or where it was cut off."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        row = about.get("row")
        return None if row is None else str(row), {str(k): int(count) for k, count in about.get("deaths", {}).items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return None, {}


class Attempt:
    """A note in the folder about a shard that is worked on: which rows were in work when a process died.

    A shard is tried again after a death, then a row at a time, and a row in whose work two more processes died is set
    aside. So no row can end one process after the other for ever.
    """

    DEATHS = 2

    def __init__(self, out: Path, shard: Shard) -> None:
        self._path = out / DOING / f"part-{shard.number:06}.json"
        self.again = self._path.is_file()
        row, self.deaths = _noted(self._path)
        if row is not None:
            self.deaths[row] = self.deaths.get(row, 0) + 1
        self._path.parent.mkdir(exist_ok=True)
        self.at(None)

    def at(self, row: str | None) -> None:
        """From now on, this row is in work."""
        _note(self._path, row, self.deaths)

    def killed(self, row: str) -> bool:
        """Has it ended so many processes that it is to be left alone?"""
        return self.deaths.get(row, 0) >= self.DEATHS

    def over(self) -> None:
        self._path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Nothing is in work any more, and no row is to blame for that. What was known stays: deaths that were counted,
        and that a process died over this part before, so that it is tried row by row."""
        if self.deaths or self.again:
            self.at(None)
        else:
            self.over()


def deaths(out: Path) -> int:
    """How much the notes of a folder know: parts in whose work a process died, and deaths of their rows."""
    return sum(1 + (row is not None) + sum(counts.values()) for _, row, counts in _notes(out))


def pardon(out: Path) -> None:
    """Take back that rows were in work when a run ended; deaths that were counted stay."""
    for path, row, counts in _notes(out):
        if row is not None:
            _note(path, None, counts)


def _notes(out: Path) -> Iterator[tuple[Path, str | None, dict[str, int]]]:
    for path in sorted((out / DOING).glob("part-*.json")):
        yield path, *_noted(path)


# ------------------------------------------------------------------------- graphs


def _save_graphs(path: Path, graphs: Sequence[TokenGraph]) -> None:
    taken: set[int] = set()
    tensors = {
        f"{number}/{name}": _alone(value, taken)
        for number, graph in enumerate(graphs)
        for name, value in graph.to_dict().items()
        if isinstance(value, Tensor)
    }
    about = [{"model": graph.model, "layers": graph.layers, "rule": graph.rule} for graph in graphs]
    save_file(tensors, str(path), metadata={"flowgraph": json.dumps({"format": FORMAT, "graphs": about})})


def _alone(value: Tensor, taken: set[int]) -> Tensor:
    """On the CPU, with memory that no other tensor has, as safetensors wants it; a copy only where it is not so yet.

    Args:
        taken: addresses of the memory that tensors before it have.
    """
    value = value.detach().cpu().contiguous()
    memory = value.untyped_storage()
    if memory.nbytes() != value.nbytes or memory.data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def graph_of(out: str | Path, name: str) -> TokenGraph:
    """The graph of a row, by the row's column `graph`.

    Raises:
        ValueError: there is no such graph, or it breaks a law.
    """
    stem, _, number = name.partition("/")
    if not (stem.startswith("part-") and stem[5:].isdigit() and number.isdigit()):
        raise ValueError(f"{name!r} is no name of a graph such as part-000007/12")
    path = Path(out) / GRAPHS / f"{stem}.safetensors"
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["flowgraph"])
            about = header["graphs"][int(number)]
            if header["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            prefix = f"{int(number)}/"
            keys = [key for key in sorted(file.keys()) if key.startswith(prefix)]
            graph = TokenGraph(**{key.removeprefix(prefix): file.get_tensor(key) for key in keys})
        graph.num_nodes = int(graph.prompt_mask.numel())
        graph.model, graph.rule = str(about["model"]), str(about["rule"])
        graph.layers = [int(layer) for layer in about["layers"]]
        graph.validate()
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot load graph {name} of {path}: {error}") from error
    return graph
