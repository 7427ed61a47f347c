"""Token credits in slime: `--rollout-data-postprocess-path flowgraph.adapters.slime.put_credits_into`.

    compute_advantages_and_returns(args, rollout_data)   slime's own, untouched, whitening included
      -> put_credits_into(args, rollout_id, rollout_data): on the first rank that holds a share of rollouts
      -> rollout_data["advantages"][i] * factors         (its own slice, if the context is parallel)
      -> rollout_data["flow/..."]                        (slime logs them as "rollout/flow/...")

slime calls this hook right after the advantages are final and right before the loss. `--custom-advantage-function-path`
would be the other place: it replaces slime's estimator, gets no step, and whitening and distillation come after it.

Read in THUDM/slime 0.3.1, commit a6272da (2026-08-06), and in 624b824 (2026-08-21), which are alike here:
    slime/backends/megatron_utils/actor.py      MegatronTrainRayActor.train_actor calls the hook
    slime/backends/megatron_utils/loss.py       compute_advantages_and_returns, policy_loss_function
    slime/backends/megatron_utils/cp_utils.py   slice_log_prob_with_cp, all_gather_with_cp: zigzag slices of a response
    slime/backends/megatron_utils/data.py       log_rollout_data: numbers in rollout_data are logged
    slime/ray/rollout.py                        what is in rollout_data

Every rank of a tensor- and context-parallel group holds the same rollouts, and must multiply by the same bits: one
scores, the others hear of it. Pipeline stages but the last have no advantages.

Shapes: S rollouts of a data-parallel rank, N_i tokens (prompt and response, no pads), R_i of them of the response;
with a parallel context, `advantages[i]` is this rank's slice of the R_i. docs/trainers/slime.md has the whole story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowgraph.adapters.service import crediting
from flowgraph.rl.crediting import Factors


def put_credits_into(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """slime's hook: multiply credits into `rollout_data["advantages"]`. FLOWGRAPH_CONFIG names their configuration.

    The advantages are replaced and not changed in place: slime's returns may be the very same tensors.

    Args:
        args: slime's arguments. rollout_id: the step, counted from 0. rollout_data: this rank's rollouts.

    Raises:
        ValueError: a setting under which credits would do nothing; no configuration, or one that does not fit.
    """
    refuse_silent_no_ops(args, rollout_data)
    if "advantages" not in rollout_data:  # not the last stage of a pipeline
        return
    cp_utils, mpu = _slime()
    lengths = list(zip(rollout_data["total_lengths"], rollout_data["response_lengths"], strict=True))
    with torch.no_grad():  # slime's gather makes pads that would ask for a gradient
        whole = [
            cp_utils.all_gather_with_cp(advantage, *length)
            for advantage, length in zip(rollout_data["advantages"], lengths, strict=True)
        ]
    group = mpu.get_tensor_and_context_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    told: list[Any] = [None, None, None]
    raised: Exception | None = None
    if torch.distributed.get_rank() == ranks[0]:
        try:
            found = factors(rollout_data, whole, rollout_id)
            told[0] = [factor[len(factor) - size :] for factor, (_, size) in zip(found, lengths, strict=True)]
            told[1] = found.metrics
        except Exception as error:  # raised below: the other ranks would wait for this one until a timeout
            raised, told[2] = error, f"{type(error).__name__}: {error}"
    if len(ranks) > 1:
        torch.distributed.broadcast_object_list(told, src=ranks[0], group=group)
    responses, metrics, why = told
    if raised is not None:
        raise raised
    if why is not None:
        raise RuntimeError(f"rank {ranks[0]}, which scores for this one: {why}")
    rollout_data["advantages"] = [
        advantage * cp_utils.slice_log_prob_with_cp(factor, *length).to(advantage)
        for advantage, factor, length in zip(rollout_data["advantages"], responses, lengths, strict=True)
    ]
    metrics = over_ranks(metrics, mpu.get_data_parallel_group_gloo(with_context_parallel=True))
    rollout_data.update({name: torch.tensor(value) for name, value in metrics.items()})


def factors(rollout_data: dict[str, Any], advantages: Sequence[Tensor], step: int) -> Factors:
    """Factors [N_i] over prompt and response of S rollouts.

    Args:
        advantages: [R_i] each, over the whole response.
    """
    tokens = [ids.cpu() for ids in rollout_data["tokens"]]
    sizes = rollout_data["response_lengths"]

    def over_sequence(values: Sequence[Tensor]) -> list[Tensor]:
        """[R_i] -> [N_i], 0 at the prompt."""
        whole = zip(values, tokens, sizes, strict=True)
        return [torch.cat([one.new_zeros(len(ids) - size), one]).cpu() for one, ids, size in whole]

    # A response without tokens has no advantage; its reward says whether it is one that counts.
    signed = zip(over_sequence(advantages), sizes, rollout_data["rewards"], strict=True)
    return crediting().factors(
        tokens,
        over_sequence([torch.ones(size, dtype=torch.bool) for size in sizes]),
        [advantage if size else float(reward) for advantage, size, reward in signed],
        step=step,
        trained_mask=[mask.bool() for mask in over_sequence(rollout_data["loss_masks"])],
        truncated=[bool(cut) for cut in rollout_data["truncated"]] if "truncated" in rollout_data else None,
        rewards=rollout_data["rewards"],
    )


def refuse_silent_no_ops(args: Any, rollout_data: dict[str, Any]) -> None:
    """Raise a ValueError where advantages per token would do nothing, or something else than weigh their tokens."""
    if args.advantage_estimator == "gspo":
        raise ValueError(
            "--advantage-estimator gspo has one ratio per response, so the same gradient for each of its tokens: "
            "credits would only scale the response by their mean. Take grpo, cispo, ppo or reinforce_plus_plus"
        )
    if not args.compute_advantages_and_returns:
        raise ValueError("--disable-compute-advantages-and-returns leaves no advantages that credits could weigh")
    if args.loss_type == "custom_loss":
        from slime.utils.misc import load_function

        loss = load_function(args.custom_loss_function_path)
        if not getattr(loss, "takes_token_advantages", False):
            raise ValueError(
                f"--custom-loss-function-path {args.custom_loss_function_path}: if the gradient of a token is "
                'batch["advantages"] of that token times that of its log-probability, say so with the attribute '
                f"{loss.__name__}.takes_token_advantages = True"
            )
    elif args.loss_type != "policy_loss":
        raise ValueError(f"--loss-type {args.loss_type} reads no advantages: credits would do nothing")
    if any(rollout_data.get("multimodal_train_inputs") or ()):
        raise ValueError("rollout_data has multimodal_train_inputs: credits read text only")


def over_ranks(metrics: dict[str, float], group: Any) -> dict[str, float]:
    """The same keys and numbers on every rank, as slime's log needs them: means over the ranks that have the number.

    Args:
        group: a process group that can gather objects. "flow/seconds" is that of the slowest rank.
    """
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, metrics, group=group)
    known = {name: [one[name] for one in everyone if name in one] for one in everyone for name in one}
    means = {name: sum(values) / len(values) for name, values in sorted(known.items())}
    return means | {"flow/seconds": max(known["flow/seconds"])}


def _slime() -> tuple[Any, Any]:
    try:
        from megatron.core import mpu
        from slime.backends.megatron_utils import cp_utils
    except ImportError as error:
        raise ImportError(
            f"slime can't be imported ({error}): install it and Megatron as its documentation says, from "
            "github.com/THUDM/slime (the package `slime` of PyPI is another one), and flowgraph-llm beside it"
        ) from error
    return cp_utils, mpu
