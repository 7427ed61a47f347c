"""Attention as a stream of row blocks, so that no [N, N] tensor is ever held.

Shapes: N tokens, r rows of a block, H query heads, K key heads, D head size. `W[k, i]` is the attention that token
`k` pays to token `i`, averaged over all heads of the chosen layers; rows of a block are consecutive `k`, and columns
run from 0 to the last row of the block, since nothing attends to the future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 48 * 2**20
"""Budget for the scores [H, r, N] of one layer and one block; it sets the number of rows per block."""


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


def _bounds(num_tokens: int, size: int, last_first: bool) -> Iterator[tuple[int, int]]:
    starts = range(0, num_tokens, size)
    return ((start, min(start + size, num_tokens)) for start in (reversed(starts) if last_first else starts))


class DenseRows:
    """The rows of a dense matrix: for tests, for small traces and for attention from elsewhere.

    Args:
        W: [N, N] float, row = later token, column = earlier token; zero above the diagonal.
    """

    def __init__(self, W: Tensor, block: int = 1024) -> None:
        if W.ndim != 2 or W.shape[0] != W.shape[1] or not W.is_floating_point():
            raise ValueError(f"W must be a float matrix [N, N], got {list(W.shape)} {W.dtype}")
        self.W = W if W.dtype in (torch.float32, torch.float64) else W.float()
        self.num_tokens, self._block = len(W), block

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        for start, stop in _bounds(self.num_tokens, self._block, last_first):
            rows = self.W[start:stop]
            # Not `!= 0` on the part above the diagonal: NaN must be named as such by the weights' own check.
            ahead = torch.triu(rows, diagonal=start + 1)
            if ahead.any():
                row, column = (int(x) for x in ahead.nonzero()[0])
                raise ValueError(
                    f"W[{row + start}, {column}] = {float(rows[row, column]):g} runs against time: token {row + start} "
                    f"cannot attend to the later token {column}; pass W with row = later token (W.T?)"
                )
            yield RowBlock(start, rows[:, :stop])


MaskTile = Callable[[Tensor, Tensor], Tensor]
"""(query positions [r], key positions [n]) -> [r, n] bool: may this query see this key?"""


@dataclass(frozen=True)
class LayerQK:
    """Queries and keys of one layer for one trace, after rotary embedding, pads removed.

    Attributes:
        query: [H, N, D]; key: [K, N, D], K divides H.
        scaling: factor on q k^T. softcap: `c * tanh(x / c)` on the scores, or None (Gemma 2).
        sink_logits: [H] logits that take part in the softmax without being a token (gpt-oss), or None.
        visible: which key a query may see, or None for plain causal attention.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    visible: MaskTile | None = None

    def only(self, heads: Sequence[int]) -> LayerQK:
        """The layer with some of its query heads, each with a key head of its own."""
        H, K = len(self.query), len(self.key)
        if not heads or not all(0 <= head < H for head in heads) or len(set(heads)) < len(heads):
            raise ValueError(f"heads must be different numbers in 0..{H - 1}, at least one, got {list(heads)}")
        chosen = torch.tensor(list(heads), device=self.query.device)
        sink_logits = None if self.sink_logits is None else self.sink_logits[chosen]
        return replace(self, query=self.query[chosen], key=self.key[chosen // (H // K)], sink_logits=sink_logits)


class AttentionRows:
    """The head-averaged attention of some layers, recomputed from their queries and keys.

    Scores, softmax and mean are taken in float32 (float64 if the model is), whatever the model's dtype. Memory is
    O(H * r * N) for one block of one layer. Attention to the future, which no causal model pays, is left out.

    Args:
        layers: one `LayerQK` per chosen layer, all of one trace.
        positions: [N] where the tokens stand in the sequence that the model saw; windows and documents go by these.
        block: rows per block; default: as many as `BLOCK_BYTES` holds, at most 256.
    """

    def __init__(self, layers: list[LayerQK], positions: Tensor, block: int | None = None) -> None:
        self._dtype = torch.float64 if layers[0].query.dtype == torch.float64 else torch.float32
        self._layers, self._positions, self._block = layers, positions, block
        self.num_tokens = layers[0].query.shape[1]

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        N = self.num_tokens
        heads = max(layer.query.shape[0] for layer in self._layers)
        size = self._block or max(16, min(256, BLOCK_BYTES // (4 * heads * N)))
        keys = [layer.key.to(self._dtype).mT for layer in self._layers]
        total_heads = sum(layer.query.shape[0] for layer in self._layers)
        for start, stop in _bounds(N, size, last_first):
            block = torch.zeros(stop - start, stop, dtype=self._dtype, device=keys[0].device)
            hidden: dict[MaskTile | None, Tensor | None] = {}
            for layer, key in zip(self._layers, keys, strict=True):
                if layer.visible not in hidden:
                    hidden[layer.visible] = self._hidden(layer.visible, start, stop)
                block += self._attention(layer, key, hidden[layer.visible], start, stop).sum(0)
            yield RowBlock(start, block.div_(total_heads))

    def heads(self, tokens: Sequence[int]) -> Iterator[list[Tensor]]:
        """For each of some tokens, its row in every layer and head apart: [H, token + 1] per layer."""
        keys = [layer.key.to(self._dtype).mT for layer in self._layers]
        for token in tokens:
            if not 0 <= token < self.num_tokens:
                raise ValueError(f"tokens holds {token}, the trace has tokens 0..{self.num_tokens - 1}")
            yield [
                self._attention(layer, key, self._hidden(layer.visible, token, token + 1), token, token + 1)[:, 0]
                for layer, key in zip(self._layers, keys, strict=True)
            ]

    def _hidden(self, visible: MaskTile | None, start: int, stop: int) -> Tensor | None:
        """[r, stop] True where the query may not see the key; None for plain causal attention."""
        if visible is None:
            return None
        return ~visible(self._positions[start:stop], self._positions[:stop])

    def _attention(self, layer: LayerQK, key: Tensor, hidden: Tensor | None, start: int, stop: int) -> Tensor:
        """[H, r, stop] attention of one layer, head by head."""
        r, (H, _, D), K = stop - start, layer.query.shape, key.shape[0]
        # Query heads that share a key head become rows of one product: the keys are never repeated.
        query = layer.query[:, start:stop].to(self._dtype).reshape(K, H // K * r, D) * layer.scaling
        scores = torch.matmul(query, key[:, :, :stop]).view(H, r, stop)
        if layer.softcap is not None:
            scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
        # Everything before the block is in the past: only the square at its end needs the causal mask.
        ahead = torch.ones(r, r, dtype=torch.bool, device=scores.device).triu_(1)
        scores[:, :, start:].masked_fill_(ahead, -torch.inf)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        if layer.sink_logits is None:
            return torch.softmax(scores, dim=-1)
        total = torch.logsumexp(scores, dim=-1)
        total = torch.logaddexp(total, layer.sink_logits.to(total)[:, None])
        return scores.sub_(total[:, :, None]).exp_()
