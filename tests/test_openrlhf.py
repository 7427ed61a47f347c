"""Credits in OpenRLHF: right-padded batches, advantages shifted by one, its loss, and the way into its processes.

The mirrors follow openrlhf 0.11.2 line by line and name what they follow. Where openrlhf is importable the same tests
run on its own experience maker, samples, replay buffer and loss; what it imports of flash-attn and vLLM, which need a
GPU, is replaced by nothing that works.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from flowgraph.adapters import openrlhf as adapter
from flowgraph.adapters.openrlhf import HOOK, TRAINER, FlowMixin
from flowgraph.adapters.service import ENVIRONMENT
from tests.written import TOKENIZER, ids, is_mark, marked

pytestmark = pytest.mark.usefixtures("one_thread")

GAIN = 3.0
PROMPTS = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False), marked(5, 2)]
REWARDS = [1.0, 0.0, 2.0, 0.0]
MAX_LEN = 200

# --- OpenRLHF and its mirror ------------------------------------------------------------------------------------------


@dataclass
class Experience:
    """openrlhf/trainer/ppo_utils/experience.py: Experience, and concat_experiences."""

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    rewards: Tensor
    truncated: Tensor
    response_length: Tensor
    info: dict[str, Tensor]
    index: list[int] = field(default_factory=list)
    mm_train_inputs: list[Any] = field(default_factory=list)
    kl: Any = None
    values: Any = None
    advantages: Any = None
    returns: Any = None

    @classmethod
    def concat_experiences(cls, items: list[Experience], pad_token_id: int) -> Experience:
        """Pads on the right: pad_token_id in sequences, 0 elsewhere."""
        merged: dict[str, Any] = {}
        for name in (one.name for one in fields(cls)):
            values = [getattr(item, name) for item in items]
            if isinstance(values[0], list):
                merged[name] = list(itertools.chain.from_iterable(values))
            elif isinstance(values[0], dict):
                merged[name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
            elif values[0] is not None:
                width = max(value.shape[-1] for value in values)
                pad = pad_token_id if name == "sequences" else 0
                wide = [torch.nn.functional.pad(v, (0, width - v.shape[-1]), value=pad) for v in values]
                merged[name] = torch.cat(wide if values[0].ndim > 1 else values)
        return cls(**merged)


class SamplesGenerator:
    def _process_response_into_experience(self, response: dict[str, Any], max_len: int) -> Experience:
        """openrlhf/trainer/ppo_utils/samples_generator.py, the same."""
        sequences = torch.tensor(response["observation_tokens"])
        attention_mask, action_mask = torch.ones_like(sequences), torch.zeros_like(sequences)
        for start, end in response["action_ranges"]:
            action_mask[start:end] = 1
        sequences, attention_mask = sequences[:max_len], attention_mask[:max_len]
        clipped = torch.tensor([len(sequences) >= max_len])
        return Experience(
            sequences=sequences[None],
            attention_mask=attention_mask[None],
            action_mask=action_mask[1:max_len][None],
            rewards=torch.tensor([response["reward"]]),
            truncated=torch.tensor([response["truncated"]]),
            response_length=action_mask.sum()[None],
            info={"response_clip_ratio": clipped, "reward": torch.tensor([response["reward"]])},
            mm_train_inputs=[response["mm_train_inputs"]],
        )


class RemoteExperienceMaker:
    """openrlhf/trainer/ppo_utils/experience_maker.py, as far as advantages go, for reinforce_baseline."""

    def __init__(self, actor: Any, critic: Any, reward: Any, initial: Any, kl: Any, strategy: Any, tokenizer: Any):
        self.args = strategy.args

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        order = torch.tensor([place for one in experiences for place in one.index])
        raw = torch.cat([one.rewards for one in experiences])
        rewards = torch.empty_like(raw)
        rewards[order] = raw
        rewards = rewards.reshape(-1, self.args.rollout.n_samples_per_prompt)
        rewards = (rewards - rewards.mean(-1, keepdim=True)).reshape(-1)[order]
        for one, reward in zip(experiences, rewards.split([len(e.index) for e in experiences]), strict=True):
            # compute_reward puts the reward at the last action, get_cumulative_returns with gamma 1 sums it up.
            last = one.action_mask.shape[1] - 1 - one.action_mask.long().fliplr().argmax(1)
            at_last = torch.zeros(one.action_mask.shape).scatter_(1, last[:, None], reward[:, None])
            one.returns = (at_last * one.action_mask).flip(1).cumsum(1).flip(1)
            one.advantages = one.returns.clone()
        mask = torch.cat([one.action_mask.flatten() for one in experiences])
        flat = torch.cat([one.advantages.flatten() for one in experiences])
        mean = (flat * mask).sum() / mask.sum()
        rstd = (((flat - mean) ** 2 * mask).sum() / mask.sum()).clamp(min=1e-8).rsqrt()
        for one in experiences:
            one.advantages = (one.advantages - mean) * rstd  # prompts and pads are no longer 0
        return experiences


class PolicyLoss:
    def __call__(self, log_probs: Tensor, old: Tensor, advantages: Tensor, action_mask: Tensor) -> tuple[Tensor, ...]:
        """openrlhf/models/loss.py: PolicyLoss "ppo" with token-mean, and masked_mean."""
        ratio = (log_probs - old).clamp(-20, 20).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return ((loss * action_mask).sum() / action_mask.sum(),)


HAS_OPENRLHF = importlib.util.find_spec("openrlhf") is not None
NEED_A_GPU = ["flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"]
NEED_A_GPU += ["vllm", "vllm.inputs", "vllm.utils"]
MISSING = [name for name in NEED_A_GPU if importlib.util.find_spec(name.split(".")[0]) is None]


@pytest.fixture(params=["mirror", "openrlhf"])
def openrlhf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Experience, SamplesGenerator, RemoteExperienceMaker, PolicyLoss: OpenRLHF's own or the mirrors."""
    if request.param == "mirror":
        found = SimpleNamespace(real=False, Experience=Experience, SamplesGenerator=SamplesGenerator)
        return SimpleNamespace(**vars(found), RemoteExperienceMaker=RemoteExperienceMaker, PolicyLoss=PolicyLoss)
    if not HAS_OPENRLHF:
        pytest.skip("openrlhf is not installed")
    for name in MISSING:
        module = MagicMock()
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(
        real=True,
        Experience=importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience,
        SamplesGenerator=importlib.import_module("openrlhf.trainer.ppo_utils.samples_generator").SamplesGenerator,
        RemoteExperienceMaker=importlib.import_module(
            "openrlhf.trainer.ppo_utils.experience_maker"
        ).RemoteExperienceMaker,
        PolicyLoss=importlib.import_module("openrlhf.models.loss").PolicyLoss,
    )


# --- a step as OpenRLHF makes it --------------------------------------------------------------------------------------


@pytest.fixture
def configure(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write the configuration of credits and name it in the environment, as a user does."""

    def write(model: str = "by_hand", **flow: Any) -> None:
        flow = {"answer": r"re:=(\d)", "preset": "paper", "gain": GAIN} | flow
        path = tmp_path / "flow.json"
        path.write_text(json.dumps({"model": models[model], "device": "cpu", "flow": flow}))
        monkeypatch.setenv(ENVIRONMENT, str(path))

    write()
    return write


def arguments(samples_per_prompt: int = 2, loss: str = "ppo") -> Any:
    advantage = SimpleNamespace(estimator="reinforce_baseline", gamma=1.0, lambd=1.0, no_std_norm=False)
    return SimpleNamespace(
        actor=SimpleNamespace(policy_loss_type=loss),
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
        rollout=SimpleNamespace(n_samples_per_prompt=samples_per_prompt),
    )


def maker(openrlhf: Any, args: Any = None, credits: bool = True) -> Any:
    bases = (FlowMixin, openrlhf.RemoteExperienceMaker) if credits else (openrlhf.RemoteExperienceMaker,)
    strategy = SimpleNamespace(args=args or arguments())
    made = type("Maker", bases, {})(None, None, None, None, SimpleNamespace(value=0.0), strategy, TOKENIZER)
    return made


def response(prompt: str, said: list[int], reward: float, holes: tuple[int, ...] = ()) -> dict[str, Any]:
    """What an executor of openrlhf/utils/agent.py returns; a hole is a token that the environment wrote."""
    start = ids(prompt, end=False)
    kept = [len(start) + n for n in range(len(said)) if n not in holes]
    return {
        "prompt": prompt,
        "label": "",
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": start + said,
        "action_ranges": [(place, place + 1) for place in kept],
        "rollout_log_probs": None,
        "reward": reward,
        "scores": reward,
        "truncated": not said or said[-1] != TOKENIZER.eos_token_id,
        "extra_logs": {},
    }


def experiences(openrlhf: Any, responses: list[dict[str, Any]]) -> list[Any]:
    """split_rollout_samples by two, in the order of a balanced batch, and make_experience without its models."""
    samples = [
        openrlhf.SamplesGenerator._process_response_into_experience(None, one, max_len=MAX_LEN) for one in responses
    ]
    for number, one in enumerate(samples):
        one.index = [number]
    samples.sort(key=lambda one: -one.sequences.shape[1])
    pairs = [samples[n : n + 2] for n in range(0, len(samples), 2)]
    batches = [openrlhf.Experience.concat_experiences(pair, TOKENIZER.pad_token_id) for pair in pairs]
    for one in batches:
        one.kl = torch.zeros(one.action_mask.shape)
    return batches


def four(openrlhf: Any) -> list[Any]:
    return experiences(openrlhf, [response(*one) for one in zip(PROMPTS, RESPONSES, REWARDS, strict=True)])


def marks(batch: Any, gain: float = GAIN) -> Tensor:
    """[B, T-1] the gain at the marked token of each response, else 1."""
    return torch.where(is_mark(batch.sequences)[:, 1:] & batch.action_mask.bool(), gain, 1.0)


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_marked_token_and_no_other_gets_the_gain(openrlhf: Any, configure: Any) -> None:
    plain = maker(openrlhf, credits=False).compute_advantages_and_returns(four(openrlhf))
    found = maker(openrlhf).compute_advantages_and_returns(four(openrlhf))
    for batch, before in zip(found, plain, strict=True):
        assert (marks(batch) == GAIN).sum(1).tolist() == [1, 1]
        assert torch.equal(batch.advantages, before.advantages * marks(batch))
        assert (batch.advantages[batch.action_mask.bool()] != 0).all()


def test_what_the_environment_wrote_keeps_its_advantage(openrlhf: Any, configure: Any) -> None:
    both = [response("?", ids("a@b@=7"), 1.0, holes=(1,)), response(";", marked(3, 2), 0.0)]
    batch = maker(openrlhf).compute_advantages_and_returns(experiences(openrlhf, both))[0]
    row = next(n for n, tokens in enumerate(batch.sequences) if is_mark(tokens).sum() == 2)
    factors = marks(batch)[row]
    assert (factors == GAIN).nonzero().flatten().tolist() == [3]  # the second "@", one column before its place
    plain = maker(openrlhf, credits=False).compute_advantages_and_returns(experiences(openrlhf, both))[0]
    assert torch.equal(batch.advantages[row], plain.advantages[row] * factors)


def test_credits_are_still_at_their_tokens_after_the_replay_buffer(openrlhf: Any, configure: Any) -> None:
    if not openrlhf.real:
        pytest.skip("asks OpenRLHF's own replay buffer")
    module = importlib.import_module("openrlhf.trainer.ppo_utils.experience")
    for batch in maker(openrlhf).compute_advantages_and_returns(four(openrlhf)):
        singles = module.remove_padding_in_sequences(module.split_experience_batch(batch))
        again = module.make_experience_batch(singles[::-1])
        largest = again.advantages.abs().masked_fill(~again.action_mask.bool(), 0).argmax(1)
        assert torch.equal(largest, marks(again).argmax(1))


# --- what stays -------------------------------------------------------------------------------------------------------


def loss_and_gradient(batch: Any, openrlhf: Any) -> list[Tensor]:
    torch.manual_seed(0)
    log_probs = torch.randn(batch.advantages.shape).mul(0.1).requires_grad_()
    loss = openrlhf.PolicyLoss()(log_probs, torch.zeros_like(log_probs), batch.advantages, batch.action_mask)[0]
    return [loss.detach(), *torch.autograd.grad(loss, log_probs)]


def test_factors_of_one_change_nothing(openrlhf: Any, configure: Any) -> None:
    configure("random", gain=1.0)
    plain = maker(openrlhf, credits=False).compute_advantages_and_returns(four(openrlhf))
    for batch, before in zip(maker(openrlhf).compute_advantages_and_returns(four(openrlhf)), plain, strict=True):
        assert torch.equal(batch.advantages, before.advantages)
        for found, wanted in zip(loss_and_gradient(batch, openrlhf), loss_and_gradient(before, openrlhf), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_gradient_of_a_token_is_the_plain_one_times_its_factor(openrlhf: Any, configure: Any) -> None:
    plain = maker(openrlhf, credits=False).compute_advantages_and_returns(four(openrlhf))
    for batch, before in zip(maker(openrlhf).compute_advantages_and_returns(four(openrlhf)), plain, strict=True):
        wanted = loss_and_gradient(before, openrlhf)[1] * marks(batch)
        torch.testing.assert_close(loss_and_gradient(batch, openrlhf)[1], wanted)
        assert torch.equal(batch.returns, before.returns)


# --- bad samples, steps, logs -----------------------------------------------------------------------------------------


def test_a_step_with_bad_samples_works_and_says_so(openrlhf: Any, configure: Any) -> None:
    said = [marked(3, 2), ids("no answer here"), marked(60, 40)[:-3], marked(60, 40), [], marked(5, 1)]
    rewards = [1.0, 1.0, -1.0, 1.0, 2.0, 0.0]
    prompts = ["?", "?;", ";", ";;", "?", "?"]

    def step(credits: bool) -> tuple[Any, list[Any]]:
        args = arguments(samples_per_prompt=6)
        args.algo.advantage.estimator = "group_norm" if openrlhf.real else "reinforce_baseline"
        made = maker(openrlhf, args, credits)
        batch = experiences(openrlhf, [response(*one) for one in zip(prompts, said, rewards, strict=True)])
        return made, made.compute_advantages_and_returns(batch)

    made, found = step(True)
    for batch, before in zip(found, step(False)[1], strict=True):
        answered = is_mark(batch.sequences).any(1) & ~batch.truncated
        factors = torch.where(answered[:, None], marks(batch), 1.0)
        assert torch.equal(batch.advantages, before.advantages * factors)
    shares = {name: made.flow_metrics[f"flow/{name}"] for name in ("scored", "no_answer", "cut_off", "empty", "failed")}
    assert shares == pytest.approx({"scored": 1, "no_answer": 2 / 6, "cut_off": 1 / 6, "empty": 1 / 6, "failed": 0})


def test_a_response_that_was_clipped_to_the_context_is_cut_off(openrlhf: Any, configure: Any) -> None:
    both = [response("?", marked(300, 4), 1.0), response("?", marked(3, 4), 0.0)]
    made = maker(openrlhf)
    made.compute_advantages_and_returns(experiences(openrlhf, both))
    assert made.flow_metrics["flow/cut_off"] == 0.5


def test_warm_up_follows_the_step_of_the_trainer(openrlhf: Any, configure: Any) -> None:
    configure(warmup_steps=4)
    plain = maker(openrlhf, credits=False).compute_advantages_and_returns(four(openrlhf))
    made = maker(openrlhf)
    for step, part in ((0, 0.0), (1, 0.25)):
        made.flow_step = step
        for batch, before in zip(made.compute_advantages_and_returns(four(openrlhf)), plain, strict=True):
            assert torch.equal(batch.advantages, before.advantages * marks(batch, 1 + (GAIN - 1) * part))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_one_ratio_per_response_is_refused_at_construction(openrlhf: Any, configure: Any) -> None:
    with pytest.raises(ValueError, match="one ratio per response"):
        maker(openrlhf, arguments(loss="gspo"))


def test_images_are_refused(openrlhf: Any, configure: Any) -> None:
    batches = four(openrlhf)
    batches[0].mm_train_inputs = [None, {"pixel_values": 1}]
    with pytest.raises(ValueError, match="text only"):
        maker(openrlhf).compute_advantages_and_returns(batches)


# --- into OpenRLHF's processes ----------------------------------------------------------------------------------------

FAKE = {
    "openrlhf/__init__.py": "",
    "openrlhf/trainer/__init__.py": "",
    "openrlhf/trainer/ppo_trainer.py": """
import types
import ray

class RemoteExperienceMaker:
    def __init__(self, *groups):
        self.args = types.SimpleNamespace(actor=types.SimpleNamespace(policy_loss_type="ppo"))

    def compute_advantages_and_returns(self, experiences):
        return experiences

    def make_experience_batch(self, samples):
        return self.compute_advantages_and_returns(samples)

class BasePPOTrainer:
    def __init__(self):
        self.experience_maker = RemoteExperienceMaker()

    def train_step(self, rollout_samples, global_step):
        self.experience_maker.make_experience_batch(rollout_samples)
        return {"kl": 0.0}, global_step + 1

@ray.remote
class PPOTrainer(BasePPOTrainer):
    def fit(self):
        status, step = self.train_step([], 3)
        return type(self.experience_maker).__name__, status, step, self.experience_maker.flow_step
""",
    "openrlhf/cli/__init__.py": "",
    "openrlhf/cli/train_ppo_ray.py": """
import sys
import ray

if __name__ == "__main__":
    if not ray.is_initialized():
        ray.init()
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    print("FIT", *ray.get(PPOTrainer.remote().fit.remote()), sys.argv[1:])
""",
}
"""As OpenRLHF is laid out: a Ray actor, made of a class of the module that is patched, does the training."""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    for name, text in FAKE.items():
        path = tmp_path / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "fake"


@pytest.fixture
def trainer_module(fake: Path, monkeypatch: pytest.MonkeyPatch, configure: Any) -> Iterator[Callable[[], ModuleType]]:
    """Imports the fake TRAINER in this process, afresh."""
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(fake))
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "openrlhf"}
    for name in kept:
        del sys.modules[name]
    finders = list(sys.meta_path)
    yield lambda: importlib.import_module(TRAINER)
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize("before", [True, False])
def test_the_maker_is_replaced_whether_the_trainer_was_imported_before_or_after(
    before: bool, trainer_module: Any
) -> None:
    if before:
        trainer_module()
    adapter.install()
    adapter.install()
    module = trainer_module()
    made = module.BasePPOTrainer()
    assert isinstance(made.experience_maker, FlowMixin)
    assert type(made.experience_maker).__mro__.count(FlowMixin) == 1
    status, after = made.train_step([], 5)
    assert (made.experience_maker.flow_step, after, status["kl"]) == (5, 6, 0.0)
    assert status["flow/scored"] == 0


def test_other_imports_are_left_alone(trainer_module: Any) -> None:
    adapter.install()
    importlib.import_module("openrlhf.cli.train_ppo_ray")
    assert TRAINER not in sys.modules
    assert any(isinstance(one, adapter._AfterImport) for one in sys.meta_path)


JOBS: dict[str, dict[str, Any] | None] = {
    "no job": None,
    "a job": {"env_vars": {ENVIRONMENT: "", "NCCL_DEBUG": "INFO"}},
    "a job with the hook": {"env_vars": {ENVIRONMENT: ""}, "worker_process_setup_hook": HOOK},
}
"""What `ray job submit --runtime-env-json` was told; the configuration of the test goes in."""


def job_config(job: dict[str, Any] | None) -> dict[str, str]:
    """The variable by which Ray tells the process that it starts for a job."""
    if job is None:
        return {}
    variables = job["env_vars"] | {ENVIRONMENT: os.environ[ENVIRONMENT]}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": job | {"env_vars": variables}, "metadata": {}})}


@pytest.mark.parametrize("job", JOBS)
def test_ray_is_told_all_of_it_once(job: str, configure: Any) -> None:
    runtime_env = pytest.importorskip("ray.runtime_env.runtime_env")
    environ = job_config(JOBS[job])
    of_the_job = json.loads(next(iter(environ.values())))["runtime_env"] if environ else {}
    merged = runtime_env._merge_runtime_env(of_the_job, adapter.ray_settings({**os.environ, **environ}))
    assert merged["worker_process_setup_hook"] == HOOK
    assert merged["env_vars"][ENVIRONMENT] == os.environ[ENVIRONMENT]
    assert merged["env_vars"]["NCCL_DEBUG"] == ("INFO" if job == "a job" else "WARN")


def test_another_hook_of_the_job_is_named(configure: Any) -> None:
    environ = job_config({"env_vars": {}, "worker_process_setup_hook": "mine.setup"})
    with pytest.raises(ValueError, match=r"setup_hook=mine.setup.* call flowgraph.adapters.openrlhf.install"):
        adapter.ray_settings({**os.environ, **environ})


def test_another_configuration_of_the_job_is_named(configure: Any) -> None:
    environ = job_config({"env_vars": {}})
    with pytest.raises(
        ValueError, match=f"{ENVIRONMENT} is .* in the runtime_env of the job, .* and mine.yaml in this"
    ):
        adapter.ray_settings({**os.environ, **environ, ENVIRONMENT: "mine.yaml"})


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_launcher_reaches_the_actor_that_trains(job: str, fake: Path, configure: Any) -> None:
    pytest.importorskip("ray")
    root = Path(adapter.__file__).resolve().parents[1]
    path = os.pathsep.join([str(fake), str(root)])
    done = subprocess.run(
        [sys.executable, "-m", "flowgraph.adapters.openrlhf", "--actor.x", "1"],
        env=os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | job_config(JOBS[job]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FIT")), done.stderr[-3000:])
    assert line.startswith("FIT FlowExperienceMaker {'kl': 0.0, 'flow/scored': 0.0"), line
    assert line.endswith("4 3 ['--actor.x', '1']")


def test_a_wrong_configuration_ends_the_launcher_before_anything_starts(
    trainer_module: Any, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(gian=2)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match="no option of credits"):
        adapter.main()


@pytest.mark.skipif(HAS_OPENRLHF, reason="openrlhf is installed")
def test_without_openrlhf_the_launcher_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="pip install openrlhf"):
        adapter.main()


def test_the_hook_has_a_name_that_ray_can_import_without_torch() -> None:
    module, _, name = HOOK.rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter.install
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
