"""Two tasks on which a small decoder learns by reward in under a minute of one core, and the policies it starts from.

    scratchpad   x+3;y+5;x+4;y+1;x+8;x+5?   ->   x3+4=7 / y5+1=6 / x7+8=5 / x5+5 / A:0
                 Two running sums modulo 10, of which one is asked for at the end of the prompt: its steps carry the
                 answer, those of the other sum are decoys.
    countdown    3,5,2:6?                   ->   3-2+5=6 / 5-2-3=0 / A:3-2+5
                 Every number once, + and - between them; two tries before the answer.

A slash stands for a line break. Rewards are 1 for a right answer and 0 for any other, found as credits find it: what
follows the last "A:".

A policy is a Llama of 0.3 million parameters that has imitated a teacher who makes mistakes: steps and decoy steps with
wrong numbers, which later steps go on from, and tries chosen nearly at random. So it gets a share of the answers right,
and what reward can teach it is which of its habits to keep. Policies are trained on first use and kept in the cache
(`flowgraph.smollm2` says where), in a folder named by the recipe and by what the teacher says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.evidence.kept import kept
from flowgraph.answers import find_answer

LARGEST = 27
"""Of a result in countdown; numbers up to here are one token each."""


@dataclass(frozen=True)
class Recipe:
    """How a policy learns to imitate. Another recipe is another policy, in a folder of its own.

    Attributes:
        careful: so many of the steps, the first, are with a teacher who is never wrong: what a number follows from is
            hard to see when a third of them follow from nothing.
    """

    width: int = 96
    layers: int = 3
    heads: int = 4
    steps: int = 1000
    careful: int = 0
    batch: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Task:
    """Prompts, a teacher for them, and what is right.

    Attributes:
        prompt: a random problem.
        demonstrate: (prompt, random, slips) -> a response as the teacher gives it, without its end token. slips: how
            often the teacher is wrong, 1: as usual, 0: never.
        solves: (prompt, answer) -> is the text after "A:" right?
        response_tokens: the longest response, its end token included.
        recipe: of its policies. learning_rate: of GRPO.
    """

    name: str
    prompt: Callable[[random.Random], str]
    demonstrate: Callable[[str, random.Random, float], str]
    solves: Callable[[str, str], bool]
    response_tokens: int
    recipe: Recipe
    learning_rate: float

    def reward(self, prompt: str, response: str) -> float:
        """1 if the last line "A:..." of the response solves the problem, else 0."""
        match = find_answer(response, "A:").match
        return float(match is not None and self.solves(prompt, response[match.start : match.stop]))


def prompts_of(task: Task, number: int, seed: int) -> list[str]:
    """So many different prompts."""
    rng, found = random.Random(f"{task.name} {seed}"), dict[str, None]()
    while len(found) < number:
        found[task.prompt(rng)] = None
    return list(found)


# --- scratchpad -------------------------------------------------------------------------------------------------------

_ADDITION = re.compile(r"([xy])\+(\d)")
_WRONG_STEP, _WRONG_ANSWER = 0.4, 0.1


def _scratchpad(rng: random.Random) -> str:
    turns = rng.sample("xy", 2) + rng.choices("xy")
    rng.shuffle(turns)
    parts = [f"{one}+{rng.randrange(1, 10)}" for one in ["x", "y", *turns, rng.choice("xy")]]
    return ";".join(parts) + "?\n"


def _scratchpad_demonstration(prompt: str, rng: random.Random, slips: float = 1.0) -> str:
    """Both sums step by step; what follows a wrong number goes on from it."""
    (x, start), (y, other), *additions, (asked, last) = _ADDITION.findall(prompt)
    values, lines = {x: int(start), y: int(other)}, []
    for name, digit in additions:
        before = values[name]
        values[name] = _slip((before + int(digit)) % 10, slips * _WRONG_STEP, rng)
        lines.append(f"{name}{before}+{digit}={values[name]}\n")
    answer = _slip((values[asked] + int(last)) % 10, slips * _WRONG_ANSWER, rng)
    return "".join(lines) + f"{asked}{values[asked]}+{last}\nA:{answer}"


def _scratchpad_solved(prompt: str, answer: str) -> bool:
    additions = _ADDITION.findall(prompt)
    return answer == str(sum(int(digit) for name, digit in additions if name == additions[-1][0]) % 10)


def _slip(value: int, chance: float, rng: random.Random) -> int:
    """The digit, or another one."""
    return (value + rng.randrange(1, 10)) % 10 if rng.random() < chance else value


# --- countdown --------------------------------------------------------------------------------------------------------

_EXPRESSION = re.compile(r"(\d+)([+-])(\d+)([+-])(\d+)")
_GOOD_TRY, _WRONG_SUM, _GUESS = 0.4, 0.35, 0.45


def _countdown(rng: random.Random) -> str:
    while True:
        numbers = rng.sample(range(1, 10), 3)
        targets = sorted({_value(one) for one in _expressions(numbers)} - {sum(numbers)})  # a sum needs no search
        if targets:
            return f"{','.join(map(str, numbers))}:{rng.choice(targets)}?\n"


def _countdown_demonstration(prompt: str, rng: random.Random, slips: float = 1.0) -> str:
    """Two tries; the answer is the last that is said to hit the target, or a guess."""
    numbers, target = _read_countdown(prompt)
    every = list(_expressions(numbers))
    good = [one for one in every if _value(one) == target]
    lines, answer = [], rng.choice(every)
    for _ in range(2):
        one = rng.choice(good if rng.random() < _GOOD_TRY else every)
        said = rng.randrange(LARGEST + 1) if rng.random() < slips * _WRONG_SUM else _value(one)
        lines.append(f"{one}={said}\n")
        answer = one if said == target and rng.random() >= slips * _GUESS else answer
    return "".join(lines) + f"A:{answer}"


def _countdown_solved(prompt: str, answer: str) -> bool:
    numbers, target = _read_countdown(prompt)
    read = _EXPRESSION.fullmatch(answer)
    return read is not None and sorted(map(int, read.group(1, 3, 5))) == sorted(numbers) and _value(answer) == target


def _read_countdown(prompt: str) -> tuple[list[int], int]:
    *numbers, target = map(int, re.findall(r"\d+", prompt))
    return numbers, target


def _expressions(numbers: list[int]) -> Iterator[str]:
    """Those whose value is a token."""
    for a, b, c in itertools.permutations(numbers):
        for one, two in itertools.product("+-", repeat=2):
            if 0 <= _value(text := f"{a}{one}{b}{two}{c}") <= LARGEST:
                yield text


def _value(expression: str) -> int:
    return sum(map(int, re.findall(r"[+-]?\d+", expression)))


TASKS = {
    task.name: task
    for task in (
        Task(
            "scratchpad",
            _scratchpad,
            _scratchpad_demonstration,
            _scratchpad_solved,
            30,
            Recipe(steps=1000, careful=700),
            1e-4,
        ),
        Task(
            "countdown",
            _countdown,
            _countdown_demonstration,
            _countdown_solved,
            24,
            Recipe(steps=1500, careful=1100),
            4e-4,
        ),
    )
}

# --- policies ---------------------------------------------------------------------------------------------------------


def symbols() -> Any:
    """A tokenizer with one token per number and per sign, padding on the left."""
    known = ["<pad>", "<eos>", *map(str, range(LARGEST + 1)), *"+-=:,;?\nAxy"]
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(known)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\D"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def load_policy(task: Task, number: int = 0, recipe: Recipe | None = None) -> tuple[LlamaForCausalLM, str]:
    """The policy of that number, in evaluation mode, and its fingerprint: 12 hex digits of the weights' sha256.

    Trained on one thread and kept in the cache if it is not there: a few minutes.
    """
    recipe = recipe or task.recipe
    lessons = hashlib.sha256(repr(_lessons(task, number)).encode()).hexdigest()[:12]
    made_by = json.dumps({"task": task.name, "number": number, "recipe": asdict(recipe), "lessons": lessons})

    def make(into: Path) -> None:
        began = time.process_time()
        model, loss = imitate(task, number, recipe)
        model.save_pretrained(into)
        took = round(time.process_time() - began, 1)
        manifest = {"made_by": json.loads(made_by), "loss": loss, "cpu_seconds": took}
        (into / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    target = kept(f"policies/{task.name}-{number}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}", make)
    weights = (target / "model.safetensors").read_bytes()
    policy: Any = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    return policy.eval(), hashlib.sha256(weights).hexdigest()[:12]


def imitate(task: Task, number: int, recipe: Recipe) -> tuple[LlamaForCausalLM, float]:
    """Train on fresh demonstrations; the model and the mean loss of its last 20 steps."""
    tokenizer, rng = symbols(), random.Random(f"{task.name} demonstrations {number}")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # up over a twentieth of the steps, then down to nothing
        optimizer, lambda step: min((step + 1) / (0.05 * recipe.steps + 1), 1 - step / recipe.steps)
    )
    losses = []
    for step in range(recipe.steps):
        loss = model(**_lesson(task, tokenizer, recipe.batch, rng, slips=float(step >= recipe.careful))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


def _lesson(task: Task, tokenizer: Any, batch: int, rng: random.Random, slips: float) -> dict[str, Tensor]:
    """Prompts and demonstrations [B, T], padded on the right; labels are those of the demonstrations."""
    rows, labels = [], []
    for _ in range(batch):
        prompt = task.prompt(rng)
        asked = tokenizer(prompt)["input_ids"]
        said = [*tokenizer(task.demonstrate(prompt, rng, slips))["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(asked + said))
        labels.append(torch.tensor([-100] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def _lessons(task: Task, number: int) -> list[str]:
    """A few problems with what the teacher says to them: another teacher is another policy."""
    rng = random.Random(number)
    return [prompt + task.demonstrate(prompt, rng, 1.0) for prompt in (task.prompt(rng) for _ in range(50))]
