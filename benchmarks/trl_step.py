"""`python -m benchmarks.trl_step`: what credits add to a step of GRPO in TRL, on the CPU.

One training run of SmolLM2's shape with random weights, whose optimizer steps are taken by turns as plain GRPO (TRL's
own methods, nothing of FlowGraph runs) and with credits; so both see the same model, machine and memory. A step is all
that a user waits for: generating the responses, rewards, credits, loss, backward, optimizer. Every response has as many
tokens as asked for; the last four stand for its answer, as random weights write none. Each step of one kind is compared
with the step of the other kind beside it, after one of each that doesn't count; reported is the median of these ratios,
once for whole steps and once for what is left of both without the generation. Twice: with one step per batch of
responses, where credits need a pass of their own, and with two, where they come out of TRL's pass for old
log-probabilities.

The result goes to benchmarks/results/trl_step.json with machine, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.run import RESULTS, machine
from flowgraph.adapters.trl import FlowConfig, FlowGRPOTrainer

VOCABULARY = 49152
LOGGED = ("completions/min_length", "flow/scored", "flow/seconds")
PROMPT = "A baker makes 12 loaves in the morning and 15 in the afternoon, and sells 9 of them. How many are left?"


class ByTurns(FlowGRPOTrainer):
    """Even batches of responses are plain GRPO, odd ones have credits."""

    takes_token_advantages = True  # the loss is TRL's own in both

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generating = 0.0

    @property
    def _owner(self) -> Any:
        return FlowGRPOTrainer if self.state.global_step // self.num_iterations % 2 else GRPOTrainer

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self._owner._generate_and_score_completions(self, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner._get_per_token_logps_and_entropies(self, *args, **kwargs)

    def _compute_loss(self, *args: Any) -> Any:
        return self._owner._compute_loss(self, *args)

    def _generate(self, *args: Any) -> Any:
        began = time.perf_counter()
        found = self._owner._generate(self, *args)
        self.generating += time.perf_counter() - began
        return found


class Watch(TrainerCallback):
    """Notes how long each step took, and how much of it was generation."""

    def __init__(self, trainer: ByTurns) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.generating = 0.0
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.began
        self.steps.append({"seconds": seconds, "without_generation": seconds - self.trainer.generating})


def words() -> Any:
    """A tokenizer of as many tokens as SmolLM2 has: the bytes, and made-up words."""
    special = ["<pad>", "<eos>"]
    known = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"Ġw{n}" for n in range(VOCABULARY - len(known))]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def smollm2_shape(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M with random weights, or with fewer layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Different for all responses, so that all have an advantage."""
    return [float(sum(one) % 1009) for one in completion_ids]


def measure(responses: int, tokens: int, layers: int, pairs: int, iterations: int) -> dict[str, Any]:
    """Train on 1 + `pairs` pairs of batches, `iterations` steps on each."""
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, max_steps=2 * (1 + pairs) * iterations, num_iterations=iterations,
        per_device_train_batch_size=responses, num_generations=responses, max_completion_length=tokens,
        gradient_accumulation_steps=1, generation_kwargs={"min_new_tokens": tokens},
    )  # fmt: skip
    trainer = ByTurns(
        model=smollm2_shape(layers), reward_funcs=reward, args=settings, processing_class=words(),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * responses}),
        flow=FlowConfig(no_answer="tail", tail_tokens=4),
    )  # fmt: skip
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    logged = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in LOGGED}
    assert set(logged["completions/min_length"]) == {float(tokens)}, logged
    assert logged["flow/scored"] == [1.0] * (1 + pairs), logged
    batches = [
        {name: sum(step[name] for step in watch.steps[start : start + iterations]) for name in watch.steps[0]}
        for start in range(0, len(watch.steps), iterations)
    ]
    plain, flow = batches[2::2], batches[3::2]
    result: dict[str, Any] = {
        "credits": "a pass of their own" if iterations == 1 else "out of the pass for old log-probabilities",
        "responses": responses, "completion_tokens": tokens, "layers": layers, "steps_per_batch": iterations,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "credit_seconds": statistics.median(logged["flow/seconds"][1:]),
    }  # fmt: skip
    for name in ("seconds", "without_generation"):
        ratios = [ours[name] / theirs[name] for ours, theirs in zip(flow, plain, strict=True)]
        result[name] = {
            "plain": [one[name] for one in plain],
            "flow": [one[name] for one in flow],
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=3, help="of steps that count")
    parser.add_argument("--steps-per-batch", type=int, nargs="+", default=[1, 2], help="which of the two cases to run")
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_step.json")
    options = parser.parse_args()
    about = machine() | {"model": "SmolLM2-135M's shape, random weights, float32", "trl": trl.__version__}
    options.out.parent.mkdir(exist_ok=True)
    results: list[dict[str, Any]] = []
    for iterations in options.steps_per_batch:
        result = measure(options.responses, options.tokens, options.layers, options.pairs, iterations)
        results.append(result)
        options.out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        print(f"credits: {result['credits']}, {result['credit_seconds']:.1f} s by themselves")
        for name, text in (("seconds", "whole steps"), ("without_generation", "without generation")):
            one = result[name]
            plain, ours = statistics.median(one["plain"]), statistics.median(one["flow"])
            print(
                f"  {text}: {plain:.1f} s plain, {ours:.1f} s with credits, ratio {one['ratio']:.3f} "
                f"({one['lowest']:.3f} to {one['highest']:.3f})"
            )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
