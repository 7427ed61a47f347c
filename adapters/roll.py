"""Token credits in ROLL: `install(pipeline)` between `RLVRPipeline(...)` and `pipeline.run()`.

    compute_advantage(data=..., ...)            ROLL's own, untouched: data.batch["advantages"] [B, S-1]
      -> rollouts without pads -> Crediting.factors
      -> data.batch["advantages"][b, t] *= factor of token t + 1
      -> data.meta_info["metrics"] |= "flow/..."        (ROLL logs them, per domain)

The pipelines run in the driver and look `compute_advantage` up in their own module, where it is replaced. Nothing
changes the advantages between this call and the loss: whitening and clipping happen inside it, before the hook.

Read in alibaba/ROLL 0.3.0, commit 8eb27cc (2026-08-19):
    roll/pipeline/rlvr/rlvr_pipeline.py         compute_advantage, once per domain and step
    roll/pipeline/agentic/agentic_pipeline.py   agentic_compute_advantage, once per step
    roll/utils/functionals.py                   postprocess_generate: all rows start at column 0, pads on the right
    roll/pipeline/rlvr/actor_worker.py, roll/pipeline/agentic/agentic_actor_worker.py    the losses

Shapes: B rollouts, S tokens with pads. `input_ids`, `attention_mask` and `response_mask` are [B, S]; `advantages` are
[B, S-1], where column t belongs to token t + 1, and 0 wherever nothing is trained (ROLL multiplies its masks in).
docs/trainers/roll.md has the whole story.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgraph.adapters.service import ServiceConfig, crediting
from flowgraph.rl.crediting import Crediting

HOOKS = ("compute_advantage", "agentic_compute_advantage")
"""What a pipeline's module calls its advantage step."""

PER_SEQUENCE = {"importance_sampling": "seq", "ratio_type": "segment"}
"""Settings whose ratio is one number for many tokens."""


def install(pipeline: Any, source: ServiceConfig | Mapping[str, Any] | str | Path | None = None) -> None:
    """Give a pipeline credits; to be called before `pipeline.run()`, in the process that runs it.

    Args:
        pipeline: an `RLVRPipeline`, an `AgenticPipeline` or a subclass.
        source: the configuration of credits, see `ServiceConfig.read`; None: the file named by FLOWGRAPH_CONFIG.

    Raises:
        TypeError: a pipeline without an advantage step.
        ValueError: a setting under which credits would do nothing; no configuration, or one that does not fit.
    """
    module = sys.modules[type(pipeline).run.__module__]
    name = next((hook for hook in HOOKS if hasattr(module, hook)), None)
    if name is None:
        raise TypeError(
            f"{type(pipeline).__name__} has no advantage step: {module.__name__} calls neither "
            f"{' nor '.join(HOOKS)}. Credits work in RLVRPipeline and AgenticPipeline"
        )
    refuse_silent_no_ops(pipeline.pipeline_config)
    hook = getattr(module, name)
    setattr(module, name, with_credits(getattr(hook, "without_credits", hook), crediting(source)))


def refuse_silent_no_ops(pipeline_config: Any) -> None:
    """Raise a ValueError for a loss in which all tokens of a response have the same gradient."""
    for key, value in PER_SEQUENCE.items():
        if getattr(pipeline_config, key, None) == value:
            raise ValueError(
                f'{key}: "{value}" gives the tokens of a response or turn one common ratio, and so the same '
                f'gradient: credits would only scale the whole by their mean. Set {key}: "token"'
            )


def with_credits(compute_advantage: Callable[..., Any], crediting: Crediting) -> Callable[..., Any]:
    """ROLL's advantage step, and then the credits."""

    @wraps(compute_advantage)
    def then_credits(*args: Any, **kwargs: Any) -> Any:
        data = compute_advantage(*args, **kwargs)
        put_credits_into(data, crediting)
        return data

    then_credits.without_credits = compute_advantage  # type: ignore[attr-defined]
    return then_credits


def put_credits_into(data: Any, crediting: Crediting) -> None:
    """Multiply credits into `data.batch["advantages"]` [B, S-1], and put metrics into `data.meta_info`.

    Args:
        data: ROLL's `DataProto` after its advantage step.

    Raises:
        ValueError: images in the batch, which credits do not trace; or advantages of another shape.
    """
    batch = data.batch
    if "multi_modal_inputs" in data.non_tensor_batch:
        raise ValueError("the batch has images (multi_modal_inputs), which credits do not trace: text only")
    real = batch["attention_mask"].bool()
    said = batch["response_mask"].bool() & real
    advantages = batch["advantages"]
    if advantages.shape != (real.shape[0], real.shape[1] - 1):
        raise ValueError(
            f"advantages must be [B, S-1] = {[real.shape[0], real.shape[1] - 1]}, got {list(advantages.shape)}"
        )
    per_token = torch.nn.functional.pad(advantages, (1, 0))  # [B, S], column t is token t's own
    rows = range(len(real))
    found = crediting.factors(
        [batch["input_ids"][row][real[row]] for row in rows],
        [said[row][real[row]] for row in rows],
        [per_token[row][real[row]] for row in rows],
        step=int(data.meta_info.get("global_step", 0)),
        truncated=_cut_off(batch, said),
    )
    factors = torch.ones_like(per_token)
    for row, factor in enumerate(found):
        factors[row, real[row]] = factor.to(factors)
    batch["advantages"] = advantages * factors[:, 1:]
    data.meta_info.setdefault("metrics", {}).update(found.metrics)


def _cut_off(batch: Any, said: Tensor) -> Tensor | None:
    """[B] a response that fills all its room, as ROLL's `max_len_mask` sees it; None where the room is unknown."""
    if "responses" not in batch.keys():  # noqa: SIM118 - not every TensorDict takes `in`
        return None
    return said[:, 1:].sum(1) == batch["responses"].shape[-1]
