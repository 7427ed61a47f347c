"""A scorer from a configuration: read from anywhere, made once, refreshed from the trainer's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from flowgraph.adapters import service
from flowgraph.adapters.service import ENVIRONMENT, Service, ServiceConfig, crediting, newest_checkpoint
from flowgraph.rl import FlowConfig
from tests.written import TOKENIZER, VOCABULARY, ids, is_mark, marked, policy, written_by_hand

FLOW = {"answer": r"re:=(\d)", "preset": "paper", "gain": 3.0}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SERVICES", {})
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def saved(model: Any, folder: Path, seconds_ago: float = 0) -> str:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    then = time.time() - seconds_ago
    for path in folder.iterdir():
        os.utime(path, (then, then))
    return str(folder)


def bloom() -> Any:
    """A model that does not use the attention interface."""
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))


def rollout() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    token_ids = torch.tensor(ids("?;", end=False) + marked(3, 2))
    return [token_ids], [torch.arange(len(token_ids)) >= 2]


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml", "mapping", "environment"])
def test_from_a_configuration_to_factors(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": saved(written_by_hand(), tmp_path / "model"), "device": "cpu", "flow": FLOW}
    source: Any = values
    if suffix != "mapping":
        source = tmp_path / f"flow{'.yaml' if suffix == 'environment' else suffix}"
        if suffix == ".toml":
            flow = f"answer = '{FLOW['answer']}'\npreset = 'paper'\ngain = 3.0\n"
            source.write_text(f"model = '{values['model']}'\ndevice = 'cpu'\n[flow]\n{flow}")
        else:
            source.write_text(json.dumps(values))  # YAML reads it too
    if suffix == "environment":
        monkeypatch.setenv(ENVIRONMENT, str(source))
        source = None
    token_ids, masks = rollout()
    factors = crediting(source).factors(token_ids, masks, [1.0])
    assert torch.equal(factors[0], torch.where(is_mark(token_ids[0]), 3.0, 1.0))
    assert crediting(source) is crediting(source)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model is missing"),
        ({"model": ""}, "model must be the name or folder"),
        ({"model": "m", "modle": 1}, "modle is no key; there are: model"),
        ({"model": "m", "workers": -1}, "workers must be at least 0"),
        ({"model": "m", "workers": "two"}, "invalid literal"),
        ({"model": "m", "gpus_per_worker": 1}, "gpus_per_worker is 1, but workers is 0"),
        ({"model": "m", "timeout": 0}, "timeout must be > 0"),
        ({"model": "m", "dtype": "float12"}, 'dtype must be "auto"'),
        ({"model": "m", "trust_remote_code": "false"}, "trust_remote_code must be true or false, .* got 'false'"),
        ({"model": "m", "trust_remote_code": 0}, "trust_remote_code must be true or false, .* got 0"),
        ({"model": "m", "flow": {"gian": 2}}, "gian is no option of credits"),
        ({"model": "m", "flow": {"score": "coupled"}}, 'flow.score="coupled" needs flow.heads'),
        ({"model": "m", "flow": FlowConfig(scorer=torch.nn.Identity())}, "flow.scorer is for trainers"),
    ],
)
def test_a_configuration_that_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServiceConfig.read(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "is no file"),
        ("flow.ini", "model=m", "must end in .yaml"),
        ("flow.json", "[1]", "must hold keys and values"),
    ],
)
def test_a_file_that_is_refused(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        ServiceConfig.read(tmp_path / name)


def test_without_a_configuration_it_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match=f"set {ENVIRONMENT} to a YAML, TOML or JSON file"):
        crediting()


@pytest.mark.parametrize(
    ("model", "flow", "message"),
    [
        (policy, {"layers": [40]}, r"LlamaForCausalLM can't be traced: .*layers \[40\]"),
        (bloom, {}, "BloomForCausalLM can't be traced: .*attention interface"),
    ],
)
def test_what_cannot_be_traced_is_refused_at_construction(model: Any, flow: Any, message: str, tmp_path: Path) -> None:
    values = {"model": saved(model(), tmp_path), "device": "cpu", "flow": FLOW | flow}
    with pytest.raises(ValueError, match=message):
        crediting(values)


def test_heads_that_are_given_will_do() -> None:
    heads = {"local_heads": [[0, 1]], "global_heads": [[1, 2]]}
    assert ServiceConfig.read({"model": "m", "flow": {"score": "coupled", "heads": heads}}).flow.heads is not None


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    saved(policy(), tmp_path / "step_1" / "actor", 300)
    saved(policy(), tmp_path / "step_2" / "actor", 200)
    saved(policy(), tmp_path / "step_3" / "actor")  # being written, for all one can know
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / "config.json").write_text("{}")  # a configuration without weights
    saved(policy(), tmp_path / "step_2" / "critic", 100)
    config = tmp_path / "step_2" / "critic" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForTokenClassification"))
    os.utime(config, (time.time() - 100,) * 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_2" / "actor"
    broadcast = tmp_path / "broadcasts" / "step_5"  # of prime-rl: no config.json, and a file that says it is complete
    saved(policy(), broadcast)
    (broadcast / "config.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_2" / "actor"
    (broadcast / "STABLE").touch()
    assert newest_checkpoint(tmp_path) == broadcast


def test_a_checkpoint_that_is_being_deleted_is_passed_over(tmp_path: Path) -> None:
    kept = Path(saved(policy(), tmp_path / "step_1", seconds_ago=100))
    going = Path(saved(policy(), tmp_path / "step_2", seconds_ago=90))
    assert newest_checkpoint(tmp_path) == going
    (going / "tokenizer.json").unlink()
    (going / "tokenizer.json").symlink_to(tmp_path / "gone")  # listed, and not there when it is looked at
    assert newest_checkpoint(tmp_path) == kept


def test_a_checkpoint_that_lacks_a_shard_of_its_index_is_passed_over(tmp_path: Path) -> None:
    kept = Path(saved(policy(), tmp_path / "step_1", seconds_ago=100))
    writing = Path(saved(policy(), tmp_path / "step_2", seconds_ago=90))
    index = writing / "model.safetensors.index.json"
    (writing / "model.safetensors").rename(writing / "model-1.safetensors")
    for text in ('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}', '{"weight_', "[]"):
        index.write_text(text)
        os.utime(index, (time.time() - 90,) * 2)
        assert newest_checkpoint(tmp_path) == kept
    (writing / "model-1.safetensors").rename(writing / "model.safetensors")  # which goes before an index
    assert newest_checkpoint(tmp_path) == writing
    (writing / "model.safetensors").rename(writing / "model-1.safetensors")
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    os.utime(index, (time.time() - 90,) * 2)
    assert newest_checkpoint(tmp_path) == writing


def following(tmp_path: Path) -> Service:
    """A service that follows the checkpoints below "out"."""
    (tmp_path / "out").mkdir(exist_ok=True)
    start = saved(policy(), tmp_path / "start")
    return crediting({"model": start, "device": "cpu", "flow": FLOW, "refresh_from": str(tmp_path / "out")})


def shifted(by: float, **changes: Any) -> Any:
    """A policy that `has_taken` tells from others."""
    model = policy(**changes)
    model.model.norm.weight.data.add_(by)
    return model


def has_taken(one: Service, by: float) -> bool:
    scorer: Any = one.scorer
    return torch.equal(scorer.model.model.norm.weight, shifted(by).model.norm.weight)


def test_a_checkpoint_that_is_overwritten_is_taken_over_again_and_an_older_one_is_not(tmp_path: Path) -> None:
    one = following(tmp_path)
    saved(shifted(1), tmp_path / "out" / "older", 400)
    for by, seconds_ago in ((2, 300), (3, 200)):
        saved(shifted(by), tmp_path / "out" / "latest", seconds_ago)
        assert one.refresh_if_newer(by) and has_taken(one, by)
        assert not one.refresh_if_newer(by)
    shutil.rmtree(tmp_path / "out" / "latest")
    assert not one.refresh_if_newer(4) and has_taken(one, 3)


def test_a_checkpoint_that_is_half_written_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = following(tmp_path)
    half = Path(saved(shifted(1), tmp_path / "out" / "step_1", 100)) / "model.safetensors"
    whole = half.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    os.utime(half, (time.time() - 100,) * 2)
    token_ids, masks = rollout()
    assert one.factors(token_ids, masks, [1.0], step=3).metrics["flow/scorer_age"] == 3
    assert has_taken(one, 0)
    assert f"{half.parent} cannot be read" in caplog.text and "keeps its weights" in caplog.text
    half.write_bytes(whole)
    os.utime(half, (time.time() - 90,) * 2)
    assert one.factors(token_ids, masks, [1.0], step=4).metrics["flow/scorer_age"] == 0
    assert has_taken(one, 1)


def test_a_checkpoint_of_another_shape_names_its_folder(tmp_path: Path) -> None:
    one = following(tmp_path)
    folder = saved(policy(intermediate_size=80), tmp_path / "out" / "step_1", 100)
    message = f"refresh_from={tmp_path / 'out'}: {folder} doesn't fit LlamaForCausalLM: other shape: model.layers.0.mlp"
    with pytest.raises(ValueError, match=message):
        one.factors(*rollout(), [1.0])
    service._SERVICES.clear()
    with pytest.raises(ValueError, match=message):
        following(tmp_path)


def test_a_checkpoint_that_was_there_before_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(shifted(1), tmp_path / "out" / "step_8", 100)
    one = following(tmp_path)
    assert has_taken(one, 1)
    assert f"{folder} was there before this run" in caplog.text
    assert [one.factors(*rollout(), [1.0], step=step).metrics["flow/scorer_age"] for step in (8, 11)] == [0, 3]


@pytest.mark.parametrize("with_config", [True, False])
def test_checkpoints_of_the_trainer_are_taken_over(with_config: bool, tmp_path: Path) -> None:
    start = saved(policy(), tmp_path / "start")
    values = {"model": start, "device": "cpu", "flow": FLOW, "refresh_from": str(tmp_path / "out")}
    values["flow"] = FLOW | {"preset": "flowgraph", "rule": "proportional"}
    (tmp_path / "out").mkdir()
    one = crediting(values)
    token_ids, masks = rollout()
    before = one.factors(token_ids, masks, [1.0], step=0)
    newer = policy()
    for parameter in newer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    saved(newer, tmp_path / "out" / "step_3", 100)
    if not with_config:
        (tmp_path / "out" / "step_3" / "config.json").unlink()
        (tmp_path / "out" / "step_3" / "STABLE").touch()
    stale = one.factors(token_ids, masks, [1.0], step=3)
    later = one.factors(token_ids, masks, [1.0], step=5)
    assert before.metrics["flow/scorer_age"] == 0 == stale.metrics["flow/scorer_age"]
    assert later.metrics["flow/scorer_age"] == 2
    assert not torch.equal(before[0], stale[0]) and torch.equal(stale[0], later[0])
