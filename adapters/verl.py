"""Token credits in verl: `trainer.v1.trainer_mode=flowgraph_sync`; nothing else of verl is replaced.

    verl's V1 trainer generates, rewards, makes advantages         (untouched; they lie in the TransferQueue)
      -> FlowMixin takes ids, masks and advantages from there      (jagged: no pads)
      -> flowgraph.adapters.service.crediting(...).factors(...)    (scored by a model with weights of its own)
      -> advantages [R_i] times factors [R_i] go back to the queue
      -> verl's own losses, which take an advantage per token

`flowgraph.adapters.verl_plugin` registers the trainers; this module imports without verl. docs/trainers/verl.md has
the configuration, what was run, and what is refused.

Shapes: B rows of a batch, N_i tokens of row i (prompt and response, no pads), R_i of them of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from verl.trainer.ppo.v1 import PPOTrainer as _Base
else:
    _Base = object

_MEDIA = ("pixel", "image", "video", "audio", "input_features")


class FlowMixin(_Base):
    """Gives a V1 trainer of verl credits: `class Mine(FlowMixin, YourTrainer)`, registered by `register_trainer`.

    Attributes:
        plain_mode: the trainer mode that verl shall see. By its name verl chooses the replay buffer, batch sizes and
            what a checkpoint holds, and an unknown name means "asynchronous" there.
        takes_token_advantages: True: your policy loss takes an advantage per token, don't ask it (`follows_tokens`).
        crediting: the `flowgraph.adapters.service.Service`.
    """

    plain_mode = "sync"
    takes_token_advantages = False

    def __init__(self, config: Any) -> None:
        from omegaconf import open_dict

        from flowgraph.adapters.service import crediting

        if not self.takes_token_advantages:
            refuse_silent_no_ops(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.plain_mode
        super().__init__(config)
        # Before verl spends minutes on its workers, so that a wrong configuration ends the run now.
        self.crediting = crediting(service_settings(config))

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        import transfer_queue
        from tensordict import TensorDict

        def fetch(*fields: str) -> Any:
            return transfer_queue.kv_batch_get(
                keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields)
            )

        # Taken first: where verl rejects rollouts it writes a smaller response_mask in the same place.
        written = fetch("input_ids", "response_mask")
        if self.processor is not None:
            refuse_images(fetch("multi_modal_inputs")["multi_modal_inputs"])
        batch = super()._compute_advantage(batch, metrics)
        data = fetch("advantages", "response_mask", "rm_scores")

        token_ids, said = rows_of(written["input_ids"]), rows_of(written["response_mask"])
        advantages, trained, scores = (rows_of(data[name]) for name in ("advantages", "response_mask", "rm_scores"))
        limit = self.config.actor_rollout_ref.rollout.response_length
        real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        factors = self.crediting.factors(
            [token_ids[row] for row in real],
            [over_sequence(said[row], token_ids[row]).bool() for row in real],
            [over_sequence(advantages[row], token_ids[row]) for row in real],
            step=self.global_steps - 1,  # verl counts from 1
            trained_mask=[over_sequence(trained[row], token_ids[row]).bool() for row in real],
            truncated=[len(said[row]) >= limit for row in real],
            rewards=[float(scores[row].sum()) for row in real],
        )
        for row, factor in zip(real, factors, strict=True):
            advantages[row] = advantages[row] * of_response(factor, advantages[row])
        metrics.update(factors.metrics)

        shaped = {"advantages": torch.nested.as_nested_tensor(advantages, layout=torch.jagged)}
        return transfer_queue.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(shaped, batch_size=len(batch))
        )


# --- verl's layout ----------------------------------------------------------------------------------------------------


def rows_of(field: Tensor) -> list[Tensor]:
    """The B rows of a field of the TransferQueue, each [N_i] or [R_i]; jagged, or [B, N] where all are equally long."""
    return list(field.unbind(0))


def over_sequence(response: Tensor, token_ids: Tensor) -> Tensor:
    """[R] of a response -> [N] over prompt and response, 0 at the prompt.

    Raises:
        ValueError: the response is longer than the sequence.
    """
    prompt = len(token_ids) - len(response)
    if prompt < 0:
        raise ValueError(
            f"response_mask has {len(response)} entries, input_ids only {len(token_ids)}: expected input_ids to be "
            "the prompt and the whole response, as verl's agent loop writes them"
        )
    return torch.cat([response.new_zeros(prompt), response])


def of_response(factors: Tensor, advantages: Tensor) -> Tensor:
    """[N] over prompt and response -> [R], those of the response, as the advantages [R] are kept."""
    return factors[len(factors) - len(advantages) :].to(advantages)


# --- verl's configuration ---------------------------------------------------------------------------------------------


def service_settings(config: Any) -> Mapping[str, Any] | str | None:
    """What `flowgraph` says in verl's configuration, for `ServiceConfig.read`.

    Keys below `flowgraph` are those of `ServiceConfig`; `model` and `tokenizer` default to those of the policy. A text
    is the name of a file. None, if there is no such section: then FLOWGRAPH_CONFIG names the file.
    """
    from omegaconf import OmegaConf

    section = config.get("flowgraph")
    if section is None or isinstance(section, str):
        return section
    policy = config.actor_rollout_ref.model
    given: Any = OmegaConf.to_container(section, resolve=True)
    own = {"model": policy.path, "tokenizer": policy.get("tokenizer_path")}
    return given if "model" in given else own | given


def refuse_silent_no_ops(config: Any) -> None:
    """Raise where advantages per token would do nothing, or something else than weigh their tokens.

    Raises:
        ValueError: a policy loss that averages the advantages of a response, or no policy loss at all.
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.import_utils import import_external_libs

    distillation = config.get("distillation")
    if distillation and distillation.enabled and not distillation.distillation_loss.use_task_rewards:
        raise ValueError(
            "distillation.distillation_loss.use_task_rewards is False: the loss has no advantages, so credits would "
            "do nothing; set it to True, or use trainer.v1.trainer_mode=sync"
        )
    import_external_libs(config.actor_rollout_ref.model.get("external_lib"))  # may register the loss
    actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    mode = actor.policy_loss.loss_mode
    if not follows_tokens(get_policy_loss_fn(mode), actor):
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={mode}: the gradient of a token does not follow its own "
            "advantage (geo_mean takes the mean over the response), so credits would not weigh tokens; take another "
            "loss, or use trainer.v1.trainer_mode=sync"
        )


def follows_tokens(loss: Callable[..., tuple[Tensor, Any]], actor: Any) -> bool:
    """Whether weights on the advantages of tokens become weights on their gradients. The loss itself is asked.

    Args:
        loss: a policy loss as verl registers them. actor: verl's ActorConfig.
    """

    from flowgraph.rl import shaping

    def value(logps: Tensor, advantages: Tensor) -> Tensor:
        return loss(
            old_log_prob=logps.detach().clone(),
            log_prob=logps,
            advantages=advantages,
            response_mask=torch.ones(logps.shape, dtype=torch.bool),
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
            rollout_is_weights=None,
        )[0]

    return shaping.follows_tokens(value)


def refuse_images(inputs: Any) -> None:
    """Raise if a row has images, video or sound, which a language model does not see.

    Args:
        inputs: B mappings, `multi_modal_inputs` of the TransferQueue. What a processor makes of text alone may pass.
    """
    for row, found in enumerate(inputs):
        media = sorted(key for key in found if key.startswith(_MEDIA))
        if media:
            raise ValueError(
                f"row {row} has multi_modal_inputs ({', '.join(media)}): credits read text only; "
                "use trainer.v1.trainer_mode=sync"
            )
