"""Credits inside the real TRL, on tiny models: alignment, losses, bad samples, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')

from accelerate import Accelerator  # type: ignore[import-untyped]
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flowgraph.adapters.trl import FlowConfig, FlowGRPOTrainer, FlowMixin
from tests.models import tiny
from tests.written import ANSWERS, MARK, TOKENIZER, VOCABULARY, ids, is_mark, marked, policy, written_by_hand

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo")

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL, to transformers
]

PROMPTS = ["6*7?", "What is 3+4 in words and digits?", "1+1?", "Sum of 2, 3 and 4?"] * 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and on a busy machine a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def says(completions: list[list[int]], masks: list[list[int]] | None = None) -> Callable[..., dict[str, Any]]:
    """A rollout function of TRL that gives out these completions, in order, again and again."""
    given = 0

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        nonlocal given
        chosen = [(given + n) % len(completions) for n in range(len(prompts))]
        given += len(prompts)
        out: dict[str, Any] = {
            "prompt_ids": [ids(prompt, end=False) for prompt in prompts],
            "completion_ids": [completions[n] for n in chosen],
            "logprobs": None,
        }
        return out if masks is None else out | {"env_mask": [masks[n] for n in chosen]}

    return rollout


SOLUTIONS = [ids(text) for text in ("so 40 and 2: =42", "I count, then =7.", "it is =2", "2 and 3 is 5, =9 then")]


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [float((sum(one) * 7 + len(one)) % 5) for one in completion_ids]


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(one)) for one in completion_ids]


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 24,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(**defaults | changes)


def trainer_of(
    folder: Path,
    flow: FlowConfig | None = None,
    kind: type = FlowGRPOTrainer,
    model: Any = None,
    rollout: Any = "solutions",
    extra: dict[str, Any] | None = None,
    reward: Any = odd,
    **changes: Any,
) -> Any:
    return kind(
        model=policy() if model is None else model,
        reward_funcs=reward,
        args=arguments(folder, **changes),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=copy.deepcopy(TOKENIZER),
        rollout_func=says(SOLUTIONS) if rollout == "solutions" else rollout,
        **({} if kind is GRPOTrainer else {"flow": flow or FlowConfig(answer=ANSWERS)}),
        **(extra or {}),
    )


def losses(trainer: Any) -> list[list[float]]:
    """Train; [loss, norm of the gradient] of each step."""
    set_seed(0)  # the shuffling and the dropout of two trainers must be the same
    trainer.train()
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def assert_same(ours: list[list[float]], plain: list[list[float]]) -> None:
    assert plain and all(norm > 0 for _, norm in plain)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-6, atol=1e-6)


def batch_of(trainer: Any, prompts: list[str]) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def plain_advantages(trainer: Any) -> Tensor:
    """[B] what TRL itself made of the rewards, from its log."""
    return torch.tensor(list(trainer._logs["advantages"]))


# --- TRL's loss takes advantages per token ---------------------------------------------------------------------------


def gradient(trainer: Any, advantages: Tensor) -> Tensor:
    """[B, C] gradient of TRL's loss by the log-probability of each token."""
    rows, tokens = 2, 5
    logps = torch.full((rows, tokens), -1.0, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.ones(rows, tokens), None)
    inputs = {
        "prompt_ids": torch.ones(rows, 2).long(),
        "prompt_mask": torch.ones(rows, 2).long(),
        "completion_ids": torch.ones(rows, tokens).long(),
        "completion_mask": torch.ones(rows, tokens).long(),
        "num_items_in_batch": torch.tensor(rows * tokens),
        "advantages": advantages,
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs).backward()
    assert logps.grad is not None
    return logps.grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_gives_each_token_its_own_advantage(loss_type: str, tmp_path: Path) -> None:
    """TRL doesn't promise this. If it fails, TRL has changed, and the adapter does something else than it says."""
    trainer = trainer_of(tmp_path, kind=GRPOTrainer, loss_type=loss_type)
    advantages, weights = torch.tensor([0.5, -2.0]), torch.tensor([[1, 1.5, 1, 2, 1], [3, 1, 1, 1, 1.5]])
    by_row = gradient(trainer, advantages)
    assert (by_row[0] < 0).all() and (by_row[1] > 0).all()
    torch.testing.assert_close(gradient(trainer, advantages[:, None] * weights), by_row * weights)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_ratio_per_sequence_undoes_credits_unless_allowed(loss_type: str, tmp_path: Path) -> None:
    """The reason for what is refused: with most losses every token gets the mean of the weights."""
    changes: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": "sequence"}
    trainer = trainer_of(tmp_path, kind=GRPOTrainer, **changes)
    advantages, weights = torch.tensor([0.5, -2.0]), torch.tensor([[1, 1.5, 1, 2, 1], [3, 1, 1, 1, 1.5]])
    by_row, by_token = gradient(trainer, advantages), gradient(trainer, advantages[:, None] * weights)
    if loss_type in ("cispo", "vespo"):
        torch.testing.assert_close(by_token, by_row * weights)
        assert trainer_of(tmp_path, **changes)
    else:
        torch.testing.assert_close(by_token, by_row * weights.mean(1, keepdim=True))
        with pytest.raises(ValueError, match="gives every token of a response the same gradient"):
            trainer_of(tmp_path, **changes)


# --- weights of 1 change nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gain_1_is_plain_grpo(loss_type: str, tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, kind=GRPOTrainer, loss_type=loss_type)
    ours = trainer_of(tmp_path, FlowConfig(answer=ANSWERS, gain=1.0), loss_type=loss_type)
    assert_same(losses(ours), losses(plain))
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    logged = next(entry for entry in ours.state.log_history if "flow/scored" in entry)
    assert logged["flow/scored"] > 0 and logged["flow/failed"] == logged["flow/no_answer"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2, "max_steps": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4},
        {"beta": 0.1, "top_entropy_quantile": 0.5},
    ],
    ids=["accumulation", "iterations", "stale", "kl-and-entropy"],
)
def test_gain_1_is_plain_grpo_in_other_schedules(changes: dict[str, Any], tmp_path: Path) -> None:
    model = policy()
    model.save_pretrained(tmp_path / "model")  # the reference model of beta > 0 is loaded from there
    model.config._name_or_path = str(tmp_path / "model")
    plain = trainer_of(tmp_path, kind=GRPOTrainer, model=copy.deepcopy(model), **changes)
    ours = trainer_of(tmp_path, FlowConfig(answer=ANSWERS, gain=1.0), model=model, **changes)
    assert_same(losses(ours), losses(plain))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_gain_changes_the_update(loss_type: str, tmp_path: Path) -> None:
    plain = losses(trainer_of(tmp_path, kind=GRPOTrainer, loss_type=loss_type, max_steps=1))
    ours = losses(trainer_of(tmp_path, loss_type=loss_type, max_steps=1))
    assert abs(ours[0][1] - plain[0][1]) > 1e-3 * plain[0][1]


# --- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["generated", "shuffled"])
@pytest.mark.parametrize("budget", [1, 70, 10_000])
def test_the_token_that_carries_all_flow_gets_the_gain_and_no_other(step: str, budget: int, tmp_path: Path) -> None:
    completions = [marked(3, 4), marked(9, 0), marked(0, 6), marked(5, 2)] * 2
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, max_batch_tokens=budget)
    prompts = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
    trainer = trainer_of(
        tmp_path, flow, model=written_by_hand(), rollout=says(completions), reward=length,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(2)]
    trainer.model.train()
    if step == "generated":
        batches = [trainer._generate_and_score_completions(rows)]
    else:
        batches = [trainer._prepare_inputs(rows)]
        trainer._step += 1
        batches.append(trainer._prepare_inputs(rows))
    assert sum(len(batch["advantages"]) for batch in batches) == 8
    # Completions come in the same pairs again and again, so each has one advantage.
    plain = {tuple(one): float(x) for one, x in zip(completions, plain_advantages(trainer), strict=True)}
    (mark,) = ids(MARK, end=False)
    for batch in batches:
        assert batch["advantages"].shape == batch["completion_ids"].shape
        for completion, mask, advantages in zip(
            batch["completion_ids"], batch["completion_mask"].bool(), batch["advantages"], strict=True
        ):
            gain = torch.where(completion == mark, 3.0, 1.0)
            torch.testing.assert_close(advantages, plain[tuple(completion[mask].tolist())] * gain)
            assert (advantages != 0).all() and gain.sum() == len(gain) + 2


def test_tool_output_is_never_credited(tmp_path: Path) -> None:
    completions = [marked(3, 4), marked(9, 0)]
    masks = [[int(token != ids(MARK, end=False)[0]) for token in one] for one in completions]
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says(completions, masks))
    batch = batch_of(trainer, ["?", "?", ";;", ";;"])
    torch.testing.assert_close(batch["advantages"], batch["advantages"][:, -1:].expand_as(batch["advantages"]))
    assert trainer._metrics["train"]["flow/no_flow"] == [1.0]  # all flow went through the tool's token
    assert not batch["flow_mask"][:, :20][batch["tool_mask"][:, :20] == 0].any()


@pytest.mark.parametrize(("signs", "up", "down"), [("both", 3, 3), ("positive", 3, 1), ("negative", 1, 3)])
def test_signs(signs: Any, up: float, down: float, tmp_path: Path) -> None:
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, signs=signs)
    rollout = says([marked(1, 1), marked(2, 2)])
    batch = batch_of(trainer_of(tmp_path, flow, model=written_by_hand(), rollout=rollout), ["?", "?", ";", ";"])
    advantages, mark = batch["advantages"], batch["completion_ids"] == ids(MARK, end=False)[0]
    ratio = advantages[mark] / advantages[:, -1]
    torch.testing.assert_close(ratio, torch.where(advantages[:, -1] > 0, up, down).float())
    assert {up, down} == {round(float(x)) for x in ratio}


def test_normalize_keeps_the_mean(tmp_path: Path) -> None:
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, normalize=True)
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says([marked(1, 1), marked(9, 2)]))
    batch = batch_of(trainer, ["?", "?", ";", ";"])
    mask = batch["completion_mask"].bool()
    means = (batch["advantages"] * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(means, plain_advantages(trainer)[-4:])


def test_the_gain_warms_up(tmp_path: Path) -> None:
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, warmup_steps=4)
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says([marked(1, 1), marked(2, 2)]))
    highest = []
    for trainer.state.global_step in range(6):
        advantages = batch_of(trainer, ["?", "?"])["advantages"]
        highest.append(float((advantages / advantages[:, -1:]).max()))
    assert highest == pytest.approx([1, 1.5, 2, 2.5, 3, 3])


# --- what goes wrong with samples ------------------------------------------------------------------------------------


def test_a_step_with_bad_samples(tmp_path: Path) -> None:
    """Beside good ones: no answer, cut off, empty, ten times as long, and longer than the model can see."""
    completions = [
        marked(3, 4), ids("I don't know"), ids(MARK + " and then", end=False), ids(""), marked(90, 4),
        ids("x" * 2000 + "=7"), marked(1, 1),
    ]  # fmt: skip
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    changes: dict[str, Any] = {"num_generations": 7, "per_device_train_batch_size": 7, "max_steps": 1}
    reward = lambda completion_ids, **_: [float(n * n) for n, _ in enumerate(completion_ids)]  # noqa: E731
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says(completions), reward=reward, **changes)
    with pytest.warns(UserWarning, match=r"weights stay 1: .*2004 tokens, more than the 256"):
        batch = batch_of(trainer, ["?"] * 7)
    gains = batch["advantages"] / batch["advantages"][:, -1:]
    assert [round(float(row.max())) for row in gains] == [3, 1, 1, 1, 3, 1, 3]
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("flow/")}
    assert metrics["flow/scored"] == 1
    assert metrics["flow/failed"] == pytest.approx(1 / 7)
    assert metrics["flow/no_answer"] == pytest.approx(3 / 7)
    assert metrics["flow/cut_off"] == pytest.approx(1 / 7)
    with pytest.warns(UserWarning, match="weights stay 1"):
        ((loss, norm),) = losses(trainer)
    assert loss == loss and norm > 0
    logged = trainer.state.log_history[0]
    assert logged["flow/failed"] == pytest.approx(1 / 7) and logged["flow/no_answer"] == pytest.approx(3 / 7)


def test_completions_masked_because_cut_off_are_not_traced(tmp_path: Path) -> None:
    completions = [marked(3, 4), ids(MARK + "=7", end=False)]
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    trainer = trainer_of(
        tmp_path, flow, model=written_by_hand(), rollout=says(completions), mask_truncated_completions=True
    )
    batch = batch_of(trainer, ["?", "?"])
    assert batch["advantages"][1].unique().numel() == 1 and batch["advantages"][0].unique().numel() == 2
    assert trainer._metrics["train"]["flow/empty"] == [0.5]  # nothing of it is left to train on


REUSES: dict[str, Any] = {"gradient_accumulation_steps": 1, "steps_per_generation": 2}
"""A schedule in which TRL computes old log-probabilities, with the very policy that is to be scored."""


def layer_calls(model: Any) -> list[tuple[int, ...]]:
    """Grows by the shape of the input whenever the model's first layer runs without gradients."""
    calls: list[tuple[int, ...]] = []
    layer = model.model.layers[0]

    def count(_: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            calls.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    layer.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        (REUSES, "attention"),
        (REUSES, "value_norm"),
        ({"num_iterations": 2}, "attention"),
        (REUSES | {"beta": 0.1}, "attention"),
    ],
    ids=["steps-per-generation", "value-norm", "iterations", "reference"],
)
def test_credits_come_out_of_the_pass_for_old_log_probabilities(
    changes: dict[str, Any], weights: str, tmp_path: Path
) -> None:
    """No layer runs once more than in plain GRPO, and the weights are those of a pass of its own."""
    prompts = PROMPTS[:4] * 2
    model = policy()
    model.save_pretrained(tmp_path / "model")  # the reference model of beta > 0 is loaded from there
    model.config._name_or_path = str(tmp_path / "model")
    plain_calls, our_calls, batches = [], [], []
    how: dict[str, Any] = {"answer": ANSWERS, "weights": weights}
    for flow in (None, FlowConfig(**how), FlowConfig(**how, reuse=False)):
        kind = GRPOTrainer if flow is None else FlowGRPOTrainer
        trainer = trainer_of(tmp_path, flow, kind=kind, model=copy.deepcopy(model), **changes)
        calls = layer_calls(trainer.model)
        batches.append(batch_of(trainer, prompts))
        our_calls.append(calls)
    plain_calls, taken, apart = our_calls
    assert len(plain_calls) >= 2 and taken == plain_calls and len(apart) > len(plain_calls)
    plain, ours, theirs = batches
    assert torch.equal(ours["old_per_token_logps"], plain["old_per_token_logps"])
    moved = plain["advantages"] != 0
    assert moved.any() and (ours["flow_weights"][moved] != 1).any()
    assert torch.equal(ours["flow_weights"], theirs["flow_weights"])
    assert torch.equal(ours["advantages"], theirs["advantages"])


@pytest.mark.parametrize("changes", [{}, REUSES], ids=["apart", "reuse"])
def test_the_pass_of_a_reference_is_never_read(changes: dict[str, Any], tmp_path: Path) -> None:
    """With adapters the reference is the policy itself, adapters off: its pass looks like one of the policy."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    weights = []
    for reuse, adapters in ((True, True), (False, True), (False, False)):
        torch.manual_seed(0)
        trainer = trainer_of(
            tmp_path, FlowConfig(answer=ANSWERS, reuse=reuse), beta=0.1, extra={"peft_config": config}, **changes
        )
        for name, weight in trainer.model.named_parameters():
            if "lora_" in name:
                weight.data.mul_(10 if adapters else 0)
        weights.append(batch_of(trainer, PROMPTS[:4] * 2)["flow_weights"])
    ours, apart, of_the_reference = weights
    assert torch.equal(ours, apart) and not torch.equal(ours, of_the_reference)


@pytest.mark.parametrize("masks", [False, True], ids=["all-words", "tools"])
def test_alignment_in_a_pass_that_runs_anyway(masks: bool, tmp_path: Path) -> None:
    completions = [marked(3, 4), marked(9, 0), marked(0, 6), marked(5, 2)]
    tools = [[int(token != 0) for token in one] for one in completions]
    for one in tools:
        one[0] = 0
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    trainer = trainer_of(
        tmp_path, flow, model=written_by_hand(), rollout=says(completions, tools if masks else None), reward=length,
        per_device_train_batch_size=2, **REUSES,
    )  # fmt: skip
    calls = layer_calls(trainer.model)
    batch = batch_of(trainer, ["?", "?", ";;;;;;;", ";;;;;;;"])
    assert calls == [(2, batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])] * 2
    assert (plain_advantages(trainer) != 0).all()
    gain = torch.where(is_mark(batch["completion_ids"]), 3.0, 1.0)
    if masks:
        gain[2, 0] = 1  # its mark is the first token, which a tool wrote
    torch.testing.assert_close(batch["advantages"], plain_advantages(trainer)[:, None] * gain)


def test_bad_samples_in_a_pass_that_runs_anyway(tmp_path: Path) -> None:
    long = ids("x" * 300 + "=7")  # the model is random over so many positions, the tracer refuses them
    completions = [marked(3, 4), ids("I don't know"), ids(MARK + " and then", end=False), ids(""), long, marked(1, 1)]
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    changes = {"num_generations": 6, "per_device_train_batch_size": 6} | REUSES
    reward = lambda completion_ids, **_: [float(len(one) % 7) + n for n, one in enumerate(completion_ids)]  # noqa: E731
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says(completions), reward=reward, **changes)
    calls = layer_calls(trainer.model)
    with pytest.warns(UserWarning, match=r"weights stay 1: .*304 tokens, more than the 256"):
        batch = batch_of(trainer, ["?"] * 6)
    assert len(calls) == 1
    gains = batch["advantages"] / batch["advantages"][:, -1:]
    assert [round(float(row.max())) for row in gains] == [3, 1, 1, 1, 1, 3]
    assert trainer._metrics["train"]["flow/failed"] == [pytest.approx(1 / 6)]


def test_masks_that_a_trainer_changes_afterwards_are_not_ignored(tmp_path: Path) -> None:
    class Blank(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"] = output["completion_mask"].clone()
            output["completion_mask"][0] = 0
            return output

    class Ours(FlowMixin, Blank):
        pass

    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
    rollout = says([marked(3, 4), marked(9, 0)])
    trainer = trainer_of(tmp_path, flow, kind=Ours, model=written_by_hand(), rollout=rollout, **REUSES)
    calls = layer_calls(trainer.model)
    batch = batch_of(trainer, ["?", "?"])
    assert len(calls) == 2  # TRL's, and one for the batch as it is now
    assert [len(row.unique()) for row in batch["advantages"]] == [1, 2]


def test_responses_without_an_advantage_are_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, reward=lambda completion_ids, **_: [1.0] * len(completion_ids))
    monkeypatch.setattr("flowgraph.tracer.capture", lambda *_, **__: pytest.fail("traced"))
    batch = batch_of(trainer, PROMPTS[:1] * 2)
    assert (batch["advantages"] == 0).all() and batch["advantages"].shape == batch["completion_ids"].shape
    metrics = trainer._metrics["train"]
    assert metrics["flow/scored"] == [0.0] and "flow/failed" not in metrics and "flow/gini" not in metrics


def test_other_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    trainer = trainer_of(tmp_path)
    monkeypatch.setattr("flowgraph.tracer.capture", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_of(trainer, PROMPTS[:1] * 2)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_end_to_end_with_real_generation(tmp_path: Path) -> None:
    def long_words(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 9) for text in completions]

    model = policy()
    before = copy.deepcopy(model.state_dict())
    flow = FlowConfig(no_answer="tail", tail_tokens=2, normalize=True, warmup_steps=1)
    trainer = trainer_of(
        tmp_path, flow, model=model, rollout=None, reward=long_words, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=4, extra={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "flow/scored" in entry]
    assert len(logged) == 2
    for name in ("seconds", "gini", "effective_tokens", "delimiter_base"):
        assert all(0 <= entry[f"flow/{name}"] < 60 for entry in logged), name
    # The gain has warmed up.
    assert logged[0]["flow/credited_share"] == 0 < logged[1]["flow/credited_share"]
    assert "flow/entropy_overlap" not in logged[0] and 0 <= logged[1]["flow/entropy_overlap"] <= 1
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not any(name.startswith("eval_flow") for entry in trainer.state.log_history for name in entry)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_keeps_its_attention(implementation: str, tmp_path: Path) -> None:
    model = policy(implementation=implementation)
    trainer = trainer_of(tmp_path, model=model)
    forward = model.forward
    batch_of(trainer, PROMPTS[:2] * 2)
    assert model.config._attn_implementation == implementation
    assert model.forward == forward and model.training


def test_dropout_and_the_random_state_are_left_alone(tmp_path: Path) -> None:
    model = policy(attention_dropout=0.5)
    trainer = trainer_of(tmp_path, model=model)
    plain = trainer_of(tmp_path, kind=GRPOTrainer, model=copy.deepcopy(model))
    after = []
    for one in (trainer, plain):
        set_seed(5)
        batch_of(one, PROMPTS[:2] * 2)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    plain = trainer_of(tmp_path, kind=GRPOTrainer, extra={"peft_config": config})
    flow = FlowConfig(answer=ANSWERS, gain=1.0)
    ours = trainer_of(tmp_path, flow, extra={"peft_config": config})
    assert_same(losses(ours), losses(plain))
    trainer = trainer_of(tmp_path, extra={"peft_config": config})
    assert len(losses(trainer)) == 2
    assert trainer.state.log_history[0]["flow/credited_share"] > 0


def test_another_model_may_score(tmp_path: Path) -> None:
    flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, scorer=written_by_hand())
    trainer = trainer_of(tmp_path, flow, rollout=says([marked(2, 3), marked(4, 0)]))
    batch = batch_of(trainer, ["?", "?"])
    carried = batch["advantages"] != batch["advantages"][:, -1:]
    assert torch.equal(carried, batch["completion_ids"] == ids(MARK, end=False)[0])


def test_a_scorer_follows_the_policy(tmp_path: Path) -> None:
    scorer = policy()
    flow = FlowConfig(answer=ANSWERS, scorer=scorer, refresh_steps=2)
    trainer = trainer_of(tmp_path, flow, max_steps=5)
    with torch.no_grad():
        for weight in scorer.parameters():
            weight.add_(1)  # whatever it was before, it starts as the policy
    policy_at: list[dict[str, Tensor]] = []
    lags = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            policy_at.append(copy.deepcopy(trainer.model.state_dict()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = scorer.state_dict()
            same = [all(torch.equal(now[name], then[name]) for name in now) for then in policy_at]
            lags.append(same.index(True))

    trainer.add_callback(Look())
    trainer.train()
    assert lags == [0, 0, 2, 2, 4]


def test_a_scorer_follows_a_policy_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    )
    scorer = policy()
    flow = FlowConfig(answer=ANSWERS, scorer=scorer, refresh_steps=1)
    trainer = trainer_of(tmp_path, flow, extra={"peft_config": config})
    before = copy.deepcopy(trainer.model.state_dict())
    batch_of(trainer, PROMPTS[:2] * 2)
    input_ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(scorer(input_ids).logits, trainer.model(input_ids=input_ids).logits)
        assert (scorer(input_ids).logits - policy()(input_ids).logits).abs().max() > 1e-3
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("score", ["uniform", "random", "entropy", "answer_attention", "coupled"])
def test_rival_signals_run_through_the_same_recipe(score: str, tmp_path: Path) -> None:
    flow = FlowConfig(
        answer=ANSWERS, preset="paper", score=score, gain=2.0, rule="proportional" if score == "coupled" else "top"
    )
    trainer = trainer_of(tmp_path, flow, model=written_by_hand(), rollout=says([marked(3, 12), marked(9, 8)]))
    batch = batch_of(trainer, ["?", "?", ";;", ";;"])
    assert trainer._metrics["train"]["flow/failed"] == [0]
    gains = batch["advantages"] / plain_advantages(trainer)[:, None]
    weighted = (gains != 1).sum(1)
    assert (weighted == 0).all() if score == "uniform" else (weighted > 0).all()
    torch.testing.assert_close(gains, batch["flow_weights"])
    if score == "answer_attention":
        assert all(row[is_mark(ids)].item() == 2 for row, ids in zip(gains, batch["completion_ids"], strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"flow: model: .* can't be traced: .*does not use the attention interface"):
        trainer_of(tmp_path, model=bloom)
    with pytest.raises(ValueError, match="flow: scorer: BloomForCausalLM can't be traced"):
        trainer_of(tmp_path, FlowConfig(scorer=bloom))


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers \[17\] have no softmax attention"):
        trainer_of(tmp_path, FlowConfig(layers=[17]))


def test_a_scorer_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="97 token embeddings, the tokenizer 259 tokens"):
        trainer_of(tmp_path, FlowConfig(scorer=tiny("llama")))


def test_a_loss_that_takes_no_token_advantages_is_refused(tmp_path: Path) -> None:
    from trl.experimental.gmpo.gmpo_config import GMPOConfig
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    class Unchecked(FlowMixin, GMPOTrainer):
        pass

    with pytest.raises(ValueError, match="GMPOTrainer has a _compute_loss of its own"):
        Unchecked(
            model=policy(), reward_funcs=odd, args=GMPOConfig(**vars_of(tmp_path)), processing_class=TOKENIZER,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )  # fmt: skip


def test_a_compute_loss_of_its_own_is_refused_too(tmp_path: Path) -> None:
    class Unchecked(FlowGRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match="Unchecked has a compute_loss of its own"):
        trainer_of(tmp_path, kind=Unchecked)


def vars_of(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": []}


def test_a_checked_loss_of_its_own_is_taken(tmp_path: Path) -> None:
    class Checked(FlowGRPOTrainer):
        takes_token_advantages = True

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            assert inputs["advantages"].ndim == 2
            return super()._compute_loss(model, inputs)

    assert len(losses(trainer_of(tmp_path, kind=Checked))) == 2


def test_heads_that_each_process_would_find_for_itself_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r'score="coupled" on 2 processes needs FlowConfig\(heads=...\)'):
        trainer_of(tmp_path, FlowConfig(score="coupled"))


def test_a_mixin_without_its_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match="is no GRPOTrainer"):
        FlowMixin()


def sharded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """TRL itself must not see it: it would want a distributed launcher."""
    monkeypatch.setattr(FlowMixin, "_sharding", lambda self: name)


@pytest.mark.parametrize(("name", "score"), [("ZeRO-3", "throughput"), ("FSDP1", "reach"), ("FSDP2", "entropy")])
def test_a_sharded_policy_that_cannot_be_read_needs_a_scorer(
    name: str, score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(monkeypatch, name)
    with pytest.raises(ValueError, match=rf"the policy is sharded by .*{name}.*Pass FlowConfig.scorer"):
        trainer_of(tmp_path, FlowConfig(score=score))
    assert trainer_of(tmp_path, FlowConfig(score=score, scorer=policy()))


def test_weights_that_cannot_be_gathered_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = FlowConfig(scorer=policy(), refresh_steps=1)
    for name in ("ZeRO-3", "FSDP1"):
        sharded(monkeypatch, name)
        with pytest.raises(ValueError, match=f"refresh_steps cannot gather weights that {name} has sharded"):
            trainer_of(tmp_path, flow)
    peft = pytest.importorskip("peft", reason="needs peft")
    sharded(monkeypatch, "FSDP2")
    with pytest.raises(ValueError, match="refresh_steps cannot merge adapters that are sharded"):
        trainer_of(tmp_path, flow, extra={"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"])})


def test_a_scorer_of_another_shape_cannot_be_refreshed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, FlowConfig(scorer=policy(num_hidden_layers=2), refresh_steps=1))
    with pytest.raises(ValueError, match=r"weights don't fit LlamaForCausalLM: unknown: model.layers.2"):
        batch_of(trainer, PROMPTS[:2] * 2)
