"""Credits in ROLL, by contract: fakes with the shapes and the formulas of its source, and the real one where it is.

The fakes mirror alibaba/ROLL 0.3.0, commit 8eb27cc; each says which function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.adapters import roll
from flowgraph.rl import Crediting, FlowConfig, Scorer
from tests.written import ANSWERS, TOKENIZER, ids, is_mark, marked, written_by_hand

PROMPTS = ["?", ";;;;;;;", "?;?;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False)]
REWARDS = [1.0, -0.5, 2.0]
PAD = TOKENIZER.pad_token_id


class FakeDataProto:
    """roll/distributed/scheduler/protocol.py, DataProto: what the advantage step touches of it."""

    def __init__(self, batch: dict[str, Tensor], global_step: int = 0) -> None:
        self.batch = batch
        self.non_tensor_batch: dict[str, Any] = {}
        self.meta_info: dict[str, Any] = {"global_step": global_step}


def generated(prompts: Sequence[str], responses: Sequence[list[int]], width: int = 40, room: int = 0) -> FakeDataProto:
    """roll/utils/functionals.py, postprocess_generate: prompts padded left and responses right, then all moved left.

    `prompts` and `responses` keep the layout of the generation; the other fields start at column 0.
    """
    starts = [ids(prompt, end=False) for prompt in prompts]
    left = max(map(len, starts))
    room = room or width - left
    prompt = torch.tensor([[PAD] * (left - len(one)) + one for one in starts])
    response = torch.tensor([one + [PAD] * (room - len(one)) for one in responses])
    output = torch.full((len(starts), left + room), PAD)
    attention, said = torch.zeros_like(output), torch.zeros_like(output)
    for row, (start, one) in enumerate(zip(starts, responses, strict=True)):
        end = len(start) + len(one)
        output[row, :end] = torch.tensor(start + one)
        attention[row, :end] = 1
        said[row, len(start) : end] = 1
    return FakeDataProto(
        {
            "prompts": prompt,
            "responses": response,
            "input_ids": output,
            "attention_mask": attention,
            "response_mask": said,
            "prompt_mask": attention.bool() & ~said.bool(),
        }
    )


def of_turns(turns: Sequence[Sequence[tuple[str, bool]]], width: int = 60) -> FakeDataProto:
    """roll/pipeline/agentic/env_manager/traj_env_manager.py, formulate_rollouts: turns one after the other, pads right.

    Each turn is (text, whether the model wrote it).
    """
    batch = {name: torch.zeros(len(turns), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["response_mask"] = torch.zeros(len(turns), width, dtype=torch.bool)
    for row, parts in enumerate(turns):
        at = 0
        for text, said in parts:
            tokens = ids(text, end=False)
            batch["input_ids"][row, at : at + len(tokens)] = torch.tensor(tokens)
            batch["response_mask"][row, at : at + len(tokens)] = said
            at += len(tokens)
        batch["attention_mask"][row, :at] = 1
    return FakeDataProto(batch)


def compute_advantage(data: Any, rewards: Sequence[float] = REWARDS, response_mask: Tensor | None = None) -> Any:
    """roll/utils/functionals.py, compute_advantage with adv_estimator="grpo", gamma 1: the reward at every token."""
    mask = data.batch["response_mask"][:, 1:] if response_mask is None else response_mask
    advantages = torch.tensor(rewards)[:, None].expand(mask.shape) * mask
    data.batch["raw_advantages"] = data.batch["returns"] = advantages
    data.batch["advantages"] = advantages * mask
    data.meta_info["metrics"] = {"critic/advantage_clip_frac": 0.0}
    return data


def loss_and_gradient(data: Any, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """roll/pipeline/rlvr/actor_worker.py, loss_func with importance_sampling="token", and agg_loss "token-mean"."""
    mask, advantages = data.batch["response_mask"][:, 1:], data.batch["advantages"]
    log_probs = log_probs.clone().requires_grad_()
    ratio = (log_probs - (log_probs.detach() + 0.05)).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def by_hand(**changes: Any) -> Crediting:
    defaults = {"answer": ANSWERS, "preset": "paper", "gain": 3.0}
    return Crediting(Scorer(written_by_hand(), TOKENIZER, FlowConfig(**{**defaults, **changes})))


def step(data: Any, crediting: Crediting, **kwargs: Any) -> Any:
    hook: Callable[..., Any] = roll.with_credits(compute_advantage, crediting)
    return hook(data=data, **kwargs)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1], ["?"] * 3])
@pytest.mark.parametrize("width", [25, 40])
def test_the_marked_token_gets_the_gain_and_no_other(prompts: list[str], width: int) -> None:
    data = step(generated(prompts, RESPONSES, width), by_hand())
    plain = compute_advantage(generated(prompts, RESPONSES, width)).batch["advantages"]
    own = is_mark(data.batch["input_ids"])[:, 1:]  # column t of the advantages belongs to token t + 1
    assert own.sum() == 3
    assert torch.equal(data.batch["advantages"], torch.where(own, 3 * plain, plain))


def test_each_token_s_own_advantage_decides_about_its_sign() -> None:
    data = compute_advantage(generated(PROMPTS, RESPONSES))
    own = is_mark(data.batch["input_ids"])[:, 1:]
    advantages = torch.where(own, 2.0, -1.0) * data.batch["response_mask"][:, 1:]
    for signs, gain in (("positive", 3), ("negative", 1)):
        data.batch["advantages"] = advantages
        roll.put_credits_into(data, by_hand(signs=signs))
        assert torch.equal(data.batch["advantages"], torch.where(own, gain * advantages, advantages))


def test_tool_output_between_turns_gets_nothing() -> None:
    # The tool's own "@" and the prompt's, which is history, look like the model's.
    turns = [("?;", False), ("aa", True), ("?@", False), ("b@b=7", True)], [("@;", False), ("a@", True), (";;;", False)]
    data = step(of_turns(turns), by_hand(), rewards=[1.0, -1.0])
    column = ids("?;aa?@b@b=7", end=False)
    assert data.batch["advantages"][0].nonzero().flatten().tolist() == [1, 2, 5, 6, 7, 8, 9]
    assert (data.batch["advantages"][0] == 3).nonzero().flatten().tolist() == [len("?;aa?@b") - 1]
    assert len(column) - 1 == 10
    assert set(data.batch["advantages"][1].tolist()) == {0.0, -1.0}  # no answer


def test_a_gain_of_1_changes_no_bit() -> None:
    data = step(generated(PROMPTS, RESPONSES), by_hand(gain=1.0))
    plain = compute_advantage(generated(PROMPTS, RESPONSES))
    assert torch.equal(data.batch["advantages"], plain.batch["advantages"])
    log_probs = torch.randn(plain.batch["advantages"].shape, generator=torch.Generator().manual_seed(0)) - 2
    for one, other in zip(loss_and_gradient(data, log_probs), loss_and_gradient(plain, log_probs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_token_s_gradient_is_the_plain_one_times_its_factor() -> None:
    data = step(generated(PROMPTS, RESPONSES), by_hand())
    plain = compute_advantage(generated(PROMPTS, RESPONSES))
    log_probs = torch.full(plain.batch["advantages"].shape, -1.0)
    _, gradient = loss_and_gradient(data, log_probs)
    _, before = loss_and_gradient(plain, log_probs)
    own = is_mark(data.batch["input_ids"])[:, 1:]
    torch.testing.assert_close(gradient, torch.where(own, 3 * before, before))


def test_what_else_is_in_the_batch_stays() -> None:
    data, plain = step(generated(PROMPTS, RESPONSES), by_hand()), compute_advantage(generated(PROMPTS, RESPONSES))
    assert data.batch.keys() == plain.batch.keys()
    for name in data.batch.keys() - {"advantages"}:
        assert torch.equal(data.batch[name], plain.batch[name])


def test_a_row_that_rolls_sample_mask_takes_out_is_not_scored() -> None:
    data = generated(PROMPTS, RESPONSES)
    final = data.batch["response_mask"][:, 1:].float()
    final[1] = 0
    data.batch["final_response_mask"] = final
    data = step(data, by_hand(), response_mask=final.clone())
    assert (data.batch["advantages"][1] == 0).all()
    assert data.meta_info["metrics"]["flow/scored"] == pytest.approx(2 / 3)


def test_bad_rollouts_cost_no_other() -> None:
    responses = [marked(3, 4), ids("no answer"), marked(5, 2, end=False), [], marked(120, 70)]
    room = max(map(len, responses))
    batch = generated(["?"] * 5, responses, room=room)
    data = step(batch, by_hand(), rewards=[1.0, 1.0, -1.0, 1.0, -1.0])
    marks = is_mark(data.batch["input_ids"])[:, 1:]
    assert ((data.batch["advantages"].abs() == 3) == marks).all()
    metrics = data.meta_info["metrics"]
    assert metrics["flow/scored"] > 0
    assert metrics["flow/no_answer"] == pytest.approx(1 / 4)  # an empty response has no advantage in ROLL
    assert metrics["critic/advantage_clip_frac"] == 0.0


def test_a_response_that_fills_its_room_is_cut_off() -> None:
    data = step(generated(["?"] * 2, [marked(3, 4), marked(3, 2)], room=len(marked(3, 4))), by_hand(), rewards=[1, 1])
    assert data.meta_info["metrics"]["flow/cut_off"] == 0.5


def test_warm_up_follows_rolls_step() -> None:
    data = generated(PROMPTS, RESPONSES)
    data.meta_info["global_step"] = 1
    step(data, by_hand(warmup_steps=4))
    assert data.batch["advantages"].max() == 2 * (1 + 0.25 * 2)


def test_images_are_refused() -> None:
    data = generated(PROMPTS, RESPONSES)
    data.non_tensor_batch["multi_modal_inputs"] = [None]
    with pytest.raises(ValueError, match="images"):
        step(data, by_hand())


def test_advantages_of_another_shape_are_refused() -> None:
    data = compute_advantage(generated(PROMPTS, RESPONSES))
    data.batch["advantages"] = data.batch["advantages"][:, 1:]
    with pytest.raises(ValueError, match=r"advantages must be \[B, S-1\]"):
        roll.put_credits_into(data, by_hand())


# --- install ----------------------------------------------------------------------------------------------------------


def a_pipeline(monkeypatch: pytest.MonkeyPatch, hook: str, **config: Any) -> tuple[Any, ModuleType]:
    """A pipeline in a module of its own, whose `run` looks its advantage step up there, as rlvr_pipeline.py does."""
    module = ModuleType("fake_roll_pipeline")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = f"class Pipeline:\n    def run(self, data):\n        return {hook}(data=data)\n"
    exec(compile(source, module.__name__, "exec"), vars(module))
    setattr(module, hook, compute_advantage)
    pipeline = module.Pipeline()
    pipeline.pipeline_config = SimpleNamespace(**{"importance_sampling": "token", "ratio_type": "token"} | config)
    return pipeline, module


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Crediting:
    made = by_hand()
    monkeypatch.setattr(roll, "crediting", lambda source=None: made)
    return made


@pytest.mark.parametrize("hook", roll.HOOKS)
@pytest.mark.usefixtures("service")
def test_install_is_enough_and_twice_is_once(monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    pipeline, _ = a_pipeline(monkeypatch, hook)
    roll.install(pipeline)
    roll.install(pipeline)
    data = pipeline.run(generated(PROMPTS, RESPONSES))
    assert data.batch["advantages"].max() == 6  # 2.0 times 3, not times 9


@pytest.mark.parametrize("setting", [{"importance_sampling": "seq"}, {"ratio_type": "segment"}])
@pytest.mark.usefixtures("service")
def test_one_ratio_for_many_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]) -> None:
    pipeline, module = a_pipeline(monkeypatch, "compute_advantage", **setting)
    with pytest.raises(ValueError, match="same gradient"):
        roll.install(pipeline)
    assert module.compute_advantage is compute_advantage


@pytest.mark.usefixtures("service")
def test_a_pipeline_without_advantages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, _ = a_pipeline(monkeypatch, "compute_dpo_loss")
    with pytest.raises(TypeError, match="no advantage step"):
        roll.install(pipeline)


# --- the real ROLL ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Any:
    """ROLL's own modules (a checkout on the path; the package "roll" of the index is another one)."""
    pytest.importorskip("roll.distributed.scheduler.protocol", reason="needs ROLL from github.com/alibaba/ROLL")
    from roll.distributed.scheduler.protocol import DataProto
    from roll.pipeline.agentic import agentic_pipeline
    from roll.pipeline.rlvr import actor_worker, rlvr_pipeline
    from roll.utils import functionals

    return SimpleNamespace(
        DataProto=DataProto, functionals=functionals, actor=actor_worker, rlvr=rlvr_pipeline, agentic=agentic_pipeline
    )


def really_generated(real: Any, prompts: Sequence[str] = PROMPTS, responses: Sequence[list[int]] = RESPONSES) -> Any:
    """A batch of ROLL's own `postprocess_generate`, up to where its advantages are made."""
    from tensordict import TensorDict

    fake = generated(prompts, responses).batch
    start = fake["prompts"]
    prompt = TensorDict(
        {
            "input_ids": start,
            "attention_mask": (start != PAD).long(),
            "position_ids": torch.clip((start != PAD).long().cumsum(1) - 1, min=0),
        },
        batch_size=len(start),
    )
    output = torch.cat([start, fake["responses"]], dim=1)
    data = real.functionals.postprocess_generate(
        real.DataProto(batch=prompt), output, 1, output.shape[1], TOKENIZER.eos_token_id, PAD
    )
    assert torch.equal(data.batch["input_ids"], fake["input_ids"])  # what the fake says is so
    for name in ("attention_mask", "response_mask"):
        assert torch.equal(data.batch[name], fake[name])
    data.batch["response_level_rewards"] = torch.tensor(REWARDS)
    data.batch["token_level_rewards"] = real.functionals.expand_to_token_level(data)
    data.batch["final_response_mask"] = data.batch["response_mask"][:, 1:].clone()
    data.meta_info = {"global_step": 0}
    return data


HOW = {"gamma": 1.0, "lambd": 1.0, "adv_estimator": "grpo", "advantage_clip": 5.0}


@pytest.mark.parametrize("hook", roll.HOOKS)
def test_the_real_advantage_step(real: Any, hook: str) -> None:
    module = real.rlvr if hook == "compute_advantage" else real.agentic
    plain = getattr(module, hook)(data=really_generated(real), **HOW).batch["advantages"]
    ones = roll.with_credits(getattr(module, hook), by_hand(gain=1.0))(data=really_generated(real), **HOW)
    assert torch.equal(ones.batch["advantages"], plain)
    shaped = roll.with_credits(getattr(module, hook), by_hand())(data=really_generated(real), **HOW)
    own = is_mark(shaped.batch["input_ids"])[:, 1:]
    assert torch.equal(shaped.batch["advantages"], torch.where(own, 3 * plain, plain))
    assert real.functionals.reduce_metrics(shaped.meta_info["metrics"])["flow/scored"] == 1.0


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(("name", "hook"), [("RLVRPipeline", 0), ("AgenticPipeline", 1)])
def test_install_finds_the_real_hooks(real: Any, monkeypatch: pytest.MonkeyPatch, name: str, hook: int) -> None:
    module = real.agentic if hook else real.rlvr
    monkeypatch.setattr(module, roll.HOOKS[hook], getattr(module, roll.HOOKS[hook]))  # put back after the test
    pipeline = object.__new__(getattr(module, name))
    pipeline.pipeline_config = SimpleNamespace(importance_sampling="token", ratio_type="token")
    roll.install(pipeline)
    data = getattr(module, roll.HOOKS[hook])(data=really_generated(real), **HOW)
    assert data.batch["advantages"].max() == 6


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_real_loss(real: Any, mode: str) -> None:
    compute = real.rlvr.compute_advantage
    plain = compute(data=really_generated(real), **HOW)
    ones = roll.with_credits(compute, by_hand(gain=1.0))(data=really_generated(real), **HOW)
    shaped = roll.with_credits(compute, by_hand())(data=really_generated(real), **HOW)
    (loss, was), (same, same_gradient), (_, gradient) = (real_loss(real, one, mode) for one in (plain, ones, shaped))
    torch.testing.assert_close(same, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(same_gradient, was, rtol=0, atol=1e-6)
    own = is_mark(shaped.batch["input_ids"])[:, 1:]
    assert was[own].abs().min() > 0
    torch.testing.assert_close(gradient, torch.where(own, 3 * was, was))


def real_loss(real: Any, data: Any, mode: str) -> tuple[Tensor, Tensor]:
    """`ActorWorker.loss_func` of ROLL, whose model is a table of log-probabilities."""
    mask = data.batch["response_mask"][:, 1:]
    log_probs = torch.full(mask.shape, -1.0, requires_grad=True)
    data.batch["ref_log_probs"] = data.batch["old_log_probs"] = log_probs.detach().clone()
    data.batch["train_infer_is_weight"] = torch.ones(mask.shape)
    data.meta_info |= {
        "batch_num_tokens": {"response_mask": mask.sum(), "final_response_mask": mask.sum()},
        "global_valid_samples": {"response_mask": len(mask), "final_response_mask": len(mask)},
    }
    config = SimpleNamespace(
        enable_old_logprobs_recompute=True, importance_sampling="token", use_pg_clip_range=False, pg_clip=0.2,
        dual_clip_loss=True, train_infer_correction=SimpleNamespace(is_weight=SimpleNamespace(enabled=False)),
        loss_agg_mode=mode, use_kl_loss=False, rl_loss_coef=1.0, entropy_loss_coef=0.0,
        difficulty_loss_weight=False, length_loss_weight=False,
    )  # fmt: skip
    worker = SimpleNamespace(
        pipeline_config=config,
        strategy=SimpleNamespace(op_compute_log_probs=lambda logits, input_ids, attention_mask: logits),
        get_old_log_probs_with_cache=lambda data, log_probs: data.batch["old_log_probs"],
        compute_sample_weights=lambda data, mask: torch.ones(len(mask)),
    )
    loss, _ = real.actor.ActorWorker.loss_func(worker, data, log_probs)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]
