"""Where words, lines, sentences, steps and turns begin."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgraph import Segments, split


def pieces(text: str) -> list[str]:
    """Tokens as tokenizers cut them: a blank belongs to the word after it."""
    return re.findall(r" ?[^\W\d]+| ?\d| ?[^\w\s]+|\s", text)


def texts(text: str, by: str) -> list[str]:
    tokens = pieces(text)
    assert "".join(tokens) == text
    return ["".join(tokens[start:stop]).strip() for start, stop in split(tokens, by).spans()]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Add 2. Then stop.", ["Add 2.", "Then stop."]),
        ("It is 3.14 or so. Yes!", ["It is 3.14 or so.", "Yes!"]),
        ("See e.g. this one. Good.", ["See e.g. this one.", "Good."]),
        ("Ask Dr. Who? No.", ["Ask Dr. Who?", "No."]),
        ("1. First do it. 2. Then", ["1. First do it.", "2.", "Then"]),
        ('He said "go." She went.', ['He said "go."', "She went."]),
        ("one\ntwo\n\nthree", ["one", "two", "three"]),
        ("你好。再见。", ["你好。", "再见。"]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, wanted: list[str]) -> None:
    assert texts(text, "sentences") == wanted


def test_words_and_lines() -> None:
    assert texts("x = 4\n\ny", "words") == ["x", "=", "4", "y"]
    assert texts("x = 4\n\ny = 5\n", "lines") == ["x = 4", "", "y = 5"]


STEPS = """<think>
First, read it.

Then, think.
</think>
# Plan
Step 1: multiply
 6 * 7
Step 2: check
- once
- twice
```python
1. no step
```
<tool_call>{"name": "sum"}</tool_call>
<tool_response>42</tool_response>
It is 42."""


def test_steps() -> None:
    tokens = pieces(STEPS)
    found = split(tokens, "steps")
    named = [
        (kind, "".join(tokens[start:stop]).strip())
        for kind, (start, stop) in zip(found.kinds, found.spans(), strict=True)
    ]
    assert [kind for kind, _ in named] == [
        "think", "think", "heading", "step", "step", "item", "item", "code", "tool", "tool", "response",
    ]  # fmt: skip
    assert named[0][1].endswith("read it.") and named[1][1].startswith("Then, think")
    assert named[3][1] == "Step 1: multiply\n 6 * 7" and named[7][1].startswith("```python")
    assert named[-1][1] == "It is 42."


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo", "sua"),
        ("<|start_header_id|>user<|end_header_id|>Hi<|start_header_id|>assistant<|end_header_id|>Ho", "ua"),
        ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo", "ua"),
        ("[INST] Hi [/INST] Ho", "ua"),
        ("<|user|>\nHi<|assistant|>\nHo<|tool|>42", "uat"),
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Ho<|return|>", "ua"),
        ("<|start|>assistant<|message|>Hi<|call|><|start|>functions.ls to=assistant<|message|>42<|end|>", "at"),
        ("<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Ho", "ua"),
        ("just text", "r"),
    ],
)
def test_turns_of_common_templates(text: str, kinds: str) -> None:
    assert "".join(kind[0] for kind in split(pieces(text), "turns").kinds) == kinds


def test_segments_never_mix_roles() -> None:
    tokens = ["Q", "?", " A", " b", " tool", " c", " 4", " 2", "."]
    found = split(
        tokens,
        "lines",
        prompt_mask=torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0]).bool(),
        response_mask=torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1]).bool(),
        sink_mask=torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0]).bool(),
    )
    assert found.spans() == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9)]
    assert found.kinds == ["prompt", "response", "other", "answer", "response"]
    assert found.names == ["Q?", "A b", "tool", "c 4", "2."]
    assert found.index.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("by", ["steps", "turns", "sentences"])
def test_sinks_on_both_sides_of_a_border_are_two_segments(by: str) -> None:
    """An answer of two tokens that is said at once: the last token of the prompt predicts the first of them."""
    prompt, sinks = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    found = split(["6 * 7", " =", " 4", "2"], by, prompt_mask=prompt, sink_mask=sinks)
    assert found.spans() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert found.kinds == ["prompt", "answer", "answer", "response"]


def test_a_splitter_of_ones_own() -> None:
    def clauses(text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"[a-z]+", text)]

    assert split(list("ab, cd"), clauses).spans() == [(0, 2), (2, 4), (4, 6)]
    with pytest.raises(ValueError, match=r"the span \(1, 9\) after one that ends at 0, in a text of 2 characters"):
        split(list("ab"), lambda text: [(1, 9)])


@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=30),
    st.sampled_from(["words", "lines", "sentences", "steps", "turns"]),
)
def test_every_token_is_in_one_segment(tokens: list[str], by: str) -> None:
    found = split(tokens, by)
    assert found.num_tokens == len(tokens) and len(found.index) == len(tokens)
    assert (found.index[1:] - found.index[:-1]).clamp(0, 1).equal(found.index[1:] - found.index[:-1])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="by must be one of 'words', 'lines'"):
        split(["a"], "pages")
    with pytest.raises(ValueError, match="text is empty"):
        split([])
    with pytest.raises(ValueError, match=r"prompt_mask must be bool \[N\] = \[1\]"):
        split(["a"], prompt_mask=torch.ones(2).bool())
    with pytest.raises(ValueError, match="ptr must be"):
        Segments(torch.tensor([0, 2, 1]), [""] * 2, [""] * 2)
    with pytest.raises(ValueError, match="kinds must have one entry per segment, 2, got 1"):
        Segments(torch.tensor([0, 2, 3]), [""] * 2, [""])
