"""Credits in slime: its hook, its zigzag slices, its loss, on its own code where it is installed and on mirrors of it.

The mirrors follow slime 0.3.1 (commit a6272da) line by line and name what they follow. Where slime is importable the
same tests run on slime's own functions; Megatron is replaced by its four answers about ranks either way.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from flowgraph.adapters import slime as adapter
from flowgraph.adapters.service import ENVIRONMENT
from tests.written import TOKENIZER, ids, is_mark, marked

pytestmark = pytest.mark.usefixtures("one_thread")

GAIN = 3.0
PROMPTS = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False), marked(5, 2)]
REWARDS = [1.0, -0.5, 2.0, -1.5]

LENGTHS_AND_MASK = ("total_length", "response_length", "loss_mask")

# --- Megatron and slime -----------------------------------------------------------------------------------------------


class Mpu(ModuleType):
    """What slime asks Megatron: one context-parallel group of all ranks, each rank a thread."""

    def __init__(self) -> None:
        super().__init__("megatron.core.mpu")

    def get_context_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_context_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_context_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_tensor_and_context_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_group(self, with_context_parallel: bool = False) -> Any:
        return dist.group.WORLD

    get_data_parallel_group_gloo = get_data_parallel_group

    def get_data_parallel_world_size(self, with_context_parallel: bool) -> int:
        return dist.get_world_size() if with_context_parallel else 1

    def get_data_parallel_src_rank(self, with_context_parallel: bool) -> int:
        return 0

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def is_pipeline_last_stage(self) -> bool:
        return True


class CpUtils(ModuleType):
    """slime/backends/megatron_utils/cp_utils.py"""

    def __init__(self, mpu: Mpu) -> None:
        super().__init__("slime.backends.megatron_utils.cp_utils")
        self.mpu = mpu

    def get_logits_and_tokens_offset_with_cp(self, total_length: int, response_length: int) -> Any:
        """As slime's: the first and the last chunks of 2 * cp_size belong to rank 0, and so on inwards."""
        cp_rank, cp_size = self.mpu.get_context_parallel_rank(), self.mpu.get_context_parallel_world_size()
        prompt_length = total_length - response_length
        chunk_size = (total_length + 2 * cp_size - 1) // (2 * cp_size)
        chunk_0 = (cp_rank * chunk_size, (cp_rank + 1) * chunk_size)
        chunk_1 = ((2 * cp_size - cp_rank - 1) * chunk_size, (2 * cp_size - cp_rank) * chunk_size)
        logits_0 = (max(chunk_0[0], prompt_length - 1), min(chunk_0[1], total_length - 1))
        logits_1 = (max(chunk_1[0], prompt_length - 1), min(chunk_1[1], total_length - 1))
        logits = [one if one[0] < one[1] else (0, 0) for one in (logits_0, logits_1)]
        tokens = [(a + 1, b + 1) if a < b else (0, 0) for a, b in logits]
        return chunk_size, (chunk_0, chunk_1), tuple(logits), tuple(tokens)

    def slice_log_prob_with_cp(self, log_prob: Tensor, total_length: int, response_length: int) -> Tensor:
        assert len(log_prob) == response_length
        if self.mpu.get_context_parallel_world_size() == 1:
            return log_prob
        first = total_length - response_length - 1
        _, _, (one, two), _ = self.get_logits_and_tokens_offset_with_cp(total_length, response_length)
        return torch.cat([log_prob[max(one[0] - first, 0) : max(one[1] - first, 0)],
                          log_prob[max(two[0] - first, 0) : max(two[1] - first, 0)]])  # fmt: skip

    def all_gather_with_cp(self, tensor: Tensor, total_length: int, response_length: int) -> Tensor:
        if self.mpu.get_context_parallel_world_size() == 1:
            return tensor
        first = total_length - response_length - 1
        _, _, offsets, _ = self.get_logits_and_tokens_offset_with_cp(total_length, response_length)
        full, taken = torch.zeros(response_length, dtype=tensor.dtype), 0
        for start, stop in offsets:
            if stop > start:
                full[start - first : stop - first] = tensor[taken : taken + stop - start]
                taken += stop - start
        dist.all_reduce(full, group=self.mpu.get_context_parallel_group())
        return full


HAS_SLIME = importlib.util.find_spec("slime") is not None and importlib.util.find_spec("slime.backends") is not None


@pytest.fixture(params=["mirror", "slime"])
def cp_utils(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """slime's module of context-parallel slices, its own or the mirror, over a Megatron of threads."""
    if request.param == "slime" and not HAS_SLIME:
        pytest.skip("slime is not installed (github.com/THUDM/slime; PyPI's slime is another package)")
    mpu, megatron, core = Mpu(), ModuleType("megatron"), ModuleType("megatron.core")
    core.mpu, megatron.core = mpu, core  # type: ignore[attr-defined]
    for module in (megatron, core, mpu):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if request.param == "slime":
        for name in [name for name in sys.modules if name.startswith("slime.backends")]:
            monkeypatch.delitem(sys.modules, name)  # they hold the mpu of the test before
        return importlib.import_module("slime.backends.megatron_utils.cp_utils")
    mirror = CpUtils(mpu)
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["slime.backends.megatron_utils"].cp_utils = mirror  # type: ignore[attr-defined]
    return mirror


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(rank)` on so many ranks, threads with torch.distributed between them; their results by rank."""
    found: dict[int, Any] = {}
    raised: list[BaseException] = []
    store = dist.HashStore()  # type: ignore[attr-defined]

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            found[rank] = work(rank)
        except BaseException as error:
            raised.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)

    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    isolate(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=600)
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate(False)
    if raised:
        raise raised[0]
    assert not late, f"ranks {late} have not ended after ten minutes"
    return [found[rank] for rank in range(size)]


# --- a step as slime makes it -----------------------------------------------------------------------------------------


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


def arguments(**changes: Any) -> Namespace:
    plain: dict[str, Any] = {
        "advantage_estimator": "grpo",
        "compute_advantages_and_returns": True,
        "loss_type": "policy_loss",
        "normalize_advantages": False,
        "kl_coef": 0.0,
        "use_rollout_logprobs": False,
        "use_opd": False,
        "custom_advantage_function_path": None,
    }
    return Namespace(**plain | changes)


def rollouts(
    prompts: list[str] = PROMPTS, responses: list[list[int]] = RESPONSES, rewards: list[float] = REWARDS
) -> dict[str, Any]:
    """`rollout_data` as it is after MegatronTrainRayActor._get_rollout_data."""
    tokens = [
        torch.tensor(ids(prompt, end=False) + response) for prompt, response in zip(prompts, responses, strict=True)
    ]
    return {
        "tokens": tokens,
        "total_lengths": [len(one) for one in tokens],
        "response_lengths": [len(one) for one in responses],
        "loss_masks": [torch.ones(len(one), dtype=torch.int) for one in responses],
        "rewards": rewards,
        "truncated": [int(not one or one[-1] != TOKENIZER.eos_token_id) for one in responses],
    }


def estimate(data: dict[str, Any], cp_utils: Any, args: Namespace | None = None) -> None:
    """slime/backends/megatron_utils/loss.py: compute_advantages_and_returns for grpo; slime's own where it is there.

    The advantages of a rollout are its reward over this rank's slice, and the returns are the very same tensors.
    """
    lengths = zip(data["total_lengths"], data["response_lengths"], strict=True)
    data["log_probs"] = [cp_utils.slice_log_prob_with_cp(torch.zeros(one[1]), *one) for one in lengths]
    if not isinstance(cp_utils, CpUtils):
        loss = importlib.import_module("slime.backends.megatron_utils.loss")
        loss.compute_advantages_and_returns(args or arguments(), data)
        return
    data["returns"] = [torch.ones_like(one) * r for one, r in zip(data["log_probs"], data["rewards"], strict=True)]
    data["advantages"] = list(data["returns"])


def step(data: dict[str, Any], cp_utils: Any, rollout_id: int = 0, **changes: Any) -> dict[str, Any]:
    """A step up to the loss on one rank."""
    args = arguments(**changes)

    def work(rank: int) -> dict[str, Any]:
        estimate(data, cp_utils, args)
        adapter.put_credits_into(args, rollout_id, data)
        return data

    return on_ranks(1, work)[0]


def responses_of(data: dict[str, Any]) -> list[Tensor]:
    return [one[len(one) - n :] for one, n in zip(data["tokens"], data["response_lengths"], strict=True)]


def expected(data: dict[str, Any]) -> list[Tensor]:
    """Advantages in which the marked token of each response has the gain and no other."""
    pairs = zip(responses_of(data), data["rewards"], strict=True)
    return [torch.where(is_mark(one), GAIN, 1.0) * reward for one, reward in pairs]


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_marked_token_and_no_other_gets_the_gain(cp_utils: Any, configure: Any) -> None:
    data = step(rollouts(), cp_utils)
    for found, wanted in zip(data["advantages"], expected(data), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_its_own_slice_of_a_parallel_context(size: int, cp_utils: Any, configure: Any) -> None:
    wanted = expected(rollouts())

    def work(rank: int) -> list[tuple[Tensor, Tensor]]:
        data = rollouts()
        estimate(data, cp_utils)
        adapter.put_credits_into(arguments(), 0, data)
        lengths = zip(data["total_lengths"], data["response_lengths"], strict=True)
        mine = [cp_utils.slice_log_prob_with_cp(one, *length) for one, length in zip(wanted, lengths, strict=True)]
        return list(zip(data["advantages"], mine, strict=True))

    ranks = on_ranks(size, work)
    for pairs in ranks:
        for found, mine in pairs:
            assert torch.equal(found, mine)
    for number, whole in enumerate(wanted):
        assert sum(len(pairs[number][0]) for pairs in ranks) == len(whole)


def test_what_ends_the_rank_that_scores_ends_the_others(
    cp_utils: Any, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("rewards")

    monkeypatch.setattr(adapter, "factors", broken)
    said: dict[int, str] = {}

    def work(rank: int) -> None:
        data = rollouts()
        estimate(data, cp_utils)
        try:
            adapter.put_credits_into(arguments(), 0, data)
        except Exception as error:
            said[rank] = f"{type(error).__name__}: {error}"

    on_ranks(2, work)
    assert said == {0: "KeyError: 'rewards'", 1: "RuntimeError: rank 0, which scores for this one: KeyError: 'rewards'"}


def test_an_advantage_that_only_another_rank_sees_counts(cp_utils: Any, configure: Any) -> None:
    configure(signs="negative")

    def work(rank: int) -> Tensor:
        data = rollouts(["?;"], [marked(20, 3)], [0.0])
        length = data["total_lengths"][0], data["response_lengths"][0]
        estimate(data, cp_utils)
        slices = data["advantages"] = [torch.zeros_like(data["advantages"][0])]
        marks = cp_utils.slice_log_prob_with_cp(is_mark(responses_of(data)[0]).float(), *length)
        slices[0] -= marks
        adapter.put_credits_into(arguments(), 0, data)
        return data["advantages"][0]

    assert sorted(float(one.min()) for one in on_ranks(2, work)) == [-GAIN, 0.0]


def test_tool_output_and_masked_samples_keep_their_advantages(cp_utils: Any, configure: Any) -> None:
    data = rollouts(["?", "?"], [ids("a@b@=7"), marked(3, 2)], [1.0, 1.0])
    data["loss_masks"][0][1] = 0  # the first "@" came from a tool
    data["loss_masks"][1][:] = 0  # as with remove_sample
    found = step(data, cp_utils)["advantages"]
    assert found[0].tolist() == [1, 1, 1, GAIN, 1, 1, 1]
    assert (found[1] == 1).all()


# --- what stays -------------------------------------------------------------------------------------------------------


def loss_and_gradient(data: dict[str, Any], cp_utils: Any) -> list[Tensor]:
    """policy_loss_function (loss.py) without KL and entropy: compute_policy_loss, then get_sum_of_sample_mean."""
    torch.manual_seed(0)
    log_probs = torch.randn(sum(data["response_lengths"])).mul(0.1).requires_grad_()
    ppo_kl = torch.zeros(len(log_probs)) - log_probs
    advantages = torch.cat(data["advantages"])

    def work(rank: int) -> Tensor:
        if not isinstance(cp_utils, CpUtils):
            ppo_utils = importlib.import_module("slime.utils.ppo_utils")
            per_token, _ = ppo_utils.compute_policy_loss(ppo_kl, advantages, 0.2, 0.28)
            reduce = cp_utils.get_sum_of_sample_mean(*(data[f"{name}s"] for name in LENGTHS_AND_MASK))
            return reduce(per_token)
        ratio = (-ppo_kl).exp()
        per_token = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages)
        rows = zip(per_token.split(data["response_lengths"]), data["loss_masks"], strict=True)
        return sum(((x * mask).sum() / mask.sum().clamp_min(1) for x, mask in rows), torch.zeros(()))

    with torch.compiler.set_stance("force_eager"):  # slime compiles its loss
        loss = on_ranks(1, work)[0]
    return [loss.detach(), *torch.autograd.grad(loss, log_probs)]


def test_factors_of_one_change_nothing(cp_utils: Any, configure: Any) -> None:
    configure("random", gain=1.0)
    plain, data = rollouts(), step(rollouts(), cp_utils)
    on_ranks(1, lambda rank: estimate(plain, cp_utils))
    for found, wanted in zip(data["advantages"], plain["advantages"], strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(loss_and_gradient(data, cp_utils), loss_and_gradient(plain, cp_utils), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_gradient_of_a_token_is_the_plain_one_times_its_factor(cp_utils: Any, configure: Any) -> None:
    plain, data = rollouts(), step(rollouts(), cp_utils)
    on_ranks(1, lambda rank: estimate(plain, cp_utils))
    factor = torch.cat([torch.where(is_mark(one), GAIN, 1.0) for one in responses_of(data)])
    torch.testing.assert_close(loss_and_gradient(data, cp_utils)[1], loss_and_gradient(plain, cp_utils)[1] * factor)


def test_returns_stay_though_they_are_the_same_tensors(cp_utils: Any, configure: Any) -> None:
    data = step(rollouts(), cp_utils)
    for returns, reward in zip(data["returns"], REWARDS, strict=True):
        assert (returns == reward).all()


def test_whitening_comes_before_credits(cp_utils: Any, configure: Any) -> None:
    if isinstance(cp_utils, CpUtils):
        pytest.skip("asks slime itself where it whitens")
    plain, data = rollouts(), step(rollouts(), cp_utils, normalize_advantages=True)
    on_ranks(1, lambda rank: estimate(plain, cp_utils, arguments(normalize_advantages=True)))
    for found, wanted, one in zip(data["advantages"], plain["advantages"], responses_of(data), strict=True):
        assert torch.equal(found, wanted * torch.where(is_mark(one), GAIN, 1.0))


# --- bad samples, steps, logs -----------------------------------------------------------------------------------------


def test_a_step_with_bad_samples_works_and_says_so(cp_utils: Any, configure: Any) -> None:
    responses = [marked(3, 2), ids("no answer here"), marked(60, 40)[:-3], [], marked(60, 40), marked(5, 1)]
    rewards = [1.0, 1.0, -1.0, 1.0, 1.0, 0.0]
    data = step(rollouts(["?", "?;", ";", "?", ";;", "?"], responses, rewards), cp_utils)
    for number, (found, wanted) in enumerate(zip(data["advantages"], expected(data), strict=True)):
        assert torch.equal(found, wanted if number in (0, 4) else torch.full_like(wanted, rewards[number]))
    logged = {name: value.item() for name, value in data.items() if name.startswith("flow/")}
    assert logged["flow/scored"] == pytest.approx(5 / 6)
    shares = {name: logged[f"flow/{name}"] for name in ("no_answer", "cut_off", "empty", "failed")}
    assert shares == pytest.approx({"no_answer": 2 / 5, "cut_off": 1 / 5, "empty": 1 / 5, "failed": 0})


def test_warm_up_follows_the_number_of_the_rollout(cp_utils: Any, configure: Any) -> None:
    configure(warmup_steps=4)
    assert float(step(rollouts(), cp_utils, 0)["advantages"][0].max()) == 1
    assert float(step(rollouts(), cp_utils, 1)["advantages"][0].max()) == 1 + (GAIN - 1) / 4


def test_what_is_logged_is_the_same_on_every_rank(cp_utils: Any, configure: Any) -> None:
    """log_rollout_data (data.py) takes scalars, and reads the keys of one rank on all of them."""

    def work(rank: int) -> dict[str, Any]:
        data = rollouts()
        estimate(data, cp_utils)
        adapter.put_credits_into(arguments(), 0, data)
        return {name: value for name, value in data.items() if name.startswith("flow/")}

    first, second = on_ranks(2, work)
    assert first == second
    assert first["flow/scored"].item() == 1
    assert all(value.ndim == 0 and value.isfinite() for value in first.values())


def test_slime_logs_it(cp_utils: Any, configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(cp_utils, CpUtils):
        pytest.skip("asks slime itself what it logs")
    packed = ModuleType("megatron.core.packed_seq_params")
    packed.PackedSeqParams = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, packed.__name__, packed)
    slime_data = importlib.import_module("slime.backends.megatron_utils.data")
    logged: dict[str, float] = {}
    monkeypatch.setattr(slime_data.logging_utils, "log", lambda args, values, step_key: logged.update(values))
    monkeypatch.setattr(slime_data, "compute_rollout_step", lambda args, rollout_id: rollout_id)
    quiet = Namespace(ci_test=False, log_multi_turn=False, log_passrate=False, log_correct_samples=False)

    def work(rank: int) -> None:
        data = rollouts() | {"global_batch_sizes": [len(RESPONSES)]}
        estimate(data, cp_utils)
        adapter.put_credits_into(arguments(), 0, data)
        slime_data.log_rollout_data(0, quiet, data)

    on_ranks(2, work)
    assert logged["rollout/flow/scored"] == 1
    assert logged["rollout/flow/credited_share"] > 0


def test_a_number_that_some_ranks_lack_is_the_mean_of_the_others(cp_utils: Any) -> None:
    mine = [{"flow/seconds": 1.0, "flow/gini": 0.5}, {"flow/seconds": 3.0}]
    found = on_ranks(2, lambda rank: adapter.over_ranks(mine[rank], dist.group.WORLD))
    assert found == [{"flow/seconds": 3.0, "flow/gini": 0.5}] * 2


def test_a_pipeline_stage_without_advantages_is_left_alone(configure: Any) -> None:
    data = rollouts()
    adapter.put_credits_into(arguments(), 0, data)
    assert "advantages" not in data


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"advantage_estimator": "gspo"}, "one ratio per response"),
        ({"compute_advantages_and_returns": False}, "no advantages"),
        ({"loss_type": "sft_loss"}, "sft_loss reads no advantages"),
    ],
)
def test_settings_under_which_credits_would_do_nothing(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adapter.put_credits_into(arguments(**changes), 0, rollouts())


def test_a_loss_of_ones_own_has_to_say_that_it_takes_advantages_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> None: ...

    module = ModuleType("slime.utils.misc")
    module.load_function = lambda path: loss  # type: ignore[attr-defined]
    for name in ("slime", "slime.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.utils.misc", module)
    mine = arguments(loss_type="custom_loss", custom_loss_function_path="mine.loss")
    with pytest.raises(ValueError, match=r"loss\.takes_token_advantages = True"):
        adapter.put_credits_into(mine, 0, rollouts())
    loss.takes_token_advantages = True  # type: ignore[attr-defined]
    adapter.put_credits_into(mine, 0, rollouts())


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match="text only"):
        adapter.put_credits_into(arguments(), 0, rollouts() | {"multimodal_train_inputs": [None, {"pixels": 1}]})


@pytest.mark.skipif(HAS_SLIME, reason="slime is installed")
def test_without_slime_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"github\.com/THUDM/slime"):
        adapter.put_credits_into(arguments(), 0, rollouts() | {"advantages": []})
