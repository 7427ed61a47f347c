"""Faithfulness: which tokens may be chosen, a job that can be stopped, and what its lines say together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from flowgraph import Tracer
from flowgraph.adapters.evidence import faithful as job
from flowgraph.adapters.evidence import plots, signals
from flowgraph.adapters.evidence.faithful import FaithfulConfig, average_precision, faithful
from flowgraph.adapters.evidence.hiding import answer_logp
from flowgraph.adapters.evidence.signals import SIGNALS, random_twin
from flowgraph.adapters.evidence.summary import markdown, same_answer, summarise, summary_of
from flowgraph.adapters.evidence.traces import Case, Found, Rows, forms_of, prepare, whole_word, written_answer
from tests.conftest import ROOT
from tests.jobs import responses, write_rows
from tests.test_docs import blocks
from tests.test_docs import run as run_blocks
from tests.written import TOKENIZER, policy

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNALS_HERE = ("flow", "reach", "recency", "flow/shuffled", "flow/random_model")
QUICK: dict[str, Any] = {"signals": SIGNALS_HERE, "regenerate": 2, "curves": 1, "restated": "both"}


@pytest.fixture(scope="module")
def model() -> Any:
    return policy(max_position_embeddings=256)


def run(model: Any, rows: Any, out: Path, **changes: Any) -> dict[str, Any]:
    return faithful(model, TOKENIZER, rows, out, FaithfulConfig(**{**QUICK, **changes}), name="tiny", plot=False)


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Without what a clock said."""
    lines = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def case(row: Mapping[str, Any], carriers: str | None = None) -> Case:
    ((_, found),) = Rows.of([row], carriers).records()
    return prepare(Tracer(policy(), TOKENIZER), found, False, ("exclude", "include"), carriers)


def text_of(trace: Case, mask: Tensor) -> str:
    return "".join(chr(b) if m else "_" for b, m in zip(spelled(trace.token_ids), mask.tolist(), strict=True))


def spelled(ids: Tensor) -> list[int]:
    return [ord(TOKENIZER.decode([i])) if i > 2 else ord("^") for i in ids.tolist()]


# ------------------------------------------------------------------------- what may be chosen


def test_the_answer_what_predicts_it_and_what_follows_it_are_never_chosen() -> None:
    trace = case({"question": "Q", "response": "It is 42.\nA: 42\nbye"})
    shown = text_of(trace, trace.choices["include"])
    assert shown.endswith("It is 42.\nA:" + "_" * len(" 42\nbye"))
    assert shown.startswith("_")  # the question


def test_restatements_are_left_out_as_whole_numbers_only() -> None:
    trace = case({"question": "42?", "response": "142 or 42.5 or 6*7=42, $42. So\nA: 42"})
    shown = text_of(trace, trace.choices["exclude"])
    assert "142 or 42.5 or 6*7=__, $__. So\nA:" in shown
    assert (trace.choices["include"] & ~trace.choices["exclude"]).sum() == 4


@pytest.mark.parametrize(
    ("answer", "text", "restated"),
    [
        ("$1,000 dollars", "1000 x 1,000 x 11,000 x 1,000.5", ["1000", "1,000"]),
        ("Yes", "yes, yesterday", ["yes"]),
        ("A", "a or A", ["A"]),
        (r"\frac{1}{2}", r"it is \frac{1}{2} now", [r"\frac{1}{2}"]),
        ("-3", "7 - 3 = 4 and -3", ["3", "-3"]),
    ],
)
def test_what_restates_an_answer(answer: str, text: str, restated: list[str]) -> None:
    places = {match.span() for form in forms_of(answer) for match in whole_word(form).finditer(text)}
    longest = [(a, b) for a, b in sorted(places) if not any(c <= a and b <= d and (c, d) != (a, b) for c, d in places)]
    assert [text[a:b] for a, b in longest] == restated


def test_rows_that_cannot_be_used_say_why() -> None:
    for row, reason in (
        ({"question": "?", "response": "I do not know."}, "no answer was found"),
        ({"question": "?", "response": "4\nA: 4"}, "fewer than 5 tokens"),
        ({"question": "?"}, "no response"),
        ({"question": "?", "response": "so it goes\nA: 4", "c": [[3, 99]]}, "character ranges"),
        ({"question": "?", "response": "so it goes\nA: 4", "c": "xx"}, "character ranges"),
    ):
        with pytest.raises(ValueError, match=reason):
            case(row, "c")


def test_carriers_are_characters_of_the_response() -> None:
    trace = case({"question": "Q", "response": "one two three\nA: 4", "c": [[4, 7]]}, "c")
    assert trace.carriers is not None
    assert text_of(trace, trace.carriers).replace("_", "") == "two"


def test_the_right_answer_is_the_rows_or_else_the_stated_one() -> None:
    response = {"question": "?", "response": "so it goes\nA: 4"}
    assert case(response).right == "4"
    assert case({**response, "answer": 5}).right == "5"
    assert case({**response, "answer": "3 + 2 = 5\n#### 5"}).right == "5"


def test_average_precision_of_a_hand_made_ranking() -> None:
    scores = torch.tensor([9.0, 4, 3, 2, 1])
    mask = torch.tensor([False, True, True, True, True])
    carriers = torch.tensor([True, True, False, True, False])
    assert average_precision(scores, carriers, mask) == pytest.approx((1 / 1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("new", "answer"),
    [("42\nA: 7", "42"), (" 42 apples.", "42 apples"), ("\n\n42", "42"), ("", "")],
)
def test_the_answer_of_a_continuation(new: str, answer: str) -> None:
    assert written_answer("6 times 7\nA: ", new, "A:") == answer


def test_same_answers() -> None:
    assert same_answer("$1,000", "1000.0") and same_answer(" **Yes**.", "yes") and same_answer("1.", "1")
    assert not same_answer("41", "42") and not same_answer("yes", "no") and not same_answer("", "42")
    assert same_answer("28 = 30 - 2", "28") and same_answer("$28.00 per gallon", "28 dollars")
    assert not same_answer("2.5 cups", "2") and not same_answer("So, 28", "28") and not same_answer("283", "28")
    assert not same_answer("1/2", "1/3") and not same_answer("10:30", "10:15") and not same_answer("40% off", "40")


# ------------------------------------------------------------------------- the job


def test_lines_hold_what_hiding_does(model: Any, tmp_path: Path) -> None:
    rows = responses(3)
    summary = run(model, rows, tmp_path / "out", shares=(0.1, 0.4), ends=("top", "bottom"))
    lines = lines_of(tmp_path / "out")
    assert [line["line"] for line in lines] == [1, 2, 3]
    assert ["answers" in line["tables"][0] for line in lines] == [True, True, False]
    assert ["curves" in line for line in lines] == [True, False, False]
    assert len(lines[0]["tables"]) == 2 * 2 * 2
    assert set(lines[0]["curves"]["include"]) == {"flow", "reach", "recency", "random", "random/1", "random/2"}
    names = {"flow", "reach", "recency", "flow/shuffled", "flow/random_model", "random", "random/1", "random/2"}
    assert set(lines[0]["tables"][0]["drop"]) == names

    # What one of the numbers is, by hand: recency hides the last tokens that may be chosen.
    ((_, found),) = Rows.of(rows[:1]).records()
    trace = prepare(Tracer(model, TOKENIZER), found, False, ("include",))
    (table,) = [
        one for one in lines[0]["tables"] if (one["restated"], one["share"], one["end"]) == ("include", 0.4, "top")
    ]
    hidden = torch.zeros(2, len(trace.token_ids), dtype=torch.bool)
    hidden[1, trace.choices["include"].nonzero().flatten()[-table["hidden"] :]] = True
    logp = answer_logp(model, trace.token_ids, hidden, trace.spans.answer_tokens)
    assert table["drop"]["recency"] == pytest.approx(float(logp[0] - logp[1]), abs=1e-5)
    assert lines[0]["logp"] == pytest.approx(float(logp[0]), abs=1e-5)

    assert summary["traces"] == 3
    assert {(one["control"], one["of"]) for one in summary["sanity"]} == {
        ("flow/shuffled", "flow"),
        ("flow/random_model", "flow"),
    }
    assert {one["verdict"] for one in summary["sanity"]} == {"too few traces"}
    assert json.loads((tmp_path / "out" / "faithful.json").read_text()) == summary == summarise(tmp_path / "out")
    assert (tmp_path / "out" / "faithful.md").read_text() == markdown(summary)


def test_a_killed_job_goes_on_to_the_same_lines(model: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*responses(3), {"question": "?", "response": "none"}, *responses(1)])
    run(model, rows, tmp_path / "whole")
    seen: list[int] = []

    def stop(line: Mapping[str, Any]) -> None:
        seen.append(line["line"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faithful(model, TOKENIZER, rows, tmp_path / "cut", FaithfulConfig(**QUICK), name="tiny", advance=stop)
    with (tmp_path / "cut" / "traces.jsonl").open("a") as file:
        file.write('{"file": "rows.jsonl", "line": 3, "tab')  # killed in the middle of a line
    assert len(summarise(tmp_path / "cut")["tables"]) == 2
    before = (tmp_path / "cut" / "traces.jsonl").read_text().splitlines()[:2]
    summary = run(model, rows, tmp_path / "cut")
    assert (tmp_path / "cut" / "traces.jsonl").read_text().splitlines()[:2] == before, "done again"
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    assert summary["traces"] == 4 and summary["set_aside"] == {"no answer was found in the response": 1}


def test_several_workers_write_the_same_lines(model: Any, tmp_path: Path) -> None:
    # The third trace that can be used is the fifth row: what is done for a trace depends on those before it.
    rows = [*responses(2), {"question": "?", "response": "none"}, {"question": "?"}, *responses(3)]
    few: dict[str, Any] = {"signals": ("recency", "flow/random_model"), "regenerate": 3, "curves": 1, "limit": 4}
    run(model, rows, tmp_path / "one", **few)
    heard: list[int] = []
    config = FaithfulConfig(**{**QUICK, **few})
    faithful(
        model, TOKENIZER, rows, tmp_path / "two", config, name="tiny", plot=False, workers=2,
        advance=lambda line: heard.append(line["line"]),
    )  # fmt: skip
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")
    assert heard == [1, 2, 3, 4, 5, 6] == [line["line"] for line in lines_of(tmp_path / "two")]
    assert ["answers" in line["tables"][0] for line in lines_of(tmp_path / "two") if "tables" in line] == [
        True, True, True, False,
    ]  # fmt: skip
    assert run(model, rows, tmp_path / "two", **few | {"limit": 5})["traces"] == 5, "goes on with one"
    assert not torch.multiprocessing.active_children()


def test_what_other_processes_cannot_know_is_said(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "mine", SIGNALS["recency"])
    config = FaithfulConfig(signals=("mine",), regenerate=0, curves=0)
    with pytest.raises(LookupError, match="'mine' is not known in other processes"):
        faithful(model, TOKENIZER, responses(1), tmp_path / "mine", config, plot=False, workers=2)
    with pytest.raises(ValueError, match=r"workers: .* can't be sent to other processes"):
        faithful(
            model, TOKENIZER, responses(1), tmp_path / "lambda", replace(config, signals=("flashtrace",)),
            plot=False, workers=2, flashtrace=lambda reading: torch.zeros(len(reading)),
        )  # fmt: skip
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        faithful(model, TOKENIZER, responses(1), tmp_path / "none", config, workers=0)


def test_seconds_of_a_signal_are_those_it_takes_by_itself(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what two signals share is computed once."""
    sinks: list[Tensor] = []

    def slow(model: Any, ids: Tensor, of: Tensor) -> Tensor:
        sinks.append(of)
        time.sleep(0.1)
        return of.double()

    monkeypatch.setattr(signals, "routes", slow)
    run(model, responses(1), tmp_path / "out", signals=("routes", "routes/paper"), regenerate=0, curves=0)
    (line,) = (json.loads(line) for line in (tmp_path / "out" / "traces.jsonl").read_text().splitlines())
    assert len(sinks) == 1 and len(sinks[0]) == 2
    assert line["seconds"]["signals"]["routes"] >= 0.1 <= line["seconds"]["signals"]["routes/paper"]


def test_a_larger_limit_goes_on_and_other_settings_are_refused(model: Any, tmp_path: Path) -> None:
    rows, out = responses(3), tmp_path / "out"
    small: dict[str, Any] = {"signals": ("recency", "future_attention"), "regenerate": 0, "curves": 0}
    assert run(model, rows, out, **small, limit=1)["traces"] == 1
    assert run(model, rows, out, **small, limit=2)["traces"] == 2
    run(model, rows, tmp_path / "at once", **small, limit=2)
    assert lines_of(out) == lines_of(tmp_path / "at once")
    with pytest.raises(ValueError, match=r"shares: \[0.2\] there, \[0.1\] here"):
        run(model, rows, out, **small, limit=2, shares=(0.1,))
    with pytest.raises(ValueError, match="sha256"):
        run(model, responses(4), out, **small)
    with pytest.raises(ValueError, match="weights"):
        run(random_twin(model, 7), rows, out, **small)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"something else, it holds notes\.txt"):
        run(model, rows, tmp_path / "other", **small)


def test_parquet_has_answers_and_carriers_too(model: Any, tmp_path: Path) -> None:
    rows = [{**row, "answer": "9", "where": [[0, 4]]} for row in responses(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    summary = run(model, tmp_path / "rows.parquet", tmp_path / "out", carriers="where", curves=0)
    lines = lines_of(tmp_path / "out")
    assert lines[0]["regenerated"]["right"] == "9"
    assert set(lines[0]["carriers"]) == {"exclude", "include"}
    assert 0 < summary["carriers"][0]["metrics"]["precision"]["recency"]["mean"] < 1
    assert set(summary["tables"][0]["metrics"]) == {"drop", "changed", "lost", "recall"}


def test_no_usable_row_is_an_error(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 1 rows could be used; the first: no answer"):
        run(model, [{"question": "?", "response": "none"}], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signals": ("flow", "magic")}, "there is no 'magic'"),
        ({"signals": "flow"}, "names or"),
        ({"shares": (0.3,)}, "shares must be different ones of 0.05"),
        ({"ends": ("top", "top")}, "ends must be different"),
        ({"restated": "maybe"}, "restated must be"),
        ({"regenerate": -1}, "regenerate must be 0 or more"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaithfulConfig(**changes)


def test_flow_random_and_the_real_signals_of_controls_are_always_there() -> None:
    names = FaithfulConfig(signals=("reach/shuffled",)).names()
    assert names == ["flow", "reach", "random", "random/1", "random/2", "reach/shuffled"]
    assert set(FaithfulConfig(signals="all").names()) == set(SIGNALS) - {"flashtrace"}
    assert set(job.DEFAULT) <= set(SIGNALS)


def test_flashtrace_comes_from_the_caller(model: Any, tmp_path: Path) -> None:
    config = FaithfulConfig(signals=("flashtrace",), regenerate=0, curves=0)
    with pytest.raises(ValueError, match="flashtrace is a package of its own"):
        faithful(model, TOKENIZER, responses(1), tmp_path / "out", config)
    found = faithful(
        model, TOKENIZER, responses(1), tmp_path / "out", config, plot=False, flashtrace=SIGNALS["recency"]
    )
    assert "flashtrace" in found["tables"][0]["metrics"]["drop"]


# ------------------------------------------------------------------------- what lines say together


def run_of(controls: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"settings": {"seed": 0, "controls": dict(controls or {}), "model": "by hand"}}


def written(drops: Mapping[str, float], end: str = "top", **more: Any) -> dict[str, Any]:
    table = {"restated": "exclude", "share": 0.2, "end": end, "hidden": 2, "of": 10, "drop": dict(drops)}
    return {
        "tokens": 20,
        "tables": [table | more.pop("table", {})],
        "seconds": {"steps": {"passes": 1.0}, "signals": dict.fromkeys(drops, 0.5)},
        **more,
    }


def by_hand(end: str = "top") -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(size=30)
    return [
        written(
            {
                "flow": 1 + wide,
                "reach": 2 + wide + 0.1 * (k % 3),
                "recency": 1 + wide + (1 if k % 2 else -1),
                "random": 0.0,
                "random/1": 0.5 + wide,
                "random/2": 1.0 - wide,
                "flow/shuffled": wide,
                "reach/shuffled": 2 + wide,
            },
            end,
        )
        for k, wide in enumerate(noise)
    ]


CONTROLS = {"flow/shuffled": "flow", "reach/shuffled": "reach"}


def test_tables_of_lines_with_known_means() -> None:
    summary = summary_of(run_of(CONTROLS), by_hand())
    drop = summary["tables"][0]["metrics"]["drop"]
    assert drop["reach"]["minus_flow"]["mean"] == pytest.approx(1.1)
    # The traces differ a lot and the two signals hardly: only a paired interval can see that.
    assert drop["reach"]["high"] - drop["reach"]["low"] > 0.5
    assert drop["reach"]["minus_flow"]["high"] - drop["reach"]["minus_flow"]["low"] < 0.1
    words = {name: cell["minus_flow"]["verdict"] for name, cell in drop.items() if name != "flow"}
    expected = {"reach": "better", "recency": "no difference", "flow/shuffled": "worse"}
    assert {name: words[name] for name in expected} == expected
    assert "minus_flow" not in drop["flow"]
    assert drop["random"]["mean"] == pytest.approx(0.5), "the mean of the seeds in each trace"
    assert {"random/1", "random/2"}.isdisjoint(drop)
    assert drop["random"]["high"] - drop["random"]["low"] < 1e-9, "the seeds' noise cancels in each trace"
    sanity = {one["control"]: one for one in summary["sanity"]}
    assert sanity["flow/shuffled"]["difference"]["mean"] == pytest.approx(1)
    assert sanity["flow/shuffled"]["verdict"] == "loses"
    assert sanity["reach/shuffled"]["difference"]["mean"] == pytest.approx(0.1)
    text = markdown(summary)
    assert text.index("## Sanity") < text.index("## The 20% of tokens with the highest scores")
    assert "| reach/shuffled |" in text and "| loses |" in text


def test_at_the_bottom_less_is_better() -> None:
    summary = summary_of(run_of(CONTROLS), by_hand("bottom"))
    drop = summary["tables"][0]["metrics"]["drop"]
    assert drop["reach"]["minus_flow"]["verdict"] == "worse"
    assert drop["flow/shuffled"]["minus_flow"]["verdict"] == "better"
    assert summary["sanity"][0]["verdict"] == "does not lose"


def test_a_control_that_equals_its_signal_does_not_lose() -> None:
    lines = [written({"flow": float(k), "flow/shuffled": float(k), "random": 0.0}) for k in range(12)]
    (sanity,) = summary_of(run_of({"flow/shuffled": "flow"}), lines)["sanity"]
    assert sanity["verdict"] == "does not lose"
    (few,) = summary_of(run_of({"flow/shuffled": "flow"}), lines[:9])["sanity"]
    assert few["verdict"] == "too few traces"


def test_changed_and_lost_answers() -> None:
    lines = []
    for k in range(4):
        right = "7" if k < 3 else "8"  # the last one was wrong before anything was hidden: nothing to lose
        texts = {"flow": "7" if k == 0 else "9", "random": "7.0"}
        table = {"answers": texts}
        drops = {"flow": 1.0, "random": 0.0}
        lines.append(written(drops, table=table, regenerated={"answer": "7", "right": right}))
    metrics = summary_of(run_of(), lines)["tables"][0]["metrics"]
    assert metrics["changed"]["flow"]["mean"] == pytest.approx(3 / 4)
    assert metrics["lost"]["flow"]["mean"] == pytest.approx(2 / 3) and metrics["lost"]["flow"]["traces"] == 3
    assert metrics["changed"]["random"]["mean"] == 0


def test_curves_fall_early_or_rise_early() -> None:
    def curve(level: float) -> dict[str, Any]:
        return {"deletion": [0.0, level], "insertion": [level, 0.0], "area": [level / 2, level / 2]}

    lines = [
        written({"flow": 1.0}, curves={"exclude": {"flow": curve(-4), "reach": curve(-5 - k % 2)}}) for k in range(12)
    ]
    (found,) = summary_of(run_of(), lines)["curves"]
    assert found["metrics"]["deletion"]["reach"]["minus_flow"]["verdict"] == "better"
    assert found["metrics"]["insertion"]["reach"]["minus_flow"]["verdict"] == "worse"
    assert found["metrics"]["deletion"]["reach"]["curve"] == pytest.approx([0, -5.5])


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary = summary_of(run_of(CONTROLS), by_hand())
    assert plots.draw(summary, tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_how_to_get_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    config = FaithfulConfig(signals=("recency",), regenerate=0, curves=0)
    with pytest.raises(ImportError, match=r'pip install "flowgraph-llm\[evidence\]"'):
        faithful(model, TOKENIZER, responses(1), tmp_path / "out", config, plot=True)
    faithful(model, TOKENIZER, responses(1), tmp_path / "out", config)
    assert not (tmp_path / "out" / "faithful.png").exists()


def test_found_is_what_a_row_says() -> None:
    ((where, found),) = Rows.of([{"id": "x", "question": "?", "response": "r", "answer": 3}]).records()
    assert where == {"file": "rows", "line": 1, "choice": 0, "id": "x"}
    assert isinstance(found, Found) and found.right == "3" and found.carriers is None


def test_the_page_runs(model: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "faithful.md").read_text()
    names: dict[str, Any] = {"model": model, "tokenizer": TOKENIZER, "folder": tmp_path / "out"}
    run_blocks(blocks(page), names, ROOT / "docs" / "faithful.md")
    for column in ("drop", "changed", "lost", "recall", "seconds"):
        assert column in page
