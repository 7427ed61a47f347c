"""docs/scale.md: its blocks of Python run on what its first commands make, and the join is exact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowgraph import cli
from flowgraph.adapters.records import CERTIFICATE, read_scores
from flowgraph.adapters.shards import MANIFEST, SCHEMA, schema
from tests.conftest import ROOT
from tests.jobs import NAN, load, responses, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def invoke(*arguments: Any) -> Any:
    settings = {"NO_COLOR": "1", "COLUMNS": "200", "FLOWGRAPH_TRACEBACK": ""}
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], env=settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rollouts and their scores."""
    folder = tmp_path_factory.mktemp("scale")
    tracer, _ = load({"folder": folder})
    tracer.model.save_pretrained(folder / "model")  # type: ignore[operator]
    tracer.tokenizer.save_pretrained(folder / "model")
    rows = responses(25, _11=NAN)
    for number, row in enumerate(rows):
        row |= {"correct": number % 2 == 0, "answer": "the right one"}
    write_rows(folder / "rollouts.jsonl", rows)
    arguments = ["score", folder / "rollouts.jsonl", folder / "scores", "-m", folder / "model", "--shard-rows", "10"]
    result = invoke(*arguments, "--measures", "--graphs")
    assert result.exit_code == 3, result.output
    assert "24 rows in" in result.stdout
    assert f"set aside: 1 of 25 lines, see {folder / 'scores' / '_failed'}" in result.stdout
    again = invoke(*arguments, "--measures", "--graphs")
    assert again.exit_code == 3
    assert "going on with" in again.stderr
    return folder


def test_every_way_of_loading_gives_the_same_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    found: dict[str, Any] = {}
    for block in blocks:
        package = re.search(r"(?:import|from) (\w+)", block)
        if package is not None:
            pytest.importorskip(package[1])
        exec(compile(block, "scale.md", "exec"), names := {**found})
        found |= names
        scores = names["scores"]
        if hasattr(scores, "df"):
            scores = scores.df()  # DuckDB's own kind of table
        assert list(scores["line"]) == [k for k in range(1, 26) if k != 12]
    joined = found["joined"]
    assert len(joined) == 24
    assert (joined["id"] == joined["id_found"]).all()
    assert (joined["answer"] == "the right one").all(), "what IN says stays under its name"
    assert (joined["answer_found"] == joined["response"].str.extract(r"(\d+)\.$")[0]).all()


def test_the_page_names_columns_and_schema(place: Path) -> None:
    assert f"`{SCHEMA}`" in PAGE
    for name in schema(graphs=True).names:
        assert f"`{name}`" in PAGE, name
    about = json.loads((place / "scores" / MANIFEST).read_text())
    done = about["done"]
    assert (done["rows"], done["written"], done["failed"]) == (25, 24, 1)


def test_compare_takes_the_folder(place: Path) -> None:
    table = read_scores(place / "scores")
    assert table.num_rows == 24
    assert {"file", "line", "gini", *CERTIFICATE} <= set(table.column_names)
    labels = ["--labels", place / "rollouts.jsonl", "--by", "correct", "--resamples", "50"]
    result = invoke("compare", place / "scores", *labels)
    assert result.exit_code == 0, result.output
    assert "correct=true: 13 traces | correct=false: 11 traces" in result.stdout


def test_other_options_are_refused_by_the_command(place: Path) -> None:
    result = invoke("score", place / "rollouts.jsonl", place / "scores", "-m", place / "model", "--top", "0.3")
    assert result.exit_code == 1
    assert "options top: 0.4 -> 0.3" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--engine", "ray"], ["--workers", "2"], ["--graphs"]])
def test_one_file_is_made_by_one_process(place: Path, arguments: list[str]) -> None:
    result = invoke("score", place / "rollouts.jsonl", place / "o.parquet", "-m", place / "model", *arguments)
    assert result.exit_code == 2
    assert "need a folder as OUT" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
