"""Sums over the edges of each token, in an order that never changes, by torch, torch-scatter or cupy.

Atomic additions, which scatters on a GPU are made of, come in any order, and floating-point sums with them. Here edges
are first brought into the order of the token they are summed at (stable, so that those of one token keep their order),
and then each token's run of them is added up. What a token gets then depends on its own edges alone: not on the run,
and not on what else is in the batch.

    torch           torch.segment_reduce; on a GPU, CUB's segmented reduction. It goes through long segments in whole
                    tiles, which it adds up in an order that depends on where in memory they begin; so long runs are
                    cut into pieces shorter than a tile, and the sums of these added up
    torch_scatter   torch_scatter.segment_csr
    cupy            a sparse matrix times ones, by cuSPARSE, on tensors that stay where they are (DLPack). NVIDIA's
                    documentation allows its default algorithm to round differently from run to run

Shapes: N tokens, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

LIBRARIES = ("torch_scatter", "cupy")
"""What is not always there."""

PIECE = 1024
"""Most edges of a piece: half of CUB's smallest tile."""

CUPY_DEVICES = ("cuda",)
"""cupy has no other arrays."""


@dataclass(frozen=True)
class Groups:
    """Edges in groups, one for each token.

    Attributes:
        order: [E] the edges in the order of their groups; None: they lie in it.
        index: [E] the token of each edge, in this order, ascending.
        ptr: [N + 1] where each group begins; the last one ends at E.
        backend: the library that adds up.
    """

    order: Tensor | None
    index: Tensor
    ptr: Tensor
    backend: str = "torch"

    @classmethod
    def by(cls, index: Tensor, num_tokens: int, *, ascending: bool | None = None, backend: str = "torch") -> Groups:
        """Edges by the token that `index` [E] names for each.

        Args:
            ascending: is `index` known to ascend? None: it is looked at.
        """
        if ascending is None:
            ascending = bool((index[1:] >= index[:-1]).all())
        order = None
        if not ascending:
            # Half the bits are half the work of a radix sort.
            index, order = torch.sort(index.int() if num_tokens < 2**31 else index, stable=True)
        tokens = torch.arange(num_tokens + 1, dtype=index.dtype, device=index.device)
        ptr = torch.searchsorted(index.contiguous(), tokens)
        return cls(order, index, ptr, backend)

    def arrange(self, values: Tensor) -> Tensor:
        """[.., E] values of the edges in the order of the groups."""
        return values if self.order is None else values[..., self.order]

    def sum(self, values: Tensor) -> Tensor:
        """[N] the sum of each group, 0 where it is empty. values: [E] float, arranged."""
        if self.backend == "torch_scatter":
            return _torch_scatter().segment_csr(values, self.ptr, reduce="sum")
        if self.backend == "cupy":
            xp, sparse = _cupy()
            data, ptr = xp.from_dlpack(values), xp.from_dlpack(self.ptr.int())
            columns = xp.arange(len(data), dtype=xp.int32)
            matrix = sparse.csr_matrix((data, columns, ptr), shape=(len(ptr) - 1, len(data)))
            return from_dlpack(matrix @ xp.ones(len(data), dtype=data.dtype))
        begins, first = self._pieces
        parts = torch.segment_reduce(values, "sum", offsets=begins, unsafe=True)
        return torch.segment_reduce(parts, "sum", offsets=first, unsafe=True)

    @cached_property
    def _pieces(self) -> tuple[Tensor, Tensor]:
        """Where each piece of a group begins, and the number of the first piece of each group [N + 1].

        How many pieces there are is not asked, since a GPU would have to be waited for: there is room for as many as
        there can be, and the last ones are empty.
        """
        E, N = len(self.index), len(self.ptr) - 1
        count = (self.ptr[1:] - self.ptr[:-1] + PIECE - 1) // PIECE
        first = torch.cat([count.new_zeros(1), count.cumsum(0)])
        number = torch.arange(N + E // PIECE + 1, dtype=first.dtype, device=first.device)
        group = torch.searchsorted(first, number, right=True) - 1  # N for those that are empty: they begin at the end
        return self.ptr[group] + (number - first[group]) * PIECE * (group < N), first

    def highest(self, values: Tensor) -> Tensor:
        """[N] the largest number of each group, 0 where it is empty. values: [E] int64 below 2 ** 53, arranged."""
        if self.backend == "torch_scatter":
            top = _torch_scatter().segment_csr(values, self.ptr, reduce="max")
            return torch.where(self.ptr[1:] > self.ptr[:-1], top, 0)
        numbers = values.double()  # exact; and neither of these libraries takes the largest of whole numbers
        if self.backend == "cupy":
            xp, _ = _cupy()
            top = xp.full(len(self.ptr) - 1, -xp.inf)
            xp.maximum.at(top, xp.from_dlpack(self.index), xp.from_dlpack(numbers))  # in any order: it is a maximum
            found = from_dlpack(top)
        else:
            found = torch.segment_reduce(numbers, "max", offsets=self.ptr, unsafe=True)
        return torch.where(self.ptr[1:] > self.ptr[:-1], found, 0).long()


def check_library(backend: str, device: torch.device) -> None:
    """Is the library there, and can it work on that device?

    Raises:
        ImportError: it isn't installed; the error names the extra.
        ValueError: it can't.
    """
    if backend not in LIBRARIES:
        return
    if find_spec(backend) is None:
        extra = "scatter" if backend == "torch_scatter" else cuda_extra()
        raise ImportError(f'backend="{backend}" needs {backend}: pip install "flowgraph-llm[{extra}]"')
    if backend == "cupy" and device.type not in CUPY_DEVICES:
        raise ValueError(f'backend="cupy" needs a CUDA GPU and the graph is on {device}: use backend="torch"')


def cuda_extra() -> str:
    """The extra with cupy and Triton, for the CUDA that torch was built for."""
    return "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"


def _torch_scatter() -> Any:
    import torch_scatter

    return torch_scatter


def _cupy() -> tuple[Any, Any]:
    """Arrays and sparse matrices."""
    import cupy
    import cupyx.scipy.sparse  # apart from the import of cupy: this one needs a GPU

    return cupy, cupyx.scipy.sparse
