"""Block-Jacobi: the hops of `flowgraph.layers`, with all edges between near tokens taken in one step.

The tokens of a graph are cut into blocks of 128. Of `M = L + U`, `L` is what has both ends in one block: a dense
triangular matrix for each block, of which the inverse `D = (I - L)^-1` is made once. Then

    x = b + M x      <=>      x = D b + D U x      so      x = D b + (D U) D b + (D U)^2 D b + ...

One term holds all paths that go from block to block so many times, however many hops they have within the blocks; so a
few terms do what takes many hops. The sum ends by the same rule as in `flowgraph.layers`, since `D U >= 0` too.

Everything is float64, and nothing but zeros and positive numbers is added: 0 comes out exactly where no path leads, if
nothing underflows. Very small and very large numbers are for the caller to look at (`flowgraph.solve`).

Shapes: N tokens, E edges, B graphs, b blocks in the batch. Memory: 1 KiB per token for the inverses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from flowgraph.layers import Stop, over
from flowgraph.sums import Groups

SIZE = 128
"""Tokens in a block."""

SLICE = 256
"""Blocks in one dense product, 32 MiB of them. On a GPU the last slice is filled up: cuBLAS goes by the size of the
batch, and what a block gets must not."""


class BlockJacobi(MessagePassing):
    """Solves `x(k) = rhs(k) + sum_i weight(i -> k) x(i)`; backward, `x(i) = rhs(i) + sum_k weight(i -> k) x(k)`.

    (Jacobi's iteration on blocks; Saad 2003, Iterative Methods for Sparse Linear Systems, section 4.1.1.)

    Args:
        tol: bound on the relative error of every token, up to rounding.
        max_rounds: give up after so many terms; by default the sum is never cut short.
        backward: along which way of the edges.

    Inputs: `edge_index` [2, E], `weight` [E] float64 >= 0, `rhs` [N] float64 >= 0, `batch` [N] ascending; `groups`, the
    edges by the token they are summed at (source, if backward), where they are known.
    Outputs: x [N] float64, and the number of terms per graph [B].
    """

    def __init__(self, tol: float = 1e-12, max_rounds: int | None = None, *, backward: bool) -> None:
        super().__init__(aggr=None, flow="target_to_source" if backward else "source_to_target", node_dim=0)
        self.tol, self.max_rounds, self.backward = tol, max_rounds, backward

    def forward(
        self, edge_index: Tensor, weight: Tensor, rhs: Tensor, batch: Tensor, groups: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        at = 0 if self.backward else 1
        groups = Groups.by(edge_index[at], len(rhs)) if groups is None else groups
        edges, weight = groups.arrange(edge_index), groups.arrange(weight)
        blocks = _Blocks(batch, edges, weight, at)
        outside = ~blocks.inside
        edges, weight = edges[:, outside], weight[outside]
        groups = Groups.by(edges[at], len(rhs), ascending=True, backend=groups.backend)
        x = term = blocks.solve(rhs)
        stop = Stop(batch, self.tol, self.max_rounds)
        while stop.any_running:
            new = blocks.solve(self.propagate(edges, x=term, weight=weight, groups=groups)) * stop.running[batch]
            x = x + new
            stop.step(over(new, term), over(new, x))
            term = new
        return x, stop.hops

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return x_j * weight

    def aggregate(self, inputs: Tensor, groups: Groups) -> Tensor:
        return groups.sum(inputs)


class _Blocks:
    """The inverses of the blocks on the diagonal. A block holds tokens of one graph, the last of a graph fewer.

    Attributes:
        inside: [E] bool, edges with both ends in one block.
    """

    def __init__(self, batch: Tensor, edges: Tensor, weight: Tensor, at: int) -> None:
        device = batch.device
        sizes = torch.bincount(batch)
        counts = (sizes + SIZE - 1) // SIZE
        first_token, first_block = (torch.cumsum(x, 0) - x for x in (sizes, counts))
        place = torch.arange(len(batch), device=device) - first_token[batch]
        self._slot = first_block[batch] * SIZE + place
        block = self._slot // SIZE
        self.inside = block[edges[0]] == block[edges[1]]
        count = int(counts.sum())
        if device.type != "cpu":
            count = (count + SLICE - 1) // SLICE * SLICE
        self._inverse = torch.zeros(count, SIZE, SIZE, dtype=torch.float64, device=device)
        to, since = self._slot[edges[at, self.inside]], self._slot[edges[1 - at, self.inside]]
        # Each edge has a place of its own.
        self._inverse.view(-1).index_copy_(0, to * SIZE + since % SIZE, weight[self.inside])
        identity = torch.eye(SIZE, dtype=torch.float64, device=device)
        for some in self._inverse.split(SLICE):
            matrix = identity - some
            some.copy_(torch.linalg.solve_triangular(matrix, identity, upper=at == 0, unitriangular=True))

    def solve(self, rhs: Tensor) -> Tensor:
        """[N] `D rhs`."""
        padded = rhs.new_zeros(self._inverse.shape[:2]).view(-1).index_copy_(0, self._slot, rhs).view(-1, SIZE, 1)
        pairs = zip(self._inverse.split(SLICE), padded.split(SLICE), strict=True)
        return torch.cat([torch.bmm(inverse, some).flatten() for inverse, some in pairs])[self._slot]
