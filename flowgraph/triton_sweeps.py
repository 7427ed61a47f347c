"""Products of attention rows with a vector, by a Triton kernel that never writes the rows: for exact mode on GPUs.

Exact mode reads all rows twice (`flowgraph.exact`). Of a block of rows start .. stop - 1 each sweep needs its square,
W[start:stop, start:stop], which `flowgraph.triton_rows` writes; and of all columns before it no more than

    arriving   reach @ W[start:stop, :start]     what the block's reach is to earlier tokens, on the way back
    known      W[start:stop, :start] @ value     what earlier tokens give to the block, on the way forward

A program makes one tile of the mean, as a program of the kernel of rows does, in registers; multiplies it by its part
of the vector; adds it up over its rows (or columns); and writes that one vector, a 64th (or 128th) of the tile. What
the programs have written is added up afterwards, in a fixed order: no atomics, the same bits in every run. The tile is
float32, to the bit as rows have it. Products and sums are float64, since reach and flow run over many decades: on an
H100 they are two operations where the tile took 384 products of vectors (Qwen3-4B), so that nothing is saved by less.

The sweeps themselves are chains of N dependent tokens, each of which would take a GPU half a microsecond. Within a
block, `solve` first inverts all tiles of 64 x 64 tokens on the diagonal at once; then one program goes from tile to
tile. What is left of the chain is N / 64 steps.

No GPU has run any of this; see `flowgraph.triton_rows` for what has been checked and where.

Shapes: N tokens, r rows of a block, V vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgraph.triton_rows import COMPILED, TritonRows, mean_tile, on_device


@triton.jit(do_not_specialize=["start", "stop", "width", "before", "num_layers"])
def _product_kernel(  # type: ignore[no-untyped-def]
    out,  # float64: [tiles of rows, width], or ACROSS [V, tiles of columns, r]
    values,  # float64: [r], or ACROSS [V, width]
    start,
    stop,
    width,  # columns 0 .. width - 1 take part
    # As `mean_tile` has them.
    table,
    first,
    before,
    num_layers,
    share,
    scale,
    cap,
    query_head,
    query_row,
    key_head,
    key_row,
    log_sum_head,
    norm_head,
    D,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACROSS: tl.constexpr,  # W @ values, a sum over columns; else values @ W
    VECTORS: tl.constexpr,  # V
):
    row_low, column_low = start + tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    tile, _ = mean_tile(
        table, first, row_low, column_low, stop, width, before, num_layers, share, scale, cap, query_head, query_row,
        key_head, key_row, log_sum_head, norm_head, D, KEY_HEADS, GROUP, HAS_CAP, HAS_FIRST, HAS_NORM, DTYPE, MULTIPLY,
        ALIGN, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    tile = tile.to(tl.float64)
    rows, columns = row_low + tl.arange(0, BLOCK_R), column_low + tl.arange(0, BLOCK_C)
    row_exists, column_exists = rows < stop, columns < width
    if ACROSS:
        for vector in tl.static_range(VECTORS):
            value = tl.load(values + vector * width + columns, mask=column_exists, other=0.0)
            place = (vector * tl.num_programs(1) + tl.program_id(1)) * (stop - start) + (rows - start)
            tl.store(out + place, tl.sum(tile * value[None, :], 1), mask=row_exists)
    else:
        value = tl.load(values + (rows - start), mask=row_exists, other=0.0)
        place = tl.program_id(0) * width + columns
        tl.store(out + place, tl.sum(tile * value[:, None], 0), mask=column_exists)


# T[k, i] = into(k) square[k, i] out_of(i), i < k, is taken in tiles of SIDE tokens. Offsets in the square are int64: it
# lies within a block, whose rows are as long as the trace.


@triton.jit(do_not_specialize=["r", "stride"])
def _invert_kernel(  # type: ignore[no-untyped-def]
    out,  # [tiles, SIDE, SIDE] float64: of each tile on the diagonal, 1 / (1 - T)
    square,  # [r, r] float32
    into,  # [r] float64, as is out_of
    out_of,
    r,
    stride,
    SIDE: tl.constexpr,
):
    low, place = tl.program_id(0) * SIDE, tl.arange(0, SIDE)
    rows = low + place
    enters = tl.load(into + rows, mask=rows < r, other=0.0)
    inverse = (place[:, None] == place[None, :]).to(tl.float64)
    for step in range(SIDE):
        token = low + step
        column = tl.load(square + rows.to(tl.int64) * stride + token, mask=(rows < r) & (place > step), other=0.0)
        leaves = tl.load(out_of + token, mask=token < r, other=0.0)
        row = tl.sum(tl.where(place[:, None] == step, inverse, 0.0), 0)
        inverse += (column.to(tl.float64) * enters * leaves)[:, None] * row[None, :]
    tl.store(out + (rows * SIDE)[:, None] + place[None, :], inverse)


@triton.jit(do_not_specialize=["r", "stride"])
def _solve_kernel(  # type: ignore[no-untyped-def]
    out,  # [r] float64, as are right, into and out_of
    square,  # [r, r] float32
    inverse,  # of `_invert_kernel`
    right,
    into,
    out_of,
    r,
    stride,
    BACKWARD: tl.constexpr,
    SIDE: tl.constexpr,
):
    place, tiles = tl.arange(0, SIDE), tl.cdiv(r, SIDE)
    for step in range(tiles):
        here = tiles - 1 - step if BACKWARD else step
        mine = here * SIDE + place
        total = tl.zeros([SIDE, SIDE], tl.float64)
        for other in range(here + 1 if BACKWARD else 0, tiles if BACKWARD else here):
            theirs = other * SIDE + place
            solved = tl.load(out + theirs, mask=theirs < r, other=0.0)
            rows, columns = (theirs, mine) if BACKWARD else (mine, theirs)
            exists = (rows < r)[:, None] & (columns < r)[None, :]
            where = rows[:, None].to(tl.int64) * stride + columns[None, :]
            weight = tl.load(square + where, mask=exists, other=0.0).to(tl.float64)
            if BACKWARD:
                total += weight * (solved * tl.load(into + theirs, mask=theirs < r, other=0.0))[:, None]
            else:
                total += weight * (solved * tl.load(out_of + theirs, mask=theirs < r, other=0.0))[None, :]
        known = tl.load(right + mine, mask=mine < r, other=0.0)
        whole = tl.load(inverse + (mine * SIDE)[:, None] + place[None, :])
        if BACKWARD:
            known += tl.sum(total, 0) * tl.load(out_of + mine, mask=mine < r, other=0.0)
            found = tl.sum(whole * known[:, None], 0)
        else:
            known += tl.sum(total, 1) * tl.load(into + mine, mask=mine < r, other=0.0)
            found = tl.sum(whole * known[None, :], 1)
        tl.store(out + mine, found, mask=mine < r)
        tl.debug_barrier()  # other threads of the program read it for the next tile


SIDE = 64
"""Tokens of a tile of `solve`."""


class TritonSweeps(TritonRows):
    """`TritonRows`, and what exact mode makes of them, as `flowgraph.rows.BlockedRows` defines it."""

    def arriving(self, start: int, reach: Tensor) -> Tensor:
        """[start] float64: reach [r] float64 times rows start .. start + r - 1 of the columns before them."""
        return self._product(start, start + len(reach), start, reach[None], across=False)[0]

    def known(self, start: int, stop: int, values: Tensor) -> Tensor:
        """[V, stop - start] float64: rows start .. stop - 1 of the columns before them times values [V, start]."""
        return self._product(start, stop, start, values, across=True)

    def _product(self, start: int, stop: int, width: int, values: Tensor, across: bool) -> Tensor:
        """[V, width] or, across, [V, r]."""
        r, V = stop - start, len(values)
        out = torch.zeros(V, r if across else width, dtype=torch.float64, device=self.device)
        if not width:
            return out
        values = values.contiguous()
        for launch in self.launches(start, stop):
            tile = launch.tile(r)
            grid = triton.cdiv(r, tile.rows), triton.cdiv(width, tile.columns)
            parts = out.new_empty(V, grid[1], r) if across else out.new_empty(1, grid[0], width)
            with on_device(self.device):
                _product_kernel[grid](
                    parts, values, start, stop, width,
                    *launch.arguments(self.share), **launch.constants(tile), ACROSS=across, VECTORS=V,
                )  # fmt: skip
            out += parts.sum(1)
        return out

    def solve(self, square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
        """`flowgraph.rows.solve_square`."""
        square = square if square.stride(1) == 1 else square.contiguous()
        into, out_of, size = into.double(), out_of.double(), (len(right), square.stride(0))
        out, tiles = torch.empty_like(right), triton.cdiv(len(right), SIDE)
        inverse = right.new_empty(tiles, SIDE, SIDE)
        with on_device(self.device):
            _invert_kernel[(tiles,)](inverse, square, into, out_of, *size, SIDE=SIDE, num_warps=8, **COMPILED)
            # One stage: what is read in the next round may have been written in this one.
            _solve_kernel[(1,)](
                out, square, inverse, right.contiguous(), into, out_of, *size,
                BACKWARD=backward, SIDE=SIDE, num_warps=8, num_stages=1, **COMPILED,
            )  # fmt: skip
        return out
