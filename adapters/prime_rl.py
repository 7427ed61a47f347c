"""Token credits in prime-rl: `python -m flowgraph.adapters.prime_rl rl @ rl.toml` in place of `rl @ rl.toml`.

    Algorithm.finalize_group(episodes)          prime-rl's own, untouched: node.advantages, one per sampled token
      -> every branch that becomes a training sample -> Crediting.factors, in a thread
      -> node.advantages[j] *= factor of the node's j-th sampled token
      -> trace.metrics |= "flow/..."            (the orchestrator logs them)

All of it happens in the orchestrator. The trainer, which may be sharded in any way, gets advantages per token as it
always does; after the hook they are not changed any more, only tokens with an advantage of 0 are left out.

Read in PrimeIntellect-ai/prime-rl 0.8.0, commit 559b447 (2026-08-21):
    src/prime_rl/orchestrator/algo/base.py       Algorithm.finalize_group, awaited by TrainSink.process_group
    src/prime_rl/orchestrator/algo/routing.py    assign_advantages: node.advantages in the order of sampled tokens
    src/prime_rl/orchestrator/trajectories.py    iter_trainable_branches, trace_to_samples: a sample per branch
    src/prime_rl/entrypoints/rl.py, orchestrator.py    the launcher and the process it starts
    src/prime_rl/trainer/rl/loss.py              the losses

Shapes: a trace is a tree of messages (nodes); a branch is a path from its root to a leaf, N tokens without pads. A node
that several branches share is trained in the first of them, and gets its factors there.
docs/trainers/prime-rl.md has the whole story.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from flowgraph.adapters.service import ServiceConfig, crediting
from flowgraph.rl.crediting import Crediting, Factors


def install(source: ServiceConfig | Mapping[str, Any] | str | Path | None = None) -> None:
    """Give every algorithm of this process credits; to be called in the orchestrator before it starts.

    Args:
        source: the configuration of credits, see `ServiceConfig.read`; None: the file named by FLOWGRAPH_CONFIG.

    Raises:
        ImportError: prime-rl is not installed.
        TypeError: an algorithm with a `finalize_group` of its own, which would pass the credits by.
        ValueError: no configuration, or one that does not fit.
    """
    try:
        from prime_rl.orchestrator.algo import ALGORITHM_CLASSES, Algorithm
    except ImportError as error:
        raise ImportError(
            f"prime-rl can't be imported ({error}): install it from github.com/PrimeIntellect-ai/prime-rl, and "
            "flowgraph into its environment (uv pip install flowgraph-llm)"
        ) from error
    for kind in ALGORITHM_CLASSES.values():
        if kind.finalize_group is not Algorithm.finalize_group:
            raise TypeError(f"{kind.__name__} has a finalize_group of its own, which would pass the credits by")
    plain = getattr(Algorithm.finalize_group, "without_credits", Algorithm.finalize_group)
    Algorithm.finalize_group = with_credits(plain, crediting(source))


def with_credits(finalize_group: Any, crediting: Crediting) -> Any:
    """prime-rl's scoring of a group, and then the credits."""

    @wraps(finalize_group)
    async def then_credits(algorithm: Any, episodes: list[Any]) -> None:
        if algorithm.action_loss_type != "rl":
            raise ValueError(
                f"{type(algorithm).__name__} trains with the loss {algorithm.action_loss_type!r}, which reads no "
                'advantages: credits would do nothing. Take an algorithm with the loss "rl" (grpo, max_rl, rae, ...), '
                "or run without credits"
            )
        await finalize_group(algorithm, episodes)
        # The event loop goes on serving rollouts meanwhile; groups come one after the other.
        await asyncio.to_thread(put_credits_into, episodes, crediting)

    then_credits.without_credits = finalize_group  # type: ignore[attr-defined]
    return then_credits


def put_credits_into(episodes: Sequence[Any], crediting: Crediting) -> Factors:
    """Multiply credits into `node.advantages` of a scored group, and put metrics into `trace.metrics`.

    Args:
        episodes: `verifiers.v1.Episode`s of one group, after `finalize_group`.

    Raises:
        ValueError: a trace with images, which credits do not trace; or one without advantages.
    """
    from prime_rl.orchestrator.algo.base import iter_trainable_traces
    from prime_rl.orchestrator.trajectories import iter_trainable_branches

    traces = [trace for _, trace in iter_trainable_traces(episodes)]
    branches = [(trace, branch, mask) for trace in traces for branch, mask in iter_trainable_branches(trace)]
    for trace, branch, _ in branches:
        if branch.multi_modal_data is not None:
            raise ValueError(f"trace {trace.id!r} has images, which credits do not trace: text only")
        if branch.advantages is None:
            raise ValueError(f"trace {trace.id!r} has no advantages: its algorithm assigned none")
    found = crediting.factors(
        [torch.tensor(branch.token_ids, dtype=torch.long) for _, branch, _ in branches],
        [torch.tensor(branch.sampled_mask, dtype=torch.bool) for _, branch, _ in branches],
        [torch.tensor(branch.advantages) for _, branch, _ in branches],
        step=training_step(episodes),
        trained_mask=[torch.tensor(mask, dtype=torch.bool) for _, _, mask in branches],
        truncated=[bool(trace.is_truncated) for trace, _, _ in branches],
        rewards=[float(trace.reward) for trace, _, _ in branches],
    )
    for (_, branch, _), factor in zip(branches, found, strict=True):
        _multiply(branch.nodes, factor.tolist())
    for trace in traces:
        trace.metrics.update(found.metrics)
    return found


def _multiply(nodes: Sequence[Any], factor: Sequence[float]) -> None:
    """Factors [N] of a branch into the advantages of its nodes; they are 1 at what another branch trains."""
    start = 0
    for node in nodes:
        end = start + len(node.token_ids)
        if node.advantages is not None:
            sampled = [value for value, said in zip(factor[start:end], node.mask, strict=True) if said]
            node.advantages = [a * value for a, value in zip(node.advantages, sampled, strict=True)]
        start = end


def training_step(episodes: Sequence[Any]) -> int:
    """The step, from 0, at which a group was dispatched (the last of its episodes): for warm-up and annealing."""
    from prime_rl.orchestrator.utils import train_work

    return max(int(train_work(episode).step) for episode in episodes) - 1


def main(arguments: Sequence[str] | None = None) -> None:
    """`rl @ rl.toml` or `orchestrator @ orchestrator.toml`, with credits; FLOWGRAPH_CONFIG names their file."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in ("rl", "orchestrator"):
        raise SystemExit("usage: python -m flowgraph.adapters.prime_rl {rl,orchestrator} @ config.toml ...")
    sys.argv = given
    if given[0] == "orchestrator":
        install()
        from prime_rl.entrypoints.orchestrator import main as start
    else:
        ServiceConfig.read()  # what is wrong with it shall be said before anything starts
        from prime_rl.entrypoints import rl as launcher

        launcher.Popen = _popen_with_credits(launcher.Popen)
        launcher.rl_slurm = _refuse_slurm
        start = launcher.main
    start()


def _popen_with_credits(popen: Any) -> Any:
    """The launcher's `Popen`, which starts the orchestrator through this module."""

    def start(command: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(command, list) and command[0] == "orchestrator":
            command = [sys.executable, "-m", "flowgraph.adapters.prime_rl", *command]
        return popen(command, *args, **kwargs)

    return start


def _refuse_slurm(config: Any) -> None:
    raise ValueError(
        "a slurm job starts the orchestrator from its own template, so without credits. Copy the template, put "
        "`uv run python -m flowgraph.adapters.prime_rl orchestrator` in place of `uv run orchestrator`, give it as "
        "slurm.template_path and start it with plain `rl`"
    )


if __name__ == "__main__":
    main()
