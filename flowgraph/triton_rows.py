"""Attention rows, and the edges in them, by Triton kernels: for GPUs, straight from queries and keys.

`flowgraph.rows.AttentionRows(backend="triton")` and `flowgraph.sparsify.sparsify` call what is here; the products of
rows with a vector, for exact mode, are in `flowgraph.triton_sweeps` and made of the same tiles. Three kernels:

    rows      one program per tile [rows, columns] of the mean. It goes through all layers and heads with the sum of
              their attention in registers, `2 ** (scores - log-sum-exp)` each, and writes the mean: no score is ever
              stored. The tile of keys is held while the query heads that share it go by.
    log-sum   one program per head and tile of rows, which it holds while the keys go by. For layers whose own kernel
              gave no log-sum-exp: soft caps, sinks, eager attention, traces that are part of what the model saw. With
              value norms it adds up `2 ** score * norm` too, and what a row of a layer sums to by value is taken off
              the log-sum-exp: from there on, rows by value are rows like any other.
    keep      one program per tile of rows: from the left to the right, what is above the threshold goes to the next
              free place of its row. Rows sum to 1 at most, so that floor(1 / threshold) places are always enough; the
              columns come out sorted.

Rows and edges are two launches and not one, since a program that cuts off must have seen all layers, heads and earlier
columns: one program would do a whole row, and the last rows would keep a GPU waiting. What goes from one to the other
is a block of the mean, [r, N] float32, which stays in the cache of the GPU.

Nothing is added up by atomics, the order of all sums is fixed, and the sizes of tiles follow from the shapes and not
from timings: the same inputs give the same bits on the same kind of device with the same Triton. Products are those of
the tensor cores for bfloat16 and float16, with sums in float32; float32 is multiplied in float32, not in TF32.

What has been checked, and where: Triton's interpreter (`TRITON_INTERPRET=1`, which also takes tensors on the CPU) runs
the tests against `backend="torch"`; and the kernels are compiled for the H100 (sm_90), which needs no GPU: the compiler
takes tensor cores and asynchronous copies of 16 bytes, and has registers enough for plain rows of heads of up to 128
numbers (a window, a cap or norms on top, or larger heads, and some are moved to local memory). No GPU has run them yet:
sizes of tiles, warps and stages are reasoned and not measured.

Shapes: N tokens, n the last of them that have queries, r rows of a block, L layers of a launch, H query heads, K key
heads, D head size, C places for kept columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))  # scores are kept in powers of 2, as GPUs take them

_MASK_NUMBERS = 2**23
"""How much of a mask is looked at at a time."""


class Layer(Protocol):
    """What is read of a `flowgraph.rows.LayerQK`."""

    @property
    def query(self) -> Tensor: ...
    @property
    def key(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def sink_logits(self) -> Tensor | None: ...
    @property
    def visible(self) -> Callable[[Tensor, Tensor], Tensor] | None: ...
    @property
    def log_sum(self) -> Tensor | None: ...
    @property
    def value_norm(self) -> Tensor | None: ...
    def lies_on(self, device: torch.device) -> bool: ...
    def part(self, start: int, stop: int, device: torch.device) -> Layer: ...


# --- kernels ---------------------------------------------------------------------------------------------------------
# Offsets are int64: 128 K tokens of 64 heads of 256 numbers are 2 ** 31. Tiles of queries are [rows, D], of keys
# [D, columns]. BLOCK_D is D rounded up to a power of 2, of which what is beyond D is 0.


@triton.jit
def _query_tile(base, head, rows, exists, head_stride, row_stride, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    numbers = tl.arange(0, BLOCK_D)
    where = head.to(tl.int64) * head_stride + rows[:, None].to(tl.int64) * row_stride + numbers[None, :]
    return tl.load(base + where, mask=exists[:, None] & (numbers[None, :] < D), other=0.0)


@triton.jit
def _key_tile(base, head, columns, exists, head_stride, row_stride, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    numbers = tl.arange(0, BLOCK_D)
    where = head.to(tl.int64) * head_stride + columns[None, :].to(tl.int64) * row_stride + numbers[:, None]
    return tl.load(base + where, mask=exists[None, :] & (numbers[:, None] < D), other=0.0)


@triton.jit
def _score_tile(query, key, scale, cap, HAS_CAP: tl.constexpr, MULTIPLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in powers of 2. With a cap, `scale` is 2 log2(e) scaling / cap and `cap` is log2(e) times it."""
    scores = tl.dot(query.to(MULTIPLY), key.to(MULTIPLY), input_precision="ieee") * scale
    if HAS_CAP:
        scores = cap - 2 * cap / (1 + tl.exp2(scores))  # cap * tanh(x), of scores = 2 x log2(e)
    return scores


@triton.jit
def mean_tile(  # type: ignore[no-untyped-def]
    table,  # [L, 4] int64: where query, key, log_sum and value_norm of each layer are
    first,  # [n] int32: the first key that each query sees
    row_low,
    column_low,
    row_stop,
    column_stop,
    before,  # tokens before the first query
    num_layers,
    share,  # what the sum over heads is multiplied by
    scale,
    cap,
    query_head,  # strides
    query_row,
    key_head,
    key_row,
    log_sum_head,
    norm_head,
    D,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each key head
    HAS_CAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLY: tl.constexpr,  # dtype of the product's factors
    ALIGN: tl.constexpr,  # bytes that all addresses in the table are multiples of
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention of rows row_low .. to columns column_low .., times `share`; 0 outside of both stops.

    Returns the tile [BLOCK_R, BLOCK_C] float32, and whether anything in it can be but 0.
    """
    rows = row_low + tl.arange(0, BLOCK_R)
    columns = column_low + tl.arange(0, BLOCK_C)
    row_exists, column_exists = rows < row_stop, columns < column_stop
    seen = (columns[None, :] <= rows[:, None]) & row_exists[:, None] & column_exists[None, :]
    works = column_low < row_low + BLOCK_R
    if HAS_FIRST:
        begin = tl.load(first + (rows - before), mask=row_exists, other=row_stop)
        seen = seen & (columns[None, :] >= begin[:, None])
        works = works & (column_low + BLOCK_C > tl.min(begin, 0))
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if works:
        for step in range(num_layers * KEY_HEADS):
            entry = table + step // KEY_HEADS * 4
            key_number = step % KEY_HEADS
            # An address out of memory could be any: the hint is what lets 16 bytes be loaded at once.
            queries = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), ALIGN)
            keys = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), ALIGN)
            log_sums = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
            norms = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
            key = _key_tile(keys, key_number, columns, column_exists, key_head, key_row, D, BLOCK_D)
            for member in range(GROUP):
                head = key_number * GROUP + member
                query = _query_tile(queries, head, rows - before, row_exists, query_head, query_row, D, BLOCK_D)
                log_sum = tl.load(
                    log_sums + head.to(tl.int64) * log_sum_head + (rows - before), mask=row_exists, other=0.0
                )
                scores = _score_tile(query, key, scale, cap, HAS_CAP, MULTIPLY)
                weight = tl.exp2(scores - log_sum[:, None] * _LOG2_E)
                if HAS_NORM:
                    norm = tl.load(norms + head.to(tl.int64) * norm_head + columns, mask=column_exists, other=0.0)
                    weight *= norm[None, :]
                total += weight
    # Hidden only now, in the sum over heads, since a known log-sum-exp doesn't ask what else was in the row.
    return tl.where(seen, total * share, 0.0), works


@triton.jit(do_not_specialize=["start", "stop", "low", "before", "num_layers"])
def _rows_kernel(  # type: ignore[no-untyped-def]
    out,  # [r, stop - low] float32
    start,
    stop,
    low,  # the first column
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
    ADD: tl.constexpr,  # to what is in `out`; else all of it is written
):
    # Programs that run at the same time share their keys.
    row_low, column_low = start + tl.program_id(0) * BLOCK_R, low + tl.program_id(1) * BLOCK_C
    total, works = mean_tile(
        table, first, row_low, column_low, stop, stop, before, num_layers, share, scale, cap, query_head, query_row,
        key_head, key_row, log_sum_head, norm_head, D, KEY_HEADS, GROUP, HAS_CAP, HAS_FIRST, HAS_NORM, DTYPE, MULTIPLY,
        ALIGN, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    rows, columns = row_low + tl.arange(0, BLOCK_R), column_low + tl.arange(0, BLOCK_C)
    places = out + (rows[:, None] - start).to(tl.int64) * (stop - low) + (columns[None, :] - low)
    exists = (rows < stop)[:, None] & (columns < stop)[None, :]
    if ADD:
        if works:
            tl.store(places, tl.load(places, mask=exists, other=0.0) + total, mask=exists)
    else:
        tl.store(places, total, mask=exists)


@triton.jit(do_not_specialize=["num_queries", "before"])
def _log_sum_kernel(  # type: ignore[no-untyped-def]
    out,  # [H, n] float32: natural logarithm
    by_value,  # [H, n] float32: that of the sum of 2 ** score * norm
    query,
    key,
    norm,  # [H, N] float32
    first,
    num_queries,  # n
    before,
    scale,
    cap,
    query_head,
    query_row,
    key_head,
    key_row,
    norm_head,
    D,
    GROUP: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    MULTIPLY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows see most keys: they begin first
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row_exists = rows < num_queries
    queries = _query_tile(query, head, rows, row_exists, query_head, query_row, D, BLOCK_D)
    place = rows + before
    stop = tl.minimum((tile + 1) * BLOCK_R, num_queries) + before
    begin = tl.zeros([BLOCK_R], tl.int32)
    if HAS_FIRST:
        begin = tl.load(first + rows, mask=row_exists, other=stop)
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    valued = tl.zeros([BLOCK_R], tl.float32)
    for low in range(tl.min(begin, 0) // BLOCK_C * BLOCK_C, stop, BLOCK_C):
        columns = low + tl.arange(0, BLOCK_C)
        keys = _key_tile(key, head // GROUP, columns, columns < stop, key_head, key_row, D, BLOCK_D)
        scores = _score_tile(queries, keys, scale, cap, HAS_CAP, MULTIPLY)
        seen = (columns[None, :] <= place[:, None]) & (columns[None, :] >= begin[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        power = tl.exp2(scores - base[:, None])
        total = total * tl.exp2(most - base) + tl.sum(power, 1)
        if HAS_NORM:
            norms = tl.load(norm + head.to(tl.int64) * norm_head + columns, mask=columns < stop, other=0.0)
            valued = valued * tl.exp2(most - base) + tl.sum(power * norms[None, :], 1)
        most = higher
    base = tl.where(most == float("-inf"), 0.0, most)
    places = head.to(tl.int64) * num_queries + rows
    tl.store(out + places, (base + tl.log2(total)) / _LOG2_E, mask=row_exists)
    if HAS_NORM:
        tl.store(by_value + places, (base + tl.log2(valued)) / _LOG2_E, mask=row_exists)


@triton.jit(do_not_specialize=["start", "stop", "num_tokens", "capacity"])
def _keep_kernel(  # type: ignore[no-untyped-def]
    block,  # [r, stop] float32
    columns,  # [N, C] int32
    weights,  # [N, C] float32
    sums,  # [4, N] float32: self, kept, dropped, first wrong weight
    numbers,  # [2, N] int32: count, column of the first wrong weight or -1
    start,
    stop,
    block_row,  # strides
    block_column,
    num_tokens,
    capacity,
    threshold,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    inside = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = start + inside
    exists = rows < stop
    row_base = block + inside.to(tl.int64) * block_row
    count = tl.zeros([BLOCK_R], tl.int32)
    kept = tl.zeros([BLOCK_R], tl.float32)
    dropped = tl.zeros([BLOCK_R], tl.float32)
    wrong = tl.full([BLOCK_R], 2147483647, tl.int32)
    # All columns, since what is above the diagonal is checked too.
    for low in range(0, stop, BLOCK_C):
        column = low + tl.arange(0, BLOCK_C)
        real = exists[:, None] & (column[None, :] < stop)
        weight = tl.load(row_base[:, None] + column[None, :].to(tl.int64) * block_column, mask=real, other=0.0)
        fine = (weight >= 0) & (weight < float("inf"))  # NaN is neither
        wrong = tl.minimum(wrong, tl.min(tl.where(fine, 2147483647, column[None, :]), 1))
        past = column[None, :] < rows[:, None]
        keep = past & (weight > threshold)
        place = count[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        free = keep & (place < capacity)  # more than that is an error, named afterwards
        where = rows[:, None].to(tl.int64) * capacity + place
        tl.store(columns + where, tl.broadcast_to(column[None, :], [BLOCK_R, BLOCK_C]), mask=free)
        tl.store(weights + where, weight, mask=free)
        count += tl.sum(keep.to(tl.int32), 1)
        kept += tl.sum(tl.where(keep, weight, 0.0), 1)
        dropped += tl.sum(tl.where(past & (weight <= threshold), weight, 0.0), 1)
    is_wrong = wrong < stop
    own = tl.load(row_base + rows.to(tl.int64) * block_column, mask=exists, other=0.0)
    sample = tl.load(row_base + wrong.to(tl.int64) * block_column, mask=exists & is_wrong, other=0.0)
    N = num_tokens.to(tl.int64)
    tl.store(sums + rows, own, mask=exists)
    tl.store(sums + N + rows, kept, mask=exists)
    tl.store(sums + 2 * N + rows, dropped, mask=exists)
    tl.store(sums + 3 * N + rows, sample, mask=exists)
    tl.store(numbers + rows, count, mask=exists)
    tl.store(numbers + N + rows, tl.where(is_wrong, wrong, -1), mask=exists)


INTERPRETED = not isinstance(_rows_kernel, triton.JITFunction)
"""Does Triton's interpreter run the kernels? (`TRITON_INTERPRET=1`, set before triton is imported.)"""

COMPILED: dict[str, Any] = {"enable_fp_fusion": True}
"""Said and not left to the version of Triton, of which each has its own default."""

KEEP_ROWS, KEEP_COLUMNS = 4, 256
"""The tile of the keep kernel: few rows, so that a block gives many programs."""

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Sizes of the tiles of a product, and how a program works on them."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_for(rows: int, head_size: int, dtype: torch.dtype) -> Tile:
    """For so many rows; by reasoning about the H100 (228 KiB of shared memory, 64 K registers), not by timing.

    bfloat16 and float16: 64 x 128 tiles of a sum and of scores take 128 registers of each of 128 threads, and two
    stages of queries beside the keys 64 KiB at head size 128, so that two programs share a multiprocessor: one
    multiplies while the other takes powers. float32 has no tensor cores and is multiplied in registers, of which larger
    tiles would take too many.
    """
    height = min(64, max(16, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        return Tile(min(height, 32), 32, 8, 1)
    return Tile(height, 128 if head_size <= 128 else 64, 4, 2)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# --- rows ------------------------------------------------------------------------------------------------------------


def first_seen(visible: Callable[[Tensor, Tensor], Tensor], positions: Tensor, before: int = 0) -> Tensor:
    """A mask as data: the first key that each query sees, from which on it sees all up to itself.

    That is what causal attention, sliding windows, chunks and packed documents look like, and any mix of them.

    Args:
        visible: (query positions [r], key positions [n]) -> [r, n] bool. positions: [N].
        before: queries belong to the tokens from here on.

    Returns:
        [N - before] int32; the number of the token after it for a query that sees nothing.

    Raises:
        ValueError: a query sees keys with a gap between them, or not itself.
    """
    N = len(positions)
    parts = []
    for start in range(before, N, height := max(1, _MASK_NUMBERS // N)):
        stop = min(start + height, N)
        seen = visible(positions[start:stop], positions[:stop]).tril(start)
        after = torch.arange(start + 1, stop + 1, device=positions.device)
        count = seen.sum(-1)
        first = torch.where(count > 0, seen.view(torch.uint8).argmax(-1), after)
        parts.append(torch.stack([first, count - (after - first)]))
    first, gaps = torch.cat(parts, 1)
    if gaps.any():
        row = before + int(gaps.nonzero()[0])
        raise ValueError(
            f'visible: token {row} does not see an unbroken run of keys up to itself, and backend="triton" reads no '
            'other masks: use backend="torch"'
        )
    return first.int()


class Launch(NamedTuple):
    """Layers that are alike in all but their addresses, for one launch.

    Attributes:
        layers: their query [H, n, D], key [K, N, D], log_sum [H, n] and value_norm [H, N] (or none), which have to live
            as long as the table. table: [L, 4] int64, their addresses. first: [n] int32 or None.
        before: tokens before the first query.
    """

    layers: list[_Placed]
    table: Tensor
    first: Tensor | None
    before: int

    def arguments(self, share: float) -> tuple[Any, ...]:
        """What `mean_tile` takes from `table` on, up to its constants, less the edges of the tile."""
        layer, first = self.layers[0], self.table if self.first is None else self.first
        strides = (*layer.query.stride()[:2], *layer.key.stride()[:2], layer.log_sum.stride(0))
        norm = 0 if layer.value_norm is None else layer.value_norm.stride(0)
        return self.table, first, self.before, len(self.layers), share, *layer.scores, *strides, norm, self.head_size

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The constants of `mean_tile`, and how the programs run."""
        layer = self.layers[0]
        addresses = [x.data_ptr() for one in self.layers for x in (one.query, one.key)]
        return {
            "KEY_HEADS": len(layer.key),
            "GROUP": len(layer.query) // len(layer.key),
            "HAS_CAP": layer.softcap is not None,
            "HAS_FIRST": self.first is not None,
            "HAS_NORM": layer.value_norm is not None,
            "DTYPE": _DTYPES[layer.query.dtype],
            "MULTIPLY": _factors(layer.query.dtype),
            "ALIGN": math.gcd(16, *addresses),
            "BLOCK_R": tile.rows,
            "BLOCK_C": tile.columns,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_size)),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **COMPILED,
        }

    def tile(self, rows: int) -> Tile:
        """For a block of so many rows."""
        return tile_for(rows, self.head_size, self.layers[0].query.dtype)

    @property
    def head_size(self) -> int:
        return self.layers[0].query.shape[-1]


class _Placed(NamedTuple):
    """One layer on the device of the kernels.

    Attributes:
        log_sum: [H, n] float32; by value, with the logarithm added of what a row of the layer sums to.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    log_sum: Tensor
    value_norm: Tensor | None

    @property
    def scores(self) -> tuple[float, float]:
        """`scale` and `cap` of the kernels."""
        return _scale_and_cap(self.scaling, self.softcap)

    def kind(self) -> tuple[Any, ...]:
        """What layers of one launch have in common."""
        norm = None if self.value_norm is None else self.value_norm.stride()
        shape = (self.query.shape, self.key.shape, self.query.dtype)
        return shape, self.scores, self.query.stride(), self.key.stride(), self.log_sum.stride(), norm


class TritonRows:
    """Rows of the head-averaged attention of some layers, as `flowgraph.rows.AttentionRows` defines them.

    Queries and keys that lie on the device are read where they are; those that lie elsewhere are brought layer by
    layer, for all that is asked for at once. Where the log-sum-exp is missing, or rows are by value, it is worked out
    first: once, and kept, [H, n] float32 per layer (of layers that lie elsewhere, for the same rows).

    Args:
        layers: all of one trace, bfloat16, float16 or float32. positions: [N], on the device to compute on.
        by_value: weigh by value norms.

    Raises:
        ValueError: a mask is not one that `first_seen` takes.
    """

    def __init__(self, layers: Sequence[Layer], positions: Tensor, by_value: bool) -> None:
        self.device, self._by_value = positions.device, by_value
        self._before = layers[0].key.shape[1] - layers[0].query.shape[1]
        self._first = {
            visible: None if visible is None else first_seen(visible, positions, self._before)
            for visible in {layer.visible for layer in layers}
        }
        # By value, rows of a layer are already divided by their sum.
        self.share = 1 / (len(layers) if by_value else sum(len(layer.query) for layer in layers))
        self._log_sums: dict[tuple[int, int, int], Tensor] = {}
        alike: dict[Any, list[int]] = {}
        placed: dict[int, _Placed] = {}
        for number, layer in enumerate(layers):
            if not self._is_here(layer):
                continue
            log_sum = self._log_sum(layer, layer.query, layer.key, layer.log_sum, self._before)
            placed[number] = self._placed(layer, layer.query, layer.key, log_sum)
            alike.setdefault((placed[number].kind(), layer.visible), []).append(number)
        self._launches = [
            _launch([placed[number] for number in numbers], self._first[layers[numbers[0]].visible], self._before)
            for numbers in alike.values()
        ]
        self._elsewhere = {number: layer for number, layer in enumerate(layers) if not self._is_here(layer)}

    def rows(self, start: int, stop: int, low: int = 0) -> Tensor:
        """[stop - start, stop - low] float32: rows start .. stop - 1 of `W`, from column `low` on."""
        out = torch.empty(stop - start, stop - low, dtype=torch.float32, device=self.device)
        add = False
        for launch in self.launches(start, stop):
            _add_rows(out, launch, start, low, self.share, add)
            add = True
            del launch  # before the keys of the next layer come
        return out

    def launches(self, start: int, stop: int) -> Iterable[Launch]:
        """What rows start .. stop - 1 are made of. Layers that are brought for it live as long as their launch."""
        yield from self._launches
        for number, layer in self._elsewhere.items():
            yield self._brought(number, layer, start, stop)

    def _brought(self, number: int, layer: Layer, start: int, stop: int) -> Launch:
        rows = slice(start - self._before, stop - self._before)
        part = layer.part(start, stop, self.device)
        known = self._log_sums.get((number, start, stop))
        if known is None:
            known = self._log_sum(layer, part.query, part.key, part.log_sum, start)
            if known is not part.log_sum:
                self._log_sums[number, start, stop] = known
        first = self._first[layer.visible]
        placed = self._placed(layer, part.query, part.key, known)
        return _launch([placed], None if first is None else first[rows], start)

    def _is_here(self, layer: Layer) -> bool:
        return layer.lies_on(self.device)

    def _readable(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """As the kernels read them."""
        dtype = torch.promote_types(query.dtype, key.dtype)
        return _with_rows(query.to(dtype)), _with_rows(key.to(dtype))

    def _norm(self, layer: Layer) -> Tensor | None:
        """[H, N] float32, for rows by value."""
        norm = layer.value_norm if self._by_value else None
        return None if norm is None else _with_rows(norm.to(self.device, torch.float32))

    def _placed(self, layer: Layer, query: Tensor, key: Tensor, log_sum: Tensor) -> _Placed:
        log_sum = _with_rows(log_sum.to(self.device, torch.float32))
        return _Placed(*self._readable(query, key), layer.scaling, layer.softcap, log_sum, self._norm(layer))

    def _log_sum(self, layer: Layer, query: Tensor, key: Tensor, given: Tensor | None, before: int) -> Tensor:
        """[H, n] of rows `before ..` of a layer, as `_Placed` has it; `given`, if it is known and can stay as it is."""
        norm = self._norm(layer)
        if given is not None and norm is None:
            return given
        first = self._first[layer.visible]
        first = None if first is None else first[before - self._before :][: query.shape[1]]
        own, valued = log_sums(
            *self._readable(query, key), layer.scaling, layer.softcap, layer.sink_logits, first, norm
        )
        log_sum = own if given is None else given.to(self.device, torch.float32)
        if valued is None:
            return log_sum
        # A row that sees nothing but values of norm 0 stays 0.
        by_value = (valued - log_sum).exp().sum(0).clamp(min=torch.finfo(torch.float32).tiny)
        return log_sum + by_value.log()


def _with_rows(x: Tensor) -> Tensor:
    """Of which the last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(layers: list[_Placed], first: Tensor | None, before: int) -> Launch:
    addresses = [
        [0 if x is None else x.data_ptr() for x in (layer.query, layer.key, layer.log_sum, layer.value_norm)]
        for layer in layers
    ]
    device = layers[0].query.device
    # Pinned, or the host would wait for all that came before.
    table = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Launch(layers, table, first, before)


def _add_rows(out: Tensor, launch: Launch, start: int, low: int, share: float, add: bool) -> None:
    """Write the attention of some layers, summed over heads and times `share`, to out [r, stop - low], or add it."""
    (r, width), tile = out.shape, launch.tile(len(out))
    with on_device(out.device):
        _rows_kernel[triton.cdiv(r, tile.rows), triton.cdiv(width, tile.columns)](
            out, start, start + r, low, *launch.arguments(share), **launch.constants(tile), ADD=add
        )


def log_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    first: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[H, n] float32 log-sum-exp of the scores of each row, as `flowgraph.rows.LayerQK` defines `log_sum`.

    Args:
        query: [H, n, D], the last tokens. key: [K, N, D]; both with contiguous last dimension, on one device.
        sink_logits: [H] or None. first: [n] int32 the first key that each query sees, or None: all up to itself.
        norm: [H, N] float32 value norms, or None.

    Returns:
        The log-sum-exp; and with norms, that of the scores with the norms of their keys as factors (sinks have none).
    """
    (H, n, D), (K, N, _) = query.shape, key.shape
    out = torch.empty(H, n, dtype=torch.float32, device=query.device)
    by_value = None if norm is None else torch.empty_like(out)
    scale, cap = _scale_and_cap(scaling, softcap)
    tile = tile_for(n, D, query.dtype)
    with on_device(query.device):
        _log_sum_kernel[H, triton.cdiv(n, tile.rows)](
            out,
            out if by_value is None else by_value,
            query,
            key,
            out if norm is None else norm,
            query if first is None else first,
            n,
            N - n,
            scale,
            cap,
            *query.stride()[:2],
            *key.stride()[:2],
            0 if norm is None else norm.stride(0),
            D,
            GROUP=H // K,
            HAS_CAP=softcap is not None,
            HAS_FIRST=first is not None,
            HAS_NORM=norm is not None,
            MULTIPLY=_factors(query.dtype),
            BLOCK_R=tile.rows,
            BLOCK_C=tile.columns,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILED,
        )
    return (out if sink_logits is None else torch.logaddexp(out, sink_logits.to(out)[:, None])), by_value


def _scale_and_cap(scaling: float, softcap: float | None) -> tuple[float, float]:
    """What `_score_tile` takes."""
    log2_e = math.log2(math.e)
    return (scaling * log2_e, 0.0) if softcap is None else (2 * scaling / softcap * log2_e, softcap * log2_e)


def _factors(dtype: torch.dtype) -> tl.dtype:
    """In what the products are taken: the interpreter would multiply the bits of bfloat16 as whole numbers."""
    return tl.float32 if INTERPRETED else _DTYPES[dtype]


# --- edges -----------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a threshold keeps of each row, and what it leaves.

    Attributes:
        source, target: [E] int64, by target and then by source. weight: [E] float32.
        self_weight, kept, dropped: [N] float32 of each row: the diagonal; what was kept and what was left, of the rest.
        wrong: (row, column, weight) of the first weight that is NaN, infinite or negative; None: there is none.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    self_weight: Tensor
    kept: Tensor
    dropped: Tensor
    wrong: tuple[int, int, float] | None


class Above:
    """Keeps what is strictly above a threshold, below the diagonal, of blocks in any order, each row once.

    The host waits for the device once, for `kept`.

    Args:
        num_tokens: N. threshold: >= 0. C = floor(1 / threshold) + 1 places are held for each row (the one is for
            rounding), at most N: 8 C bytes per token.
    """

    def __init__(self, num_tokens: int, threshold: float, device: torch.device) -> None:
        self._threshold, self._begin, self._stop = threshold, num_tokens, 0
        self._capacity = num_tokens if threshold * num_tokens <= 1 else math.floor(1 / threshold) + 1
        self._buffers = [
            torch.empty(*shape, dtype=dtype, device=device)
            for shape, dtype in (
                ((num_tokens, self._capacity), torch.int32),
                ((num_tokens, self._capacity), torch.float32),
                ((4, num_tokens), torch.float32),
                ((2, num_tokens), torch.int32),
            )
        ]

    def take(self, start: int, block: Tensor) -> None:
        """Rows from `start` on; block [r, start + r] float32."""
        stop = start + len(block)
        self._begin, self._stop = min(self._begin, start), max(self._stop, stop)
        with on_device(block.device):
            _keep_kernel[(triton.cdiv(len(block), KEEP_ROWS),)](
                block,
                *self._buffers,
                start,
                stop,
                *block.stride(),
                self._buffers[2].shape[1],
                self._capacity,
                self._threshold,
                BLOCK_R=KEEP_ROWS,
                BLOCK_C=KEEP_COLUMNS,
                num_warps=4,
                **COMPILED,
            )

    def kept(self) -> Kept:
        """Of all blocks, which together are consecutive rows.

        Raises:
            ValueError: a row keeps more than C, since it sums to more than 1.
        """
        rows = slice(self._begin, self._stop)
        columns, weights, sums, numbers = self._buffers
        sums, (count, first_wrong) = sums[:, rows], numbers[:, rows].long()
        fits = count.clamp(max=self._capacity)
        wrong = (first_wrong >= 0).any()
        any_wrong, most, total = torch.stack([wrong.long(), count.max(), fits.sum()]).tolist()
        found = None
        if any_wrong:
            row = int((first_wrong >= 0).nonzero()[0])
            found = row + self._begin, int(first_wrong[row]), float(sums[3, row])
        elif most > self._capacity:
            row = int(count.argmax())
            raise ValueError(
                f"row {row + self._begin} of W has {most} weights above {self._threshold:g}, more than fit "
                "into 1: the attention weights of a row must sum to 1 at most"
            )
        # The places that are taken, by number: a mask of all [N, C] of them may have more than CUDA's nonzero takes.
        target = torch.arange(self._begin, self._stop, device=count.device).repeat_interleave(fits, output_size=total)
        taken = torch.arange(total, device=count.device) - (fits.cumsum(0) - fits)[target - self._begin]
        taken += target * self._capacity
        return Kept(
            source=columns.view(-1)[taken].long(),
            target=target,
            weight=weights.view(-1)[taken],
            self_weight=sums[0],
            kept=sums[1],
            dropped=sums[2],
            wrong=found,
        )


def keep_above(blocks: Iterable[tuple[int, Tensor]], num_tokens: int, threshold: float) -> Kept:
    """`Above` for blocks [r, stop] float32 that come one after the other. The host waits once, at the end."""
    above: Above | None = None
    for start, block in blocks:
        above = Above(num_tokens, threshold, block.device) if above is None else above
        above.take(start, block)
    assert above is not None, "there are no rows"
    return above.kept()
