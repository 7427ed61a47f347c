"""Token credits in SkyRL: `trainer.override_entrypoint=flowgraph.adapters.skyrl`, or `FlowMixin` on a trainer of yours.

    RayPPOTrainer.compute_advantages_and_returns(data)   SkyRL's own, untouched: data["advantages"] [B, R]
      -> rollouts without pads -> Crediting.factors
      -> data["advantages"] = advantages * factors       (right-aligned, as SkyRL keeps them)
      -> all_metrics["flow/..."]                         (SkyRL's tracker logs them)

Read in NovaSky-AI/SkyRL 0.3.0 (the package `skyrl`), and in commit a956457 (2026-08-21), which are alike here:
    skyrl/train/trainer.py              RayPPOTrainer.compute_advantages_and_returns, _normalize_advantages
    skyrl/train/dataset/preprocess.py   convert_prompts_responses_to_batch_tensors: the layout
    skyrl/train/entrypoints/main_base.py    BasePPOExp.get_trainer, skyrl_entrypoint, main
    skyrl/backends/skyrl_train/utils/ppo_utils.py       estimators and losses
    skyrl/backends/skyrl_train/training_batch.py        pad_training_input_batch: copies of row 0 without a loss

The trainer runs in one process without a model, so a scorer of its own does it. This module imports without SkyRL.

Shapes: B rows, T tokens with pads on the left (`sequences`, `attention_mask`), R tokens of the longest response
(`response_mask`, `loss_mask`, `advantages`), responses at the right end of both. docs/trainers/skyrl.md has the whole
story.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph.adapters.service import ServiceConfig, crediting
from flowgraph.rl import shaping

if TYPE_CHECKING:
    from skyrl.train.trainer import RayPPOTrainer as _Base
else:
    _Base = object

_TRUNCATED = "flow_truncated"


class FlowMixin(_Base):
    """Gives a trainer of SkyRL credits: `class Mine(FlowMixin, RayPPOTrainer)`.

    Args:
        flow: a `ServiceConfig`, the keys of one, or a file; default: the file that FLOWGRAPH_CONFIG names.

    Attributes:
        takes_token_advantages: True: your policy loss takes an advantage per token, don't ask it (`follows_tokens`).
        crediting: the `flowgraph.adapters.service.Service`.
    """

    takes_token_advantages = False

    def __init__(self, *args: Any, flow: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.takes_token_advantages:
            refuse_silent_no_ops(self.cfg)
        # SkyRL starts its workers later: a wrong configuration ends the run before.
        self.crediting = crediting(flow)

    def convert_to_training_input(self, generator_output: Any, uids: list[str]) -> Any:
        """SkyRL's batch, which says besides which responses were cut off."""
        data = super().convert_to_training_input(generator_output, uids)
        reasons = generator_output.get("stop_reasons")
        if reasons is not None:
            data.metadata[_TRUNCATED] = [reason == "length" for reason in reasons]
        return data

    @torch.no_grad()
    def compute_advantages_and_returns(self, data: Any) -> Any:
        """SkyRL's advantages [B, R], times the factors of their tokens; the returns stay."""
        refuse_images(data)
        data = super().compute_advantages_and_returns(data)
        real = slice(len(data["advantages"]) - data.metadata.get("pad_size", 0))
        attended = data["attention_mask"][real].bool()
        advantages, written, trained = (data[name][real] for name in ("advantages", "response_mask", "loss_mask"))

        def over_sequence(values: Tensor) -> list[Tensor]:
            """[B, R] -> B tensors [N_i] over prompt and response, 0 at the prompt."""
            wide = values.new_zeros(attended.shape)
            wide[:, wide.shape[1] - values.shape[1] :] = values
            return [row[mask] for row, mask in zip(wide, attended, strict=True)]

        found = self.crediting.factors(
            [row[mask] for row, mask in zip(data["sequences"][real], attended, strict=True)],
            over_sequence(written.bool()),
            over_sequence(advantages),
            step=self.global_step - 1,  # SkyRL counts from 1
            trained_mask=over_sequence(trained.bool()),
            truncated=data.metadata.pop(_TRUNCATED, None),
            rewards=data["rewards"][real].sum(1).tolist(),
        )
        factors = torch.ones_like(data["advantages"])
        for row, factor in enumerate(found):
            factors[row, written[row].bool()] = factor[len(factor) - int(written[row].sum()) :].to(factors)
        data["advantages"] = data["advantages"] * factors  # not in place: the returns may be the same tensor
        self.all_metrics.update(found.metrics)
        return data


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse_silent_no_ops(cfg: Any) -> None:
    """Raise where advantages per token would do nothing, or something else than weigh their tokens.

    Raises:
        ValueError: a policy loss whose gradient does not follow the advantage of the token.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    algorithm = cfg.trainer.algorithm
    if not follows_tokens(PolicyLossRegistry.get(algorithm.policy_loss_type), algorithm):
        raise ValueError(
            f"trainer.algorithm.policy_loss_type={algorithm.policy_loss_type}: the gradient of a token does not follow "
            "its own advantage, so credits would not weigh tokens. Take another loss, or set takes_token_advantages = "
            "True on the trainer's class if you know better"
        )


def follows_tokens(loss: Callable[..., tuple[Tensor, Any]], algorithm: Any) -> bool:
    """Whether weights on the advantages of tokens become weights on their gradients. The loss itself is asked.

    Args:
        loss: a policy loss as SkyRL registers them. algorithm: `cfg.trainer.algorithm`.
    """

    def value(logps: Tensor, advantages: Tensor) -> Tensor:
        return loss(
            log_probs=logps,
            old_log_probs=logps.detach().clone(),
            advantages=advantages,
            config=algorithm,
            loss_mask=torch.ones(logps.shape),
            rollout_logprobs=logps.detach().clone(),
        )[0]

    return shaping.follows_tokens(value)


def refuse_images(data: Any) -> None:
    """Raise a ValueError if the batch has images, which a language model does not see."""
    if data.get("pixel_values") is not None:
        raise ValueError("the batch has pixel_values: credits read text only; train without FlowMixin")


# --- the entry point --------------------------------------------------------------------------------------------------


def main() -> None:
    """SkyRL's entry point with credits: the arguments of `skyrl.train.entrypoints.main_base`."""
    try:
        import ray
        from skyrl.train.config import SkyRLTrainConfig
        from skyrl.train.utils import validate_cfg
        from skyrl.train.utils.utils import initialize_ray
    except ImportError as error:
        raise ImportError(f'SkyRL can\'t be imported ({error}): pip install "skyrl[fsdp]" flowgraph-llm') from error
    arguments = [one for one in sys.argv[1:] if not one.startswith("trainer.override_entrypoint=")]
    cfg = SkyRLTrainConfig.from_cli_overrides(arguments)
    validate_cfg(cfg)
    flow = ServiceConfig.read()
    initialize_ray(cfg)
    ray.get(ray.remote(num_cpus=1)(train).remote(cfg, flow))


def train(cfg: Any, flow: ServiceConfig) -> None:
    """Run SkyRL's experiment with credits in this process, which must not be the head node's driver."""
    from skyrl.train.entrypoints.main_base import BasePPOExp
    from skyrl.train.trainer import RayPPOTrainer

    class FlowTrainer(FlowMixin, RayPPOTrainer):
        """SkyRL's trainer with credits."""

    class Experiment(BasePPOExp):
        def get_trainer(
            self,
            cfg: Any,
            tracker: Any,
            tokenizer: Any,
            train_dataset: Any,
            eval_dataset: Any,
            inference_engine_client: Any,
            generator: Any,
            colocate_pg: Any,
        ) -> FlowTrainer:
            return FlowTrainer(
                cfg=cfg,
                tracker=tracker,
                tokenizer=tokenizer,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                inference_engine_client=inference_engine_client,
                generator=generator,
                colocate_pg=colocate_pg,
                flow=flow,
            )

    Experiment(cfg).run()
