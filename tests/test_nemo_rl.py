"""Credits in NeMo-RL: the same tests on fakes that mirror its source and, where it is installed, on the real one.

The fakes mirror NVIDIA-NeMo/RL 0.6.0, commit 7ea279a; each says which function.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowgraph.adapters import nemo_rl
from flowgraph.rl import Crediting, FlowConfig, Scorer
from tests.written import ANSWERS, TOKENIZER, ids, is_mark, marked, written_by_hand

HAS_NEMO_RL = importlib.util.find_spec("nemo_rl") is not None

Turn = tuple[str | list[int], str]
"""Text or ids of a message, and its role. "assistant" was generated, "history" is an assistant's turn of the prompt."""

PROMPTS = ["?", ";;;;;;;", "?;?;"]
RESPONSES = [marked(3, 4), marked(1, 1), marked(9, 0)]
REWARDS = [3.0, 1.0, -1.0]
"""Of one group: with the others' mean as baseline, advantages 3, 0 and -3."""


def rollout(*turns: Turn) -> list[dict[str, Any]]:
    """A message log as NeMo-RL's rollouts leave it: only what was generated has `generation_logprobs`."""
    log = []
    for text, role in turns:
        tokens = torch.tensor(ids(text, end=False) if isinstance(text, str) else text, dtype=torch.long)
        one: dict[str, Any] = {"role": "assistant" if role == "history" else role, "content": "", "token_ids": tokens}
        if role == "assistant":
            one["generation_logprobs"] = torch.full((len(tokens),), -1.0)
        log.append(one)
    return log


def one_turn(prompts: Sequence[str] = PROMPTS, responses: Sequence[list[int]] = RESPONSES) -> list[list[Any]]:
    return [rollout((p, "user"), (r, "assistant")) for p, r in zip(prompts, responses, strict=True)]


# --- fakes ------------------------------------------------------------------------------------------------------------


class FakeEstimator:
    """nemo_rl/algorithms/advantage_estimator.py, GRPOAdvantageEstimator without normalisation, one group."""

    def compute_advantage(self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **_: Any) -> Tensor:
        baseline = (rewards.sum() - rewards) / (len(rewards) - 1)
        return (rewards - baseline).unsqueeze(-1).expand(mask.shape)


class FakePackedTensor:
    """nemo_rl/data/multimodal_utils.py, PackedTensor."""


class FakeCheckpointManager:
    """nemo_rl/utils/checkpoint.py, CheckpointManager."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.checkpoint_dir = Path(config["checkpoint_dir"])

    def get_latest_checkpoint_path(self) -> str | None:
        found = sorted(self.checkpoint_dir.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
        return str(found[-1]) if found else None


class FakeWorld:
    """NeMo-RL without NeMo-RL."""

    packed = FakePackedTensor

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grpo = ModuleType("nemo_rl.algorithms.grpo")
        vars(grpo).update(
            _create_advantage_estimator=lambda master_config: FakeEstimator(),
            _log_mixed_rewards_and_advantages_information=self._log,
        )
        algorithms = ModuleType("nemo_rl.algorithms")
        algorithms.grpo = grpo  # type: ignore[attr-defined]
        utils, data = ModuleType("nemo_rl.utils.checkpoint"), ModuleType("nemo_rl.data.multimodal_utils")
        utils.CheckpointManager = FakeCheckpointManager  # type: ignore[attr-defined]
        data.PackedTensor = FakePackedTensor  # type: ignore[attr-defined]
        for module in (algorithms, grpo, utils, data, ModuleType("nemo_rl"), ModuleType("nemo_rl.utils")):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        self.grpo: Any = grpo

    @staticmethod
    def _log(logger: Any, total_steps: int, metrics: dict[str, Any], baseline: Tensor, advantages: Tensor) -> None:
        """nemo_rl/algorithms/grpo.py, _log_mixed_rewards_and_advantages_information."""
        metrics["advantages/sum"] = advantages.float().sum().item()

    def config(self, **changes: Any) -> Any:
        loss = SimpleNamespace(sequence_level_importance_ratios=False)
        return SimpleNamespace(grpo=SimpleNamespace(advantage_clip_low=None, advantage_clip_high=None), loss_fn=loss)

    def flatten(self, logs: list[list[Any]], divisible_by: int) -> tuple[dict[str, Tensor], Tensor]:
        """grpo.py, add_grpo_token_loss_masks_and_generation_logprobs; llm_message_utils.py, batched_message_log_to_...:
        messages in a row, pads on the right up to a multiple."""
        for log in logs:
            for one in log:
                generated = one["role"] == "assistant" and "generation_logprobs" in one
                one["token_loss_mask"] = torch.full_like(one["token_ids"], int(generated))
                one.setdefault("generation_logprobs", torch.zeros(len(one["token_ids"])))
        flat = {}
        for key in ("token_ids", "token_loss_mask", "generation_logprobs"):
            padded = pad_sequence([torch.cat([one[key] for one in log]) for log in logs], batch_first=True)
            flat[key] = torch.nn.functional.pad(padded, (0, -padded.shape[1] % divisible_by))
        return flat, torch.tensor([sum(len(one["token_ids"]) for one in log) for log in logs])

    def loss(self, log_probs: Tensor, data: dict[str, Tensor]) -> Tensor:
        """loss_functions.py, ClippedPGLossFn, token level, without KL: the advantages lose their first column."""
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        ratios = (log_probs - data["prev_logprobs"][:, 1:]).exp()
        advantages = data["advantages"][:, 1:]
        worst = torch.max(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
        return (worst * mask).sum() / mask.sum()


class RealWorld:
    """The real NeMo-RL."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nemo_rl.algorithms import grpo
        from nemo_rl.data.multimodal_utils import PackedTensor

        self.grpo, self.packed = grpo, PackedTensor
        for name in ("_create_advantage_estimator", "_log_mixed_rewards_and_advantages_information"):
            monkeypatch.setattr(grpo, name, getattr(grpo, name))  # put back after the test

    def config(self, **changes: Any) -> Any:
        from nemo_rl.algorithms.advantage_estimator import AdvEstimatorConfig
        from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig

        estimator = AdvEstimatorConfig(name="grpo", normalize_rewards=False)
        loss = ClippedPGLossConfig(reference_policy_kl_penalty=0.0)
        return SimpleNamespace(grpo=self.grpo.GRPOConfig(adv_estimator=estimator), loss_fn=loss)

    def flatten(self, logs: list[list[Any]], divisible_by: int) -> tuple[dict[str, Tensor], Tensor]:
        from nemo_rl.data.llm_message_utils import batched_message_log_to_flat_message

        self.grpo.add_grpo_token_loss_masks_and_generation_logprobs(logs)
        flat, lengths = batched_message_log_to_flat_message(
            logs, pad_value_dict={"token_ids": 0}, make_sequence_length_divisible_by=divisible_by
        )
        return dict(flat), lengths

    def loss(self, log_probs: Tensor, data: dict[str, Tensor]) -> Tensor:
        from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn

        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        loss: Tensor = ClippedPGLossFn(self.config().loss_fn)(log_probs, data, data["sample_mask"].sum(), mask.sum())[0]
        return loss


@pytest.fixture(params=["fake", "real"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "fake":
        return FakeWorld(monkeypatch)
    if not HAS_NEMO_RL:
        pytest.skip("needs NeMo-RL from github.com/NVIDIA-NeMo/RL")
    return RealWorld(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def by_hand(**changes: Any) -> Crediting:
    defaults = {"answer": ANSWERS, "preset": "paper", "gain": 3.0}
    return Crediting(Scorer(written_by_hand(), TOKENIZER, FlowConfig(**{**defaults, **changes})))


def config_of(world: Any, folder: Path, **grpo: Any) -> Any:
    """What the adapter reads of a MasterConfig; the parts that NeMo-RL reads are its own."""
    config = world.config()
    config.data_plane = None
    config.checkpointing = {
        "checkpoint_dir": str(folder), "metric_name": None, "higher_is_better": True, "keep_top_k": 1,
        "save_period": 1, "save_optimizer": False,
    }  # fmt: skip
    for name, value in grpo.items():
        setattr(config.grpo, name, value)
    return config


def train_data(
    world: Any, logs: list[list[Any]], estimator: Any, rewards: Sequence[float] = REWARDS, **more: Any
) -> dict[str, Tensor]:
    """nemo_rl/algorithms/grpo.py, grpo_train, from "data_processing" to "advantage_calculation"."""
    flat, _ = world.flatten(logs, more.pop("divisible_by", 8))
    sample_mask = more.pop("sample_mask", torch.ones(len(logs)))
    data = {
        "input_ids": flat["token_ids"],
        "token_mask": flat["token_loss_mask"],
        "sample_mask": sample_mask,
        "generation_logprobs": flat["generation_logprobs"],
        "prev_logprobs": flat["generation_logprobs"].clone(),
    }
    data["advantages"] = estimator.compute_advantage(
        prompt_ids=torch.zeros(len(logs), 2, dtype=torch.long),
        rewards=torch.tensor(rewards),
        mask=data["token_mask"] * sample_mask.unsqueeze(-1),
        repeated_batch={"message_log": logs, **more},
        logprobs_policy=data["prev_logprobs"],
        logprobs_reference=None,
    )
    return data


def plain(world: Any, folder: Path) -> Any:
    create = world.grpo._create_advantage_estimator
    return getattr(create, "without_credits", create)(config_of(world, folder))


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisible_by", [1, 64])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1]])
def test_the_marked_token_gets_the_gain_and_no_other(
    world: Any, folder: Path, prompts: list[str], divisible_by: int
) -> None:
    estimator = nemo_rl.WithCredits(plain(world, folder), by_hand())
    data = train_data(world, one_turn(prompts), estimator, divisible_by=divisible_by)
    before = train_data(world, one_turn(prompts), plain(world, folder), divisible_by=divisible_by)["advantages"]
    own = is_mark(data["input_ids"])
    assert own.sum() == 3
    assert before.abs().amax(1).tolist() == [3.0, 0.0, 3.0]
    assert torch.equal(data["advantages"], torch.where(own, 3 * before, before))


def test_tool_output_and_history_get_nothing(world: Any, folder: Path) -> None:
    logs = [
        rollout((";@", "history"), ("?;", "user"), ("aa", "assistant"), ("?@", "tool"), ("b@b=7", "assistant")),
        rollout(("?;", "user"), ("aa", "assistant")),
    ]
    data = train_data(world, logs, nemo_rl.WithCredits(plain(world, folder), by_hand()), rewards=[1.0, -1.0])
    assert (data["advantages"][0] == 6).nonzero().flatten().tolist() == [len(";@?;aa?@b")]
    assert (data["advantages"][1] == -2).all()  # no answer


def test_a_gain_of_1_changes_no_bit(world: Any, folder: Path) -> None:
    data = train_data(world, one_turn(), nemo_rl.WithCredits(plain(world, folder), by_hand(gain=1.0)))
    before = train_data(world, one_turn(), plain(world, folder))
    assert torch.equal(data["advantages"], before["advantages"])
    for one, other in zip(loss_and_gradient(world, data), loss_and_gradient(world, before), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_token_s_gradient_is_the_plain_one_times_its_factor(world: Any, folder: Path) -> None:
    data = train_data(world, one_turn(), nemo_rl.WithCredits(plain(world, folder), by_hand()))
    before = train_data(world, one_turn(), plain(world, folder))
    own = is_mark(data["input_ids"])[:, 1:]
    gradient, was = loss_and_gradient(world, data)[1], loss_and_gradient(world, before)[1]
    assert was[own].abs().sum() > 0
    torch.testing.assert_close(gradient, torch.where(own, 3 * was, was))


def loss_and_gradient(world: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    log_probs = data["prev_logprobs"][:, 1:].clone().requires_grad_()
    loss = world.loss(log_probs, data)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


# --- bad rollouts, the log --------------------------------------------------------------------------------------------


def test_bad_rollouts_cost_no_other(world: Any, folder: Path) -> None:
    responses = [marked(3, 4), ids("no answer"), marked(2, 2, end=False), [], marked(130, 60)]
    estimator = nemo_rl.WithCredits(plain(world, folder), by_hand())
    data = train_data(
        world,
        one_turn(["?"] * 5, responses),
        estimator,
        rewards=[1.0, 1.0, -1.0, 1.0, -1.0],
        truncated=torch.tensor([False, False, True, False, False]),
    )
    at = data["advantages"].abs()
    assert torch.equal(at > 2, is_mark(data["input_ids"]))
    assert estimator.last_metrics["flow/scored"] == 1.0
    for name in ("no_answer", "cut_off", "empty"):
        assert estimator.last_metrics[f"flow/{name}"] == 0.2


def test_a_row_that_the_sample_mask_takes_out_is_not_scored(world: Any, folder: Path) -> None:
    estimator = nemo_rl.WithCredits(plain(world, folder), by_hand())
    data = train_data(world, one_turn(), estimator, sample_mask=torch.tensor([1.0, 1.0, 0.0]))
    assert (data["advantages"][2] == -3).all()
    assert (data["advantages"][0] == 9).sum() == 1


def test_warm_up_counts_the_steps(world: Any, folder: Path) -> None:
    estimator = nemo_rl.WithCredits(plain(world, folder), by_hand(warmup_steps=2))
    seen = [train_data(world, one_turn(), estimator)["advantages"].max().item() for _ in range(3)]
    assert seen == [3.0, 6.0, 9.0]


def test_images_are_refused(world: Any, folder: Path) -> None:
    logs = one_turn()
    flat, _ = world.flatten(logs, 8)
    logs[1][0]["pixel_values"] = object.__new__(world.packed)
    with pytest.raises(ValueError, match="row 1 has images"):
        nemo_rl.WithCredits(plain(world, folder), by_hand()).compute_advantage(
            prompt_ids=torch.zeros(3, 1),
            rewards=torch.tensor(REWARDS),
            mask=flat["token_loss_mask"],
            repeated_batch={"message_log": logs},
        )


def test_logs_that_don_t_fit_the_mask_are_refused(world: Any, folder: Path) -> None:
    class Swapped(nemo_rl.WithCredits):
        def compute_advantage(self, **inputs: Any) -> Tensor:
            inputs["repeated_batch"]["message_log"] = inputs["repeated_batch"]["message_log"][::-1]
            return super().compute_advantage(**inputs)

    with pytest.raises(ValueError, match="row 0: mask and message_log don't fit"):
        train_data(world, one_turn(), Swapped(plain(world, folder), by_hand()))


# --- install ----------------------------------------------------------------------------------------------------------


SOURCE = {"model": "some/model"}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand(warmup_steps=4)
    monkeypatch.setattr(nemo_rl, "crediting", lambda source=None: made)


@pytest.mark.usefixtures("service")
def test_install_is_enough_and_twice_is_once(world: Any, folder: Path) -> None:
    (folder / "step_2").mkdir()
    (folder / "step_10").mkdir()
    config = config_of(world, folder)
    nemo_rl.install(config, SOURCE)
    nemo_rl.install(config, SOURCE)
    estimator = world.grpo._create_advantage_estimator(config)
    assert estimator.step == 10  # the run goes on from there
    data = train_data(world, one_turn(), estimator)
    assert data["advantages"].max() == 9.0  # 3.0 times 3, not times 9

    metrics: dict[str, Any] = {}
    logger = SimpleNamespace(log_histogram=lambda *_: None)
    world.grpo._log_mixed_rewards_and_advantages_information(
        logger=logger, total_steps=10, metrics=metrics, baseline=torch.zeros(3), advantages=data["advantages"]
    )
    assert metrics["flow/scored"] == pytest.approx(2 / 3)
    assert metrics["advantages/sum"] == pytest.approx(data["advantages"].sum().item())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda config: setattr(config.loss_fn, "sequence_level_importance_ratios", True), "same gradient"),
        (lambda config: setattr(config.grpo, "advantage_clip_high", 5.0), "advantage_clip_high"),
        (lambda config: setattr(config.grpo, "advantage_clip_low", -5.0), "advantage_clip_low"),
        (lambda config: setattr(config, "data_plane", {"enabled": True}), "data_plane"),
    ],
)
@pytest.mark.usefixtures("service")
def test_what_would_do_nothing_is_refused(world: Any, folder: Path, change: Any, match: str) -> None:
    config = config_of(world, folder)
    change(config)
    with pytest.raises(ValueError, match=match):
        nemo_rl.install(config, SOURCE)
    assert not hasattr(world.grpo._create_advantage_estimator, "without_credits")


@pytest.mark.usefixtures("service")
def test_another_algorithm_is_refused(world: Any) -> None:
    with pytest.raises(TypeError, match="no configuration of GRPO"):
        nemo_rl.install(SimpleNamespace(ppo=None), SOURCE)


def test_a_missing_configuration_is_said_at_once(world: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWGRAPH_CONFIG", raising=False)
    with pytest.raises(ValueError, match="FLOWGRAPH_CONFIG"):
        nemo_rl.install(config_of(world, folder))


def test_without_nemo_rl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "nemo_rl", None)
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms", None)
    with pytest.raises(ImportError, match="NVIDIA-NeMo/RL"):
        nemo_rl.install(config_of(FakeWorld.__new__(FakeWorld), folder))


@pytest.mark.skipif(not HAS_NEMO_RL, reason="needs NeMo-RL from github.com/NVIDIA-NeMo/RL")
def test_the_real_configuration_has_what_is_checked() -> None:
    from nemo_rl.algorithms import grpo

    assert {"grpo", "loss_fn", "data_plane", "checkpointing"} <= grpo.MasterConfig.model_fields.keys()
    assert {"advantage_clip_low", "advantage_clip_high"} <= grpo.GRPOConfig.model_fields.keys()
    source = Path(grpo.__file__).read_text(encoding="utf-8")
    assert source.count("adv_estimator = _create_advantage_estimator(master_config)") == 2
    assert source.count("repeated_batch=repeated_batch,\n                        logprobs_policy") == 2
