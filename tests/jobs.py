"""Jobs of scoring to test with: rows, a tiny model with traps in it, and what must be true of a folder of scores."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flowgraph import Tracer
from flowgraph.adapters import engines, inputs, scoring, shards
from tests.written import TOKENIZER, ids, policy

WINDOW = 256
KILLS, KILLS_ONCE, HANGS, NAN = "!", "&", "~", "^"
"""In a response: what happens to the process, or to the numbers of the model, that reads it."""


def load(given: Mapping[str, Any]) -> tuple[Tracer, bool]:
    """A tiny random model over bytes; the traps leave notes in `given["folder"]`."""
    torch.set_num_threads(1)
    if given.get("hangs"):  # when it reads rows; for a process that does nothing else
        scoring.read = lambda *args: time.sleep(1000)  # type: ignore[assignment, attr-defined]
    model = policy(max_position_embeddings=WINDOW)
    folder = Path(given["folder"])
    if given.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / "workers").open("a") as notes:
        notes.write(f"{os.getpid()}\n")
    trap_of = {ids(text, end=False)[0]: text for text in (KILLS, KILLS_ONCE, HANGS)}
    with torch.no_grad():
        model.get_input_embeddings().weight[ids(NAN, end=False)[0]] = float("nan")

    def spring(module: Any, arguments: tuple[Tensor, ...]) -> None:
        if given.get("pause"):
            time.sleep(given["pause"])
        for trap in {trap_of[token] for token in arguments[0].flatten().tolist() if token in trap_of}:
            with (folder / f"sprung{ord(trap)}").open("a") as notes:
                notes.write(f"{os.getpid()}\n")
            if trap == HANGS:
                time.sleep(1000)
            elif trap == KILLS or not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    model.get_input_embeddings().register_forward_pre_hook(spring)
    return Tracer(model, TOKENIZER, **given.get("options", {})), False


def responses(count: int, **special: str) -> list[dict[str, Any]]:
    """Rows of different lengths; `_7="text"` puts a text into row 7, from 0."""
    found = []
    for k in range(count):
        text = f"{'so ' * (k * 7 % 13)}it is {special.get(f'_{k}', '')}{k + 7}. The answer is {k + 7}."
        found.append({"id": f"r{k}", "question": f"What is {k} plus 7?", "response": text})
    return found


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """As JSON lines; text as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def job_of(
    source: Path,
    out: Path,
    *,
    shard_rows: int = 10,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    **how: Any,
) -> scoring.Job:
    """A job over the tiny model, planned or found in its folder."""
    limit = scoring.Limits(**{"io_timeout": 60.0} | dict(limits or {}))
    settings = {"model": "tiny", **how}
    manifest, _ = engines.prepare(
        source, out, settings, shard_rows=shard_rows, max_row_bytes=limit.max_row_bytes, overwrite=overwrite
    )
    found = {one.name: one for one in inputs.sources(source)}
    model = scoring.Model(load, {"folder": str(source.parent), **(given or {})})
    return scoring.Job(found, manifest, out, model, limit, overwrite=overwrite, **how)


def score(job: scoring.Job, **engine: Any) -> dict[str, Any]:
    """Do a job; the counts at its end."""
    return engines.score(job, engines.Engine(**{"device": "cpu"} | engine), scoring.Tally(job.manifest.rows))


def table_of(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("part-*.parquet")))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder of scores, by its name; but what says where and when it was made."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (shards.LOCK, shards.MANIFEST)
    }


def assert_whole(out: Path, source: Path) -> None:
    """No row of JSON lines is lost, none is there twice, and nothing is left lying about."""
    numbers = [k for k, line in enumerate(source.read_bytes().split(b"\n"), 1) if line.strip()]
    rows = table_of(out)
    scored = list(zip(rows["line"].to_pylist(), rows["choice"].to_pylist(), strict=True))
    aside = [(one["line"], one["choice"] or 0) for one in shards.read_failed(out)]
    assert len(scored) == len(set(scored))
    assert not set(scored) & set(aside)
    assert sorted({line for line, _ in (*scored, *aside)}) == numbers
    assert scored == sorted(scored)
    assert [path.name for path in out.rglob("*.partial")] == []
    assert not (out / shards.DOING).exists()


def assert_close(one: pa.Table, other: pa.Table, tolerance: float = 1e-5) -> None:
    """The same rows, numbers up to rounding."""
    assert one.schema.equals(other.schema)
    exact = (
        "file",
        "line",
        "choice",
        "id",
        "prompt_tokens",
        "response_tokens",
        "response_token_ids",
        "answer",
        "flags",
    )
    for name in exact:
        assert one[name].to_pylist() == other[name].to_pylist(), name
    for name in ("throughput", "reach"):
        for row, (a, b) in enumerate(zip(one[name].to_pylist(), other[name].to_pylist(), strict=True)):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=tolerance, msg=f"{name} {row}")
