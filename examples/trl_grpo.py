"""GRPO with token credits on arithmetic: a small random Llama on the CPU in minutes, or any model of the hub on a GPU.

    python examples/trl_grpo.py                              # a Llama of 0.45 million parameters, from scratch
    python examples/trl_grpo.py --plain                      # the same run without FlowGraph
    python examples/trl_grpo.py --model Qwen/Qwen3-0.6B      # a real model, two-digit sums in chat form

The random model first learns the format and some of the sums by imitation, then GRPO takes it from there.
Needs TRL: pip install "flowgraph-llm[trl]".
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from flowgraph.adapters.trl import FlowConfig, FlowGRPOTrainer

ANSWER = re.compile(r"A: *(-?\d+)")


def reward(completions: list[Any], sum: list[int], **_: Any) -> list[float]:
    """1 if the number after the last "A:" is right, else 0."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    found = [ANSWER.findall(text) for text in texts]
    return [float(bool(numbers) and int(numbers[-1]) == right) for numbers, right in zip(found, sum, strict=True)]


def characters() -> Any:
    """A tokenizer with one token per character."""
    symbols = ["<pad>", "<eos>", *"0123456789+=:A\n "]
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def one_digit_sums(tokenizer: Any) -> tuple[Any, Dataset]:
    """A small Llama that imitates a teacher who gets about a third of the sums right, and those sums."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sums = [(a, b) for a in range(10) for b in range(10)]
    for _ in range(400):
        chosen = random.sample(sums, 32)
        said = [max(0, a + b + random.choice([0, 0, -2, -1, 1, 2])) for a, b in chosen]
        texts = [f"{a}+{b}=\n{a}+{b}={c}\nA: {c}<eos>" for (a, b), c in zip(chosen, said, strict=True)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :5] = -100  # the prompt
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, Dataset.from_dict({"prompt": [f"{a}+{b}=\n" for a, b in sums], "sum": [a + b for a, b in sums]})


def two_digit_sums() -> Dataset:
    rows = [(random.randint(10, 99), random.randint(10, 99), random.randint(10, 99)) for _ in range(2000)]
    ask = "What is {} + {} * {}? Think briefly, then end with a line 'A: <number>'."
    prompts = [[{"role": "user", "content": ask.format(*row)}] for row in rows]
    return Dataset.from_dict({"prompt": prompts, "sum": [a + b * c for a, b, c in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a chat model; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="GRPO without credits, for comparison")
    options = parser.parse_args()
    set_seed(options.seed)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": options.steps,
        "seed": options.seed,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "num_generations": 8,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
    }
    if options.model:
        model, tokenizer, dataset = options.model, None, two_digit_sums()
        settings |= {"per_device_train_batch_size": 16, "max_completion_length": 512, "learning_rate": 1e-6}
    else:
        tokenizer = characters()
        model, dataset = one_digit_sums(tokenizer)
        settings |= {"per_device_train_batch_size": 128, "max_completion_length": 16, "learning_rate": 3e-4}
        settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}

    common = {"model": model, "reward_funcs": reward, "train_dataset": dataset, "processing_class": tokenizer}
    if options.plain:
        trainer = GRPOTrainer(args=GRPOConfig(**settings), **common)
    else:
        trainer = FlowGRPOTrainer(args=GRPOConfig(**settings), **common, flow=FlowConfig(gain=1.5, normalize=True))
    trainer.train()

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    window = max(1, min(5, len(rewards) // 4))
    first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
    print("rewards: " + " ".join(f"{one:.2f}" for one in rewards))
    print(f"reward: {first:.2f} in the first {window} steps, {last:.2f} in the last {window}")


if __name__ == "__main__":
    main()
