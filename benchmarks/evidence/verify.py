"""Carriers verified by intervention: change one unit and see whether the decoder answers something else.

In a prompt task the unit's statement gets another value and the decoder answers the changed prompt. In a response task
the step gets a wrong value and the decoder writes, greedily, everything after it: the other steps and the answer.
Nothing here looks at the carriers that follow from construction, so that the two can be compared.

    python -m benchmarks.evidence.verify [TASK ...]     rates per hop
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.evidence.decoders import load_decoder
from benchmarks.evidence.tasks import EVERY, TASKS, Problem

TRIES = {"chains": 8, "needles": 8, "addition": 24, "scratchpad": 1}
TRIES |= {f"{name}-long": tries for name, tries in TRIES.items()}
"""Other values tried per unit. A column of "addition" may get other digits and yet hand on the same carry, so that one
try says little; in "scratchpad" every wrong value leads to another answer."""


@dataclass(frozen=True)
class Tried:
    """What the decoder did about one problem."""

    problem: Problem
    right: bool
    """The decoder, left alone, gives the right answer; in a response task after writing all of the response itself."""
    changed: list[bool]
    """Per unit: some other value in it changed the decoder's answer."""
    followed: list[float]
    """Per unit: share of the other values after which the decoder gave the answer that is right for them."""

    @property
    def agrees(self) -> bool:
        """The decoder is right, and the units that change its answer are exactly the carriers by construction."""
        found = {unit for unit, changed in enumerate(self.changed) if changed}
        return self.right and found == set(self.problem.carriers)


def verified(model: LlamaForCausalLM, problem: Problem, *, seed: int = 0) -> list[bool]:
    """For each unit: does changing it change the decoder's answer?"""
    return tried(model, [problem], seed=seed)[0].changed


@torch.no_grad()
def tried(model: LlamaForCausalLM, problems: Sequence[Problem], *, seed: int = 0) -> list[Tried]:
    """Every unit of every problem (all of one task) is given other values, drawn with the seed."""
    if not problems:
        return []
    (name,) = {problem.task for problem in problems}
    task, most = EVERY[name], TRIES[name]
    generator = Random(f"verify {seed}")
    rows, starts, owners = [], [], []
    for index, problem in enumerate(problems):
        rows.append(problem.tokens)
        starts.append(problem.prompt)
        owners.append((index, -1))
        for unit, (_, end) in enumerate(problem.units):
            others = task.redraws(problem, unit)
            for tokens in generator.sample(others, min(most, len(others))):
                rows.append(tokens)
                starts.append(max(end, problem.prompt))
                owners.append((index, unit))
    given = continued(model, torch.tensor(rows), torch.tensor(starts))[:, -1].tolist()
    alone = {index: answer for (index, unit), answer in zip(owners, given, strict=True) if unit < 0}
    wanted = [row[-1] for row in rows]
    changed = [[False] * len(problem.units) for problem in problems]
    followed: list[list[list[bool]]] = [[[] for _ in problem.units] for problem in problems]
    for (index, unit), answer, right in zip(owners, given, wanted, strict=True):
        if unit >= 0:
            changed[index][unit] |= answer != alone[index]
            followed[index][unit].append(answer == right)
    return [
        Tried(
            problem,
            alone[index] == problem.tokens[-1],
            changed[index],
            [sum(unit) / len(unit) for unit in followed[index]],
        )
        for index, problem in enumerate(problems)
    ]


@torch.no_grad()
def continued(model: LlamaForCausalLM, tokens: Tensor, starts: Tensor) -> Tensor:
    """tokens [B, N] with everything from `starts` [B] on written greedily by the model: [B, N]."""
    tokens = tokens.clone()
    first = int(starts.min())
    output = model(tokens[:, :first], use_cache=True, logits_to_keep=1)
    for place in range(first, tokens.shape[1]):
        own = starts <= place
        tokens[own, place] = output.logits[own, -1].argmax(-1)
        if place + 1 < tokens.shape[1]:
            output = model(tokens[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
    return tokens


def rates(results: Sequence[Tried]) -> dict[str, float]:
    """Shares over all problems: of those the decoder gets right, the rest of it, over these problems alone:

    changed hop H      units of that hop that change the answer when changed
    followed hop H     other values in them after which the answer is the one right for them
    changed decoys     other units that change the answer
    agree              problems (right or not) whose changing units are exactly the carriers
    """
    right = [result for result in results if result.right]
    counts: dict[str, list[float]] = {"right": [result.right for result in results]}
    for hop in sorted({hop for result in results for hop in result.problem.hops}):
        counts[f"changed hop {hop}"], counts[f"followed hop {hop}"] = [], []
    counts["changed decoys"] = []
    for result in right:
        hops = dict(zip(result.problem.carriers, result.problem.hops, strict=True))
        for unit, changed in enumerate(result.changed):
            if unit in hops:
                counts[f"changed hop {hops[unit]}"].append(changed)
                counts[f"followed hop {hops[unit]}"].append(result.followed[unit])
            else:
                counts["changed decoys"].append(changed)
    counts["agree"] = [result.agrees for result in results]
    return {name: sum(found) / len(found) for name, found in counts.items() if found}


def main(names: Sequence[str], each: int = 40) -> None:
    """Print the rates of every task, over `each` problems per level."""
    for name in names or TASKS:
        task, model = TASKS[name], load_decoder(name)
        problems = [
            task.sample(Random(f"verify {name} {level} {i}"), level) for level in task.levels for i in range(each)
        ]
        found = "  ".join(f"{what} {rate:.3f}" for what, rate in rates(tried(model, problems)).items())
        print(f"{name}: {len(problems)} problems  {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
