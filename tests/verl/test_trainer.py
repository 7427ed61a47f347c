"""Credits inside the real verl: its constructor, TransferQueue, replay buffer, balancing, advantages and losses.

verl's workers and `init` need GPUs; `tests/verl/steps.py` says what stands in for them. Run by `make test-verl`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="needs verl in an environment of its own: make test-verl")

import transfer_queue
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.utils import MetricsAggregator
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import left_right_2_no_padding

from flowgraph.adapters.verl import FlowMixin, follows_tokens, over_sequence, rows_of
from tests.verl.steps import (
    RESPONSE_LIMIT,
    CpuActor,
    Rollout,
    clear,
    config_of,
    fields_of,
    put,
    step,
    trainer_of,
)
from tests.written import TOKENIZER, ids, is_mark, marked

pytestmark = pytest.mark.usefixtures("queue")

GAIN = 3.0
FLOW = ("+flowgraph.flow.preset=paper", r"+flowgraph.flow.answer='re:=(\d)'", f"+flowgraph.flow.gain={GAIN}")
TAKES_TOKENS = sorted(set(POLICY_LOSS_REGISTRY) - {"geo_mean"})
MODES = {
    "sync": (PPOTrainerSync, ReplayBuffer),
    "colocate_async": (PPOTrainerColocateAsync, ReplayBufferAsync),
    "separate_async": (PPOTrainerSeparateAsync, ReplayBufferAsync),
}
SEPARATE = (
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    "trainer.v1.separate_async.parameter_sync_step=4",
    "data.train_batch_size=4",
)
"""What verl itself asks for in this mode."""


def question(repeat: int) -> list[int]:
    return ids("?;" * repeat, end=False)


ROLLOUTS = [
    Rollout(question(1), marked(3, 5), 1.0),
    Rollout(question(1), marked(7, 2), 0.0),
    Rollout(question(4), marked(1, 1), 0.0),
    Rollout(question(4), marked(12, 20), 1.0),
]
"""Prompts and responses of different lengths, an advantage for each."""


def loss_overrides(mode: str) -> tuple[str, ...]:
    prefix = "actor_rollout_ref.actor.policy_loss"
    return (f"{prefix}.loss_mode={mode}", *([f"{prefix}.dro_beta=0.1"] if mode == "dro" else []))


def run(folder: str, rollouts: list[Rollout], *overrides: str, mode: str = "flowgraph_sync", devices: int = 1) -> Any:
    """(response ids -> advantages [R], response ids -> gradient [R], metrics, actor) of one step of verl."""
    config = config_of(folder, *overrides, *(FLOW if mode.startswith("flowgraph") else ()), mode=mode)
    actor = CpuActor(config, devices=devices)
    torch.manual_seed(0)  # clip_cov draws
    batch, metrics = step(trainer_of(config, actor), rollouts)
    found = fields_of(batch, "responses", "advantages")
    names = [tuple(row.tolist()) for row in found["responses"]]
    gradients = {name: actor.by_token[key] for name, key in zip(names, batch.keys, strict=True)}
    advantages = dict(zip(names, found["advantages"], strict=True))
    clear(batch)
    return advantages, gradients, metrics, actor


def expected(response: tuple[int, ...]) -> Tensor:
    """[R] the gain at the token that carries all flow, 1 elsewhere."""
    return torch.where(is_mark(torch.tensor(response)), GAIN, 1.0)


# --- verl finds it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_plugin_is_found(mode: str) -> None:
    """No test imports the plugin: verl has loaded it by its entry point."""
    base, _ = MODES[mode]
    assert get_trainer_cls(mode) is base
    ours = get_trainer_cls(f"flowgraph_{mode}")
    assert issubclass(ours, base) and issubclass(ours, FlowMixin)


def test_plugins_can_be_turned_off_and_named() -> None:
    """VERL_USE_EXTERNAL_PLUGINS=none leaves verl as it is; VERL_USE_EXTERNAL_MODULES calls what is called here."""
    ask = (
        "import verl; from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY as r; print('modes:', *sorted(r));"
        "verl.import_external_libs(['flowgraph.adapters.verl_plugin']); print('modes:', *sorted(r))"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    before, after = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("modes:"))
    assert before == sorted(MODES)
    assert after == sorted([*MODES, *(f"flowgraph_{mode}" for mode in MODES)])


@pytest.mark.parametrize("mode", MODES)
def test_verl_sees_its_own_mode(mode: str, folder: str) -> None:
    """verl takes the replay buffer, and more, by the name of the mode."""
    config = config_of(folder, *FLOW, *(SEPARATE if mode == "separate_async" else ()), mode=f"flowgraph_{mode}")
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert trainer.trainer_mode == config.trainer.v1.trainer_mode == mode
    assert type(trainer.replay_buffer) is MODES[mode][1]
    assert trainer.parameter_sync_step == (4 if mode == "separate_async" else 1)


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 3], ids=["as it is", "with verl's padding rows"])
def test_only_the_marked_token_gets_the_gain(devices: int, folder: str) -> None:
    plain, plain_gradients, _, _ = run(folder, ROLLOUTS, mode="sync", devices=devices)
    ours, gradients, metrics, _ = run(folder, ROLLOUTS, devices=devices)
    assert len(ours) == len(ROLLOUTS) + (devices == 3) and ours.keys() == plain.keys()
    for response, advantages in ours.items():
        torch.testing.assert_close(advantages, plain[response] * expected(response))
        torch.testing.assert_close(gradients[response], plain_gradients[response] * expected(response))
    assert sum(bool((plain[one] != ours[one]).any()) for one in ours) == len(ROLLOUTS)
    assert metrics["flow/scored"] == 1 and metrics["flow/no_answer"] == 0


def test_tool_output_is_read_but_never_credited(folder: str) -> None:
    """Two marks: a tool wrote the first, so the second has the gain alone."""
    written, tool = ids("aa", end=False), ids("b@b", end=False)
    response = written + tool + marked(2, 2)
    mask = [1] * len(written) + [0] * len(tool) + [1] * len(marked(2, 2))
    other = Rollout(question(2), marked(4, 4), 0.0)
    ours, _, _, _ = run(folder, [Rollout(question(2), response, 1.0, mask), other])
    plain, _, _, _ = run(folder, [Rollout(question(2), response, 1.0, mask), other], mode="sync")
    factor = torch.where(torch.tensor(mask).bool(), expected(tuple(response)), 1)
    assert factor.sum() == len(response) + GAIN - 1
    torch.testing.assert_close(ours[tuple(response)], plain[tuple(response)] * factor)


def test_rejected_tokens_get_no_credit(folder: str) -> None:
    """verl's rollout correction takes tokens out of the loss after they were written; others get what they leave."""
    overrides = (
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.5_2.0'",
        "+flowgraph.flow.top=0.1",  # one token of the response, the first of two equals if both may
    )
    near, far = -5.5, -0.1  # the tiny policy gives every byte about 1 / 259
    response, other = ids("a@bb@b=7"), marked(5, 5)
    rejected = Rollout(question(2), response, 1.0, logps=[near, far] + [near] * (len(response) - 2))
    kept = Rollout(question(2), other, 0.0, logps=[near] * len(other))
    ours, gradients, _, _ = run(folder, [kept, rejected], *overrides)
    plain, plain_gradients, _, _ = run(folder, [kept, rejected], *overrides[:2], mode="sync")
    assert plain_gradients[tuple(response)][1] == 0 and (plain_gradients[tuple(response)][2:] != 0).all()
    factor = torch.ones(len(response))
    factor[4] = GAIN
    torch.testing.assert_close(ours[tuple(response)], plain[tuple(response)] * factor)
    torch.testing.assert_close(gradients[tuple(other)], plain_gradients[tuple(other)] * expected(tuple(other)))


def test_advantages_that_differ_by_token(folder: str) -> None:
    """Estimators that whiten or discount give each token its own."""
    overrides = ("algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.9")
    ours, _, _, _ = run(folder, ROLLOUTS, *overrides)
    plain, _, _, _ = run(folder, ROLLOUTS, *overrides, mode="sync")
    assert max(len(advantages.unique()) for advantages in plain.values()) > 2
    for response, advantages in plain.items():
        torch.testing.assert_close(ours[response], advantages * expected(response))


def test_padded_layout_of_verl_gives_the_same_rows() -> None:
    """verl's own way from left-padded prompts and right-padded responses to jagged rows."""
    width, limit = max(len(one.prompt) for one in ROLLOUTS), max(len(one.response) for one in ROLLOUTS)
    token_ids = torch.zeros(len(ROLLOUTS), width + limit, dtype=torch.long)
    attention = torch.zeros_like(token_ids)
    for row, one in enumerate(ROLLOUTS):
        sequence = torch.tensor(one.prompt + one.response)
        token_ids[row, width - len(one.prompt) :][: len(sequence)] = sequence
        attention[row, width - len(one.prompt) :][: len(sequence)] = 1
    padded = {"input_ids": token_ids, "attention_mask": attention, "response_mask": attention[:, width:]}
    padded["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    data = left_right_2_no_padding(TensorDict(padded, batch_size=len(ROLLOUTS)))
    for sequence, one in zip(rows_of(data["input_ids"]), ROLLOUTS, strict=True):
        assert sequence.tolist() == one.prompt + one.response
        whole = over_sequence(torch.ones(len(one.response)), sequence)
        assert whole.tolist() == [0] * len(one.prompt) + [1] * len(one.response)


# --- verl's losses ----------------------------------------------------------------------------------------------------


def test_every_loss_of_verl_is_known(folder: str) -> None:
    """A loss that is new in verl is asked at construction; this says so when there is one."""
    assert set(TAKES_TOKENS) == {
        "bypass_mode", "cispo", "clip_cov", "dppo_kl", "dppo_tv", "dro", "gpg", "gspo", "kl_cov", "sapo", "vanilla"
    }  # fmt: skip
    config = config_of(folder, *loss_overrides("dro")).actor_rollout_ref.actor
    for mode in POLICY_LOSS_REGISTRY:
        config.policy_loss.loss_mode = mode
        actor = omega_conf_to_dataclass(config)
        assert follows_tokens(get_policy_loss_fn(mode), actor) == (mode != "geo_mean"), mode


@pytest.mark.parametrize("mode", TAKES_TOKENS)
def test_losses_weigh_tokens_and_gain_1_changes_nothing(mode: str, folder: str) -> None:
    overrides = loss_overrides(mode)
    plain, plain_gradients, _, theirs = run(folder, ROLLOUTS, *overrides, mode="sync")
    same, _, _, mine = run(folder, ROLLOUTS, *overrides, "+flowgraph.flow.warmup_steps=10")
    for response, advantages in plain.items():  # the first step of the warm-up: all weights are 1
        assert torch.equal(same[response], advantages)
    assert theirs.loss is not None and mine.loss is not None and mine.loss.isfinite()
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    for ours, other in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-6, atol=1e-6)
    _, gradients, _, _ = run(folder, ROLLOUTS, *overrides)
    for response, gradient in plain_gradients.items():
        if mode not in ("clip_cov", "kl_cov"):  # these choose tokens by their advantages
            torch.testing.assert_close(gradients[response], gradient * expected(response))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (loss_overrides("geo_mean"), "loss_mode=geo_mean"),
        (("distillation.enabled=True", "distillation.distillation_loss.use_task_rewards=False"), "use_task_rewards"),
        (("+flowgraph.flow.gian=2",), "gian is no option"),
        (("+flowgraph.wrokers=2",), "wrokers is no key"),
    ],
)
def test_refused_before_any_worker_starts(overrides: tuple[str, ...], why: str, folder: str) -> None:
    config = config_of(folder, *FLOW, *overrides)
    with pytest.raises(ValueError, match=why):
        get_trainer_cls("flowgraph_sync")(config)


def test_a_class_may_vouch_for_its_loss(folder: str) -> None:
    class Vouching(get_trainer_cls("flowgraph_sync")):  # type: ignore[misc]
        takes_token_advantages = True

    assert Vouching(config_of(folder, *FLOW, *loss_overrides("geo_mean")))


# --- odd samples, the log ---------------------------------------------------------------------------------------------


def test_odd_samples_go_through_and_are_logged(folder: str) -> None:
    """No answer, cut off, nothing but the end token, all of it by a tool, and one of ten times the length."""
    no_answer = Rollout(question(2), ids("aa@bb"), 1.0)
    cut_off = Rollout(question(2), ids("a" * RESPONSE_LIMIT, end=False), 0.0)
    only_end = Rollout(question(3), [TOKENIZER.eos_token_id], 0.0)
    long = Rollout(question(3), marked(300, 300), 1.0)
    by_tool = Rollout(question(1), ids("b@b=7"), 1.0, mask=[0] * 6)
    usual = Rollout(question(1), marked(3, 3), 0.0)
    rollouts = [no_answer, cut_off, only_end, long, by_tool, usual]
    ours, _, metrics, actor = run(folder, rollouts)
    plain, _, _, _ = run(folder, rollouts, mode="sync")
    for one in (no_answer, cut_off, only_end, by_tool):
        assert torch.equal(ours[tuple(one.response)], plain[tuple(one.response)])
    for one in (long, usual):
        response = tuple(one.response)
        torch.testing.assert_close(ours[response], plain[response] * expected(response))
    assert actor.loss is not None and actor.loss.isfinite()
    scored = metrics["flow/scored"] * len(rollouts)
    assert scored == 5  # verl gives a response without a token of its own no advantage
    assert metrics["flow/no_answer"] == 3 / 5
    assert metrics["flow/cut_off"] == 2 / 5  # the long one is over the limit, too, but has an answer
    assert metrics["flow/failed"] == 0


def test_verl_writes_no_response_without_tokens() -> None:
    """verl's agent loop can't write one: it sets the reward at the last token."""
    with pytest.raises(IndexError):
        put([Rollout(question(1), [], 1.0)])


def test_metrics_reach_the_log_as_they_are(folder: str) -> None:
    """verl sums, averages or takes the maximum over the parts of a step, by what it finds in a name."""
    trainer = trainer_of(config_of(folder, *FLOW))
    batch, metrics = step(trainer, ROLLOUTS)
    flow = {name: value for name, value in metrics.items() if name.startswith("flow/")}
    assert {"flow/scored", "flow/seconds", "flow/credited_share", "flow/scorer_age"} <= flow.keys()
    aggregator = MetricsAggregator()
    aggregator.add_step_metrics(flow, sample_count=4)
    aggregator.add_step_metrics(flow, sample_count=4)
    assert aggregator.get_aggregated_metrics() == pytest.approx(flow)
    trainer._get_n_gpus_for_throughput = lambda: 1
    trainer._compute_metrics(batch, metrics, {"step": 1.0, "gen": 1.0}, global_steps=1, epoch=0)
    clear(batch)
    assert metrics["critic/advantages/max"] == pytest.approx(GAIN * math.sqrt(0.5), rel=1e-5)
    assert metrics["critic/returns/max"] == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert flow.items() <= metrics.items()


def test_images_are_refused(folder: str) -> None:
    trainer = trainer_of(config_of(folder, *FLOW))
    trainer.processor = object()
    batch, _ = step(trainer, ROLLOUTS[:2])  # text only: nothing to refuse
    clear(batch)
    put(ROLLOUTS[:2])
    batch, _ = trainer.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    seen = [{"pixel_values": torch.ones(1)}, {}]
    transfer_queue.kv_batch_put(
        keys=batch.keys, partition_id="train", fields=TensorDict({"multi_modal_inputs": seen}, batch_size=2)
    )
    with pytest.raises(ValueError, match=r"multi_modal_inputs \(pixel_values\)"):
        trainer._compute_advantage(batch, {})
    clear(batch)


# --- where the scores come from ---------------------------------------------------------------------------------------


def test_scores_of_a_ray_actor(folder: str) -> None:
    ours, _, metrics, _ = run(folder, ROLLOUTS, "+flowgraph.workers=1", "+flowgraph.timeout=120")
    plain, _, _, _ = run(folder, ROLLOUTS, mode="sync")
    for response, advantages in ours.items():
        torch.testing.assert_close(advantages, plain[response] * expected(response))
    assert metrics["flow/failed"] == 0


def test_configuration_by_file(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    with pytest.raises(ValueError, match="FLOWGRAPH_CONFIG"):
        get_trainer_cls("flowgraph_sync")(config)
    file = tmp_path / "credits.yaml"
    file.write_text(f"model: {folder}\nflow:\n  gain: 2.5\n", encoding="utf-8")
    named = get_trainer_cls("flowgraph_sync")(config_of(folder, f"+flowgraph={file}"))
    monkeypatch.setenv("FLOWGRAPH_CONFIG", str(file))
    by_environment = get_trainer_cls("flowgraph_sync")(config_of(folder))
    assert named.crediting.config.gain == by_environment.crediting.config.gain == 2.5


def test_checkpoints_of_verl_are_taken_over(folder: str, tmp_path: Path) -> None:
    """With `hf_model` in checkpoint.save_contents verl leaves global_step_N/actor/huggingface."""
    from tests.written import written_by_hand

    config = config_of(
        folder, *FLOW, f"trainer.default_local_dir={tmp_path}", "+flowgraph.refresh_from=${trainer.default_local_dir}"
    )
    trainer = trainer_of(config)
    newer = written_by_hand(max_position_embeddings=1024)
    with torch.no_grad():
        newer.model.norm.weight.fill_(0.5)
    checkpoint = tmp_path / "global_step_3" / "actor" / "huggingface"
    newer.save_pretrained(checkpoint)
    settled = time.time() - 3600
    for file in checkpoint.iterdir():
        os.utime(file, (settled, settled))
    trainer.global_steps = 4
    batch, metrics = step(trainer, ROLLOUTS)
    clear(batch)
    assert (trainer.crediting.scorer.model.model.norm.weight == 0.5).all()
    assert metrics["flow/scorer_age"] == 0 and metrics["flow/failed"] == 0
