"""The triangular solves of a whole batch by one Triton kernel: each graph has a program of its own.

A chain of N tokens, each waiting for the one before, keeps a GPU idle; sixty-four of them, side by side, less so, and
most of the waiting can go. A program walks over the tokens of its graph in blocks of 32 rows. For all rows of a block
at once it fetches what is known from the earlier blocks (the edges, then `x` at their other ends: two waits, whatever
the number of edges), adds it up, and puts the weights of edges within the block into a square of its own. Then the 32
tokens are solved one after the other in registers, column by column of the square. So a graph of 8,192 tokens takes 256
rounds to memory, and not 8,192.

    x(k) = rhs(k) + sum_e weight(e) x(other(e))        over the edges e of token k; first tokens first, or last first

Every token is solved by additions and products of its own edges in an order that is fixed by the graph alone: no
atomics, no inverse matrices, and no library that goes by the size of the batch. So a graph gets the same bits alone and
in any batch. Sums are float64, whatever the weights are.

Rows of many edges (the first token of a trace is read by all others) would make their block wait: from the 257th edge
on, a row has all lanes for itself.

What has been checked, and where: Triton's interpreter runs the tests against the other solvers, and the kernel is
compiled for the H100 (sm_90), which needs no GPU. No GPU has run it: sizes are reasoned and not measured, and that the
barriers are where they have to be is reasoned too, since the interpreter runs one lane after the other.

Shapes: N tokens, E edges, B graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgraph.triton_rows import COMPILED, on_device


@triton.jit
def _sweep_kernel(  # type: ignore[no-untyped-def]
    x,  # [N] float64
    squares,  # [B, BLOCK, BLOCK] float64, anything
    rhs,  # [N] float64
    graph_ptr,  # [B + 1] int64: the first token of each graph
    edge_ptr,  # [N + 1] int64: the first edge of each token
    other,  # [E] int32: the earlier token (BACKWARD: the later one)
    weight,  # [E] float
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # edges of a row at a time
    LONG: tl.constexpr,  # edges of a row that are taken together with the other rows
    WIDE: tl.constexpr,  # edges at a time after that
):
    graph = tl.program_id(0)
    start = tl.load(graph_ptr + graph).to(tl.int32)
    stop = tl.load(graph_ptr + graph + 1).to(tl.int32)
    number = tl.arange(0, BLOCK)
    lane, wide_lane = tl.arange(0, CHUNK), tl.arange(0, WIDE)
    # What row r takes from column j stands at [j, r]: a column is read at once.
    square = squares + graph.to(tl.int64) * BLOCK * BLOCK
    nothing = tl.zeros([BLOCK, BLOCK], tl.float64)
    for low in range(0, stop - start, BLOCK):
        # Places count in the order of the sweep.
        exists = low + number < stop - start
        token = stop - 1 - low - number if BACKWARD else start + low + number
        total = tl.load(rhs + token, mask=exists, other=0.0)
        begin = tl.load(edge_ptr + token, mask=exists, other=0)
        count = (tl.load(edge_ptr + token + 1, mask=exists, other=0) - begin).to(tl.int32)
        tl.store(square + number[:, None] * BLOCK + number[None, :], nothing)
        tl.debug_barrier()  # the square is empty before anything is put there
        longest = tl.max(count, 0)
        for at in range(0, tl.minimum(longest, LONG), CHUNK):
            real = (at + lane)[None, :] < tl.minimum(count, LONG)[:, None]
            edge = begin[:, None] + (at + lane)[None, :]
            end = tl.load(other + edge, mask=real, other=0)
            factor = tl.load(weight + edge, mask=real, other=0.0).to(tl.float64)
            column = stop - 1 - end - low if BACKWARD else end - start - low
            known = tl.load(x + end, mask=real & (column < 0), other=0.0)
            total += tl.sum(factor * known, 1)
            tl.store(square + column * BLOCK + number[:, None], factor, mask=real & (column >= 0))
        if longest > LONG:
            for row in range(BLOCK):
                is_row = number == row
                first = tl.sum(tl.where(is_row, begin + LONG, 0), 0)
                last = tl.sum(tl.where(is_row, begin + count, 0), 0)
                part = tl.zeros([WIDE], tl.float64)
                for far in range(first, last, WIDE):
                    more = far + wide_lane < last
                    ends = tl.load(other + far + wide_lane, mask=more, other=0)
                    value = tl.load(weight + far + wide_lane, mask=more, other=0.0).to(tl.float64)
                    place = stop - 1 - ends - low if BACKWARD else ends - start - low
                    part += value * tl.load(x + ends, mask=more & (place < 0), other=0.0)
                    tl.store(square + place * BLOCK + row, value, mask=more & (place >= 0))
                total += tl.where(is_row, tl.sum(part, 0), 0.0)
        tl.store(x + token, total, mask=exists)
        tl.debug_barrier()  # the square is full
        # Read again, one row to a lane of each warp: what a token hands to the next doesn't leave the warp then.
        total = tl.load(x + token, mask=exists, other=0.0)
        tl.debug_barrier()  # every warp has read what the first one is to write over
        for done in range(BLOCK):
            taken = tl.load(square + done * BLOCK + number)
            total += taken * tl.gather(total, number * 0 + done, 0)  # one shuffle
        tl.store(x + token, total, mask=exists)
        tl.debug_barrier()  # all lanes see x, and are done with the square


BLOCK, CHUNK, LONG, WIDE = 32, 32, 256, 1024
"""32 rows are one to a lane of a warp, of which each holds all: what a token hands to the next never leaves the warp.
32 x 32 edges are 8 to each of 128 threads; the square takes 8 KiB, and stays in the first-level cache."""

_LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
"""One stage: loads must not be moved before the stores of the block before them."""


def sweep(graph_ptr: Tensor, edge_ptr: Tensor, other: Tensor, weight: Tensor, rhs: Tensor, *, backward: bool) -> Tensor:
    """[N] float64 the x of `x(k) = rhs(k) + sum weight(e) x(other(e))` over the edges e of token k, for all graphs.

    Args:
        graph_ptr: [B + 1] int64 the first token of each graph. edge_ptr: [N + 1] int64 the first edge of each token.
        other: [E] the earlier tokens of the edges; backward, the later ones. weight: [E] float32 or float64.
        rhs: [N] float64. All on one device.
    """
    B = len(graph_ptr) - 1
    x = torch.empty_like(rhs)
    squares = torch.empty(B, BLOCK, BLOCK, dtype=torch.float64, device=rhs.device)
    other, weight = other.to(torch.int32).contiguous(), weight.contiguous()
    with on_device(rhs.device):
        _sweep_kernel[(B,)](
            x, squares, rhs.contiguous(), graph_ptr.contiguous(), edge_ptr.contiguous(), other, weight,
            BACKWARD=backward, BLOCK=BLOCK, CHUNK=CHUNK, LONG=LONG, WIDE=WIDE, **_LAUNCH, **COMPILED,
        )  # fmt: skip
    return x
