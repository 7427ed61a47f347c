"""Token credits in NeMo-RL: `install(config)` in examples/run_grpo.py, after `config = MasterConfig(**config)`.

    estimator.compute_advantage(mask=..., repeated_batch=..., ...)      NeMo-RL's own, untouched: advantages [B, S]
      -> rollouts out of repeated_batch["message_log"], which has no pads -> Crediting.factors
      -> advantages[b, t] * factor of token t
      -> "flow/..." among the metrics of the step      (NeMo-RL logs them as "train/flow/...")

`grpo_train` and `async_grpo_train` make their estimator with `_create_advantage_estimator`, which is replaced.
Normalising happens in the estimator, before the hook; clipping after it, and is therefore refused.

Read in NVIDIA-NeMo/RL 0.6.0, commit 7ea279a (2026-08-22):
    nemo_rl/algorithms/grpo.py                  _create_advantage_estimator, grpo_train, async_grpo_train,
                                                _log_mixed_rewards_and_advantages_information, _clip_grpo_advantages
    nemo_rl/algorithms/advantage_estimator.py   the estimators
    nemo_rl/data/llm_message_utils.py           batched_message_log_to_flat_message: messages in a row, then pads
    nemo_rl/algorithms/loss/loss_functions.py   ClippedPGLossFn: column t of the advantages is token t's own

Shapes: B rollouts, S tokens with pads; `mask` and the advantages are [B, S]. A message log is a list of messages, each
with its own `token_ids` [n] and `token_loss_mask` [n]. docs/trainers/nemo-rl.md has the whole story.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgraph.adapters.service import ServiceConfig, crediting
from flowgraph.rl.crediting import Crediting


def install(master_config: Any, source: ServiceConfig | Mapping[str, Any] | str | Path | None = None) -> None:
    """Give GRPO credits; to be called before the trainer, in the process that runs it.

    Args:
        master_config: the `MasterConfig` of nemo_rl.algorithms.grpo that the run uses.
        source: the configuration of credits, see `ServiceConfig.read`; None: the file named by FLOWGRAPH_CONFIG.

    Raises:
        ImportError: NeMo-RL is not installed.
        TypeError: the configuration of another algorithm.
        ValueError: a setting under which credits would do nothing; no configuration, or one that does not fit.
    """
    try:
        from nemo_rl.algorithms import grpo
    except ImportError as error:
        raise ImportError(
            f"NeMo-RL can't be imported ({error}): install it from github.com/NVIDIA-NeMo/RL (the package nemo-rl of "
            "the index is empty), and flowgraph into its environment (uv pip install flowgraph-llm)"
        ) from error
    refuse_silent_no_ops(master_config)
    config = source if isinstance(source, ServiceConfig) else ServiceConfig.read(source)
    create, log = grpo._create_advantage_estimator, grpo._log_mixed_rewards_and_advantages_information
    made: list[WithCredits] = []
    grpo._create_advantage_estimator = _creating(getattr(create, "without_credits", create), config, made)
    grpo._log_mixed_rewards_and_advantages_information = _logging(getattr(log, "without_credits", log), made)


def refuse_silent_no_ops(master_config: Any) -> None:
    """Raise where credits would not arrive, or would not weigh tokens.

    Raises:
        TypeError: no GRPO. ValueError: a sequence-level ratio, clipped advantages, the data plane.
    """
    if not hasattr(master_config, "grpo"):
        raise TypeError(
            f"{type(master_config).__module__}.{type(master_config).__name__} is no configuration of GRPO: credits "
            "work in nemo_rl.algorithms.grpo alone (PPO's estimator gets no token ids)"
        )
    if master_config.loss_fn.sequence_level_importance_ratios:
        raise ValueError(
            "loss_fn.sequence_level_importance_ratios gives the tokens of a response one common ratio, and so the same "
            "gradient: credits would only scale the whole by their mean. Set it to false"
        )
    low, high = master_config.grpo.advantage_clip_low, master_config.grpo.advantage_clip_high
    if low is not None or high is not None:
        raise ValueError(
            f"grpo.advantage_clip_low={low} and advantage_clip_high={high} apply after the credits and would take "
            "them back where they count. Set both to null"
        )
    if (master_config.data_plane or {}).get("enabled", False):
        raise ValueError(
            "data_plane.enabled keeps the token ids away from where advantages are made. Set it to false "
            "(grpo_train or async_grpo_train)"
        )


class WithCredits:
    """An advantage estimator of NeMo-RL, and then the credits.

    Attributes:
        last_metrics: of the last call; `async_grpo_train` logs them.
        step: the next step, counted from 0.
    """

    def __init__(self, estimator: Any, crediting: Crediting, step: int = 0) -> None:
        self.estimator, self.crediting, self.step = estimator, crediting, step
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(self, **inputs: Any) -> Tensor:
        """Advantages [B, S]. Takes what the estimator takes, by name; `mask` and `repeated_batch` must be there."""
        advantages = self.estimator.compute_advantage(**inputs)
        mask, logs = inputs["mask"], inputs["repeated_batch"]["message_log"]
        check_layout(logs, mask, advantages)
        token_ids = [torch.cat([message["token_ids"] for message in log]) for log in logs]
        found = self.crediting.factors(
            token_ids,
            [torch.cat([message["token_loss_mask"] for message in log]).bool() for log in logs],
            [row[: len(one)] for row, one in zip(advantages, token_ids, strict=True)],
            step=self.step,
            trained_mask=[row[: len(one)].bool() for row, one in zip(mask, token_ids, strict=True)],
            truncated=inputs["repeated_batch"].get("truncated"),
            rewards=inputs["rewards"],
        )
        factors = torch.ones_like(advantages)
        for row, factor in zip(factors, found, strict=True):
            row[: len(factor)] = factor
        self.last_metrics = {**(getattr(self.estimator, "last_metrics", None) or {}), **found.metrics}
        self.step += 1
        return advantages * factors


def check_layout(logs: Sequence[Sequence[Mapping[str, Any]]], mask: Tensor, advantages: Tensor) -> None:
    """Raise unless message logs are what `mask` [B, S] was made of.

    Raises:
        ValueError: names the row.
    """
    from nemo_rl.data.multimodal_utils import PackedTensor

    if advantages.shape != mask.shape or len(logs) != len(mask):
        raise ValueError(
            f"advantages {list(advantages.shape)}, mask {list(mask.shape)} and {len(logs)} message logs don't fit: "
            "expected [B, S] twice and B"
        )
    for row, log in enumerate(logs):
        if any(isinstance(value, PackedTensor) for message in log for value in message.values()):
            raise ValueError(f"row {row} has images, which credits do not trace: text only")
        said = torch.cat([message["token_loss_mask"] for message in log]).bool()
        trained = mask[row].bool()
        if len(said) > len(trained) or trained[len(said) :].any() or (trained[: len(said)] & ~said).any():
            raise ValueError(
                f"row {row}: mask and message_log don't fit, tokens are trained that the log does not have"
            )


# --- where NeMo-RL gets it --------------------------------------------------------------------------------------------


def _creating(create: Callable[[Any], Any], config: ServiceConfig, made: list[WithCredits]) -> Callable[[Any], Any]:
    """`_create_advantage_estimator`, whose estimator gives credits; it is left in `made`.

    The scorer is made here, and not in `install`: now NeMo-RL has started Ray.
    """

    @wraps(create)
    def with_credits(master_config: Any) -> WithCredits:
        refuse_silent_no_ops(master_config)
        made[:] = [WithCredits(create(master_config), crediting(config), steps_done(master_config))]
        return made[0]

    with_credits.without_credits = create  # type: ignore[attr-defined]
    return with_credits


def _logging(log: Callable[..., None], made: list[WithCredits]) -> Callable[..., None]:
    """What `grpo_train` calls right after the advantages, with the metrics of the step."""

    @wraps(log)
    def with_credits(*args: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        log(*args, metrics=metrics, **kwargs)
        for estimator in made:
            metrics.update(estimator.last_metrics)

    with_credits.without_credits = log  # type: ignore[attr-defined]
    return with_credits


def steps_done(master_config: Any) -> int:
    """Steps of the checkpoint that the run goes on from (its folder is called step_N); 0 without one."""
    from nemo_rl.utils.checkpoint import CheckpointManager

    latest = CheckpointManager(master_config.checkpointing).get_latest_checkpoint_path()
    return 0 if latest is None else int(Path(latest).name.removeprefix("step_"))
