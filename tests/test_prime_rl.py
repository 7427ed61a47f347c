"""Credits in prime-rl: the same tests on fakes that mirror its source and, where it is installed, on the real one.

The fakes mirror PrimeIntellect-ai/prime-rl 0.8.0, commit 559b447, and its verifiers 0.3.1; each says which class.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.adapters import prime_rl
from flowgraph.rl import Crediting, FlowConfig, Scorer
from tests.written import ANSWERS, TOKENIZER, ids, is_mark, marked, written_by_hand

HAS_PRIME_RL = importlib.util.find_spec("prime_rl") is not None and importlib.util.find_spec("verifiers") is not None

needs_prime_rl = pytest.mark.skipif(
    not HAS_PRIME_RL, reason="needs prime-rl from github.com/PrimeIntellect-ai/prime-rl and its verifiers"
)

Turn = tuple[str | list[int], bool]
"""Text or ids of a message, and whether the model wrote it."""

SCAFFOLD = "<a>"
"""What a chat template puts before the model's tokens; part of the assistant's message, never sampled."""


# --- fakes ------------------------------------------------------------------------------------------------------------


@dataclass
class FakeNode:
    """verifiers/v1/graph.py, MessageNode."""

    token_ids: list[int]
    mask: list[bool]
    sampled: bool
    parent: int | None
    advantages: list[float] | None = None


@dataclass
class FakeBranch:
    """verifiers/v1/trace.py, Branch: a path from the root to a leaf."""

    nodes: list[FakeNode]
    multi_modal_data: Any = None

    @property
    def token_ids(self) -> list[int]:
        return [token for node in self.nodes for token in node.token_ids]

    @property
    def sampled_mask(self) -> list[bool]:
        return [said for node in self.nodes for said in node.mask]

    @property
    def advantages(self) -> list[float] | None:
        if all(node.advantages is None for node in self.nodes):
            return None
        values: list[float] = []
        for node in self.nodes:
            own = iter(node.advantages or [])
            values += [next(own, 0.0) if said else 0.0 for said in node.mask]
        return values


@dataclass
class FakeTrace:
    """verifiers/v1/trace.py, Trace."""

    nodes: list[FakeNode]
    reward: float
    is_truncated: bool = False
    has_error: bool = False
    id: str = "trace"
    metrics: dict[str, float] = field(default_factory=dict)
    agent: Any = field(default_factory=lambda: SimpleNamespace(trainable=True, name="agent"))

    @property
    def branches(self) -> list[FakeBranch]:
        parents = {node.parent for node in self.nodes}
        return [FakeBranch(self._path(leaf)) for leaf in range(len(self.nodes)) if leaf not in parents]

    def _path(self, at: int | None) -> list[FakeNode]:
        path: list[FakeNode] = []
        while at is not None:
            path.insert(0, self.nodes[at])
            at = self.nodes[at].parent
        return path


def fake_trainable_traces(episodes: list[Any]) -> Iterator[tuple[Any, Any]]:
    """src/prime_rl/orchestrator/algo/base.py, iter_trainable_traces."""
    for episode in episodes:
        for trace in episode.traces:
            if not trace.has_error and trace.agent.trainable and any(any(node.mask) for node in trace.nodes):
                yield episode, trace


def fake_trainable_branches(trace: Any) -> Iterator[tuple[Any, list[bool]]]:
    """src/prime_rl/orchestrator/trajectories.py, iter_trainable_branches: a shared node trains in its first branch."""
    seen: set[int] = set()
    for branch in trace.branches:
        mask: list[bool] = []
        for node in branch.nodes:
            fresh = node.sampled and any(node.mask) and id(node) not in seen
            mask += list(node.mask) if fresh or not node.sampled else [False] * len(node.mask)
            if fresh:
                seen.add(id(node))
        if any(mask):
            yield branch, mask


class FakeAlgorithm:
    """src/prime_rl/orchestrator/algo/base.py and grpo.py: the reward less the group's mean, at every sampled token."""

    action_loss_type = "rl"

    async def score_group(self, episodes: list[Any]) -> None:
        traces = [trace for _, trace in fake_trainable_traces(episodes)]
        mean = sum(trace.reward for trace in traces) / len(traces)
        for trace in traces:
            for node in trace.nodes:
                if any(node.mask):
                    node.advantages = [trace.reward - mean] * sum(node.mask)

    async def finalize_group(self, episodes: list[Any]) -> None:
        await self.score_group(episodes)


class FakeWorld:
    """prime-rl without prime-rl."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.algorithm_class: Any = type(
            "Algorithm", (FakeAlgorithm,), {"finalize_group": FakeAlgorithm.finalize_group}
        )
        modules: dict[str, dict[str, Any]] = {
            "prime_rl": {},
            "prime_rl.orchestrator": {},
            "prime_rl.orchestrator.algo": {
                "Algorithm": self.algorithm_class,
                "ALGORITHM_CLASSES": {"grpo": type("GRPOAlgorithm", (self.algorithm_class,), {})},
            },
            "prime_rl.orchestrator.algo.base": {"iter_trainable_traces": fake_trainable_traces},
            "prime_rl.orchestrator.trajectories": {"iter_trainable_branches": fake_trainable_branches},
            "prime_rl.orchestrator.utils": {"train_work": lambda episode: episode.work},
        }
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)

    def algorithm(self) -> Any:
        return sys.modules["prime_rl.orchestrator.algo"].ALGORITHM_CLASSES["grpo"]()

    def node(self, token_ids: list[int], mask: list[bool], sampled: bool, parent: int | None) -> Any:
        return FakeNode(token_ids, mask, sampled, parent)

    def episode(self, nodes: list[Any], reward: float, truncated: bool, step: int) -> Any:
        trace = FakeTrace(nodes, reward, truncated)
        return SimpleNamespace(traces=[trace], work=SimpleNamespace(step=step))

    def samples(self, trace: Any) -> list[Any]:
        """trajectories.py, trace_to_samples."""
        return [
            SimpleNamespace(token_ids=branch.token_ids, mask=mask, advantages=branch.advantages)
            for branch, mask in fake_trainable_branches(trace)
        ]

    def loss(self, log_probs: Tensor, behaved: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """src/prime_rl/trainer/rl/loss.py, default_loss_fn, away from its trust region."""
        return (-(mask * advantages * (log_probs - behaved).exp()) + 1e-3 * mask * (log_probs - behaved) ** 2).sum()


class RealWorld:
    """The real prime-rl and verifiers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from prime_rl.orchestrator.algo import Algorithm

        self.algorithm_class: Any = Algorithm
        monkeypatch.setattr(Algorithm, "finalize_group", Algorithm.finalize_group)  # put back after the test

    def algorithm(self) -> Any:
        from prime_rl.configs.algorithm import GRPOAlgoConfig
        from prime_rl.orchestrator.algo import GRPOAlgorithm

        return GRPOAlgorithm(GRPOAlgoConfig(), policy_pool=None)

    def node(self, token_ids: list[int], mask: list[bool], sampled: bool, parent: int | None) -> Any:
        import verifiers.v1 as vf

        message = vf.AssistantMessage(content="a") if sampled else vf.UserMessage(content="u")
        logprobs = [-0.1] * sum(mask)
        return vf.MessageNode(
            message=message, token_ids=token_ids, mask=mask, logprobs=logprobs, sampled=sampled, parent=parent
        )

    def episode(self, nodes: list[Any], reward: float, truncated: bool, step: int) -> Any:
        import verifiers.v1 as vf

        trace = vf.Trace[vf.TaskData](
            task=vf.TraceTask(type="Task", data=vf.TaskData(idx=0, prompt=None)),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=nodes,
            calls=[vf.ModelCall(node=len(nodes) - 1, finish_reason="length" if truncated else "stop")],
            rewards={"reward": vf.Reward(score=reward)},
            ok=True,
        )
        return vf.Episode(
            env=vf.EnvInfo(id="test", name="test"),
            task=trace.task,
            group=vf.GroupInfo(id="group"),
            run=vf.TrainRunInfo(id="run", work=vf.TrainWorkInfo(step=step)),
            traces=[trace],
        )

    def samples(self, trace: Any) -> list[Any]:
        from prime_rl.orchestrator.trajectories import trace_to_samples

        return list(trace_to_samples(trace))

    def loss(self, log_probs: Tensor, behaved: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        from prime_rl.configs.trainer import DefaultLossConfig
        from prime_rl.trainer.rl.loss import LossInputs, default_loss_fn

        inputs = LossInputs(log_probs, behaved, None, advantages, mask)
        return default_loss_fn(inputs, DefaultLossConfig()).loss


@pytest.fixture(params=["fake", "real"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "fake":
        return FakeWorld(monkeypatch)
    if not HAS_PRIME_RL:
        pytest.skip("needs prime-rl from github.com/PrimeIntellect-ai/prime-rl and its verifiers")
    return RealWorld(monkeypatch)


def rollout(world: Any, turns: Sequence[Turn], reward: float, truncated: bool = False, step: int = 1) -> Any:
    """An episode of one trace whose messages follow each other."""
    nodes: list[Any] = []
    for text, said in turns:
        nodes.append(message(world, text, said, len(nodes) - 1 if nodes else None))
    return world.episode(nodes, reward, truncated, step)


def message(world: Any, text: str | list[int], said: bool, parent: int | None) -> Any:
    tokens = ids(text, end=False) if isinstance(text, str) else text
    scaffold = ids(SCAFFOLD, end=False) if said else []
    mask = [False] * len(scaffold) + [said] * len(tokens)
    return world.node(scaffold + tokens, mask, said, parent)


def by_hand(**changes: Any) -> Crediting:
    defaults = {"answer": ANSWERS, "preset": "paper", "gain": 3.0}
    return Crediting(Scorer(written_by_hand(), TOKENIZER, FlowConfig(**{**defaults, **changes})))


def group(world: Any) -> list[Any]:
    """Rewards 3, 1 and -1: advantages 2, 0 and -2."""
    return [
        rollout(world, [("?", False), (marked(3, 4), True)], 3.0),
        rollout(world, [(";;;;", False), (marked(1, 1), True)], 1.0),
        rollout(world, [("?;?;;", False), (marked(9, 0), True)], -1.0),
    ]


def finalize(world: Any, episodes: list[Any], crediting: Crediting | None) -> list[Any]:
    """As TrainSink.process_group awaits it; the samples that the trainer then gets."""
    hook = world.algorithm_class.finalize_group
    if crediting is not None:
        hook = prime_rl.with_credits(hook, crediting)
    asyncio.run(hook(world.algorithm(), episodes))
    return [sample for episode in episodes for trace in episode.traces for sample in world.samples(trace)]


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_marked_token_gets_the_gain_and_no_other(world: Any) -> None:
    samples = finalize(world, group(world), by_hand())
    plain = finalize(world, group(world), None)
    for number, (sample, before) in enumerate(zip(samples, plain, strict=True)):
        own = is_mark(torch.tensor(sample.token_ids)) & torch.tensor(sample.mask)
        assert own.sum() == 1
        advantages = torch.tensor(before.advantages)
        assert torch.equal(torch.tensor(sample.advantages), torch.where(own, 3 * advantages, advantages))
        assert advantages.abs().max() == (2, 0, 2)[number]


def test_tool_output_between_turns_gets_nothing(world: Any) -> None:
    turns: list[Turn] = [("?;", False), ("aa", True), ("?@", False), ("b@b=7", True)]
    (sample, _) = finalize(world, [rollout(world, turns, 1.0), rollout(world, turns[:2], -1.0)], by_hand())
    gained = [place for place, value in enumerate(sample.advantages) if value == 3.0]
    assert gained == [len("?;<a>aa?@<a>b")]
    assert [value != 0 for value in sample.advantages] == list(sample.mask)


def test_a_turn_that_two_branches_share_gets_the_factors_of_the_first(world: Any) -> None:
    # The root and the first answer are shared; then the history forks. Only the first branch trains the shared turn.
    nodes = [message(world, "?;", False, None), message(world, "a@a", True, 0)]
    nodes += [message(world, ";", False, 1), message(world, "bb=7", True, 2)]
    nodes += [message(world, ";;", False, 1), message(world, "c@=7", True, 4)]
    episodes = [world.episode(nodes, 1.0, False, 1), rollout(world, [("?", False), ("a", True)], -1.0)]
    first, second, _ = finalize(world, episodes, by_hand())
    assert sorted(set(first.advantages)) == [0.0, 1.0, 3.0]
    assert first.advantages.index(3.0) == len("?;<a>a")
    # In the second branch the shared "@" is context: its loss is masked. The branch's own "@" shares the flow with it.
    own = [a for a, trains in zip(second.advantages, second.mask, strict=True) if trains]
    assert len(own) == len("c@=7")
    assert own[1] == 3.0
    assert [own[0], *own[2:]] == [1.0, 1.0, 1.0]


def test_a_gain_of_1_changes_no_bit(world: Any) -> None:
    samples, plain = finalize(world, group(world), by_hand(gain=1.0)), finalize(world, group(world), None)
    for sample, before in zip(samples, plain, strict=True):
        assert sample.advantages == before.advantages
        for one, other in zip(loss_and_gradient(world, sample), loss_and_gradient(world, before), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_token_s_gradient_is_the_plain_one_times_its_factor(world: Any) -> None:
    samples, plain = finalize(world, group(world), by_hand()), finalize(world, group(world), None)
    for sample, before in zip(samples, plain, strict=True):
        own = is_mark(torch.tensor(sample.token_ids)) & torch.tensor(sample.mask)
        gradient, was = loss_and_gradient(world, sample)[1], loss_and_gradient(world, before)[1]
        torch.testing.assert_close(gradient, torch.where(own, 3 * was, was))


def loss_and_gradient(world: Any, sample: Any) -> tuple[Tensor, Tensor]:
    log_probs = torch.full((len(sample.token_ids),), -1.0, requires_grad=True)
    advantages, mask = torch.tensor(sample.advantages), torch.tensor(sample.mask)
    loss = world.loss(log_probs, log_probs.detach(), advantages, mask)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


# --- bad rollouts, the log --------------------------------------------------------------------------------------------


def test_bad_rollouts_cost_no_other(world: Any) -> None:
    episodes = [
        rollout(world, [("?", False), (marked(3, 4), True)], 5.0),
        rollout(world, [("?", False), ("no answer", True)], 5.0),
        rollout(world, [("?", False), (marked(2, 2, end=False), True)], -5.0, truncated=True),
        rollout(world, [("?", False), (marked(130, 60), True)], -5.0),
        rollout(world, [("?", False)], 0.0),  # nothing was generated
    ]
    samples = finalize(world, episodes, by_hand())
    assert len(samples) == 4
    for sample in samples:
        at = torch.tensor(sample.advantages).abs()
        assert torch.equal(at == 15, is_mark(torch.tensor(sample.token_ids)))
    metrics = episodes[0].traces[0].metrics
    assert metrics["flow/scored"] == 1.0
    assert metrics["flow/no_answer"] == 0.25
    assert metrics["flow/cut_off"] == 0.25
    assert not episodes[4].traces[0].metrics


def test_rollouts_without_an_advantage_are_not_scored(world: Any) -> None:
    episodes = group(world)
    finalize(world, episodes, by_hand())
    assert episodes[0].traces[0].metrics["flow/scored"] == pytest.approx(2 / 3)


def test_warm_up_follows_the_step_of_dispatch(world: Any) -> None:
    turns: list[Turn] = [("?", False), (marked(3, 4), True)]
    episodes = [rollout(world, turns, 1.0, step=2), rollout(world, turns, -1.0, step=2)]
    samples = finalize(world, episodes, by_hand(warmup_steps=4))
    assert max(samples[0].advantages) == 1 + 0.25 * 2


def test_the_event_loop_goes_on_meanwhile(world: Any) -> None:
    beats: list[int] = []

    async def both() -> None:
        async def beat() -> None:
            while True:
                beats.append(1)
                await asyncio.sleep(0.001)

        other = asyncio.create_task(beat())
        await asyncio.sleep(0)
        before = len(beats)
        await prime_rl.with_credits(world.algorithm_class.finalize_group, by_hand())(world.algorithm(), group(world))
        assert len(beats) > before
        other.cancel()

    asyncio.run(both())


def test_an_algorithm_that_reads_no_advantages_is_refused(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = world.algorithm()
    monkeypatch.setattr(type(algorithm), "action_loss_type", "ref_kl")
    with pytest.raises(ValueError, match="reads no advantages"):
        asyncio.run(prime_rl.with_credits(world.algorithm_class.finalize_group, by_hand())(algorithm, group(world)))


def test_an_algorithm_that_assigned_nothing_is_refused(world: Any) -> None:
    with pytest.raises(ValueError, match="assigned none"):
        prime_rl.put_credits_into(group(world), by_hand())


# --- how it is started ------------------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand()
    monkeypatch.setattr(prime_rl, "crediting", lambda source=None: made)


@pytest.mark.usefixtures("service")
def test_install_is_enough_and_twice_is_once(world: Any) -> None:
    prime_rl.install()
    prime_rl.install()
    samples = finalize(world, group(world), None)
    assert max(samples[0].advantages) == 6.0  # 2.0 times 3, not times 9


@pytest.mark.usefixtures("service")
def test_an_algorithm_that_would_pass_the_credits_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeWorld(monkeypatch)
    own = type("Mine", (world.algorithm_class,), {"finalize_group": lambda algorithm, episodes: None})
    sys.modules["prime_rl.orchestrator.algo"].ALGORITHM_CLASSES["mine"] = own
    with pytest.raises(TypeError, match="Mine has a finalize_group of its own"):
        prime_rl.install()


def test_without_prime_rl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prime_rl.orchestrator.algo", None)
    with pytest.raises(ImportError, match="PrimeIntellect-ai/prime-rl"):
        prime_rl.install()


def an_entry_point(monkeypatch: pytest.MonkeyPatch, name: str, main: Any, **contents: Any) -> ModuleType:
    """src/prime_rl/entrypoints/rl.py or orchestrator.py."""
    package, module = ModuleType("prime_rl.entrypoints"), ModuleType(f"prime_rl.entrypoints.{name}")
    vars(module).update({"main": main, **contents})
    setattr(package, name, module)
    monkeypatch.setitem(sys.modules, "prime_rl.entrypoints", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["before"])
    return module


@pytest.mark.usefixtures("service")
def test_the_orchestrator_starts_with_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeWorld(monkeypatch)
    seen: list[Any] = []
    an_entry_point(monkeypatch, "orchestrator", lambda: seen.append(list(sys.argv)))
    prime_rl.main(["orchestrator", "@", "orchestrator.toml"])
    assert seen == [["orchestrator", "@", "orchestrator.toml"]]
    assert hasattr(world.algorithm_class.finalize_group, "without_credits")


def test_the_launcher_starts_the_orchestrator_through_this_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    FakeWorld(monkeypatch)
    (tmp_path / "flow.yaml").write_text("model: some/model\n")
    monkeypatch.setenv("FLOWGRAPH_CONFIG", str(tmp_path / "flow.yaml"))
    started: list[Any] = []

    def main() -> None:
        module.Popen(["env-server", "@", "env.json"], env={})
        module.Popen(["orchestrator", "@", "orchestrator.json"], env={})
        module.Popen("tail -F log", shell=True)

    module = an_entry_point(monkeypatch, "rl", main, Popen=lambda command, **_: started.append(command), rl_slurm=None)
    prime_rl.main(["rl", "@", "rl.toml"])
    ours = [sys.executable, "-m", "flowgraph.adapters.prime_rl", "orchestrator", "@", "orchestrator.json"]
    assert started == [["env-server", "@", "env.json"], ours, "tail -F log"]
    with pytest.raises(ValueError, match="template"):
        module.rl_slurm(None)


def test_the_launcher_says_at_once_that_there_is_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorld(monkeypatch)
    monkeypatch.delenv("FLOWGRAPH_CONFIG", raising=False)
    an_entry_point(monkeypatch, "rl", lambda: pytest.fail("started"), Popen=None, rl_slurm=None)
    with pytest.raises(ValueError, match="FLOWGRAPH_CONFIG"):
        prime_rl.main(["rl", "@", "rl.toml"])


@pytest.mark.parametrize("arguments", [[], ["trainer"], ["@", "rl.toml"]])
def test_other_commands_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="usage"):
        prime_rl.main(arguments)


@needs_prime_rl
def test_the_real_launcher_has_what_is_replaced() -> None:
    from prime_rl.entrypoints import rl

    assert callable(rl.Popen)
    assert callable(rl.rl_slurm)
    assert 'orchestrator_cmd = ["orchestrator", "@"' in Path(rl.__file__).read_text(encoding="utf-8")


@needs_prime_rl
@pytest.mark.usefixtures("service")
def test_the_real_train_sink_ships_and_logs_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    from prime_rl.orchestrator.train_sink import TrainSink
    from prime_rl.orchestrator.types import Progress

    world = RealWorld(monkeypatch)
    prime_rl.install()
    env = SimpleNamespace(
        algorithm=world.algorithm(), sampling_args={"temperature": 1.0}, config=SimpleNamespace(group_size=3)
    )
    config = SimpleNamespace(
        max_off_policy_steps=8, train=SimpleNamespace(filter_zero_advantages=True), seq_len=512, batch_size=3
    )
    sink = TrainSink(
        config,
        tokenizer=TOKENIZER,
        train_envs=SimpleNamespace(get=lambda name: env),
        mm_token_type_ids_mapping=None,
        progress=Progress(step=1),
        batch_size=3,
        token_batch_size=None,
    )

    async def run() -> Any:
        batches = [await sink.add(episode) for episode in group(world)]
        return batches[-1]

    batch = asyncio.run(run())
    assert len(batch.samples) == 2  # the rollout with advantage 0 is not shipped
    for sample in batch.samples:
        assert (torch.tensor(sample.advantages).abs() == 6).tolist() == is_mark(torch.tensor(sample.token_ids)).tolist()
    logged = batch.episodes.metrics.to_wandb(prefix="train/agg", subset="all")
    (scored,) = (value for name, value in logged.items() if name.endswith("/metrics/flow/scored/mean"))
    assert scored == pytest.approx(2 / 3)
