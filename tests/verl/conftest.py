"""A local Ray, the real TransferQueue with its in-memory storage, and a folder with the model written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.written import TOKENIZER, written_by_hand


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def queue() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    transfer_queue = pytest.importorskip("transfer_queue")
    from omegaconf import OmegaConf

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    storage = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
    transfer_queue.init(OmegaConf.create({"backend": storage}))
    yield
    transfer_queue.close()
    ray.shutdown()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of transformers of the model in which one token carries all flow."""
    path: Path = tmp_path_factory.mktemp("written")
    written_by_hand(max_position_embeddings=1024).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)
