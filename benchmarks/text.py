"""Long real text as tokens, from what is there without a network; nothing of it is copied into the project.

Either GSM8K problems, each worked in full, one after the other (the file that the tests read: $FLOWGRAPH_DATA, else
shared/data beside the checkout), or, where that file is missing, the prose of Python's own help.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GSM8K = "GSM8K problems with their reference solutions"
HELP = "the help texts of Python (pydoc_data.topics)"


def source() -> tuple[str, str]:
    """(name, text)."""
    folder = Path(os.environ.get("FLOWGRAPH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = folder / "gsm8k_solutions.jsonl"
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        solved = [f"{row['question']}\n{row['response']}\n\n" for row in rows if row["source"] == "reference"]
        return GSM8K, "".join(solved)
    return python_help()


def python_help() -> tuple[str, str]:
    """(name, text), on every machine."""
    from pydoc_data.topics import topics

    return HELP, "".join(topics[name] for name in sorted(topics))


def tokens(
    tokenizer: Any, num_tokens: int, prompt: int, text_of: tuple[str, str] | None = None
) -> tuple[list[int], str, str]:
    """(ids, text of the first `prompt` tokens, text of the rest), of a (name, text); default: of `source`.

    Both texts give the same ids again when they are tokenized apart, as tools do that take text: the trace starts at
    the first token of the source from which this holds.

    Raises:
        ValueError: the source is too short.
    """
    name, text = source() if text_of is None else text_of
    everything = tokenizer(text[: 8 * (num_tokens + 1000)], add_special_tokens=False).input_ids
    for start in range(1000):
        ids = everything[start : start + num_tokens]
        if len(ids) < num_tokens:
            break
        parts = [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:prompt], ids[prompt:])]
        again = [tokenizer(part, add_special_tokens=False).input_ids for part in parts]
        if again == [ids[:prompt], ids[prompt:]]:
            return ids, *parts
    raise ValueError(f"{name}: {len(everything)} tokens do not hold {num_tokens} that split after {prompt}")
