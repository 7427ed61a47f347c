"""Credits in SkyRL: its left-padded batch, its right-aligned advantages, its losses; on SkyRL itself where it is there.

The mirrors follow skyrl 0.3.0 line by line and name what they follow. Where skyrl is importable the same tests run on
its own trainer, with everything that needs GPUs (workers, inference engine) left away.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typing_extensions
from torch import Tensor

from flowgraph.adapters.service import ENVIRONMENT, ServiceConfig
from flowgraph.adapters.skyrl import FlowMixin, follows_tokens, main, refuse_silent_no_ops
from tests.written import TOKENIZER, ids, is_mark, marked

pytestmark = pytest.mark.usefixtures("one_thread")

GAIN = 3.0
PROMPTS = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False), marked(5, 2)]
REWARDS = [1.0, 0.0, 2.0, 0.0]

# --- SkyRL and its mirror ---------------------------------------------------------------------------------------------


class Batch(dict[str, Any]):
    """skyrl/backends/skyrl_train/training_batch.py: TrainingInputBatch."""

    metadata: dict[str, Any]


class RayPPOTrainer:
    """skyrl/train/trainer.py: RayPPOTrainer, as far as advantages go."""

    def __init__(self, cfg: Any, tokenizer: Any = None, **others: Any) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.all_metrics: dict[str, float] = {}
        self.global_step = 0
        self.dispatch: Any = None

    def convert_to_training_input(self, generator_output: Any, uids: list[str]) -> Batch:
        """The same, with convert_prompts_responses_to_batch_tensors (preprocess.py) and pad_training_input_batch."""
        prompts, responses = generator_output["prompt_token_ids"], generator_output["response_ids"]
        longest = max(len(one) for one in responses)
        total = max(len(prompt) + len(one) for prompt, one in zip(prompts, responses, strict=True))

        def right_aligned(rows: Any) -> Tensor:
            return torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])

        whole = [prompt + one for prompt, one in zip(prompts, responses, strict=True)]
        batch = Batch(
            sequences=torch.tensor([[self.tokenizer.pad_token_id] * (total - len(row)) + row for row in whole]),
            attention_mask=torch.tensor([[0] * (total - len(row)) + [1] * len(row) for row in whole]),
            response_mask=right_aligned([[1] * len(one) for one in responses]),
            rewards=right_aligned(generator_output["rewards"]).float(),
            loss_mask=right_aligned(generator_output["loss_masks"]),
        )
        size = self.dispatch.get_lcm_dp_size()
        pads = math.ceil(len(whole) / size) * size - len(whole)
        for name, values in batch.items():
            more = torch.zeros_like(values[:1]) if name == "loss_mask" else values[:1]
            batch[name] = torch.cat([values, *[more] * pads])
        batch.metadata = {"uids": uids + [f"pad{i}" for i in range(pads)], "pad_size": pads}
        return batch

    def compute_advantages_and_returns(self, data: Batch) -> Batch:
        """The same, for compute_grpo_outcome_advantage (ppo_utils.py): advantages and returns are one tensor."""
        scores = data["rewards"].sum(-1)
        groups = data.metadata["uids"]
        for row, group in enumerate(groups):
            mine = torch.stack([data["rewards"][other].sum() for other, name in enumerate(groups) if name == group])
            mean, std = (mine.mean(), mine.std()) if len(mine) > 1 else (torch.tensor(0.0), torch.tensor(1.0))
            scores[row] = (scores[row] - mean) / (std + 1e-6)
        data["returns"] = data["advantages"] = scores.unsqueeze(-1) * data["response_mask"]
        return data


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """skyrl/backends/skyrl_train/utils/ppo_utils.py: ppo_policy_loss "regular", with reduce_loss."""
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)
    return (-torch.min(ratio * advantages, clipped * advantages) * loss_mask).sum(), {}


def token_mean(advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """The same file: apply_loss_reduction_to_advantages_minibatch "token_mean"."""
    return advantages / loss_mask.sum().clamp(min=1)


HAS_SKYRL = importlib.util.find_spec("skyrl") is not None


class SkyRL:
    """What the tests need of SkyRL: of itself, or of the mirror."""

    def __init__(self, real: bool, patch: pytest.MonkeyPatch) -> None:
        self.real = real
        if not real:
            self.trainer: Any = RayPPOTrainer
            algorithm = SimpleNamespace(policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.2)
            self.cfg: Any = SimpleNamespace(trainer=SimpleNamespace(algorithm=algorithm))
            registry = ModuleType("skyrl.backends.skyrl_train.utils.ppo_utils")
            registry.PolicyLossRegistry = {"regular": ppo_policy_loss}  # type: ignore[attr-defined]
            for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, registry.__name__, registry)
            return
        self.trainer, self.ppo_utils = self.modules(patch)
        config = importlib.import_module("skyrl.train.config")
        self.cfg = config.SkyRLTrainConfig()
        self.cfg.generator.inference_engine.enable_ray_prometheus_stats = False

    @staticmethod
    def modules(patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
        if sys.version_info < (3, 12):
            # SkyRL hands typing.TypedDict to pydantic, which takes it from Python 3.12 on.
            patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
        trainer = importlib.import_module("skyrl.train.trainer").RayPPOTrainer
        return trainer, importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")


@pytest.fixture(params=["mirror", "skyrl"])
def skyrl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SkyRL:
    if request.param == "skyrl" and not HAS_SKYRL:
        pytest.skip("skyrl is not installed")
    return SkyRL(request.param == "skyrl", monkeypatch)


# --- a step as SkyRL makes it -----------------------------------------------------------------------------------------


@pytest.fixture
def flow(models: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """The configuration of credits, as a mapping."""

    def make(model: str = "by_hand", **changes: Any) -> dict[str, Any]:
        options = {"answer": r"re:=(\d)", "preset": "paper", "gain": GAIN} | changes
        return {"model": models[model], "device": "cpu", "flow": options}

    return make


def trainer(skyrl: SkyRL, flow: Any, credits: bool = True, dp_size: int = 1) -> Any:
    bases = (FlowMixin, skyrl.trainer) if credits else (skyrl.trainer,)
    others = dict.fromkeys(("tracker", "train_dataset", "inference_engine_client", "generator"))
    made = type("Trainer", bases, {})(
        cfg=skyrl.cfg, tokenizer=TOKENIZER, **others, **({"flow": flow} if credits else {})
    )
    made.dispatch = SimpleNamespace(get_lcm_dp_size=lambda: dp_size)
    made.global_step = 1
    return made


def generated(
    prompts: list[str] = PROMPTS, responses: list[list[int]] = RESPONSES, rewards: list[float] = REWARDS
) -> dict[str, Any]:
    """A GeneratorOutput after postprocess_generator_output: rewards per token, at the last one."""
    pairs = list(zip(responses, rewards, strict=True))
    return {
        "prompt_token_ids": [ids(prompt, end=False) for prompt in prompts],
        "response_ids": responses,
        "rewards": [([0.0] * len(one) + [reward])[-len(one) :] if one else [] for one, reward in pairs],
        "loss_masks": [[1] * len(one) for one in responses],
        "stop_reasons": ["stop" if one and one[-1] == TOKENIZER.eos_token_id else "length" for one in responses],
    }


def batch_of(trainer: Any, output: dict[str, Any], uids: list[str]) -> Any:
    """RayPPOTrainer.train up to the forward passes on GPUs."""
    prompts = len(set(uids))
    if not isinstance(trainer, RayPPOTrainer):
        trainer.cfg.trainer.train_batch_size = trainer.cfg.trainer.policy_mini_batch_size = prompts
        trainer.cfg.generator.n_samples_per_prompt = len(uids) // prompts
    data = trainer.convert_to_training_input(output, uids)
    data["values"] = None
    return data


def step(trainer: Any, output: dict[str, Any], uids: list[str]) -> Any:
    """The same, and the advantages, which need nothing of the forward passes where there is no KL in the reward."""
    return trainer.compute_advantages_and_returns(batch_of(trainer, output, uids))


UIDS = ["a", "a", "b", "b"]


def marks(data: Any) -> Tensor:
    """[B, R] GAIN at the marked token of each response, else 1."""
    width = data["response_mask"].shape[1]
    marked_ones = is_mark(data["sequences"])[:, -width:] & data["response_mask"].bool()
    return torch.where(marked_ones, GAIN, 1.0)


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_marked_token_and_no_other_gets_the_gain(skyrl: SkyRL, flow: Any) -> None:
    plain = step(trainer(skyrl, None, credits=False), generated(), UIDS)
    data = step(trainer(skyrl, flow()), generated(), UIDS)
    assert (marks(data) == GAIN).sum(1).tolist() == [1, 1, 1, 1]
    assert torch.equal(data["advantages"], plain["advantages"] * marks(data))
    assert (data["advantages"] != 0).any(1).all()


def test_rows_that_fill_a_batch_up_are_not_scored(skyrl: SkyRL, flow: Any) -> None:
    made = trainer(skyrl, flow(), dp_size=8)
    plain = step(trainer(skyrl, None, credits=False, dp_size=8), generated(), UIDS)
    data = step(made, generated(), UIDS)
    assert len(data["advantages"]) == 8
    assert torch.equal(data["advantages"][:4], plain["advantages"][:4] * marks(data)[:4])
    assert torch.equal(data["advantages"][4:], plain["advantages"][4:])
    assert made.all_metrics["flow/scored"] == 1


def test_tool_output_and_masked_rows_keep_their_advantages(skyrl: SkyRL, flow: Any) -> None:
    output = generated(["?", "?"], [ids("a@b@=7"), marked(3, 2)], [1.0, 0.0])
    output["loss_masks"][0][1] = 0  # the first "@" came from a tool
    output["loss_masks"][1] = [0] * len(output["response_ids"][1])  # as zero_variance_filter does
    data = step(trainer(skyrl, flow()), output, ["a", "b"])
    width = data["advantages"].shape[1]
    assert data["advantages"][0].tolist() == pytest.approx([0] * (width - 7) + [1, 1, 1, GAIN, 1, 1, 1])
    assert data["advantages"][1].unique().tolist() == [0]


# --- what stays -------------------------------------------------------------------------------------------------------


def loss_and_gradient(data: Any, skyrl: SkyRL) -> list[Tensor]:
    """_normalize_advantages and the policy loss; SkyRL's own where it is there."""
    torch.manual_seed(0)
    log_probs = torch.randn(data["advantages"].shape).mul(0.1).requires_grad_()
    algorithm = skyrl.cfg.trainer.algorithm
    if skyrl.real:
        scaled = skyrl.ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            data["advantages"], data["loss_mask"], algorithm.loss_reduction, 2, 32
        )
        loss, _ = skyrl.ppo_utils.PolicyLossRegistry.get(algorithm.policy_loss_type)(
            log_probs, torch.zeros_like(log_probs), scaled, algorithm, data["loss_mask"]
        )
    else:
        scaled = token_mean(data["advantages"], data["loss_mask"])
        loss, _ = ppo_policy_loss(log_probs, torch.zeros_like(log_probs), scaled, algorithm, data["loss_mask"])
    return [loss.detach(), *torch.autograd.grad(loss, log_probs)]


def test_factors_of_one_change_nothing(skyrl: SkyRL, flow: Any) -> None:
    plain = step(trainer(skyrl, None, credits=False), generated(), UIDS)
    data = step(trainer(skyrl, flow("random", gain=1.0)), generated(), UIDS)
    assert torch.equal(data["advantages"], plain["advantages"])
    for found, wanted in zip(loss_and_gradient(data, skyrl), loss_and_gradient(plain, skyrl), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_gradient_of_a_token_is_the_plain_one_times_its_factor(skyrl: SkyRL, flow: Any) -> None:
    plain = step(trainer(skyrl, None, credits=False), generated(), UIDS)
    data = step(trainer(skyrl, flow()), generated(), UIDS)
    wanted = loss_and_gradient(plain, skyrl)[1] * marks(data)
    torch.testing.assert_close(loss_and_gradient(data, skyrl)[1], wanted)


def test_returns_stay_though_they_are_the_same_tensor(skyrl: SkyRL, flow: Any) -> None:
    plain = step(trainer(skyrl, None, credits=False), generated(), UIDS)
    assert torch.equal(step(trainer(skyrl, flow()), generated(), UIDS)["returns"], plain["returns"])


# --- bad samples, steps, logs -----------------------------------------------------------------------------------------


def test_a_step_with_bad_samples_works_and_says_so(skyrl: SkyRL, flow: Any) -> None:
    """An empty response gets no reward in SkyRL, so it has no advantage."""
    responses = [marked(3, 2), ids("no answer here"), marked(60, 40)[:-3], marked(60, 40), [TOKENIZER.eos_token_id], []]
    made = trainer(skyrl, flow())
    output = generated(["?", "?;", ";", ";;", "?", "?"], responses, [1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    data = step(made, output, list("abcdef"))
    wanted = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 0.0])[:, None] * data["response_mask"]
    wanted[[0, 3]] *= marks(data)[[0, 3]]
    torch.testing.assert_close(data["advantages"], wanted)
    shares = {name: made.all_metrics[f"flow/{name}"] for name in ("scored", "no_answer", "cut_off", "failed")}
    assert shares == pytest.approx({"scored": 5 / 6, "no_answer": 3 / 5, "cut_off": 1 / 5, "failed": 0})
    assert "flow_truncated" not in data.metadata


def test_warm_up_follows_the_step_of_the_trainer(skyrl: SkyRL, flow: Any) -> None:
    made = trainer(skyrl, flow(warmup_steps=4))
    plain = step(trainer(skyrl, None, credits=False), generated(), UIDS)["advantages"]
    assert torch.equal(step(made, generated(), UIDS)["advantages"], plain)
    made.global_step = 2
    data = step(made, generated(), UIDS)
    assert torch.equal(data["advantages"], plain * torch.where(marks(data) == GAIN, 1 + (GAIN - 1) / 4, 1.0))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_which_losses_of_skyrl_take_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    """GSPO among them: SkyRL has its variant with advantages per token."""
    pytest.importorskip("skyrl", reason="asks SkyRL's own losses")
    skyrl = SkyRL(True, monkeypatch)
    algorithm, found = skyrl.cfg.trainer.algorithm, {}
    for kind in skyrl.ppo_utils.PolicyLossType:
        algorithm.policy_loss_type = str(kind)
        found[str(kind)] = follows_tokens(skyrl.ppo_utils.PolicyLossRegistry.get(kind), algorithm)
    assert {name for name, follows in found.items() if not follows} == {"cross_entropy"}


@pytest.mark.parametrize(("name", "follows"), [("ppo", True), ("sequence", False), ("none", False)])
def test_the_loss_itself_is_asked(name: str, follows: bool) -> None:
    def sequence(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, **others: Any) -> tuple[Tensor, Any]:
        ratio = (log_probs - old_log_probs).mean(1, keepdim=True).exp()
        return (-ratio * advantages).sum(), {}

    def none(log_probs: Tensor, **others: Any) -> tuple[Tensor, Any]:
        return -log_probs.sum(), {}

    losses: dict[str, Any] = {"ppo": ppo_policy_loss, "sequence": sequence, "none": none}
    assert follows_tokens(losses[name], SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.2)) is follows


def test_a_loss_that_ignores_advantages_is_refused_at_construction(skyrl: SkyRL, flow: Any) -> None:
    if not skyrl.real:
        registry: Any = sys.modules["skyrl.backends.skyrl_train.utils.ppo_utils"]
        registry.PolicyLossRegistry["cross_entropy"] = lambda log_probs, **others: (-log_probs.sum(), {})
    skyrl.cfg.trainer.algorithm.policy_loss_type = "cross_entropy"
    with pytest.raises(ValueError, match="policy_loss_type=cross_entropy"):
        trainer(skyrl, flow())
    with pytest.raises(ValueError, match="takes_token_advantages"):
        refuse_silent_no_ops(skyrl.cfg)


def test_images_are_refused(skyrl: SkyRL, flow: Any) -> None:
    made = trainer(skyrl, flow())
    data = batch_of(made, generated(), UIDS)
    data["pixel_values"] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="text only"):
        made.compute_advantages_and_returns(data)


def test_a_wrong_configuration_ends_the_run_at_construction(skyrl: SkyRL, flow: Any) -> None:
    with pytest.raises(ValueError, match="no option of credits"):
        trainer(skyrl, flow(gian=2))


# --- the entry point --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(HAS_SKYRL, reason="skyrl is installed")
def test_without_skyrl_the_entry_point_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install \"skyrl\[fsdp\]\""):
        main()


def test_skyrl_finds_the_entry_point_and_it_builds_a_trainer_with_credits(
    flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skyrl", reason="runs SkyRL's own entry point")
    skyrl = SkyRL(True, monkeypatch)
    base = importlib.import_module("skyrl.train.entrypoints.main_base")
    utils = importlib.import_module("skyrl.train.utils.utils")
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(flow()))
    monkeypatch.setenv(ENVIRONMENT, str(path))
    quiet = "generator.inference_engine.enable_ray_prometheus_stats=false"
    arguments = ["trainer.override_entrypoint=flowgraph.adapters.skyrl", "trainer.epochs=7", quiet]
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    monkeypatch.setattr("skyrl.train.utils.validate_cfg", lambda cfg: None)
    monkeypatch.setattr(utils, "initialize_ray", lambda cfg: None)
    sent: list[Any] = []
    ray = importlib.import_module("ray")

    def take(function: Any) -> Any:
        sent.append(function)
        return SimpleNamespace(remote=lambda *given: sent.extend(given))

    monkeypatch.setattr(ray, "remote", lambda **options: take)
    monkeypatch.setattr(ray, "get", lambda reference: None)
    base.main()
    train, cfg, config = sent
    assert cfg.trainer.epochs == 7 and isinstance(config, ServiceConfig)

    made: list[Any] = []
    monkeypatch.setattr(base.BasePPOExp, "__init__", lambda self, cfg: setattr(self, "cfg", cfg))
    rest = dict.fromkeys(("tracker", "train_dataset", "eval_dataset", "inference_engine_client", "generator"))

    def run(self: Any) -> None:
        made.append(self.get_trainer(cfg=self.cfg, tokenizer=TOKENIZER, colocate_pg=None, **rest))

    monkeypatch.setattr(base.BasePPOExp, "run", run)
    train(cfg, config)
    assert isinstance(made[0], FlowMixin) and isinstance(made[0], skyrl.trainer)
    assert made[0].crediting.service == config
