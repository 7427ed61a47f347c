"""Token credits in OpenRLHF: `python -m flowgraph.adapters.openrlhf` for `python -m openrlhf.cli.train_ppo_ray`.

    RemoteExperienceMaker.compute_advantages_and_returns(experiences)   OpenRLHF's own, untouched, whitening included
      -> rollouts without pads -> Crediting.factors
      -> experience.advantages[b, t] *= factor of token t + 1
      -> the status of BasePPOTrainer.train_step |= "flow/..."          (OpenRLHF logs it as "train/flow/...")

OpenRLHF has no registry for this step. Ray calls `install` when it starts a worker process (its
`worker_process_setup_hook`); in the one process that then imports openrlhf.trainer.ppo_trainer the experience maker is
replaced by a subclass. Nothing changes the advantages between this step and the loss.

Read in OpenRLHF 0.11.2 (the package `openrlhf`), and in OpenRLHF/OpenRLHF, commit 3c3be62 (2026-08-13), alike here:
    openrlhf/trainer/ppo_utils/experience_maker.py      compute_advantages_and_returns
    openrlhf/trainer/ppo_utils/experience.py            Experience: sequences [B, T], action_mask [B, T-1]
    openrlhf/trainer/ppo_utils/samples_generator.py     _process_response_into_experience: no pads on the left
    openrlhf/trainer/ppo_trainer.py, ppo_trainer_async.py   BasePPOTrainer makes the experience maker
    openrlhf/models/loss.py, openrlhf/cli/train_ppo_ray.py

The experience maker runs in one process without a model, so a scorer of its own does it. This module imports without
OpenRLHF and, as it is imported in every worker process, without torch.

Shapes: an experience has B rollouts of T tokens with pads on the right; `action_mask` and `advantages` are [B, T-1],
where column t belongs to token t + 1. docs/trainers/openrlhf.md has the whole story.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as _Base
    from torch import Tensor

    from flowgraph.rl.crediting import Crediting, Factors
else:
    _Base = object

TRAINER = "openrlhf.trainer.ppo_trainer"
HOOK = "flowgraph.adapters.openrlhf.install"
_HOOK_KEY = "worker_process_setup_hook"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In this variable (of that name indeed) Ray tells a job's process what was submitted, as JSON."""


class FlowMixin(_Base):
    """Gives OpenRLHF's experience maker credits: `class Mine(FlowMixin, RemoteExperienceMaker)`.

    Attributes:
        crediting: the `flowgraph.adapters.service.Service` of the file that FLOWGRAPH_CONFIG names.
        flow_step: the step of the trainer, counted from 0. flow_metrics: "flow/..." of the latest step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from flowgraph.adapters.service import crediting

        super().__init__(*args, **kwargs)
        refuse_silent_no_ops(self.args)
        self.crediting: Crediting = crediting()
        self.flow_step = 0
        self.flow_metrics: dict[str, float] = {}

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """OpenRLHF's advantages [B, T-1], times the factors of their tokens; the returns stay."""
        experiences = super().compute_advantages_and_returns(experiences)
        self.flow_metrics = put_credits_into(experiences, self.crediting, self.flow_step).metrics
        return experiences


def put_credits_into(experiences: Sequence[Any], crediting: Crediting, step: int) -> Factors:
    """Multiply credits into `advantages` of OpenRLHF's experiences; all of a step at once.

    Raises:
        ValueError: an experience with images, which credits do not trace.
    """
    import torch

    token_ids: list[Tensor] = []
    written: list[Tensor] = []
    advantages: list[Tensor | float] = []
    for number, one in enumerate(experiences):
        if any(one.mm_train_inputs or ()):
            raise ValueError(f"experience {number} has mm_train_inputs: credits read text only")
        for row, real in enumerate(one.attention_mask.bool()):
            first = real.new_zeros(1)  # which no column stands for
            said = torch.cat([first, one.action_mask[row].bool()])[real]
            signed = torch.cat([first.to(one.advantages), one.advantages[row]])[real]
            token_ids.append(one.sequences[row][real])
            written.append(said)
            # Without a token that was written there is no advantage; the reward says whether it is one that counts.
            advantages.append(signed if said.any() else float(one.rewards[row]))
    found = crediting.factors(
        token_ids,
        written,
        advantages,
        step=step,
        truncated=[cut for one in experiences for cut in _truncated(one)],
        rewards=[float(reward) for one in experiences for reward in one.rewards],
    )
    place = 0
    for one in experiences:
        whole = torch.ones(one.attention_mask.shape)
        for row, real in enumerate(one.attention_mask.bool().cpu()):
            whole[row, real] = found[place + row]
        one.advantages = one.advantages * whole[:, 1:].to(one.advantages)
        place += len(whole)
    return found


def _truncated(experience: Any) -> list[bool]:
    """[B] the response hit max_new_tokens, or the context window of an agent with several turns."""
    cut = experience.truncated.bool().flatten()
    clipped = experience.info.get("response_clip_ratio")
    found: list[bool] = (cut if clipped is None else cut | clipped.bool().flatten()).tolist()
    return found


def refuse_silent_no_ops(args: Any) -> None:
    """Raise a ValueError for a loss in which all tokens of a response have the same gradient."""
    if args.actor.policy_loss_type == "gspo":
        raise ValueError(
            "--actor.policy_loss_type gspo has one ratio per response, so the same gradient for each of its tokens: "
            "credits would only scale the response by their mean. Take --actor.policy_loss_type ppo"
        )


# --- into OpenRLHF's processes ----------------------------------------------------------------------------------------


def install() -> None:
    """Give this process's experience maker credits, as soon as openrlhf.trainer.ppo_trainer is imported.

    Ray's `worker_process_setup_hook`: called in every worker process, it does no more than keep an eye on imports.
    """
    if TRAINER in sys.modules:
        replace_maker(sys.modules[TRAINER])
    elif not any(isinstance(one, _AfterImport) for one in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds TRAINER as all others would, and replaces the maker once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def then_replace(module: ModuleType) -> None:
            load(module)
            replace_maker(module)

        spec.loader.exec_module = then_replace  # type: ignore[method-assign]
        return spec


def replace_maker(module: Any) -> None:
    """Put credits into openrlhf.trainer.ppo_trainer; doing it again changes nothing.

    Raises:
        AttributeError: the module is not what OpenRLHF 0.11 has there.
    """
    if issubclass(module.RemoteExperienceMaker, FlowMixin):
        return
    module.RemoteExperienceMaker = type("FlowExperienceMaker", (FlowMixin, module.RemoteExperienceMaker), {})
    module.BasePPOTrainer.train_step = _with_step(module.BasePPOTrainer.train_step)


def _with_step(train_step: Callable[..., tuple[dict[str, Any], int]]) -> Callable[..., tuple[dict[str, Any], int]]:
    """The experience maker hears which step it is, and its metrics join the status that OpenRLHF logs."""

    @wraps(train_step)
    def then_log(self: Any, rollout_samples: Any, global_step: int) -> tuple[dict[str, Any], int]:
        self.experience_maker.flow_step = global_step
        status, after = train_step(self, rollout_samples, global_step)
        status.update(self.experience_maker.flow_metrics)
        return status, after

    return then_log


def main() -> None:
    """`openrlhf.cli.train_ppo_ray` with credits, and the same arguments. FLOWGRAPH_CONFIG names their configuration."""
    try:
        import ray

        found = importlib.util.find_spec("openrlhf.cli.train_ppo_ray")
    except ImportError as error:
        raise ImportError(f"OpenRLHF can't be imported ({error}): pip install openrlhf flowgraph-llm") from error
    if found is None:
        raise ImportError("openrlhf has no cli.train_ppo_ray: credits were written for openrlhf 0.11")

    from flowgraph.adapters.service import ServiceConfig

    ServiceConfig.read()  # what is wrong with it shall be said before anything starts
    ray.init(runtime_env=ray_settings(os.environ))
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


def ray_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """The `runtime_env` for `ray.init`, without what the job of this process (`ray job submit`) says already.

    Args:
        environ: the variables of this process.

    Raises:
        ValueError: the job has another hook for worker processes, or names another configuration.
    """
    from flowgraph.adapters.service import ENVIRONMENT

    # OpenRLHF starts Ray with these variables, unless it runs already.
    variables = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    variables = {name: environ.get(name, default) for name, default in variables.items()}
    variables[ENVIRONMENT] = str(Path(environ[ENVIRONMENT]).resolve())
    # Ray refuses a variable or a hook that both name, even if they name the same.
    job = json.loads(environ.get(_JOB, "{}")).get("runtime_env") or {}
    said = job.get("env_vars") or {}
    if said.get(ENVIRONMENT, environ[ENVIRONMENT]) != environ[ENVIRONMENT]:
        raise ValueError(
            f"{ENVIRONMENT} is {said[ENVIRONMENT]} in the runtime_env of the job, by which its workers go, and "
            f"{environ[ENVIRONMENT]} in this process; give both the same"
        )
    settings: dict[str, Any] = {"env_vars": {name: value for name, value in variables.items() if name not in said}}
    hook = job.get(_HOOK_KEY)
    if hook not in (None, HOOK):
        raise ValueError(
            f"the runtime_env of the job has {_HOOK_KEY}={hook}, and Ray takes one: call {HOOK}() from it and start "
            "python -m openrlhf.cli.train_ppo_ray, or leave it out"
        )
    return settings if hook else settings | {_HOOK_KEY: HOOK}


if __name__ == "__main__":
    main()
