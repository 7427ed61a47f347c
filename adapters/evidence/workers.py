"""Traces judged in processes of their own, each of them whole: the same lines, sooner.

    with judging(judge, workers) as line: line(found, number).result()

A worker gets a copy of the judge without the numbers of its models; these are in a file that all workers map into
memory, so that weights of a model on the CPU are there once. Left out: which rows there are, and in which order their
lines stand (faithful.py).
"""

from __future__ import annotations

import copy
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowgraph.adapters.evidence.signals import SIGNALS
from flowgraph.adapters.evidence.traces import Found

Line = dict[str, Any]


class Judge(Protocol):
    """What a line is made by."""

    names: list[str]
    """Of the signals."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """All that it holds."""
        ...

    def line(self, found: Found | ValueError, number: int) -> Line: ...


Ask = Callable[[Found | ValueError, int], "Future[Line]"]


@contextmanager
def judging(judge: Judge, workers: int) -> Iterator[Ask]:
    """Gives a function that asks for the line of a row. One worker is this process, and its lines are there at once.

    Threads are shared out: each worker has its part of those that this process has, one at least.

    Raises:
        ValueError: the judge can't be sent to other processes.
        RuntimeError: when a result is asked for: a worker died.
    """
    if workers == 1:
        yield lambda found, number: _known(judge.line(found, number))
        return
    threads = max(1, torch.get_num_threads() // workers)
    with tempfile.TemporaryDirectory(prefix="flowgraph-") as folder:
        path = Path(folder) / "tensors.pt"
        tensors = _tensors(judge)
        torch.save([tensor.detach() for tensor in tensors], path)
        try:
            hollow = copy.deepcopy(judge, {id(tensor): _without_numbers(tensor) for tensor in tensors})
            ForkingPickler.dumps(hollow)
        except Exception as error:  # copying and sending raise whatever they like
            raise ValueError(
                f"workers: the model, its tokenizer or a function can't be sent to other processes ({error}); "
                "use workers=1"
            ) from error
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _start, (hollow, str(path), threads))
        whole = False
        try:
            yield lambda found, number: pool.submit(_line, found, number)
            whole = True
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker died; is there too little memory for so many? What is finished is kept, and the same call "
                "goes on"
            ) from error
        finally:
            # After Ctrl-C nobody waits for what is still being judged: it would be minutes for long traces.
            for process in () if whole else list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def _tensors(judge: Judge) -> list[Tensor]:
    """Parameters and buffers of its models, each once."""
    found = (tensor for model in judge.models for tensor in (*model.parameters(), *model.buffers()))
    return list({id(tensor): tensor for tensor in found}.values())


def _without_numbers(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _fill(judge: Judge, tensors: Sequence[Tensor]) -> None:
    """Put numbers into a judge without any; tensors as `_tensors` has them."""
    empties = _tensors(judge)  # held, so that no number of an object is given twice
    given = {
        id(empty): nn.Parameter(tensor, empty.requires_grad) if isinstance(empty, nn.Parameter) else tensor
        for empty, tensor in zip(empties, tensors, strict=True)
    }
    for module in (module for model in judge.models for module in model.modules()):
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in both:
            held.update({name: given[id(empty)] for name, empty in held.items() if empty is not None})


def _known(line: Line) -> Future[Line]:
    future: Future[Line] = Future()
    future.set_result(line)
    return future


# ------------------------------------------------------------------------- in a worker

_here: list[Judge] = []


def _start(judge: Judge, path: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    torch.set_num_threads(threads)
    _fill(judge, torch.load(path, weights_only=True, mmap=True))
    _here.append(judge)


def _line(found: Found | ValueError, number: int) -> Line:
    (judge,) = _here
    if missing := sorted(set(judge.names) - set(SIGNALS)):
        raise LookupError(
            f"workers: signal {missing[0]!r} is not known in other processes: put it into SIGNALS where a module of "
            "yours is imported, or use workers=1"
        )
    return judge.line(found, number)
