"""`flowgraph faithful`: what it reads, writes, shows and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowgraph.adapters.evidence.faithful import DEFAULT, ENDS, RESTATED, SHARES
from tests.jobs import responses, write_rows
from tests.test_cli import good, invoke, refused

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ("--signals", "reach,recency,flow/shuffled", "--regenerate", "1", "--curves", "1", "--no-plot")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", responses(3))


def command(models: dict[str, str], rows: Path, out: Path, *more: str) -> list[Any]:
    return ["faithful", rows, "-m", models["random"], "--out", out, *more]


def drops_of(line: str) -> list[Any]:
    return [table["drop"] for table in json.loads(line)["tables"]]


def test_tables_and_files(models: dict[str, str], rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = good(*command(models, rows, out, *FEW, "--shares", "5%,0.2", "--ends", "top,bottom", "--limit", "2"))
    assert "2 traces" in shown.stdout
    assert shown.stdout.index("flow/shuffled") < shown.stdout.index("top 5% hidden, 2 traces"), "controls come first"
    assert all(f"{end} {share} hidden" in shown.stdout for end in ENDS for share in ("5%", "20%"))
    assert "too few traces" in shown.stdout
    assert {path.name for path in out.iterdir() if not path.name.startswith("_")} == {
        "run.json", "traces.jsonl", "faithful.json", "faithful.md",
    }  # fmt: skip
    result = json.loads((out / "faithful.json").read_text())
    assert result["traces"] == 2 and len(result["tables"]) == 4
    assert result["run"]["settings"]["model"] == models["random"]

    again = good(*command(models, rows, out, *FEW, "--shares", "5%,0.2", "--ends", "top,bottom", "-q"))
    assert again.stdout == ""
    assert json.loads((out / "faithful.json").read_text())["traces"] == 3, "it goes on"
    wide = tmp_path / "wide"
    good(*command(models, rows, wide, *FEW, "--shares", "5%,0.2", "--ends", "top,bottom", "-q", "--workers", "2"))
    assert [drops_of(line) for line in (wide / "traces.jsonl").open()] == [
        drops_of(line) for line in (out / "traces.jsonl").open()
    ]
    message = refused(1, *command(models, rows, out, *FEW, "--ends", "top", "-q"))
    assert "holds a run of something else" in message and "shares" in message and "ends" in message


def test_rows_set_aside_are_counted(models: dict[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*responses(1), "{", {"question": "?", "response": "I pass."}])
    result = invoke(*command(models, rows, tmp_path / "out", *FEW))
    assert result.exit_code == 3
    assert "1 traces, 2 rows set aside" in result.stdout
    assert "1 rows: no answer was found" in result.stdout and "1 rows: not JSON" in result.stdout


def test_the_answer_is_found_as_told(models: dict[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "?", "response": "so it goes, result=7 and A: 5"}])
    good(*command(models, rows, tmp_path / "out", *FEW, "--answer-regex", r"result=(\d)"))
    (line,) = (tmp_path / "out" / "traces.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == "7"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--signals", "magic"), "there is no 'magic'"),
        (("--shares", "0.3"), "shares must be different ones of 0.05, 0.1, 0.2, 0.4"),
        (("--shares", "many"), "is not shares like 0.05,0.2"),
        (("--ends", "middle"), "ends must be different ones of top, bottom"),
        (("--restated", "maybe"), "is not one of exclude, include, both"),
    ],
)
def test_wrong_usage(models: dict[str, str], rows: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    said = refused(2, *command(models, rows, tmp_path / "out", *more))
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_said(models: dict[str, str], rows: Path, tmp_path: Path) -> None:
    assert "there is no file" in refused(1, *command(models, tmp_path / "none.jsonl", tmp_path / "out"))
    write_rows(tmp_path / "none.jsonl", [{"question": "?", "response": "I pass."}])
    assert "none of 1 rows could be used" in refused(
        1, *command(models, tmp_path / "none.jsonl", tmp_path / "out", *FEW)
    )


def test_help_names_the_choices() -> None:
    text = good("faithful", "--help").stdout
    for choice in (*map(str, SHARES), *ENDS, *RESTATED, "flowgraph faithful", "traces.jsonl"):
        assert choice in text
    assert "faithful" in good("--help").stdout
    assert "[bold]" not in text
    assert {"flow", "reach", "flow/positions"} <= set(DEFAULT)
