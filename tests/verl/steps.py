"""Steps of the real verl on the CPU: what is verl's own, and what stands in for its workers.

AgentLoopOutput -> AgentLoopWorkerTQ._agent_loop_postprocess -> TransferQueue     verl's, from the rollouts given
PPOTrainer(config), _step_once: replay buffer, balancing, padding rows, old log-probabilities, advantages,
rollout correction, metrics                                                       verl's
CpuActor: log-probabilities and the update                                        ours: verl's `ppo_loss` on a tiny
                                                                                  model of transformers
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transfer_queue
import verl
from hydra import compose, initialize_config_dir
from torch import Tensor
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1 import AgentLoopWorkerTQ, get_trainer_cls
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from tests.written import TOKENIZER, policy

RESPONSE_LIMIT = 64


def config_of(folder: str, *overrides: str, mode: str = "flowgraph_sync") -> Any:
    """verl's own configuration, for the model in `folder`, with the overrides a user would write."""
    configs = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    given = [
        f"trainer.v1.trainer_mode={mode}",
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1",
        "algorithm.adv_estimator=grpo",
        f"data.max_response_length={RESPONSE_LIMIT}",
        "data.train_batch_size=1",
        "trainer.device=cpu",
    ]
    with initialize_config_dir(configs, version_base=None):
        return compose("ppo_trainer", overrides=[*given, *overrides])


@dataclass(frozen=True)
class Rollout:
    """One answer to a prompt: ids, reward, and 0 where a tool wrote the response."""

    prompt: list[int]
    response: list[int]
    reward: float
    mask: list[int] | None = None
    logps: list[float] | None = None


def put(rollouts: Sequence[Rollout], partition: str = "train") -> None:
    """Leave rollouts in the TransferQueue as verl's agent loop does, two to a prompt, ready to be sampled."""
    worker = object.__new__(AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    worker.processor, worker.reward_loop_worker_handles, worker.distillation_enabled = None, None, False
    for first in range(0, len(rollouts), 2):
        uid = uuid.uuid4().hex
        for session, one in enumerate(rollouts[first : first + 2]):
            output = AgentLoopOutput(
                prompt_ids=one.prompt,
                response_ids=one.response,
                response_mask=one.mask or [1] * len(one.response),
                response_logprobs=one.logps or [-5.0] * len(one.response),
                reward_score=one.reward,
                num_turns=2,
                metrics=AgentLoopMetrics(),
                extra_fields={"min_global_steps": 1, "max_global_steps": 1},
            )
            given = {"uid": uid, "session_id": session, "global_steps": 1}
            asyncio.run(worker._agent_loop_postprocess(output, False, **given))
        tag = {"is_prompt": True, "status": "finished", "global_steps": 1}
        transfer_queue.kv_batch_put(keys=[uid], partition_id=partition, tags=[tag])


@dataclass
class CpuActor:
    """Stands in for verl's workers; `loss`, `by_token` and `model` tell what an update did."""

    config: Any
    model: Any = field(default_factory=lambda: policy(max_position_embeddings=1024))
    devices: int = 1
    loss: Tensor | None = None
    by_token: dict[str, Tensor] = field(default_factory=dict)
    """Key of the rollout -> [R] gradient of the loss by the log-probabilities of its response."""
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dispatch_info = {"actor": list(range(self.devices))}

    def _log_probs(self, data: Any) -> tuple[Tensor, Tensor]:
        """[sum N_i] log-probability of the token after each, as verl's engines give them out; and its offsets."""
        rows = []
        for ids in data["input_ids"].unbind(0):
            logits = self.model(ids[None]).logits[0].float()
            rows.append(torch.log_softmax(logits, -1).gather(-1, ids.roll(-1)[:, None])[:, 0])
        return torch.cat(rows), data["input_ids"].offsets()

    def compute_log_prob(self, batch: Any) -> Any:
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = transfer_queue.kv_batch_get(**where, select_fields=["input_ids"])
        with torch.no_grad():
            log_probs, offsets = self._log_probs(data)
        nested = torch.nested.nested_tensor_from_jagged(log_probs, offsets)
        fields = {"log_probs": nested, "entropy": torch.nested.nested_tensor_from_jagged(log_probs.abs(), offsets)}
        return transfer_queue.kv_batch_put(**where, fields=tensordict_utils.get_tensordict(fields))

    def update_actor(self, batch: Any) -> Any:
        fields = ["input_ids", "prompts", "responses", "response_mask", "old_log_probs", "advantages"]
        data = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=[*fields, "rollout_is_weights"]
        )
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        log_probs, offsets = self._log_probs(data)
        log_probs.retain_grad()
        known = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
        data = tensordict_utils.get_tensordict(dict(data.items()), known)
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        self.loss, self.metrics = ppo_loss(actor, output, data)
        self.model.zero_grad()
        self.loss.backward()
        assert log_probs.grad is not None
        for key, end, response in zip(batch.keys, offsets[1:], data["responses"].unbind(0), strict=True):
            self.by_token[key] = log_probs.grad[end - 1 - len(response) : end - 1]
        return {"metrics": {"mfu": [0.0], "pg_loss": [float(self.loss.detach())]}}


def trainer_of(config: Any, actor: CpuActor | None = None) -> Any:
    """verl's trainer of this mode, made by its own constructor; without `init`, which needs GPUs."""
    trainer: Any = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    trainer.tokenizer, trainer.processor = TOKENIZER, None
    trainer.global_steps, trainer.curr_step_profile = 1, False
    trainer.use_critic = trainer.use_reference_policy = False
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None)
    trainer.actor_rollout_wg = actor or CpuActor(config)
    return trainer


def step(trainer: Any, rollouts: Sequence[Rollout]) -> tuple[Any, dict[str, Any]]:
    """(batch, metrics) of one step of verl over these rollouts; what it left is then in the TransferQueue."""
    put(rollouts)
    metrics: dict[str, Any] = {}
    batch = trainer._step_once(metrics, {}, sample_batch_size=len(rollouts) // 2)
    return batch, metrics


def fields_of(batch: Any, *names: str) -> dict[str, list[Tensor]]:
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))
    return {name: list(data[name].unbind(0)) for name in names}


def clear(batch: Any) -> None:
    transfer_queue.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
