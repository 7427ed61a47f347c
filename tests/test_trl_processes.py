"""TRL on two processes (gloo, CPU): replicated (DDP) and sharded (FSDP2) policies.

The tests start this very file twice, as `torchrun` does, and read what each process wrote down. PyTorch shards on CPUs,
but Accelerate leaves FSDP2 out there without a word (and refuses FSDP1): `_fsdp_on_cpus` makes it do as on GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason='needs TRL: pip install "flowgraph-llm[trl]"')

KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "apart": {},
    "reuse": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
}
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    folder = tmp_path_factory.mktemp(request.param)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.test_trl_processes"]
    done = subprocess.run(
        [*launch, request.param, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(one["sharded"] == (request.param != "ddp") for one in found)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gain_1_is_plain_grpo(schedule: str, written: list[dict[str, Any]]) -> None:
    for one in written:
        plain, ours = one[schedule]["plain"], one[schedule]["gain 1"]
        assert len(plain["losses"]) == 2 and all(norm > 0 for _, norm in plain["losses"])
        torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(plain["losses"]), rtol=1e-6, atol=1e-6)
        assert ours["weights"] == pytest.approx(plain["weights"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_marked_token_gets_the_gain_and_no_other(schedule: str, written: list[dict[str, Any]]) -> None:
    """The second process has only advantages of 0 here, and so nothing to score; neither may wait for the other."""
    first, second = (one[schedule]["marks"] for one in written)
    assert first["gains"] == first["expected"] and any(3.0 in row for row in first["gains"])
    assert second["gains"] == [] and second["advantages"] == 0
    for name in ("scored", "failed", "credited_share", "seconds"):
        assert first["metrics"][f"flow/{name}"] == second["metrics"][f"flow/{name}"]
    assert first["metrics"]["flow/scored"] == [0.5]


def test_processes_make_as_many_passes_when_sharded(written: list[dict[str, Any]]) -> None:
    first, second = (one["apart"]["marks"]["calls"] for one in written)
    assert len(first) >= 2  # one or two responses each
    assert second == ([[1, 4]] * len(first) if written[0]["sharded"] else [])


def test_credits_out_of_the_old_log_probabilities_cost_no_pass(written: list[dict[str, Any]]) -> None:
    for one in written:
        assert one["reuse"]["gain 1"]["calls"] == one["reuse"]["plain"]["calls"]


def test_a_scorer_follows_the_policy(written: list[dict[str, Any]]) -> None:
    for one in written:
        assert one["scorer"]["refreshed"] == [0, 2] and one["scorer"]["distance"] == 0
        assert one["scorer"]["moved"] > 0


def test_responses_may_be_generated(written: list[dict[str, Any]]) -> None:
    for one in written:
        assert len(one["generated"]) == 2 and all(loss == loss and norm > 0 for loss, norm in one["generated"])


# --- one process ------------------------------------------------------------------------------------------------------


def _fsdp_on_cpus() -> None:
    from accelerate.state import AcceleratorState, DistributedType, PartialState  # type: ignore[import-untyped]

    init = AcceleratorState.__init__

    def with_fsdp(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def _work(kind: str, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from transformers.trainer_utils import set_seed
    from trl.trainer.grpo_trainer import GRPOTrainer

    from flowgraph.adapters import trl as adapter
    from flowgraph.adapters.trl import FlowConfig, FlowGRPOTrainer
    from tests.test_trl import SOLUTIONS, layer_calls, length, losses, says, trainer_of
    from tests.written import ANSWERS, is_mark, marked, policy, written_by_hand

    torch.set_num_threads(1)
    _fsdp_on_cpus()
    rank = 0
    is_sharded: list[bool] = []

    def make(flow: FlowConfig | None, schedule: str, model: Any, **changes: Any) -> Any:
        trainer_kind = GRPOTrainer if flow is None else FlowGRPOTrainer
        return trainer_of(folder, flow, kind=trainer_kind, model=model, **KINDS[kind], **SCHEDULES[schedule], **changes)

    def trained(flow: FlowConfig | None, schedule: str) -> dict[str, Any]:
        set_seed(0)
        trainer = make(flow, schedule, policy(), rollout=says(SOLUTIONS[rank:] + SOLUTIONS[:rank]))
        calls = layer_calls(trainer.model)
        found = losses(trainer)
        sums = [float(weight.double().square().sum()) for weight in adapter._whole_weights(trainer.model).values()]
        is_sharded.append(any(isinstance(weight, DTensor) for weight in trainer.model.parameters()))
        return {"losses": found, "weights": sums, "calls": calls}

    def marks(schedule: str) -> dict[str, Any]:
        completions = [marked(3, 4), marked(9, 0), marked(0, 6), marked(5, 2)]
        reward: Callable[..., list[float]] = (
            length if rank == 0 else lambda completion_ids, **_: [1.0] * len(completion_ids)
        )
        # Rank 0 needs several passes, rank 1 none.
        flow = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0, max_batch_tokens=30)
        trainer = make(flow, schedule, written_by_hand(), rollout=says(completions), reward=reward, max_steps=1)
        seen: list[dict[str, Any]] = []
        score = trainer._put_credits_into

        def look(output: dict[str, Any], taken: Any) -> None:
            plain = output["advantages"].clone()
            score(output, taken)
            seen.append({**output, "plain": plain})

        trainer._put_credits_into = look
        calls = layer_calls(trainer.model)
        trainer.train()
        (batch,) = seen
        moved = batch["plain"] != 0
        gains = (batch["advantages"] / batch["plain"][:, None])[moved]
        return {
            "gains": [[round(gain, 5) for gain in row] for row in gains.tolist()],
            "expected": torch.where(is_mark(batch["completion_ids"]), 3.0, 1.0)[moved].tolist(),
            "advantages": float(batch["advantages"].abs().sum()),
            "calls": calls,
            "metrics": {
                name: [entry[name] for entry in trainer.state.log_history if name in entry]
                for name in ("flow/scored", "flow/failed", "flow/credited_share", "flow/seconds")
            },
        }

    def followed() -> dict[str, Any]:
        scorer = policy(num_attention_heads=4)
        flow = FlowConfig(answer=ANSWERS, scorer=scorer, refresh_steps=2)
        trainer = make(flow, "apart", policy(), max_steps=3)
        start = {name: value.clone() for name, value in scorer.state_dict().items()}
        refreshed: list[int] = []
        distances: list[float] = []
        refresh = trainer._flow_crediting.scorer.refresh

        def look(weights: dict[str, torch.Tensor]) -> None:
            refresh(weights)
            refreshed.append(trainer.state.global_step)
            now = scorer.state_dict()
            distances.append(max(float((now[name] - value).abs().max()) for name, value in weights.items()))

        trainer._flow_crediting.scorer.refresh = look
        trainer.train()
        moved = max(float((value - start[name]).abs().max()) for name, value in scorer.state_dict().items())
        return {"refreshed": refreshed, "distance": max(distances), "moved": moved}

    make(None, "apart", policy())  # joins the group of processes
    rank = dist.get_rank()
    found: dict[str, Any] = {
        schedule: {
            "plain": trained(None, schedule),
            "gain 1": trained(FlowConfig(answer=ANSWERS, gain=1.0, max_batch_tokens=60), schedule),
            "marks": marks(schedule),
        }
        for schedule in SCHEDULES
    }
    found |= {"scorer": followed(), "sharded": all(is_sharded)}
    generating = make(FlowConfig(no_answer="tail", tail_tokens=2), "apart", policy(), rollout=None)
    found["generated"] = losses(generating)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # all is written, and taking gloo's threads down in good order was seen to hang


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
