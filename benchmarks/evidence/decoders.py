"""Small decoders that solve the tasks, trained here in minutes: `python -m benchmarks.evidence.decoders [TASK ...]`.

They are ordinary Llama models of transformers, so everything that reads a model reads them. Each is kept in the cache
(see flowgraph/smollm2.py) in a folder named by its task and by a hash of its recipe and of problems the task draws:
change either and it is trained anew. Beside the weights lies a manifest: the recipe, the accuracy and the seconds.

A prompt task asks everything that can be asked about its statements in one sequence: the questions see the statements
and themselves, not each other, and all stand at the position where one question alone would. So training sees several
answers per prompt, and the model that comes out reads one prompt and one question.

Shapes: B problems, N tokens, Q questions of one prompt, V symbols.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.evidence.kept import kept
from benchmarks.evidence.tasks import TASKS, Problem, Task
from flowgraph import smollm2

Say = Callable[[str], None]

COUNTED = 1000
"""Problems per level behind the accuracy that is kept with a decoder."""


@dataclass(frozen=True)
class Recipe:
    """How one decoder is made: Muon for the matrices of its layers, AdamW for the rest."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    steps: int = 1500
    batch: int = 32
    """Problems per step."""
    questions: int = 1
    """Questions per prompt."""
    stages: tuple[tuple[int, int], ...] = ()
    """(level, steps) of easier problems that come first; these steps are part of `steps`."""
    rate: float = 4e-3
    decay: float = 0.05
    seed: int = 0
    version: int = 1
    """Raised when training itself changes."""

    def share(self, step: int) -> float:
        """What part of the learning rate a step has: it rises over the first twentieth and falls as a cosine."""
        warm = max(self.steps // 20, 1)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


RECIPES = {
    "chains": Recipe(layers=5, steps=2000, batch=48, questions=8, stages=((1, 250), (2, 450))),
    "needles": Recipe(steps=1800, questions=5, stages=((1, 250), (2, 450))),
    "addition": Recipe(steps=1800, questions=5, stages=((1, 400),)),
    "scratchpad": Recipe(steps=1500, stages=((3, 700),)),
}


def load_decoder(task: str, *, say: Say | None = None) -> LlamaForCausalLM:
    """The decoder of a task, in evaluation mode, on the CPU, in float32; trained when the cache lacks it.

    Args:
        task: a name in `TASKS`.
        say: called with lines of progress; by default they go to standard error.
    """
    if task not in RECIPES:
        raise ValueError(f"task {task!r}: must be one of {', '.join(RECIPES)}")
    return LlamaForCausalLM.from_pretrained(_folder(task, say or _to_stderr), local_files_only=True).eval()


class Training:
    """A decoder of a task in the making, step by step, on the device that is torch's default.

    It can be saved, and goes on to the same weights: its state is model, optimizers, schedules, the random state that
    draws problems, and the number of steps. Leaves the global random state as it was.
    """

    def __init__(self, task: Task, recipe: Recipe) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"training a decoder needs torch 2.9 or later (torch.optim.Muon), this is {torch.__version__}"
            )
        self.task, self.recipe, self.step = task, recipe, 0
        self.generator = Random(f"train {task.name} {recipe.seed}")
        self.model = model = _untrained(task, recipe)
        inside = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
        known = {id(parameter) for parameter in inside}
        outside = [parameter for parameter in model.parameters() if id(parameter) not in known]
        self.optimizers: list[Any] = [
            torch.optim.Muon(inside, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outside, lr=recipe.rate, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, recipe.share) for one in self.optimizers]
        self._stages = [task.easier(level) for level, steps in recipe.stages for _ in range(steps)]
        self._setting = torch.tensor([n for n, symbol in enumerate(task.vocabulary) if symbol.endswith("=")])

    @property
    def stage(self) -> Task:
        """The task, or the easier one that the last step was on."""
        return self.task if self.step > len(self._stages) else self._stages[self.step - 1]

    def advance(self) -> float:
        """One step; its loss."""
        self.step += 1
        stage, recipe = self.stage, self.recipe
        drawn = [stage.sample(self.generator, self.generator.choice(stage.levels)) for _ in range(recipe.batch)]
        tokens, positions, visible, targets = _batch(stage, drawn, recipe.questions, self.generator)
        output = self.model(tokens, position_ids=positions, attention_mask=visible, use_cache=False)
        logits = output.logits[:, :-1]  # [B, N - 1, V]
        bare = loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        valued = torch.isin(tokens[:, :-1], self._setting) & (targets[:, 1:] >= 0)
        if valued.any():  # values of a response: they count more and more, since the order of the steps is chance
            loss = loss + self.step / recipe.steps * cross_entropy(logits[valued], targets[:, 1:][valued])
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return float(bare.detach())

    def _parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedules]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        state = [part.state_dict() for part in self._parts()]
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_suffix(".partial")
        torch.save({"step": self.step, "random": self.generator.getstate(), "state": state}, hidden)
        os.replace(hidden, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` left."""
        found = torch.load(path, weights_only=True)
        for part, state in zip(self._parts(), found["state"], strict=True):
            part.load_state_dict(state)
        self.step = found["step"]
        version, numbers, rest = found["random"]
        self.generator.setstate((version, tuple(numbers), rest))


def train(task: Task, recipe: Recipe, say: Say) -> LlamaForCausalLM:
    """A decoder of the task, trained from random weights. Leaves the global random state as it was."""
    training = Training(task, recipe)
    began, every, recent = time.monotonic(), max(recipe.steps // 20, 10), []
    while training.step < recipe.steps:
        recent.append(training.advance())
        step = training.step
        if step % every == 0 or step == recipe.steps:
            rates = accuracy(training.stage, training.model, 100)
            seen = "  ".join(f"level {level} {rate:.2f}" for level, rate in rates.items())
            took = time.monotonic() - began
            say(f"{task.name}  step {step}  {took:.0f} s  loss {_mean(recent):.3f}  {seen}")
            recent = []
    return training.model.eval()


@torch.no_grad()
def accuracy(task: Task, model: LlamaForCausalLM, count: int, *, seed: int = 0) -> dict[int, float]:
    """Share of right answers per level, over `count` fresh problems each; a response is given up to its answer."""
    rates = {}
    for level in task.levels:
        generator = Random(f"test {task.name} {seed} {level}")
        tokens = torch.tensor([task.sample(generator, level).tokens for _ in range(count)])
        answers = model(tokens[:, :-1], logits_to_keep=1, use_cache=False).logits[:, 0].argmax(-1)
        rates[level] = (answers == tokens[:, -1]).double().mean().item()
    return rates


def _batch(
    task: Task, drawn: Sequence[Problem], questions: int, generator: Random
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """tokens [B, N], positions [B, N], what each row may see [1, 1, N, N] and targets [B, N] (-100: no target).

    Positions and what is visible are None where they are the usual ones.
    """
    start = drawn[0].prompt
    if questions == 1:
        tokens = torch.tensor([problem.tokens for problem in drawn])
        targets = tokens.clone()
        targets[:, :start] = -100
        return tokens, None, None, targets

    start -= 2  # the question
    rows = []
    for problem in drawn:
        tails = task.questions(problem)
        generator.shuffle(tails)
        chosen = [tails[index % len(tails)] for index in range(questions)]
        rows.append([*problem.tokens[:start], *(token for tail in chosen for token in tail)])
    tokens = torch.tensor(rows)
    length = tokens.shape[1]
    places = torch.arange(length)
    question = torch.where(places < start, -1, (places - start) // 3)
    visible = (places[:, None] >= places) & ((question == -1) | (question[:, None] == question))
    positions = torch.where(places < start, places, start + (places - start) % 3)
    targets = torch.where((places >= start) & ((places - start) % 3 == 2), tokens, -100)
    return tokens, positions.expand_as(tokens), visible[None, None], targets


def _untrained(task: Task, recipe: Recipe) -> LlamaForCausalLM:
    """Random weights. `a:`, `a` and `a=` begin alike, so that what learns to match one variable matches all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(task, recipe))
        characters = {character: torch.randn(recipe.width) for character in sorted(set("".join(task.vocabulary)))}
    rows = [torch.stack([characters[character] for character in symbol]).mean(0) for symbol in task.vocabulary]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(0.1 * torch.stack(rows))
    return model


def _config(task: Task, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(task.vocabulary),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )


def _folder(task: str, say: Say) -> Path:
    """The cached folder of a decoder."""

    def make(into: Path) -> None:
        say(f"Training the decoder of {task} (minutes, once) into {smollm2.cache() / 'evidence'}")
        began = time.monotonic()
        model = train(TASKS[task], RECIPES[task], say)
        manifest = {
            "task": task,
            "recipe": asdict(RECIPES[task]),
            "hash": _hash(task),
            "seconds": round(time.monotonic() - began),
            "accuracy": accuracy(TASKS[task], model, COUNTED),
            "torch": torch.__version__,
        }
        model.save_pretrained(into)
        (into / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    return kept(f"{task}-{_hash(task)}", make)


def _hash(task: str) -> str:
    """Of the recipe and of problems as the task draws them: comments on either train nothing anew."""
    generator = Random("hash")
    drawn = [TASKS[task].sample(generator, level).tokens for level in TASKS[task].levels for _ in range(20)]
    text = json.dumps([asdict(RECIPES[task]), TASKS[task].vocabulary, drawn], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(names: Sequence[str]) -> None:
    """Train what the cache lacks and print what each decoder can do."""
    for name in names or RECIPES:
        load_decoder(name)
        manifest = json.loads((_folder(name, _to_stderr) / "manifest.json").read_text())
        rates = "  ".join(f"level {level} {rate:.3f}" for level, rate in manifest["accuracy"].items())
        print(f"{name}: {rates}  (trained in {manifest['seconds']} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
