"""Every Python block of docs/rl.md and of the README's sections on RL and on reading runs, and does what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flowgraph.rl as rl
from flowgraph import Tracer
from flowgraph.credit import PER, SCORES
from flowgraph.rl.crediting import COUNTED
from flowgraph.rl.monitor import KEYS
from tests.conftest import ROOT
from tests.test_credit import RULES
from tests.written import TOKENIZER, ids, policy

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = ROOT / "docs" / "rl.md"
README = ROOT / "README.md"

PROMPTS = ["12 + 30?", "What is 6 times 7?", "2+3?"]
RESPONSES = ["10 and 30 is 40, and 2.\nA: 42", "6 * 7 = 42.\nA: 42", "I do not know."]


def blocks(markdown: str) -> list[str]:
    """The ```python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)


def section(markdown: str, heading: str) -> str:
    """What stands below a heading "## ..." up to the next one."""
    parts = re.split(r"^## (.*)$", markdown, flags=re.MULTILINE)
    found = [text for title, text in zip(parts[1::2], parts[2::2], strict=True) if re.search(heading, title)]
    assert len(found) == 1, f"{len(found)} headings match {heading!r}"
    return found[0]


def run(code: list[str], names: dict[str, Any], file: Path) -> dict[str, Any]:
    """Run blocks one after the other in one namespace."""
    assert code, f"no block of Python in {file.name}"
    for number, block in enumerate(code):
        exec(compile(block, f"{file.name}, block {number}", "exec"), names)
    return names


def test_long_contexts_runs() -> None:
    place = torch.arange(60)
    names = {
        "model": policy(),
        "input_ids": torch.randint(4, 60, (1, 60), generator=torch.Generator().manual_seed(0)),
        "positions": place,
        "prompt_mask": place < 20,
        "sinks": place == 58,
    }
    pieces = blocks((ROOT / "docs" / "long-contexts.md").read_text())[-1]
    flow = run([pieces], names, ROOT / "docs" / "long-contexts.md")["flow"]
    assert flow.solver == "exact" and float(flow.absorbed) == pytest.approx(1)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the blocks take as given: a model with its tokenizer, a batch padded left, and what a trainer needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    # From a folder, so that TRL finds the tokenizer as it would find that of a hub model.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rollouts = [(ids(p, end=False), ids(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(len(prompt) + len(response) for prompt, response in rollouts)
    input_ids = torch.zeros(3, width, dtype=torch.int64)
    attention_mask, response_mask = torch.zeros_like(input_ids), torch.zeros(3, width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rollouts):
        input_ids[row, -len(prompt + response) :] = torch.tensor(prompt + response)
        attention_mask[row, -len(prompt + response) :] = 1
        response_mask[row, -len(response) :] = True
    return {
        "model": model,
        "tokenizer": tokenizer,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "response_mask": response_mask,
        "prompt_mask": attention_mask.bool() & ~response_mask,
        "advantages": torch.tensor([1.0, -0.5, -0.5]),
        "rewards": torch.tensor([1.0, 0.0, 0.0]),
    }


def for_trl(folder: Path) -> dict[str, Any]:
    """args, reward and dataset as TRL takes them."""
    pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl.trainer.grpo_config import GRPOConfig

    args = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        save_strategy="no",
        disable_tqdm=True,
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(n) for n in range(len(completions))]

    return {"args": args, "reward": reward, "dataset": Dataset.from_dict({"prompt": PROMPTS})}


def test_the_page_on_rl(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = blocks(PAGE.read_text())
    run([first], names, PAGE)
    promised = re.findall(r"^(\w+) = .*# ([\d.\[\], ]+)$", first, flags=re.MULTILINE)
    assert [name for name, _ in promised] == ["weights", "part", "shaped"]
    for name, number in promised:
        assert torch.as_tensor(names[name]).tolist() == ast.literal_eval(number), name
    run(others, names, PAGE)
    # A batch: credits in the two responses with an answer, and nowhere else.
    assert names["scored"].flags[2] == ("no_answer",)
    credited = names["weights"] > 1
    assert credited.any(1).tolist() == [True, True, False] and not (credited & ~names["response_mask"]).any()
    # The comparison: plain training credits nothing, the others the same share of the same mask.
    shares = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(shares) == ["uniform", "random", "entropy", "mix"]
    assert float(shares["uniform"]) == 0 < float(shares["mix"])
    # Only what needs an answer leaves the response without one alone.
    assert float(shares["random"]) == float(shares["entropy"]) > float(shares["mix"])
    assert names["seen"]["place_stability"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL, to transformers
def test_the_section_on_rl_of_the_readme(names: dict[str, Any], tmp_path: Path) -> None:
    names |= for_trl(tmp_path)
    plain = names["advantages"]
    run(blocks(section(README.read_text(), r"\bRL\b")), names, README)
    assert names["trainer"].state.global_step == 1
    shaped, mask = names["advantages"], names["response_mask"]
    assert shaped.shape == names["input_ids"].shape
    moved = shaped != plain[:, None]
    assert moved.any(1).tolist() == [True, True, False] and not (moved & ~mask).any()
    assert torch.equal(shaped[moved], (1.5 * plain[:, None]).expand(shaped.shape)[moved])


def test_the_section_on_reading_of_the_readme(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(names["tokenizer"], "chat_template", template, raising=False)
    names |= {"Tracer": Tracer, "question": PROMPTS[0], "response": RESPONSES[0]}
    run(blocks(section(README.read_text(), "Reading")), names, README)
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert 0 < float(names["coarse"].absorbed) <= 1 + 1e-5 and names["coarse"].graph.num_nodes > 2


@pytest.mark.parametrize(
    "name",
    sorted(
        {*RULES, *PER, *SCORES, *rl.BASELINES, *KEYS, *COUNTED, "signs", "normalize", "warmup_steps", "anneal_steps"}
    ),
)
def test_the_page_on_rl_leaves_nothing_out(name: str) -> None:
    assert re.search(rf'[`"]{name}[`"=]|{name} /|/ {name}', PAGE.read_text()), f"docs/rl.md says nothing of {name}"


def test_a_block_that_fails_is_seen() -> None:
    text = "## On RL\n\n```python\nx = 1\n```\n\nand\n\n```bash\nfalse\n```\n\n```python\nx / 0\n```\n\n## Else\n"
    with pytest.raises(ZeroDivisionError):
        run(blocks(section(text, "RL")), {}, README)
    with pytest.raises(AssertionError, match="no block of Python"):
        run(blocks(section(text, "Else")), {}, README)
