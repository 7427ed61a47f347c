"""Models that are trained once and kept in the cache (`flowgraph.smollm2` says where)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from flowgraph import smollm2


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` below "evidence" in the cache; `make` fills it if it is not there.

    It is complete or not there at all. Of two processes that want it at once, one makes it and the other waits.
    """
    target = smollm2.cache() / "evidence" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
            try:
                make(work)
                os.replace(work, target)
            except BaseException:
                shutil.rmtree(work)
                raise
    return target
