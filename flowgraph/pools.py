"""Pools: the attention that became no edge, at low resolution and with its mass kept.

A pool collects from a run of earlier tokens and pays to a run of later ones. Its collecting shares `c` sum to 1, and
it pays to each later token the attention `p(k)` that this token has left for the run: together they stand for the
rectangle `R[k, i] = p(k) c(i)` of rank one. The rectangles halve the trace again and again (second half of the tokens
to the first half, then each half in itself, ...), so that every pair of tokens lies in exactly one of them and a token
takes part in at most log2(N) of each kind: about ten numbers per token at 3,000 tokens, fourteen at 32,000.

          first half     second half          Two things are exact whatever the rest looks like: the mass that each
        +-------------+-------------+         later token pays to each run (`p`), and, for the weights `w(k)` that
        |   \\  ...    |             |         the builder was given for the later tokens, the weighted sums of every
        | one  \\      |             |         column: `sum_k w(k) p(k) c(i) = sum_k w(k) R[k, i]`. With `w = h`, the
        +-------------+-------------+         reach itself, reach through the pools is the reach through the full
        |             |   \\  ...    |         attention: nothing at all is lost in the backward pass.
        |  one pool   | one  \\      |
        +-------------+-------------+         In a random walk from query to key a pool is a node like any other, later
                                              than all that it collects from and earlier than all that it pays to. So
a graph with pools is still a triangular system, and every solver works on it unchanged.

Runs are cut at the end of the prompt: prompt and response differ too much in flow to share a pool.

Shapes: N tokens, r rows of a block, M pools, L links between tokens and pools, J = ceil(log2 N) sizes of runs.
(After the hierarchical low-rank matrices of Hackbusch 1999, HODLR, with one non-negative term per block.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowgraph.sums import Groups

TILE = 64
"""Runs shorter than this lie inside square tiles on the diagonal and are taken all tiles at once."""


@dataclass(frozen=True)
class Pools:
    """Links between tokens and pools.

    Attributes:
        index: [2, L] int64; row 0 the token, row 1 the number of the pool, 0 .. M - 1. Pools are numbered by the first
            token that they pay to.
        weight: [L] > 0. From token to pool its share in what the pool stands for (they sum to 1 for each pool); from
            pool to token the attention that the token pays to the pool.
        collects: [L] bool: True for token -> pool, False for pool -> token.
        shape: [N] >= 0, what each later token counted for in the shares of the pools that it pays to (`w` above).
    """

    index: Tensor
    weight: Tensor
    collects: Tensor
    shape: Tensor

    @property
    def count(self) -> int:
        """M."""
        return int(self.index[1].max()) + 1 if self.index.numel() else 0

    @property
    def first_paid(self) -> Tensor:
        """[M] the first token that each pool pays to; N where there is none."""
        token, pool = self.index[:, ~self.collects]
        return token.new_full((self.count,), len(self.shape)).scatter_reduce_(0, pool, token, "amin")

    @property
    def last_collected(self) -> Tensor:
        """[M] the last token that each pool collects from; -1 where there is none."""
        token, pool = self.index[:, self.collects]
        return token.new_full((self.count,), -1).scatter_reduce_(0, pool, token, "amax")

    def closed_to(self, tokens: Tensor) -> Pools:
        """Pools that pay nothing to some tokens, [N] bool."""
        return replace(self, weight=self.weight * (self.collects | ~tokens[self.index[0]]))

    @classmethod
    def none(cls, like: Tensor) -> Pools:
        """No pools among N tokens; `like` [N] gives dtype and device."""
        empty = torch.zeros(2, 0, dtype=torch.int64, device=like.device)
        return cls(
            empty, like.new_zeros(0), torch.zeros(0, dtype=torch.bool, device=like.device), like.new_zeros(len(like))
        )


class PoolBuilder:
    """Adds up pools from blocks of rows, in any order, each row once; O(N log N) numbers are kept.

    Args:
        num_tokens: N.
        cuts: positions at which runs of earlier tokens are cut, ascending.
        kinds: [N] int64 or None: later tokens of different kinds don't share a pool.
    """

    def __init__(self, num_tokens: int, cuts: list[int], kinds: Tensor | None, device: torch.device) -> None:
        self.num_tokens, self._cuts = num_tokens, cuts
        self._sizes = max((num_tokens - 1).bit_length(), 1)
        self._kinds = torch.zeros(num_tokens, dtype=torch.int64, device=device) if kinds is None else kinds
        place = torch.arange(num_tokens, device=device)
        self._part = torch.bucketize(place, torch.tensor(cuts, device=device), right=True)
        # paid[part, j, k]: what token k pays to that part of its run of 2^j tokens; collected[kind, j, i]: what token i
        # gets, weighted, from the later tokens of that kind which have it in their run of 2^j tokens.
        self._paid = torch.zeros(len(cuts) + 1, self._sizes, num_tokens, dtype=torch.float64, device=device)
        self._collected = self._paid.new_zeros(int(self._kinds.max()) + 1, self._sizes, num_tokens)
        self._shape = self._paid.new_zeros(num_tokens)

    def add(self, start: int, rest: Tensor, weight: Tensor) -> None:
        """Rows `start ..`.

        Args:
            rest: [r, >= start + r], what pools are to stand for; zero on and above the diagonal. Added up in float64.
            weight: [r] > 0, the weight of each row in what the pools collect.
        """
        rest = rest.double()
        stop = start + len(rest)
        self._shape[start:stop] = weight
        kinds = self._kinds[start:stop]
        weights = torch.stack([weight * (kinds == kind) for kind in range(len(self._collected))])
        self._add_tiles(start, rest, weights)
        for j in range(TILE.bit_length() - 1, self._sizes):
            # Rows whose number has bit j set pay to the run of 2^j tokens before theirs.
            size = 1 << j
            for run in range((start >> j) | 1, (stop - 1 >> j) + 1, 2):
                low, high = max(start, run << j), min(stop, (run + 1) << j)
                here, edges = slice(low - start, high - start), self._edges((run << j) - size, run << j)
                for part, begin, end in edges:
                    self._paid[part, j, low:high] = rest[here, begin:end].sum(-1)
                begin, end = edges[0][1], edges[-1][2]
                self._collected[:, j, begin:end] += weights[:, here] @ rest[here, begin:end]

    def _edges(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(part, begin, end) of the parts that the cuts make of a run."""
        cuts = [0, *self._cuts, self.num_tokens]
        parts = ((n, max(begin, a), min(end, b)) for n, (a, b) in enumerate(pairwise(cuts)))
        return [one for one in parts if one[1] < one[2]]

    def _add_tiles(self, start: int, rest: Tensor, weights: Tensor) -> None:
        """The runs shorter than a tile."""
        stop = start + len(rest)
        first, last = start // TILE, (stop - 1) // TILE + 1
        tiles = rest.new_zeros(last - first, TILE, TILE)
        for n in range(first, last):
            low, high, begin = max(start, n * TILE), min(stop, (n + 1) * TILE), n * TILE
            width = min(TILE, rest.shape[1] - begin)
            tiles[n - first, low - begin : high - begin, :width] = rest[
                low - start : high - start, begin : begin + width
            ]
        rows = rest.new_zeros(len(weights), (last - first) * TILE)
        rows[:, start - first * TILE : stop - first * TILE] = weights
        begin, end = first * TILE, min(last * TILE, self.num_tokens)
        for j in range(min(TILE.bit_length() - 1, self._sizes)):
            size, count = 1 << j, TILE >> (j + 1)
            pairs = tiles.view(-1, count, 2, size, count, 2, size).diagonal(dim1=1, dim2=4)[:, 1, :, 0]
            pairs = pairs.permute(0, 3, 1, 2)  # [tiles, count, later, earlier]
            for part in range(len(self._paid)):
                inside = (self._part[begin:end] == part).to(rest)
                inside = torch.nn.functional.pad(inside, (0, last * TILE - end)).view(-1, count, 2, size)[:, :, 0]
                paid = rest.new_zeros(last - first, count, 2, size)
                paid[:, :, 1] = (pairs @ inside[..., None])[..., 0]
                self._paid[part, j, begin:end] += paid.flatten()[: end - begin]
            for kind, row in enumerate(rows):
                got = rest.new_zeros(last - first, count, 2, size)
                got[:, :, 0] = (row.view(-1, count, 2, 1, size)[:, :, 1] @ pairs)[:, :, 0]
                self._collected[kind, j, begin:end] += got.flatten()[: end - begin]

    def pools(self, dtype: torch.dtype) -> Pools:
        """What has been added up, as links."""
        kinds, parts, N = len(self._collected), len(self._paid), self.num_tokens
        j, token = (
            torch.arange(self._sizes, device=self._part.device)[:, None],
            torch.arange(N, device=self._part.device),
        )
        # A pool is known by its size, its place, the part it collects from and the kind of token it pays to.
        place = (j * (N + 1) + (token >> (j + 1))) * parts
        shape = (self._sizes, N)
        collect_key = [(place + self._part).expand(shape) * kinds + kind for kind in range(kinds)]
        pay_key = [(place + part).expand(shape) * kinds + self._kinds for part in range(parts)]
        collecting, paying = self._collected > 0, self._paid > 0
        keys = torch.cat([torch.stack(collect_key)[collecting], torch.stack(pay_key)[paying]])
        tokens = torch.cat([token.expand_as(collecting)[collecting], token.expand_as(paying)[paying]])
        values = torch.cat([self._collected[collecting], self._paid[paying]])
        collects = torch.arange(len(keys), device=keys.device) < int(collecting.sum())
        names, pool = keys.unique(return_inverse=True)
        by_pool = Groups.by(pool, len(names), ascending=False)
        total = by_pool.sum(by_pool.arrange(values * collects))
        values = torch.where(collects, values / total[pool], values)
        # A share this small comes from rows that don't count at all, and would lead where no reach is.
        values = torch.where(collects & (values < 1e-200), 0, values).to(dtype)
        # What is too small for `dtype`, and pools that are left with one side by it, are nothing.
        for side in (collects, ~collects):
            alive = torch.zeros_like(collects).index_fill_(0, pool[side & (values > 0)], True)
            values = values * alive[pool]
        real = values > 0
        tokens, values, collects = tokens[real], values[real], collects[real]
        pool = pool[real].unique(return_inverse=True)[1]
        first = torch.full_like(pool, N).scatter_reduce_(0, pool, torch.where(collects, N, tokens), "amin")
        count = int(pool.max()) + 1 if pool.numel() else 0
        order = torch.argsort(first[:count], stable=True)
        number = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=order.device))
        return Pools(torch.stack([tokens, number[pool]]), values, collects, self._shape.to(dtype))


class Expanded(NamedTuple):
    """A graph with its pools as nodes, in an order in which every edge leads from an earlier node to a later one.

    A pool stands right before the first token that it pays to.
    """

    edge_index: Tensor
    """[2, E + L] sorted by target, then source."""
    edge_weight: Tensor
    """[E + L]"""
    tokens: Tensor
    """[N] the number of each token among the nodes."""
    edges: Tensor
    """[E] the number of each edge of the graph among all."""
    links: Tensor
    """[L] the number of each link."""


def expand(edge_index: Tensor, edge_weight: Tensor, pools: Pools) -> Expanded:
    """Make the pools of a graph, or of each graph in a batch, nodes like any other."""
    (token, pool), collects, first = pools.index, pools.collects, pools.first_paid
    num_tokens, count = len(pools.shape), len(first)
    place = torch.arange(num_tokens, device=token.device)
    tokens = place + torch.searchsorted(first, place, right=True)
    pool, token = (first + torch.arange(count, device=token.device))[pool], tokens[token]
    links = torch.stack([torch.where(collects, token, pool), torch.where(collects, pool, token)])
    joined = torch.cat([tokens[edge_index], links], dim=1)
    order = torch.argsort(joined[1] * (num_tokens + count) + joined[0])
    where = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    weight = torch.cat([edge_weight, pools.weight.to(edge_weight)])
    E = edge_index.shape[1]
    return Expanded(joined[:, order], weight[order], tokens, where[:E], where[E:])
