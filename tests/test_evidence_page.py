"""docs/evidence.md is what the committed logs say, and its parts are put together as they should be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')

from benchmarks.evidence import page, recall
from flowgraph.adapters.evidence.summary import number


def test_a_section_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\n"
    once = page.fill(text, "a", "new")
    assert once == "before\n<!-- a -->\n\nnew\n\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\n"
    assert page.fill(once, "a", "new") == once


@pytest.mark.parametrize("text", ["", "<!-- a -->", "<!-- /a --><!-- a -->", "<!-- a --><!-- a --><!-- /a -->"])
def test_a_page_without_its_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must hold <!-- a --> and, after it, <!-- /a -->, once each"):
        page.fill(text, "a", "new")


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.3, "no difference"), (None, None, "")],
)
def test_words_say_what_intervals_say(low: float | None, high: float | None, word: str) -> None:
    cell = {"mean": 0.2, "low": low, "high": high}
    assert recall.word(cell) == word
    assert number(cell) == ("0.20" if low is None else f"0.20 [{low:.2f}, {high:.2f}]")


def test_signals_stand_in_the_order_of_their_precision(tmp_path: Path) -> None:
    header: dict[str, Any] = {"task": "chains", "split": "report", "signals": ["flow", "reach"]}
    lines = [header]
    for problem in range(6):  # reach finds the carrier, flow does not
        line = {"task": "chains", "split": "report", "problem": problem, "level": 1, "solved": True, "verified": True}
        lines.append(line | {"units": 3, "carriers": [0], "hops": [1], "max": "201 012", "mean": "201 012"})
    (tmp_path / "recall-chains.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page.carriers_section(tmp_path)
    assert text.index("| `reach` | 1.00") < text.index("| `flow` | 0.33")
    assert "6 problems, of which the decoder solves 100%" in text and "better" in text
    assert "There is no recall-scratchpad.jsonl yet" in text


def test_the_mix_is_compared_with_reach(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"task": "addition", "split": "report", "signals": ["mix", "reach"]}]
    for problem in range(12):  # the mix finds the carrier, reach does not
        line = {"task": "addition", "split": "report", "problem": problem, "level": 1, "solved": True, "verified": True}
        lines.append(line | {"units": 3, "carriers": [0], "hops": [1], "max": "012 201", "mean": "012 201"})
    (tmp_path / "recall-addition.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "gsm8k").mkdir()
    drops = [{"line": n, "tables": [{"drop": {"mix": n, "reach": n + 1 + n % 2}}]} for n in range(12)]
    rows: list[dict[str, Any]] = [*drops, {"line": 12, "reason": "set aside"}]
    (tmp_path / "gsm8k" / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    found = page.mix_section(tmp_path).splitlines()[2:]
    assert found[0].startswith("| addition, precision | other tasks | 12 | 1.00 ") and found[0].endswith("better |")
    assert found[1].startswith("| GSM8K, `gsm8k`, drop | other problems | 12 | 5.50 ") and "-1.50 [" in found[1]
    assert found[1].endswith("worse |") and len(found) == 2


@pytest.mark.slow
def test_the_page_is_what_the_logs_say() -> None:
    text = (page.ROOT / page.PAGE).read_text(encoding="utf-8")
    found = page.page(text, page.ROOT / page.LOGS)
    digits = re.compile(r"[-+]?\d+\.\d+")
    assert digits.sub("", found) == digits.sub("", text), "run make evidence"
    # Another processor may round the last digit otherwise.
    numbers = [[float(one) for one in digits.findall(side)] for side in (found, text)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011), "run make evidence"
