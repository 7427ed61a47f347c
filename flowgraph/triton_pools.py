"""Pools by Triton kernels: `flowgraph.pools.PoolBuilder` for blocks of rows on a GPU, in two launches per block.

Tokens k and i < k meet in the pool of size 2 ** j where j is the highest bit in which k and i differ: then bit j of k
is set, bit j of i is not, and all above it is the same. So what row k pays to runs of 2 ** j tokens lies in one stretch
of its columns for each set bit j of k, and what column i collects in one stretch of rows for each bit that i lacks.
Three kernels, each of which reads a block of float32 rows once and adds up in float64:

    pay        one program per row: the stretches of its columns one after the other, each cut at the ends of parts.
               Every sum is written once, by one program.
    collect    one program per 32 columns, which have the same bits from the fifth on: the stretches of rows, times
               their weights, are added to what earlier launches have collected. Bits below the fifth are looked at
               number by number, where the columns meet rows of their own tile.
    arrive     one program per 32 columns: all rows of a block before it, times their reach.

A threshold leaves out what became an edge, so that nobody has to write what is left. No atomics: the same blocks in the
same order give the same bits. No GPU has run any of this; see `flowgraph.triton_rows` for what has been checked.

Shapes: N tokens, r rows of a block, J sizes of runs, P parts between cuts, K kinds of later tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgraph.pools import PoolBuilder
from flowgraph.triton_rows import COMPILED, on_device

PAY_COLUMNS = 1024
"""Columns that a program of the pay kernel takes at a time."""

TILE_ROWS, TILE_COLUMNS = 64, 32
"""The tile of the other two: 128 bytes of a row, and 16 sums in float64 for each of 128 threads."""


@triton.jit(do_not_specialize=["start", "block_row", "num_tokens", "sizes", "parts"])
def _pay_kernel(  # type: ignore[no-untyped-def]
    paid,  # [P, J, N] float64
    block,  # [r, >= start + r] float32
    bounds,  # [P + 1] int32: where the parts begin, and N
    start,
    block_row,  # strides
    block_column,
    num_tokens,
    sizes,  # J
    parts,  # P
    above,  # what is above this is no part of pools
    BLOCK_C: tl.constexpr,
):
    row = start + tl.program_id(0)
    base = block + tl.program_id(0).to(tl.int64) * block_row
    for j in range(sizes):
        if (row >> j) & 1:
            end = (row >> j) << j
            begin = end - (1 << j)
            for part in range(parts):
                low = tl.maximum(begin, tl.load(bounds + part))
                high = tl.minimum(end, tl.load(bounds + part + 1))
                if low < high:
                    total = tl.zeros([BLOCK_C], tl.float64)
                    for first in range(low, high, BLOCK_C):
                        column = first + tl.arange(0, BLOCK_C)
                        weight = tl.load(base + column.to(tl.int64) * block_column, mask=column < high, other=0.0)
                        total += tl.where(weight > above, 0.0, weight).to(tl.float64)
                    place = (part * sizes + j).to(tl.int64) * num_tokens + row
                    tl.store(paid + place, tl.sum(total, 0))


@triton.jit
def _tile(block, rows, columns, takes, block_row, block_column):  # type: ignore[no-untyped-def]
    """Numbers of a block as float32 [rows, columns]; 0 where none is to be taken."""
    places = rows[:, None].to(tl.int64) * block_row + columns[None, :].to(tl.int64) * block_column
    return tl.load(block + places, mask=takes, other=0.0)


@triton.jit(do_not_specialize=["start", "stop", "block_row", "num_tokens", "sizes"])
def _collect_kernel(  # type: ignore[no-untyped-def]
    collected,  # [K, J, N] float64, added to
    block,
    weights,  # [r] float64
    kinds,  # [N] int64
    start,
    stop,
    block_row,
    block_column,
    num_tokens,
    sizes,
    above,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    low, kind = tl.program_id(0) * BLOCK_C, tl.program_id(1)
    columns = low + tl.arange(0, BLOCK_C)
    for j in range(sizes):
        size = 1 << j
        # Rows whose run of 2 ** j tokens holds these columns; or, where only some are in it, the rows of their tile.
        inside, lacks = size < BLOCK_C, ((low >> j) & 1) == 0
        first = tl.where(inside, low, low + size - low % size)
        last = tl.where(inside, low + BLOCK_C, tl.where(lacks, first + size, first))
        begin, end = tl.maximum(first, start), tl.minimum(last, stop)
        if begin < end:
            total = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
            for row_low in range(begin, end, BLOCK_R):
                rows = row_low + tl.arange(0, BLOCK_R)
                real = rows < end
                differ = rows[:, None] ^ columns[None, :]
                takes = real[:, None] & ((differ >> j) == 1) & (columns[None, :] < rows[:, None])
                weight = _tile(block, rows - start, columns, takes, block_row, block_column)
                own = tl.load(kinds + rows, mask=real, other=-1)
                counts = tl.load(weights + (rows - start), mask=real & (own == kind), other=0.0)
                total += tl.where(weight > above, 0.0, weight).to(tl.float64) * counts[:, None]
            places = collected + (kind * sizes + j).to(tl.int64) * num_tokens + columns
            exists = columns < stop
            tl.store(places, tl.load(places, mask=exists, other=0.0) + tl.sum(total, 0), mask=exists)


@triton.jit(do_not_specialize=["start", "num_rows", "block_row"])
def _arrive_kernel(  # type: ignore[no-untyped-def]
    arriving,  # [N] float64, added to
    block,
    reach,  # [r] float64
    start,
    num_rows,  # r
    block_row,
    block_column,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = columns < start
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for row_low in range(0, num_rows, BLOCK_R):
        rows = row_low + tl.arange(0, BLOCK_R)
        real = rows < num_rows
        weight = _tile(block, rows, columns, real[:, None] & exists[None, :], block_row, block_column)
        total += weight.to(tl.float64) * tl.load(reach + rows, mask=real, other=0.0)[:, None]
    places = arriving + columns
    tl.store(places, tl.load(places, mask=exists, other=0.0) + tl.sum(total, 0), mask=exists)


class TritonPools(PoolBuilder):
    """A `PoolBuilder` whose blocks are added by kernels."""

    def __init__(self, num_tokens: int, cuts: list[int], kinds: Tensor | None, device: torch.device) -> None:
        super().__init__(num_tokens, cuts, kinds, device)
        self._bounds = torch.tensor([0, *cuts, num_tokens], dtype=torch.int32, device=device)

    def add(self, start: int, rest: Tensor, weight: Tensor, above: float = math.inf) -> None:
        """Rows `start ..`.

        Args:
            rest: [r, >= start + r] float32. What is below its diagonal and not above `above` is what pools are to stand
                for; the others may be anything.
            weight: [r] float64 > 0, the weight of each row in what the pools collect.
        """
        r, (K, J, N) = len(rest), self._collected.shape
        self._shape[start : start + r] = weight
        with on_device(rest.device):
            _pay_kernel[(r,)](
                self._paid, rest, self._bounds, start, *rest.stride(), N, J, len(self._paid), above,
                BLOCK_C=PAY_COLUMNS, num_warps=4, **COMPILED,
            )  # fmt: skip
            _collect_kernel[triton.cdiv(start + r, TILE_COLUMNS), K](
                self._collected, rest, weight.contiguous(), self._kinds, start, start + r, *rest.stride(), N, J, above,
                BLOCK_R=TILE_ROWS, BLOCK_C=TILE_COLUMNS, num_warps=4, **COMPILED,
            )  # fmt: skip


def add_arriving(arriving: Tensor, start: int, block: Tensor, reach: Tensor) -> None:
    """arriving[:start] += reach @ block[:, :start], where the products are float64.

    Args:
        arriving: [N] float64. block: [r, >= start] float32, rows from `start` on. reach: [r] float64.
    """
    if start:
        with on_device(block.device):
            _arrive_kernel[(triton.cdiv(start, TILE_COLUMNS),)](
                arriving, block, reach.contiguous(), start, len(block), *block.stride(),
                BLOCK_R=TILE_ROWS, BLOCK_C=TILE_COLUMNS, num_warps=4, **COMPILED,
            )  # fmt: skip
