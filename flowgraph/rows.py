"""Attention as a stream of row blocks, so that no [N, N] tensor is ever held.

Shapes: N tokens, r rows of a block, H query heads, K key heads, D head size. `W[k, i]` is the attention that token
`k` pays to token `i`, averaged over all heads of the chosen layers; rows of a block are consecutive `k`, and columns
run from 0 to the last row of the block, since nothing attends to the future.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowgraph.sums import cuda_extra

BLOCK_BYTES = {"cpu": 8 * 2**20, "other": 64 * 2**20}
"""Budget for a block [r, N] of rows. What is made of a block takes ten times as much, and so bounds it."""

BLOCK_ROWS = {"cpu": 256, "other": 1024}
"""Most rows of a block: a GPU wants many, so that all of it works on one; of 256 rows at 8,000 tokens it is half."""

BAND_BYTES = 512 * 2**20
"""Budget for a band: the rows of several blocks, of layers that lie elsewhere than where they are computed on. A band
has all their keys sent once, so a GPU waits less, the more rows it has: of 1,024 rows, about as long as it computes."""

TILE_BYTES = {"cpu": 4 * 2**20, "other": 128 * 2**20}
"""Budget for the scores [H, r, n] of a tile: in the cache of a CPU; other devices want fewer and larger tiles."""

TILE_ROWS, TILE_COLUMNS = 128, 64
"""Most rows and fewest columns of a tile: enough for a matrix product; and with few rows, little of it is future."""

KEPT_BYTES = {"cpu": 64 * 2**20, "other": 512 * 2**20}
"""Budget for the blocks that `KeptRows` holds: all blocks of a trace of 5,700 tokens; of 16,000 on other devices."""

TRITON = (3, 3)
"""The first version of Triton that has all that the kernels use (`tl.gather`)."""

TRITON_HEAD = 512
"""The largest head size of the kernels: two stages of queries and a tile of keys are 192 KiB then."""

_LOG2_E = math.log2(math.e)  # scores are kept in powers of 2: on a CPU, 2**x takes a third of the time of e**x


def of_device(budget: dict[str, int], device: torch.device) -> int:
    """What one of the budgets above is on a device."""
    return budget["cpu" if device.type == "cpu" else "other"]


def rows_of_a_block(num_tokens: int, device: torch.device) -> int:
    """How many rows a block of a trace of N tokens has, unless somebody says otherwise."""
    return max(16, min(of_device(BLOCK_ROWS, device), of_device(BLOCK_BYTES, device) // (4 * num_tokens)))


def rows_of_a_band(num_tokens: int, block: int) -> int:
    """How many rows a band has: as many as `BAND_BYTES` holds, up to `BLOCK_ROWS`, in whole blocks of so many rows."""
    return block * max(1, min(BLOCK_ROWS["other"], BAND_BYTES // (4 * num_tokens)) // block)


class RowBlock(NamedTuple):
    """Rows `start .. start + r - 1` of `W`."""

    start: int
    weight: Tensor
    """[r, start + r], diagonal included; zero above the diagonal."""


class Rows(Protocol):
    """A matrix `W` [N, N] that is read block by block, as often as one likes, always in the same blocks."""

    num_tokens: int

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        """First rows first, or the blocks in reverse (within a block the rows always ascend)."""
        ...


class BlockedRows(ABC):
    """Rows of which each block can be had by itself."""

    num_tokens: int
    starts: range
    """The first row of every block."""
    backend = "torch"
    """What computes on blocks: "torch", or "triton"; see `AttentionRows`."""
    device = torch.device("cpu")
    """Where blocks lie."""
    dtype = torch.float32
    """Of their numbers."""
    held_bytes = 0
    """Of what stays here between two readings."""

    @abstractmethod
    def block(self, start: int) -> RowBlock:
        """The block that begins at row `start`, one of `starts`. Not to be written into: it may be read again."""

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        return map(self.block, reversed(self.starts) if last_first else self.starts)

    # What exact mode needs of a block, for which kernels need not write it. These are their slow twins.

    def square(self, start: int) -> Tensor:
        """[r, r] the attention of the rows of a block among themselves: its last columns."""
        return self.block(start).weight[:, start:]

    def arriving(self, start: int, reach: Tensor) -> Tensor:
        """[start] float64: what reach [r] float64 of a block's rows is to all tokens before it, `reach @ W`."""
        return reach @ self.block(start).weight[:, :start].double()

    def known(self, start: int, values: Tensor) -> Tensor:
        """[V, r] float64: the sums of V values [V, start] float64 of the tokens before a block, `W @ value` each."""
        return values @ self.block(start).weight[:, :start].double().mT

    def solve(self, square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
        """`solve_square`."""
        return solve_square(square.double(), right, into, out_of, backward)


def solve_square(square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
    """The sweep within a block: x = right + T x, or right + T^T x, of T[k, i] = into(k) square[k, i] out_of(i), i < k.

    Args:
        square: [r, r] float64; what is on and above the diagonal doesn't count. right: [r] float64.
        into, out_of: [r] bool. backward: with T^T.
    """
    system = -(square * into[:, None]).tril(-1) * out_of
    system = system.mT if backward else system
    return torch.linalg.solve_triangular(system, right[:, None], upper=backward, unitriangular=True)[:, 0]


class DenseRows(BlockedRows):
    """The rows of a dense matrix: for tests, for small traces and for attention from elsewhere.

    Args:
        W: [N, N] float, row = later token, column = earlier token; zero above the diagonal.
    """

    def __init__(self, W: Tensor, block: int = 1024) -> None:
        if W.ndim != 2 or W.shape[0] != W.shape[1] or not W.is_floating_point():
            raise ValueError(f"W must be a float matrix [N, N], got {list(W.shape)} {W.dtype}")
        self.W = W if W.dtype in (torch.float32, torch.float64) else W.float()
        self.num_tokens, self.starts = len(W), range(0, len(W), block)
        self.device, self.dtype = self.W.device, self.W.dtype

    def block(self, start: int) -> RowBlock:
        rows = self.W[start : start + self.starts.step]
        # Not `!= 0` on the part above the diagonal: NaN must be named as such by the weights' own check.
        ahead = torch.triu(rows, diagonal=start + 1)
        if ahead.any():
            row, column = (int(x) for x in ahead.nonzero()[0])
            raise ValueError(
                f"W[{row + start}, {column}] = {float(rows[row, column]):g} runs against time: token {row + start} "
                f"cannot attend to the later token {column}; pass W with row = later token (W.T?)"
            )
        return RowBlock(start, rows[:, : start + len(rows)])


class KeptRows(BlockedRows):
    """Rows that hold on to their blocks while these fit into a budget, so that reading again costs little.

    What fits is kept in the order of the first reading and nothing is dropped for something else: a block takes as
    long to compute as it is large, so it makes no difference which ones are kept.

    Args:
        rows: what to read; its blocks are handed on as they are.
        budget_bytes: for all blocks that are kept; default: what `KEPT_BYTES` has for the device of the rows, less what
            the rows hold themselves.
    """

    def __init__(self, rows: BlockedRows, budget_bytes: int | None = None) -> None:
        self.num_tokens, self.starts, self.backend = rows.num_tokens, rows.starts, rows.backend
        self.device, self.dtype = rows.device, rows.dtype
        self._rows = rows
        self._room = of_device(KEPT_BYTES, rows.device) - rows.held_bytes if budget_bytes is None else budget_bytes
        self._kept: dict[int, RowBlock] = {}

    def block(self, start: int) -> RowBlock:
        if start in self._kept:
            return self._kept[start]
        block = self._rows.block(start)
        if (size := self._size(start)) <= self._room:
            self._room -= size
            self._kept[start] = block
        return block

    # Of a block that is kept, all that is asked for is made of it.

    def square(self, start: int) -> Tensor:
        return super().square(start) if self._keeps(start) else self._rows.square(start)

    def arriving(self, start: int, reach: Tensor) -> Tensor:
        return super().arriving(start, reach) if self._keeps(start) else self._rows.arriving(start, reach)

    def known(self, start: int, values: Tensor) -> Tensor:
        return super().known(start, values) if self._keeps(start) else self._rows.known(start, values)

    def solve(self, square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
        return self._rows.solve(square, right, into, out_of, backward)

    def _keeps(self, start: int) -> bool:
        return start in self._kept or self._size(start) <= self._room

    def _size(self, start: int) -> int:
        """Bytes of a block."""
        stop = min(start + self.starts.step, self.num_tokens)
        return (stop - start) * stop * self.dtype.itemsize


MaskTile = Callable[[Tensor, Tensor], Tensor]
"""(query positions [r], key positions [n]) -> [r, n] bool: may this query see this key?"""


@dataclass(frozen=True)
class LayerQK:
    """Queries and keys of one layer for one trace, after rotary embedding, pads removed.

    Attributes:
        query: [H, N, D]; key: [K, N, D], K divides H. Fewer queries than keys belong to the last tokens.
        scaling: factor on q k^T. softcap: `c * tanh(x / c)` on the scores, or None (Gemma 2).
        sink_logits: [H] logits that take part in the softmax without being a token (gpt-oss), or None.
        visible: which key a query may see, or None for plain causal attention.
        log_sum: [H, N] float32 log-sum-exp of each row's scores (scaled, soft-capped, masked), sink logit included,
            as the model's own attention call gave it. None: worked out here.
        value_norm: [H, N] float32 `||W_O^h v_i||` of each query head, for `weights="value_norm"`; None: not captured.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    visible: MaskTile | None = None
    log_sum: Tensor | None = None
    value_norm: Tensor | None = None

    def only(self, heads: Sequence[int]) -> LayerQK:
        """The layer with some of its query heads, each with a key head of its own."""
        H, K = len(self.query), len(self.key)
        if not heads or not all(0 <= head < H for head in heads) or len(set(heads)) < len(heads):
            raise ValueError(f"heads must be different numbers in 0..{H - 1}, at least one, got {list(heads)}")
        if list(heads) == list(range(H)):
            return self
        chosen = torch.tensor(list(heads), device=self.query.device)
        per_head = {name: getattr(self, name) for name in ("query", "sink_logits", "log_sum", "value_norm")}
        per_head = {name: None if value is None else value[chosen] for name, value in per_head.items()}
        return replace(self, key=self.key[chosen // (H // K)], **per_head)

    def lies_on(self, device: torch.device) -> bool:
        """Are its queries and keys there?"""
        return self.query.device == device == self.key.device

    def part(self, start: int, stop: int, device: torch.device) -> LayerQK:
        """What rows `start .. stop - 1` are made of: their queries, and the keys up to them, brought to a device."""
        rows = _of_rows(self, start, stop)
        return replace(
            self,
            query=bring(self.query[:, rows], device),
            key=bring(self.key[:, :stop], device),
            log_sum=None if self.log_sum is None else self.log_sum[:, rows],
            value_norm=None if self.value_norm is None else self.value_norm[:, :stop],
        )


def bring(heads: Tensor, device: torch.device) -> Tensor:
    """[H, n, D] on a device; what is there already is not copied.

    Head by head: each lies in one piece, and only that goes from pinned memory to a GPU without a copy on the host. The
    host doesn't wait for copies to a GPU: what computes with them comes after them.
    """
    if heads.device == device:
        return heads
    there = torch.empty(heads.shape, dtype=heads.dtype, device=device)
    for theirs, ours in zip(there, heads, strict=True):
        theirs.copy_(ours, non_blocking=device.type != "cpu")
    return there


def check_kind(weights: str) -> None:
    """Raise a ValueError if `weights` names no kind of weight."""
    if weights not in ("attention", "value_norm"):
        raise ValueError(f'weights must be "attention" or "value_norm", got {weights!r}')


def check_backend(backend: str) -> None:
    """Raise a ValueError if `backend` names none."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", got {backend!r}')


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch" or "triton": the one that is named; "auto" is torch, until a GPU has seen and timed the kernels.

    Raises:
        ValueError: the backend that is named can't do this, or there is none of that name.
        ImportError: it isn't installed.
    """
    check_backend(backend)
    if backend != "triton":
        return "torch"
    if dtype == torch.float64:
        raise ValueError('backend="triton" computes in float32 and the model is float64: use backend="torch"')
    check_triton(device, 'backend="triton" needs a GPU and the tensors are on the CPU: use backend="torch"')
    return "triton"


def check_triton(device: torch.device, on_a_cpu: str) -> None:
    """Can kernels run there?

    Args:
        on_a_cpu: the error on a CPU, where only the interpreter runs them.

    Raises:
        ImportError: Triton isn't installed, or too old. ValueError: it is a CPU.
    """
    if find_spec("triton") is None:
        raise ImportError(f'backend="triton" needs Triton: pip install "flowgraph-llm[{cuda_extra()}]"')
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON:
        raise ImportError(
            f'backend="triton" needs Triton {".".join(map(str, TRITON))} or later, which torch has from 2.7 on; this '
            f"is Triton {triton.__version__}"
        )
    from flowgraph.triton_rows import INTERPRETED

    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{on_a_cpu}, or, to check the kernels, Triton's interpreter (TRITON_INTERPRET=1 in the environment, "
            "before anything imports triton)"
        )


class AttentionRows(BlockedRows):
    """The head-averaged attention of some layers, recomputed from their queries and keys.

    Scores, softmax and mean are taken in float32 (float64 if the model is), whatever the model's dtype. Attention to
    the future, which no causal model pays, is left out. The same queries and keys give the same bits, in either order
    and however often they are read. Memory is that of one block [r, N] and one tile of scores.

    Where layers lie elsewhere than the positions, several blocks are computed at once, as a band of up to 1,024 rows in
    `BAND_BYTES`, and what is asked for is cut out of it: each layer's keys are sent once per band, one layer after the
    other. The last band is held.

    Args:
        layers: one `LayerQK` per chosen layer, all of one trace. With `log_sum` rows are computed in tiles, without it
            a few whole rows at a time. Where there are queries of the last tokens only, so are the blocks.
        positions: [N] where the tokens stand in the sequence that the model saw; windows and documents go by these.
            All is computed on their device; queries and keys may lie elsewhere.
        block: rows per block; default: as many as `BLOCK_BYTES` holds, from 16 to `BLOCK_ROWS`.
        weights: "attention": the mean over all heads. "value_norm": attention counts by how much the head then writes,
            `a[k, i] * ||W_O^h v_i||` (Kobayashi et al. 2020, arXiv 2004.10102), summed over the heads of a layer,
            divided by the sum of the row, and then the mean over layers.
        backend: "torch"; "triton": the kernels of `flowgraph.triton_rows`, for queries that are not float64, on a GPU,
            and masks that show each query an unbroken run of keys (windows, chunks, packed documents); "auto": torch,
            until a GPU has seen and timed these kernels. What is named is taken or refused; the attribute `backend`
            says which it is.
    """

    def __init__(
        self,
        layers: list[LayerQK],
        positions: Tensor,
        block: int | None = None,
        weights: str = "attention",
        backend: str = "auto",
    ) -> None:
        check_kind(weights)
        if weights == "value_norm" and any(layer.value_norm is None for layer in layers):
            raise ValueError(
                'weights="value_norm" needs value_norm in every layer: capture or record them with values=True'
            )
        self.dtype = torch.float64 if layers[0].query.dtype == torch.float64 else torch.float32
        self.device = positions.device
        self.backend = choose_backend(backend, self.device, self.dtype)
        if self.backend == "triton" and (size := max(layer.query.shape[-1] for layer in layers)) > TRITON_HEAD:
            raise ValueError(
                f'backend="triton" takes heads of up to {TRITON_HEAD} numbers, for whose tiles a GPU has shared '
                f'memory; the model has heads of {size}: use backend="torch"'
            )
        self._layers, self._positions, self._weights = layers, positions, weights
        self.num_tokens = N = layers[0].key.shape[1]
        self.starts = range(N - layers[0].query.shape[1], N, block or rows_of_a_block(N, self.device))
        self._in_bands = not all(layer.lies_on(self.device) for layer in layers)
        self._band: RowBlock | None = None
        if self._in_bands:
            self.held_bytes = rows_of_a_band(N, self.starts.step) * N * self.dtype.itemsize

    @torch.no_grad()
    def block(self, start: int) -> RowBlock:
        stop = self._stop(start)
        if not self._in_bands:
            return RowBlock(start, self._rows(start, stop))
        first, band = self._band_of(start)
        # A copy: whoever holds on to a block would hold on to all of the band, when there is another one.
        return RowBlock(start, band[start - first : stop - first, :stop].clone())

    def _band_of(self, start: int) -> RowBlock:
        """The band that the block from row `start` on is a part of."""
        rows = rows_of_a_band(self.num_tokens, self.starts.step)
        first = start - (start - self.starts.start) % rows
        if self._band is None or self._band.start != first:
            self._band = None  # before there are two
            self._band = RowBlock(first, self._rows(first, min(first + rows, self.num_tokens)))
        return self._band

    def _rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, stop] rows start .. stop - 1 of `W`."""
        if self.backend == "triton":
            written: Tensor = self._kernels.rows(start, stop)
            return written
        by_value = self._weights == "value_norm"
        rows = torch.zeros(stop - start, stop, dtype=self.dtype, device=self.device)
        scratch = _Scratch(rows)
        hidden: dict[MaskTile | None, Tensor | None] = {}
        for layer in self._layers:
            if layer.visible not in hidden:
                hidden[layer.visible] = self._hidden(layer.visible, start, stop)
            if not layer.lies_on(self.device):
                layer = layer.part(start, stop, self.device)
            if not by_value:
                add_attention(rows, layer, hidden[layer.visible], scratch)
                continue
            own = torch.zeros_like(rows)
            add_attention(own, layer, hidden[layer.visible], scratch, layer.value_norm)
            # A row that sees nothing but values of norm 0 stays 0.
            rows += own.div_(own.sum(-1, keepdim=True).clamp_(min=torch.finfo(own.dtype).tiny))
        parts = len(self._layers) if by_value else sum(len(layer.query) for layer in self._layers)
        return rows.div_(parts)

    @torch.no_grad()
    def square(self, start: int) -> Tensor:
        if not self._summed:
            return super().square(start)
        square: Tensor = self._kernels.rows(start, self._stop(start), low=start)
        return square

    @torch.no_grad()
    def arriving(self, start: int, reach: Tensor) -> Tensor:
        if not self._summed:
            return super().arriving(start, reach)
        arriving: Tensor = self._kernels.arriving(start, reach)
        return arriving

    @torch.no_grad()
    def known(self, start: int, values: Tensor) -> Tensor:
        if not self._summed:
            return super().known(start, values)
        known: Tensor = self._kernels.known(start, self._stop(start), values)
        return known

    @torch.no_grad()
    def solve(self, square: Tensor, right: Tensor, into: Tensor, out_of: Tensor, backward: bool) -> Tensor:
        if self.backend != "triton":
            return super().solve(square, right, into, out_of, backward)
        solved: Tensor = self._kernels.solve(square, right, into, out_of, backward)
        return solved

    def _stop(self, start: int) -> int:
        return min(start + self.starts.step, self.num_tokens)

    @property
    def _summed(self) -> bool:
        """Do kernels sum up rows without writing them? Not those of a band, which would have its keys sent again."""
        return self.backend == "triton" and not self._in_bands

    @cached_property
    def _kernels(self) -> Any:
        """A `TritonSweeps`."""
        from flowgraph.triton_sweeps import TritonSweeps

        return TritonSweeps(self._layers, self._positions, by_value=self._weights == "value_norm")

    @torch.no_grad()
    def heads(self, tokens: Sequence[int]) -> Iterator[list[Tensor]]:
        """For each of some tokens, its row in every layer and head apart: [H, token + 1] per layer.

        This is bare attention, whatever the `weights`.
        """
        for token in tokens:
            if not 0 <= token < self.num_tokens:
                raise ValueError(f"tokens holds {token}, the trace has tokens 0..{self.num_tokens - 1}")
            rows = []
            for layer in self._layers:
                scratch = _Scratch(torch.empty(0, dtype=self.dtype, device=self._positions.device))
                scores = _scores(layer, _queries(layer, token, token + 1, scratch.like), 0, token + 1, None, scratch)
                hidden = self._hidden(layer.visible, token, token + 1)
                rows.append(_softmax(_hide(scores, -torch.inf, token, hidden), layer.sink_logits)[:, 0])
            yield rows

    def _hidden(self, visible: MaskTile | None, start: int, stop: int) -> Tensor | None:
        """[r, stop] True where the query may not see the key; None for plain causal attention."""
        if visible is None:
            return None
        return ~visible(self._positions[start:stop], self._positions[:stop])


# --- the attention of one layer --------------------------------------------------------------------------------------
# a..b are rows and c..d columns of a tile, r and n their numbers.


class _Scratch:
    """Memory for one tile after the other: a fresh page costs a CPU as much as what is computed in it.

    Attributes:
        like: of the dtype and on the device that all of it has.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._areas: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor with anything in it, in the place of the last one of that name."""
        size = math.prod(shape)
        if name not in self._areas or len(self._areas[name]) < size:
            self._areas[name] = self.like.new_empty(size)
        return self._areas[name][:size].view(shape)


def add_attention(
    block: Tensor, layer: LayerQK, hidden: Tensor | None, scratch: _Scratch, value_norm: Tensor | None = None
) -> None:
    """Add the attention of one layer, summed over its heads, to a block of rows.

    Nearly all time of `backend="torch"` goes here.

    Args:
        block: [r, stop] float32 or float64, rows `stop - r .. stop - 1`; changed in place.
        hidden: [r, stop] bool, True where a query may not see a key, or None. The future is never seen.
        value_norm: [H, N] what the attention of each head to each token is multiplied by, or None.
    """
    r, stop = block.shape
    start = stop - r
    budget = of_device(TILE_BYTES, block.device) // (len(layer.query) * block.element_size())
    # Before `first` no row of the block sees anything: most of a trace, where there is a sliding window.
    first = 0 if hidden is None else int((~hidden).any(0).int().argmax())
    if layer.log_sum is None:  # softmax needs whole rows
        rows, columns = max(16, budget // (stop - first)), stop
    else:
        rows = min(r, TILE_ROWS)
        columns = max(TILE_COLUMNS, budget // rows)
    for a in range(start, stop, rows):
        b = min(a + rows, stop)
        query = _queries(layer, a, b, block)
        log_sum = None if layer.log_sum is None else layer.log_sum[:, _of_rows(layer, a, b)].to(block) * _LOG2_E
        for c in range(first, b, columns):
            d = min(c + columns, b)
            unseen = None if hidden is None else hidden[a - start : b - start, c:d]
            tile = _scores(layer, query, c, d, log_sum, scratch)
            if log_sum is None:
                _softmax(_hide(tile, -torch.inf, a - c, unseen), layer.sink_logits)
            else:
                tile.exp2_()
            if value_norm is not None:
                tile *= value_norm[:, None, c:d]
            total = torch.sum(tile, 0, out=scratch.take("total", b - a, d - c))
            # Hidden only now, in the sum over heads, since a known log-sum-exp doesn't ask what else was in the row.
            block[a - start : b - start, c:d] += _hide(total, 0, a - c, unseen)


def _of_rows(layer: LayerQK, a: int, b: int) -> slice:
    """Where the queries of tokens a..b are."""
    before = layer.key.shape[1] - layer.query.shape[1]
    return slice(a - before, b - before)


def _queries(layer: LayerQK, a: int, b: int, like: Tensor) -> Tensor:
    """[K, H/K * r, D] queries; those that share a key head are rows of one product, so no key is repeated."""
    query = layer.query[:, _of_rows(layer, a, b)].to(like)
    return query.reshape(len(layer.key), -1, query.shape[-1])


def _scores(layer: LayerQK, query: Tensor, c: int, d: int, log_sum: Tensor | None, scratch: _Scratch) -> Tensor:
    """[H, r, n] scores of `_queries`, less `log_sum` [H, r] if that is given; all in powers of 2.

    Scaled after the product and not before: numbers of 16 bits then stay as they are, and TF32, which many trainers
    allow on GPUs, multiplies them exactly.
    """
    K, rows, _ = query.shape
    scale = layer.scaling * _LOG2_E if layer.softcap is None else layer.scaling / layer.softcap
    key = layer.key[:, c:d]
    if key.dtype != query.dtype or key.device != query.device:
        key = scratch.take("key", *key.shape).copy_(key)
    out = scratch.take("scores", K, rows, d - c)
    if log_sum is None or layer.softcap is not None:
        scores = torch.baddbmm(out, query, key.mT, beta=0, alpha=scale, out=out)
    else:
        scores = torch.baddbmm(log_sum.reshape(K, rows, 1), query, key.mT, beta=-1, alpha=scale, out=out)
    scores = scores.view(len(layer.query), -1, d - c)
    if layer.softcap is not None:
        scores.tanh_().mul_(layer.softcap * _LOG2_E)
        if log_sum is not None:
            scores.sub_(log_sum[:, :, None])
    return scores


def _hide(tile: Tensor, fill: float, diagonal: int, hidden: Tensor | None) -> Tensor:
    """Fill what a [.., r, n] tile has in the future (beyond column `diagonal` of its first row) and where `hidden`."""
    r, n = tile.shape[-2:]
    past = max(diagonal, 0)
    if past < n:
        ahead = torch.ones(r, n - past, dtype=torch.bool, device=tile.device).triu_(diagonal - past + 1)
        tile[..., past:].masked_fill_(ahead, fill)
    return tile if hidden is None else tile.masked_fill_(hidden, fill)


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """[H, r, n] softmax over whole rows of scores in powers of 2; a sink takes its share and gets no column."""
    top = scores.amax(-1, keepdim=True)
    weight = scores.sub_(top).exp2_()
    total = weight.sum(-1, keepdim=True)
    if sink_logits is not None:
        total += (sink_logits.to(top)[:, None, None] * _LOG2_E - top).exp2_()
    return weight.div_(total)
