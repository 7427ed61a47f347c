"""A scorer from a configuration: read from anywhere, made once, refreshed from the trainer's checkpoints."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph.adapters import service
from flowgraph.adapters.service import ENVIRONMENT, ServiceConfig, crediting, newest_checkpoint
from flowgraph.rl import FlowConfig
from tests.written import TOKENIZER, ids, is_mark, marked, policy, written_by_hand

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
        ({"model": "m", "flow": {"gian": 2}}, "gian is no option of credits"),
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
