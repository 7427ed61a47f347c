"""`python -m benchmarks.rl_gain`: does it help RL? GRPO with credits by every signal, on two tasks, paired by seed.

Each run trains a policy of `benchmarks.rl_tasks` through `FlowGRPOTrainer`, as a user would. The arms differ in the
`FlowConfig` alone: one recipe (the top 40 % of a response's tokens get 1.5 times the advantage), the same rollouts per
step, steps, learning rate, evaluation. A seed means the same policy to begin with, the same order of prompts and the
same seed of sampling; the first step's responses are the same in all its arms, and part from there, since the weights
do.

The settings were chosen by looking at the arm "uniform" alone, which is plain GRPO: so that it learns clearly and has
room left. No learning curve of another arm was seen before they were fixed. All arms read all layers, since a third of
three is one.

`ABLATIONS` say what a difference comes from: other shares and gains, the tokens with the least flow instead of the
most, weights of mean 1 (`flow/mean 1`), and 1.2 for every token that may get credit (`uniform/1.2`), the mean of
what the recipe gives: a larger step without aim.

The curve is the share of 512 held-out prompts answered right, one response each, sampled at temperature 1 with a
seed of its own: what GRPO maximises. Two numbers stand for a run: that share at the end, and its mean over the training
(area under the curve). Verdicts go by the area, which averages over more samples; both are shown.

One JSON line per run goes to benchmarks/results/evidence/rl-<task>.jsonl. Runs that are there are skipped, and every
seed is done in all arms before the next begins, so it can be stopped anywhere. Two processes share the work with
`--shard 0/2` and `--shard 1/2`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl.trainer.grpo_config import GRPOConfig

import flowgraph
from benchmarks.rl_tasks import TASKS, Recipe, Task, load_policy, prompts_of, symbols
from flowgraph.adapters.evidence.statistics import Interval, student
from flowgraph.adapters.evidence.summary import grid, number
from flowgraph.adapters.trl import FlowConfig, FlowGRPOTrainer
from flowgraph.rl.samples import Sample
from flowgraph.rl.scorer import Credits, SampleScore, Scorer

RESULTS = Path(__file__).parent / "results" / "evidence"

ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"score": "uniform"},
    "random": {"score": "random"},
    "entropy": {"score": "entropy"},
    "answer_attention": {"score": "answer_attention"},
    "future_attention": {"score": "future_attention"},
    "reach": {"score": "reach"},
    "flow": {"score": "throughput"},
    "mix": {"score": "mix"},
    "reach/paper": {"score": "reach", "preset": "paper"},
    "flow/paper": {"score": "throughput", "preset": "paper"},
}
"""Arm -> what its `FlowConfig` says beside the recipe."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "uniform/1.2": {"score": "random", "top": 1.0, "gain": 1.2},  # the top 100 % by whatever score: every token
    "flow/mean 1": {"normalize": True},
    "flow/lowest": {},  # see `Lowest`
    "flow/top 0.2": {"top": 0.2},
    "flow/top 0.6": {"top": 0.6},
    "flow/gain 1.2": {"gain": 1.2},
    "flow/gain 3": {"gain": 3.0},
}
ABLATED, ABLATION_SEEDS = "scratchpad", 4
MEASURES = ("final", "area")
FEWEST = 4
"""Pairs of runs below which nothing is said to be better or worse."""


@dataclass(frozen=True)
class Settings:
    """Of a run. Runs of other settings are never compared.

    Attributes:
        every: steps between evaluations. prompts, group: per step, and responses per prompt. held_out: prompts to
            evaluate on. policies: how many to begin with; a seed has the one of its number modulo that.
        learning_rate, imitation: of GRPO, and how the policies are made; None: what the task says.
    """

    steps: int = 60
    every: int = 10
    prompts: int = 8
    group: int = 8
    learning_rate: float | None = None
    held_out: int = 512
    policies: int = 1
    imitation: Recipe | None = None

    def of(self, task: Task) -> Settings:
        """With nothing left to the task."""
        return replace(
            self,
            learning_rate=self.learning_rate or task.learning_rate,
            imitation=self.imitation or task.recipe,
        )

    @property
    def key(self) -> str:
        """8 hex digits of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


# --- one run ----------------------------------------------------------------------------------------------------------


class Lowest(Credits):
    """Scores that put the tokens with the least flow first."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.config = scorer, scorer.config

    def score(self, samples: Sequence[Sample]) -> list[SampleScore]:
        """The scorer's own, turned round; a sample without flow keeps its zeros, and with them weights of 1."""
        return [replace(one, scores=_turned(one)) for one in self.scorer.score(samples)]


def _turned(one: SampleScore) -> torch.Tensor:
    most = one.scores[one.mask].max() if one.mask.any() else torch.tensor(0.0)
    return (2 * most - one.scores).clamp(min=0) * one.mask  # at least `most`, so that no token of the mask has 0


def config_of(arm: str, seed: int, model: Any, tokenizer: Any) -> FlowConfig:
    """What an arm tells the trainer."""
    recipe: dict[str, Any] = {"answer": "A:", "layers": "all", "rule": "top", "top": 0.4, "gain": 1.5, "seed": seed}
    config = FlowConfig(**recipe | (ARMS | ABLATIONS)[arm])
    if arm == "flow/lowest":
        return replace(config, scorer=Lowest(Scorer(model, tokenizer, config)))
    return config


def accuracy(model: Any, tokenizer: Any, task: Task, prompts: Sequence[str], seed: int = 0) -> float:
    """Share of prompts whose response, sampled at temperature 1, is right. Leaves torch's generator as it was."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": model.config.vocab_size}
        found = model.generate(**batch, **how, max_new_tokens=task.response_tokens)
    model.train(training)
    said = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return statistics.fmean(task.reward(*pair) for pair in zip(prompts, said, strict=True))


class Curve(TrainerCallback):
    """Accuracy before the first step, after every so many, and after the last."""

    def __init__(self, task: Task, tokenizer: Any, settings: Settings) -> None:
        self.task, self.tokenizer, self.settings = task, tokenizer, settings
        self.prompts = prompts_of(task, settings.held_out, seed=-1)
        self.steps: list[int] = []
        self.accuracy: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._note(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.settings.every == 0 or state.global_step == self.settings.steps:
            self._note(state.global_step, model)

    def _note(self, step: int, model: Any) -> None:
        self.steps.append(step)
        self.accuracy.append(round(accuracy(model, self.tokenizer, self.task, self.prompts), 4))


def train(task: Task, arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """One run; what there is to log of it."""
    settings = settings.of(task)
    model, policy = load_policy(task, seed % settings.policies, settings.imitation)
    wall, cpu = time.perf_counter(), time.process_time()
    tokenizer = symbols()
    held_out = set(prompts_of(task, settings.held_out, seed=-1))
    prompts = [one for one in prompts_of(task, settings.steps * settings.prompts, seed) if one not in held_out]

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [task.reward(*pair) for pair in zip(prompts, completions, strict=True)]

    curve = Curve(task, tokenizer, settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, seed=seed, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_steps=1, gradient_checkpointing=False, max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts * settings.group, num_generations=settings.group,
            max_completion_length=task.response_tokens, learning_rate=settings.learning_rate or task.learning_rate,
            lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        )  # fmt: skip
        set_seed(seed)
        trainer = FlowGRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[curve],
            train_dataset=Dataset.from_dict({"prompt": prompts}), flow=config_of(arm, seed, model, tokenizer),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in logged]
    seconds = time.perf_counter() - wall
    shares = {name: [entry[f"flow/{name}"] for entry in logged if f"flow/{name}" in entry] for name in FLAGS}
    return {
        "task": task.name,
        "arm": arm,
        "seed": seed,
        "policy": policy,
        "settings": settings.key,
        "steps": curve.steps,
        "accuracy": curve.accuracy,
        "reward": [round(statistics.fmean(rewards[n : n + settings.every]), 4)
                   for n in range(0, len(rewards), settings.every)],
        "flags": {name: round(statistics.fmean(values or [0.0]), 4) for name, values in shares.items()},
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "credit_share": round(sum(entry["flow/seconds"] for entry in logged) / seconds, 4),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__,
                     "flowgraph": flowgraph.__version__},
    }  # fmt: skip


FLAGS = ("scored", "no_answer", "cut_off", "no_flow", "failed")
"""Of the adapter's log: "scored" as a share of all responses, the others of those scored."""

# --- all of them ------------------------------------------------------------------------------------------------------

Job = tuple[str, str, int]


def plan(tasks: Iterable[str], seeds: Iterable[int], arms: Sequence[str] | None = None) -> Iterator[Job]:
    """(task, arm, seed): seed by seed, over all tasks and arms."""
    names = list(tasks)
    for seed in seeds:
        for name in names:
            also = ABLATIONS if name == ABLATED and seed < ABLATION_SEEDS else {}
            for arm in (*ARMS, *also):
                if arms is None or arm in arms:
                    yield name, arm, seed


def run_all(jobs: Iterable[Job], settings: Settings, folder: Path = RESULTS, minutes: float = float("inf")) -> int:
    """Do what is not logged yet; returns how many runs that were. None begins after so many minutes."""
    began, done = time.perf_counter(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, arm, seed in jobs:
        task, path = TASKS[name], folder / f"rl-{name}.jsonl"
        own = settings.of(task)
        logged = [one for one in read(path) if one["settings"] == own.key and one["seed"] == seed]
        if arm in {one["arm"] for one in logged}:
            continue
        if time.perf_counter() - began > 60 * minutes:
            break
        _, policy = load_policy(task, seed % own.policies, own.imitation)
        if others := {one["policy"] for one in logged} - {policy}:
            raise ValueError(
                f"seed {seed} of {name} was begun with another policy ({', '.join(sorted(others))}) than the {policy} "
                f"of this cache: their runs are no pairs. Take that seed's lines out of {path}, or later seeds (--from)"
            )
        found = train(task, arm, seed, own)
        with path.open("a") as file:  # one write: another process may append too
            file.write(json.dumps(found) + "\n")
        done += 1
        print(f"{name} {arm} {seed}: {found['accuracy']} in {found['cpu_seconds']} CPU s", flush=True)
    return done


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- what came out ----------------------------------------------------------------------------------------------------


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """ "final": accuracy at the end. "area": mean accuracy over the steps, trapezoids between evaluations."""
    steps, accuracy = np.array(line["steps"], float), np.array(line["accuracy"])
    area = float((np.diff(steps) * (accuracy[1:] + accuracy[:-1]) / 2).sum() / (steps[-1] - steps[0]))
    return {"final": float(accuracy[-1]), "area": area}


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of one task say.

    Returns:
        "task"; "steps" of the evaluations; "arms": per arm
            "seeds": how many runs; "final", "area": {"mean", "low", "high"}, Student's t over seeds;
            "curve": one such dict per evaluation;
            "against": {"uniform", "random"} -> {"pairs", "final", "area", "verdict"}: arm - other by seed. "better" or
                "worse" if the interval of the area leaves out 0 and there are `FEWEST` pairs, else "no difference
                shown". The intervals are 95 % each: of twenty comparisons without any difference one leaves out 0;
            "verdict": that against uniform; "cpu_seconds": mean; "flags": means.

    Raises:
        ValueError: no lines, runs of several tasks or settings, the same run twice, or one seed with two policies.
    """
    for name in ("task", "settings"):
        if len(values := sorted({one[name] for one in lines})) != 1:
            raise ValueError(f"lines must be runs of one {name}, got {values}")
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    policies: dict[int, str] = {}
    for one in lines:
        if one["seed"] in runs.setdefault(one["arm"], {}):
            raise ValueError(f"arm {one['arm']!r} has seed {one['seed']} twice")
        if policies.setdefault(one["seed"], one["policy"]) != one["policy"]:
            raise ValueError(
                f"seed {one['seed']} began with policy {policies[one['seed']]} and with {one['policy']} (arm "
                f"{one['arm']!r}): such runs are no pair; drop the lines of one of them and run again"
            )
        runs[one["arm"]][one["seed"]] = one
    order = {arm: place for place, arm in enumerate((*ARMS, *ABLATIONS))}
    arms = {arm: _arm(arm, runs) for arm in sorted(runs, key=lambda arm: order.get(arm, len(order)))}
    return {"task": lines[0]["task"], "settings": lines[0]["settings"], "steps": lines[0]["steps"], "arms": arms}


def _arm(arm: str, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    mine = runs[arm]
    values = {name: np.array([numbers_of(one)[name] for one in mine.values()]) for name in MEASURES}
    curves = np.array([one["accuracy"] for one in mine.values()])
    against = {
        other: _against(mine, runs[other])
        for other in ("uniform", "random")
        if other != arm and other in runs and mine.keys() & runs[other].keys()
    }
    flags = {name: statistics.fmean(one["flags"][name] for one in mine.values()) for name in FLAGS}
    return {
        "seeds": len(mine),
        **{name: asdict(student(values[name])) for name in MEASURES},
        "curve": [asdict(student(column)) for column in curves.T],
        "against": against,
        "verdict": against["uniform"]["verdict"] if "uniform" in against else None,
        "cpu_seconds": statistics.fmean(one["cpu_seconds"] for one in mine.values()),
        "credit_share": statistics.fmean(one["credit_share"] for one in mine.values()),
        "flags": flags,
    }


def _against(mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    seeds = sorted(mine.keys() & theirs.keys())
    found: dict[str, Interval] = {}
    for name in MEASURES:
        ours, other = (np.array([numbers_of(side[seed])[name] for seed in seeds]) for side in (mine, theirs))
        found[name] = student(ours - other)
    area, verdict = found["area"], "no difference shown"
    if len(seeds) >= FEWEST and area.excludes_zero:
        verdict = "better" if area.low > 0 else "worse"
    return {"pairs": len(seeds), **{name: asdict(one) for name, one in found.items()}, "verdict": verdict}


def arms_table(found: Mapping[str, Any]) -> str:
    """What GRPO came to with each signal in one task, of `rl_gain.summarise`."""
    rows = []
    for arm, one in found["arms"].items():
        against = [one["against"].get(other) for other in ("uniform", "random")]
        words = [
            text for x in against for text in (("", "") if x is None else (number(x["area"], "+.3f"), x["verdict"]))
        ]
        cells = [str(one["seeds"]), number(one["final"]), number(one["area"])]
        rows.append([f"`{arm}`", *cells, *words, f"{one['cpu_seconds']:.0f}"])
    heads = ("arm", "seeds", "final", "area", "area - uniform", "against uniform", "area - random", "against random")
    return grid((*heads, "CPU s"), rows)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Learning curves: a panel per arm, with plain GRPO in grey; bands are the intervals over seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    arms = summary["arms"]
    shown = [arm for arm in arms if arm != "uniform"] or list(arms)
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    size = (2.6 * columns + 0.4, 2.1 * rows + 0.4)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, arm in zip(panels.flat, shown, strict=False):
        for name, colour in (("uniform", "#777777"), (arm, "#1d5c99")):
            if name in arms:
                low, mean, high = ([one[key] for one in arms[name]["curve"]] for key in ("low", "mean", "high"))
                axes.fill_between(summary["steps"], low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(summary["steps"], mean, color=colour, linewidth=1.4)
        axes.set_title(f"{arm} (n = {arms[arm]['seeds']})", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("steps of GRPO", fontsize=8)
    figure.supylabel(f"{summary['task']}: right answers", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"must be like 0/2, got {text!r}")
    return int(number), int(of)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=8, help="up to this one, exclusive")
    parser.add_argument("--from", type=int, default=0, dest="first", help="from this seed on")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *ABLATIONS], help="default: all")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="0/2: this process does every other run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="run nothing: say what the logs say, and draw it")
    options = parser.parse_args(arguments)
    if options.summary:
        for name in options.tasks:
            key = Settings().of(TASKS[name]).key
            if lines := [one for one in read(options.folder / f"rl-{name}.jsonl") if one["settings"] == key]:
                summary = summarise(lines)
                print(json.dumps(summary, indent=1))
                plot(summary, options.folder / f"rl-{name}.png")
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    number, of = options.shard
    jobs = list(plan(options.tasks, range(options.first, options.seeds), options.arms))[number::of]
    run_all(jobs, Settings(), options.folder, options.minutes)


if __name__ == "__main__":
    main()
