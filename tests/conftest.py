"""What the tests share: the small real model, real reasoning, a fixed seed, and what is skipped where."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test reaches for the hub

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from flowgraph import smollm2 as smollm2_source
from tests.written import TOKENIZER, policy, written_by_hand

ROOT = Path(__file__).resolve().parents[1]

# What Hypothesis does by itself where CI is set, so that the same examples are tried everywhere. A busy machine makes
# single examples slow, which says nothing about the code.
settings.register_profile(
    "flowgraph",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flowgraph")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and on a busy machine a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the model written by hand and of a random one, for trainers that load theirs by name."""
    folders = {}
    for name, model in (("by_hand", written_by_hand()), ("random", policy())):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer): SmolLM2-135M-Instruct, float32, CPU, evaluation mode. Leave it as it was."""
    return smollm2_source.load(torch.float32)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer alone, for tests that need no model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_source.folder(), local_files_only=True)


@pytest.fixture(scope="session")
def gsm8k() -> list[dict[str, Any]]:
    """3,000 solutions to 600 GSM8K problems, each a dict of problem, question, response, answer, correct,
    source.

    A response ends in "A: <number>". The file lies in $FLOWGRAPH_DATA, else in shared/data beside the
    checkout.
    """
    folder = Path(os.environ.get("FLOWGRAPH_DATA") or ROOT.parent / "shared" / "data")
    path = folder / "gsm8k_solutions.jsonl"
    if not path.is_file():
        pytest.skip(f"no real solutions: {path} is missing (set FLOWGRAPH_DATA to the folder that holds it)")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
