"""The pool of Ray actors: it equals the scorer in this process, and one lost actor or sample costs nothing else."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from benchmarks import kill
from flowgraph.adapters import service
from flowgraph.adapters.ray import RayScorer
from flowgraph.rl import Crediting, FlowConfig, Scored, Scorer
from tests.written import ANSWERS, TOKENIZER, VOCABULARY, ids, is_mark, marked, policy, written_by_hand

CONFIG = FlowConfig(answer=ANSWERS, preset="paper", gain=3.0)
ROOT = Path(__file__).resolve().parents[1]
KILLS, KILLS_ONCE, HANGS, RAISES, BREAKS = "}", "&", "~", "^", "|"
"""In a response: what happens to the process that reads it. None is of the tokens 0 to 5, which `check` reads."""


def load(folder: Path) -> tuple[Any, Any]:
    """The model written by hand, with traps; it notes its process and the number of tokens of each forward pass."""
    if (folder / "unloadable").exists():
        raise FileNotFoundError("no such model: gone")
    torch.set_num_threads(1)
    model = written_by_hand(max_position_embeddings=128)
    trap_of = {ids(text, end=False)[0]: text for text in (KILLS, KILLS_ONCE, HANGS, RAISES, BREAKS)}
    broken = []

    def spring(module: Any, inputs: tuple[Tensor, ...]) -> None:
        with (folder / "passes").open("a") as notes:
            notes.write(f"{os.getpid()} {inputs[0].numel()}\n")
        until = time.monotonic() + 50
        while (folder / "together").exists() and len(set(processes(folder))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        traps = {trap_of[token] for token in inputs[0].flatten().tolist() if token in trap_of}
        if KILLS in traps:
            os._exit(1)
        if KILLS_ONCE in traps and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in traps:
            time.sleep(1000)
        if RAISES in traps:
            raise TypeError("a bug somewhere")
        if BREAKS in traps:
            broken.append(True)
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")

    model.get_input_embeddings().register_forward_pre_hook(spring)
    return model, TOKENIZER


def cannot_load() -> tuple[Any, Any]:
    raise FileNotFoundError("no weights at all")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with kill.cluster():
        yield


@pytest.fixture(scope="module")
def shared(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayScorer, Path]]:
    folder = tmp_path_factory.mktemp("pool")
    with RayScorer(partial(load, folder), CONFIG, workers=2, num_cpus=0.5, timeout=60, start_timeout=300) as pool:
        yield pool, folder


@pytest.fixture
def pool(shared: tuple[RayScorer, Path]) -> Iterator[RayScorer]:
    scorer, folder = shared
    for name in ("passes", "killed", "unloadable", "together"):
        (folder / name).unlink(missing_ok=True)
    yield scorer
    scorer.refresh(written_by_hand(max_position_embeddings=128))


@pytest.fixture
def folder(shared: tuple[RayScorer, Path]) -> Path:
    return shared[1]


def here(**changes: Any) -> Scorer:
    """The scorer in this process."""
    return Scorer(written_by_hand(max_position_embeddings=128, **changes), TOKENIZER, CONFIG)


def rollouts(responses: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Jagged ids and response masks."""
    question = ids("?;?;", end=False)
    token_ids = [torch.tensor(question + response) for response in responses]
    return token_ids, [torch.arange(len(one)) >= len(question) for one in token_ids]


GOOD = [marked(n, 11 - n) for n in range(12)]


def with_trap(trap: str) -> list[list[int]]:
    """Good responses, and one at place 4 that springs a trap."""
    return [*GOOD[:4], ids(trap) + marked(1, 1), *GOOD[4:]]


def assert_equal(found: Scored, expected: Scored, bits: bool = False) -> None:
    assert len(found) == len(expected)
    for one, other in zip(range(len(found)), range(len(expected)), strict=True):
        assert torch.equal(found.weights[one], expected.weights[other])
        assert torch.equal(found.masks[one], expected.masks[other])
        tolerance = 0 if bits else 1e-5
        torch.testing.assert_close(found.scores[one], expected.scores[other], rtol=0, atol=tolerance)
    assert (found.flags, found.text, found.failed) == (expected.flags, expected.text, expected.failed)


def assert_only_lost(found: Scored, token_ids: list[Tensor], lost: int, why: str) -> None:
    assert list(found.failed) == [lost]
    assert why in found.failed[lost]
    assert found.flags[lost] == ("failed",)
    assert (found[lost] == 1).all()
    for number in set(range(len(found))) - {lost}:
        assert torch.equal(found[number] == 3, is_mark(token_ids[number])), number


def processes(folder: Path) -> list[int]:
    """Of each forward pass so far, in order."""
    return [int(line.split()[0]) for line in (folder / "passes").read_text().splitlines()]


def ended(process: int, seconds: float = 60) -> bool:
    """Is a process gone, after a while? One that nobody has waited for yet (Z) is."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
            with suppress(FileNotFoundError):  # not Linux
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return True
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# --- the same as in this process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["left", "right", "packed", "jagged"])
def test_every_layout_equals_the_scorer_of_this_process(pool: RayScorer, layout: str) -> None:
    token_ids, masks = rollouts([marked(3, 4), marked(9, 0), marked(0, 6, end=False), []])
    if layout == "jagged":
        given: tuple[Any, Any, dict[str, Any]] = (token_ids, masks, {})
    elif layout == "packed":
        places = torch.cat([torch.arange(len(one)) for one in token_ids])[None]
        given = (torch.cat(token_ids)[None], torch.cat(masks)[None], {"position_ids": places})
    else:
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=layout)
        real = pad([torch.ones_like(one) for one in token_ids])
        given = (pad(token_ids), pad(masks), {"attention_mask": real})
    found = pool.credits(given[0], given[1], truncated=[False, False, True, False], **given[2])
    expected = here().credits(given[0], given[1], truncated=[False, False, True, False], **given[2])
    assert_equal(found, expected)
    assert found.flags[2:] == [("cut_off",), ("empty",)]
    for weights, one in zip(found[:3], token_ids, strict=False):
        assert torch.equal(weights == 3, is_mark(one))
    if layout != "jagged":
        assert torch.equal(found.to_layout(given[0].shape), expected.to_layout(given[0].shape))


def test_the_same_batch_gives_the_same_bits(pool: RayScorer) -> None:
    token_ids, masks = rollouts([GOOD[3]])
    assert_equal(pool.credits(token_ids, masks), here().credits(token_ids, masks), bits=True)


def test_nothing_to_score(pool: RayScorer) -> None:
    assert len(pool.credits([], [])) == 0


def test_both_actors_work(pool: RayScorer, folder: Path) -> None:
    (folder / "together").touch()  # the first pass of one waits for the first of the other
    token_ids, masks = rollouts([marked(n, n) for n in (1, 40, 2, 38, 3, 36)])
    assert not pool.credits(token_ids, masks).failed
    assert len(set(processes(folder))) == 2


def test_long_samples_go_first(pool: RayScorer) -> None:
    lengths = [5, 80, 7, 78, 9, 76]
    samples: Any = [range(length) for length in lengths]  # of samples only their lengths count here
    order = [[lengths[number] for number in chunk] for chunk in pool._chunks(samples)]
    assert sorted(length for chunk in order for length in chunk) == sorted(lengths)
    assert order[0] == [80]
    assert [max(chunk) for chunk in order] == sorted((max(chunk) for chunk in order), reverse=True)


def test_a_training_step(pool: RayScorer) -> None:
    token_ids, masks = rollouts([GOOD[2], [*GOOD[3], VOCABULARY], GOOD[4], GOOD[5]])
    with pytest.warns(UserWarning, match="token_ids must be in"):
        factors = Crediting(pool).factors(token_ids, masks, [1.0, -1.0, -1.0, 0.0])
    for number, gain in enumerate([3.0, 1.0, 3.0, 1.0]):
        assert torch.equal(factors[number], torch.where(is_mark(token_ids[number]), gain, 1.0))
    assert factors.metrics["flow/failed"] == pytest.approx(1 / 3)


# --- newer weights ----------------------------------------------------------------------------------------------------


def newer() -> Any:
    """Other weights for the same model."""
    return policy(num_hidden_layers=1, max_position_embeddings=128)


@pytest.mark.parametrize("kind", ["state dict", "bfloat16", "model", "folder"])
def test_a_refresh_changes_the_scores(
    pool: RayScorer, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids, masks = rollouts(GOOD)
    scorer, model = here(), newer()
    before = pool.credits(token_ids, masks)
    weights: Any = model
    if kind == "state dict":
        weights = model.state_dict()
    elif kind == "bfloat16":
        weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    elif kind == "folder":
        model.save_pretrained(tmp_path / "checkpoint")
        monkeypatch.chdir(tmp_path)
        weights = "checkpoint"
    pool.refresh(weights)
    scorer.refresh(weights)
    found, expected = pool.credits(token_ids, masks), scorer.credits(token_ids, masks)
    for number in range(len(GOOD)):
        torch.testing.assert_close(found.scores[number], expected.scores[number], rtol=0, atol=1e-5)
        assert (found.scores[number] - before.scores[number]).abs().max() > 1e-3


def test_weights_that_do_not_fit_are_named_and_change_nothing(pool: RayScorer) -> None:
    token_ids, masks = rollouts(GOOD)
    before = pool.credits(token_ids, masks)
    weights = newer().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=rf"missing: {name}; unknown: other"):
        pool.refresh({("other" if key == name else key): value for key, value in weights.items()})
    with pytest.raises(ValueError, match=rf"other shape: {name} \[1, 64\] instead of \[64, 64\]"):
        pool.refresh({**weights, name: weights[name][:1]})
    with pytest.raises(TypeError, match=rf"weights\['{name}'\] must be a tensor, got list"):
        pool.refresh({**weights, name: [1.0]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="weights must be a state dict, a model or a folder, got int"):
        pool.refresh(3)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="nowhere"):
        pool.refresh("/nowhere/at/all")
    assert_equal(pool.credits(token_ids, masks), before)


@pytest.mark.parametrize("broken", ["half", "without a norm"])
def test_a_checkpoint_that_cannot_be_taken_changes_nothing(pool: RayScorer, broken: str, tmp_path: Path) -> None:
    token_ids, masks = rollouts(GOOD)
    before = pool.credits(token_ids, masks)
    newer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if broken == "half":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        save_file({name: one for name, one in load_file(path).items() if name != "model.norm.weight"}, path)
    with pytest.raises(SafetensorError if broken == "half" else ValueError, match=r"missing: model.norm|deserializing"):
        pool.refresh(tmp_path)
    assert_equal(pool.credits(token_ids, masks), before)


def test_a_restarted_actor_has_the_latest_weights(pool: RayScorer, folder: Path) -> None:
    token_ids, masks = rollouts(GOOD)
    pool.refresh(newer())
    expected = pool.credits(token_ids, masks)
    killed = set(ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in pool._actors]))
    assert len(killed) == 2
    for process in killed:
        os.kill(process, signal.SIGKILL)
    (folder / "passes").unlink()
    assert_equal(pool.credits(token_ids, masks), expected)
    assert not killed & set(processes(folder))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_bad_samples_cost_no_other(pool: RayScorer) -> None:
    responses = [*GOOD[:3], [VOCABULARY, *GOOD[3]], [-1, *GOOD[3]], marked(100, 100), []]
    token_ids, masks = rollouts(responses)
    found = pool.credits(token_ids, masks)
    assert set(found.failed) == {3, 4, 5}
    assert "token_ids must be in" in found.failed[3]
    assert "more than the 128 that the model can see" in found.failed[5]
    assert found.flags[6] == ("empty",)
    for number in range(len(responses)):
        assert torch.equal(found[number] == 3, is_mark(token_ids[number]) & (number < 3))


def test_a_sample_that_raises_costs_no_other(pool: RayScorer) -> None:
    token_ids, masks = rollouts(with_trap(RAISES))
    assert_only_lost(pool.credits(token_ids, masks), token_ids, 4, "TypeError: a bug somewhere")


def test_samples_of_an_actor_that_is_killed_once_go_to_another(pool: RayScorer, folder: Path) -> None:
    token_ids, masks = rollouts(with_trap(KILLS_ONCE))
    found = pool.credits(token_ids, masks)
    assert (folder / "killed").exists()
    assert_equal(found, here().credits(token_ids, masks))
    assert not found.failed


def test_a_sample_that_kills_its_actors_costs_no_other(pool: RayScorer) -> None:
    token_ids, masks = rollouts(with_trap(KILLS))
    assert_only_lost(pool.credits(token_ids, masks), token_ids, 4, "the actor died")


@pytest.mark.slow
def test_a_sample_that_hangs_costs_no_other(pool: RayScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.credits(*rollouts(GOOD))
    monkeypatch.setattr(pool, "timeout", 30.0)
    token_ids, masks = rollouts(with_trap(HANGS))
    assert_only_lost(pool.credits(token_ids, masks), token_ids, 4, "took longer than timeout=30 s")


@pytest.mark.slow
def test_an_actor_whose_device_is_lost_is_restarted(pool: RayScorer) -> None:
    token_ids, masks = rollouts(with_trap(BREAKS))
    assert_only_lost(pool.credits(token_ids, masks), token_ids, 4, "device-side assert")
    assert not pool.credits(*rollouts(GOOD * 2)).failed


@pytest.mark.slow
def test_without_any_actor_the_batch_comes_back_and_the_next_one_is_scored(pool: RayScorer, folder: Path) -> None:
    token_ids, masks = rollouts(GOOD)
    pool.credits(token_ids, masks)
    (folder / "unloadable").touch()
    for process in set(processes(folder)):
        os.kill(process, signal.SIGKILL)
    found = pool.credits(token_ids, masks)
    assert len(found.failed) == len(GOOD)
    assert set(found.failed.values()) == {"no actor of the pool is ready: FileNotFoundError: no such model: gone"}
    assert all((weights == 1).all() for weights in found)
    (folder / "unloadable").unlink()
    assert_equal(pool.credits(token_ids, masks), here().credits(token_ids, masks))


# --- at construction, and at the end ----------------------------------------------------------------------------------


def test_a_load_that_raises_is_named_with_its_reason(cluster: None) -> None:
    with pytest.raises(RuntimeError, match="load=cannot_load: FileNotFoundError: no weights at all"):
        RayScorer(cannot_load, num_cpus=0.1)


def test_a_model_that_cannot_be_traced_is_named_with_its_reason(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: LlamaForCausalLM can't be traced: .*layers \[40\]"):
        RayScorer(partial(load, tmp_path), FlowConfig(layers=[40]), num_cpus=0.1)


@pytest.mark.slow
def test_a_load_that_returns_something_else_is_named(cluster: None) -> None:
    with pytest.raises(RuntimeError, match=r"TypeError: load must return \(model, tokenizer\), got int"):
        RayScorer(lambda: 3, num_cpus=0.1)  # type: ignore[arg-type, return-value]


def test_a_cluster_that_is_too_small_is_named(cluster: None) -> None:
    with pytest.raises(RuntimeError, match="2 actors ask for 64 CPU, 0 GPU each, the cluster has 2 CPU"):
        RayScorer(cannot_load, workers=2, num_cpus=64, start_timeout=1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"load": 3}, TypeError, "load must be a function"),
        ({"workers": 0}, ValueError, "workers must be a whole number >= 1, got 0"),
        ({"timeout": 0}, ValueError, "timeout must be > 0 seconds, got 0"),
        ({"start_timeout": -1}, ValueError, "start_timeout must be > 0 seconds, got -1"),
        ({"config": FlowConfig(scorer=torch.nn.Linear(1, 1))}, ValueError, "config.scorer is for trainers"),
        ({"config": FlowConfig(score="coupled")}, ValueError, 'score="coupled" needs config.heads here'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        RayScorer(**{"load": cannot_load, **arguments})


@pytest.mark.slow
def test_a_closed_pool_has_ended_its_actors_and_says_so(cluster: None, tmp_path: Path) -> None:
    pool = RayScorer(partial(load, tmp_path), CONFIG, num_cpus=0.1)
    pool.credits(*rollouts(GOOD))
    (process,) = set(processes(tmp_path))
    pool.close()
    pool.close()
    assert ended(process)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])
    with pytest.raises(RuntimeError, match="closed"):
        pool.refresh({})


ALONE = """
import sys
from functools import partial
from pathlib import Path
import ray
from flowgraph.adapters.ray import RayScorer
from tests.test_ray import CONFIG, GOOD, load, rollouts

assert not ray.is_initialized()
with RayScorer(partial(load, Path(sys.argv[1])), CONFIG, address="local") as pool:
    assert ray.is_initialized()
    assert not pool.credits(*rollouts(GOOD)).failed
assert ray.is_initialized()
print("scored")
"""


@pytest.mark.slow
def test_without_a_cluster_it_starts_ray_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.splitlines()[-1:]) == (0, ["scored"]), run.stderr
    (process,) = set(processes(tmp_path))
    assert ended(process)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "flowgraph.adapters.ray")
    with pytest.raises(ImportError, match=r"flowgraph-llm\[ray\]"):
        importlib.import_module("flowgraph.adapters.ray")


def test_a_service_with_workers(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a configuration to factors, with the model on an actor."""
    monkeypatch.setattr(service, "_SERVICES", {})
    written_by_hand(max_position_embeddings=128).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    flow = {"answer": r"re:=(\d)", "preset": "paper", "gain": 3.0}
    made = service.crediting({"model": str(tmp_path), "workers": 1, "cpus_per_worker": 0.5, "flow": flow})
    assert isinstance(made.scorer, RayScorer)
    try:
        token_ids, masks = rollouts([marked(3, 4), marked(0, 2)])
        factors = made.factors(token_ids, masks, [1.0, -1.0])
        assert all(torch.equal(one == 3, is_mark(row)) for one, row in zip(factors, token_ids, strict=True))
    finally:
        made.scorer.close()
