"""What carries a flow: its strongest edges, its most probable paths, its hubs, and its width along the trace.

Everything here works on the `Flow` of one graph, over tokens or over segments (`contract`): a node is a token of the
one and a segment of the other. The measure of a part of the graph is what it *delivers*: push the injected unit through
its edges with the transition probabilities that they have in the whole graph, count what leaves over other edges as
lost, and add up what arrives at sinks.

Flow over attention is diffuse. The best single path of a trace of 3,000 tokens carries some 0.02 % of it, so every
result says which share of the flow it holds; over sentences or steps the shares are of another order.

Shapes: N nodes, E edges.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowgraph.flow import Flow, check_flow
from flowgraph.graph import graph_ptr
from flowgraph.solve import Triangle

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How much less than asked counts as delivered, by the dtype of the flow: transitions are rounded to it."""
FAINTEST = 1e-150
"""Flow below this counts as none where shares are squared; the square would be 0 in float64."""


@dataclass(frozen=True)
class FlowArrays:
    """The flow of one graph in NumPy, float64: source, target, transition, carried [E]; injection, sinks [N]."""

    source: np.ndarray
    target: np.ndarray
    transition: np.ndarray
    carried: np.ndarray
    injection: np.ndarray
    sinks: np.ndarray

    @classmethod
    def of(cls, flow: Flow) -> FlowArrays:
        """Raises a TypeError for what is no flow, a ValueError for the flow of a batch."""
        check_flow(flow)
        if len(graph_ptr(flow.graph)) != 2:
            raise ValueError(f"flow is over a batch of {len(flow)} graphs; take them one by one: for one in flow")
        source, target = flow.graph.edge_index.cpu().numpy()
        parts = (flow.transition, flow.edge_flow, flow.injection)
        transition, carried, injection = (part.detach().cpu().double().numpy() for part in parts)
        return cls(source, target, transition, carried, injection, flow.graph.answer_mask.cpu().numpy())

    @cached_property
    def _triangle(self) -> Triangle:
        return Triangle(self.source, self.target, len(self.sinks))

    def push(self, transition: np.ndarray) -> np.ndarray:
        """[N] the flow through each node when edges pass on the given shares [E] (0: the edge does not exist)."""
        return self._triangle.solve(transition, self.injection, backward=False)

    def arrive(self, transition: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[N] the share of what passes through each node that arrives at `ends` [N] (no edge may leave those)."""
        return self._triangle.solve(transition, ends.astype(np.float64), backward=True)

    def on_paths(self, edges: np.ndarray) -> np.ndarray:
        """[N] bool: nodes on a path from a source to a sink along `edges` [E] bool. Structure, no floating point."""
        source, target = self.source[edges], self.target[edges]
        starts = np.flatnonzero(self.injection > 0)
        return _reached(source, target, starts, len(self.sinks)) & _reached(
            target, source, np.flatnonzero(self.sinks), len(self.sinks)
        )


def _reached(source: np.ndarray, target: np.ndarray, starts: np.ndarray, num_nodes: int) -> np.ndarray:
    """[N] bool: the starts and what edges lead to from them."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order

    # One extra node, number N, leads to all starts.
    row = np.concatenate([source, np.full(len(starts), num_nodes)])
    links = csr_array(
        (np.ones(len(row), dtype=np.int8), (row, np.concatenate([target, starts]))), shape=(num_nodes + 1,) * 2
    )
    reached = np.zeros(num_nodes + 1, dtype=bool)
    reached[breadth_first_order(links, num_nodes, directed=True, return_predecessors=False)] = True
    return reached[:num_nodes]


@dataclass(frozen=True)
class Backbone:
    """The strongest edges of a flow that together deliver a given share of it.

    Attributes:
        edge_mask: [E] bool, its edges, in the order of `flow.graph.edge_index`. nodes: [N] bool, what lies on its
            paths: the ends of its edges, and sources that are sinks themselves.
        share: the share that was asked for. delivered: what its edges deliver of the injected unit.
        available: what all listed edges together deliver: 1, or less where flow takes edges that the graph does not
            list (`exact_flow`), 0 where no source reaches the answer.
    """

    edge_mask: Tensor
    nodes: Tensor
    share: float
    delivered: float
    available: float
    complete: bool
    """Was the share delivered? If not, the backbone is every listed edge that carries flow to the answer."""

    @property
    def num_edges(self) -> int:
        return int(self.edge_mask.sum())

    @property
    def num_nodes(self) -> int:
        return int(self.nodes.sum())

    def __repr__(self) -> str:
        short = "" if self.complete else f", asked for {self.share:.1%}: the rest takes unlisted edges or does not flow"
        return f"Backbone({self.num_edges} edges, {self.num_nodes} nodes, delivers {self.delivered:.1%}{short})"


def backbone(flow: Flow, share: float = 0.5) -> Backbone:
    """The strongest edges, in descending order of flow, until they deliver `share` of the injected unit.

    What they deliver grows with every edge, so their number is found by bisection, one sweep O(N + E) a step. Of edges
    with equal flow the earlier comes first. Edges among them that lie on no path from a source to a sink are left out.

    Args:
        flow: of one graph. share: above 0, at most 1.

    Returns:
        A `Backbone`. Where not even all listed edges deliver the share, it has them all and `complete` is False.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    arrays = FlowArrays.of(flow)
    order = np.argsort(-arrays.carried, kind="stable")[: int((arrays.carried > 0).sum())]
    rank = np.full(len(arrays.carried), len(order))
    rank[order] = np.arange(len(order))

    def delivered(count: int) -> float:
        through = arrays.push(np.where(rank < count, arrays.transition, 0.0))
        return float(through[arrays.sinks].sum())

    available = delivered(len(order))
    wanted = min(share, available)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if delivered(middle) >= wanted:
            high = middle
        else:
            low = middle + 1
    edges = rank < high
    nodes = arrays.on_paths(edges)
    edges &= nodes[arrays.source] & nodes[arrays.target]
    device = flow.edge_flow.device
    return Backbone(
        edge_mask=torch.from_numpy(edges).to(device),
        nodes=torch.from_numpy(nodes).to(device),
        share=share,
        delivered=delivered(high),
        available=available,
        complete=available >= share - ROUNDING[flow.edge_flow.dtype],
    )


# --- paths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """One way from a source to a sink.

    Attributes:
        tokens: its nodes, ascending; a source that is a sink is a path of one.
        log_share: the natural logarithm of the share of the injected unit that takes it.
        names: of its nodes, where they have any: those of segments.
    """

    tokens: tuple[int, ...]
    log_share: float
    names: tuple[str, ...] | None = None

    @property
    def share(self) -> float:
        """What it carries of the injected unit; 0 where that is below any float, and `log_share` is not."""
        return math.exp(self.log_share)

    def __repr__(self) -> str:
        nodes = map(str, self.tokens) if self.names is None else map(repr, self.names)
        return f"Path({100 * self.share:.3g}%: {' -> '.join(nodes)})"


_SHOWN = 10  # paths that are printed


class Paths(list[Path]):
    """Paths, the most probable first."""

    @property
    def share(self) -> float:
        """What all of them carry together. They are different paths of one unit, so their shares add up."""
        return math.fsum(path.share for path in self)

    def __repr__(self) -> str:
        s = "s" * (len(self) != 1)
        shown = [f"  {path!r}" for path in self[:_SHOWN]] + ["  ..."] * (len(self) > _SHOWN)
        return "\n".join([f"Paths({len(self)} path{s} with {self.share:.3%} of the flow)", *shown])


_START = -1
"""In place of an edge: the path begins here."""


def paths(flow: Flow, k: int = 10) -> Paths:
    """The `k` most probable paths from the question to the answer, exactly, by dynamic programming over the DAG.

    A path has the share injection(first) * product of P along it. One sweep in time order finds the best way into
    every node. Then paths are built from their ends, always the one that has lost least against the best (each node
    offers its ways in, best first, one at a time; Eppstein 1998), so that beyond the sweep the work is O(k * length).

    Args:
        flow: of one graph. k: how many; fewer come back where there are fewer. Edges that `exact_flow` did not list
            are on no path.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    arrays = FlowArrays.of(flow)
    real, sinks = arrays.transition > 0, arrays.sinks
    source, target, log_share = arrays.source[real], arrays.target[real], np.log(arrays.transition[real])
    N = len(sinks)
    begins = np.searchsorted(target, np.arange(N + 1)).tolist()
    with np.errstate(divide="ignore"):
        log_start = np.log(arrays.injection)
    best = log_start.copy()
    for node in range(N):
        into = slice(begins[node], begins[node + 1])
        if into.start < into.stop:
            best[node] = max(best[node], (best[source[into]] + log_share[into]).max())

    @cache
    def ways(node: int) -> tuple[list[float], list[int]]:
        """What each of the k best ways into a node loses against the best one; the edge, or _START."""
        into = np.arange(begins[node], begins[node + 1])
        return _losses(
            np.append(log_start[node], best[source[into]] + log_share[into]), np.append(_START, into), limit=k
        )

    ends = _losses(best[sinks], np.flatnonzero(sinks), limit=k)
    found = _best_first(ends, ways, source, k)
    names = getattr(flow.graph, "segment_names", None)
    ordered = Paths()
    for last, edges in found:
        first = int(source[edges[0]]) if edges else last
        share = math.fsum([float(log_start[first]), *log_share[edges].tolist()])
        nodes = (first, *target[edges].tolist())
        ordered.append(Path(nodes, share, None if names is None else tuple(names[node] for node in nodes)))
    ordered.sort(key=lambda path: (-path.log_share, path.tokens))
    return ordered


def _losses(values: np.ndarray, names: np.ndarray, limit: int) -> tuple[list[float], list[int]]:
    """The highest values, descending, as what they are below the highest, and their names. -inf is no value."""
    order = np.argsort(-values, kind="stable")[:limit]
    order = order[values[order] > -np.inf]
    return (values[order[0]] - values[order]).tolist() if len(order) else [], names[order].tolist()


def _best_first(
    ends: tuple[list[float], list[int]],
    ways: Callable[[int], tuple[list[float], list[int]]],
    source: np.ndarray,
    k: int,
) -> list[tuple[int, list[int]]]:
    """The k paths that lose least, as (last node, edges in time order)."""
    found: list[tuple[int, list[int]]] = []
    # (loss in all, number, loss before this choice, node or None for the end, rank of the choice, edges after it).
    # Numbers go down: of equal losses the newest comes first, so a tie is followed to its end and never spread out.
    heap: list[tuple[float, int, float, int | None, int, tuple[int, object] | None]] = []
    number = 0

    def consider(base: float, node: int | None, rank: int, after: tuple[int, object] | None) -> None:
        nonlocal number
        losses, _ = ends if node is None else ways(node)
        if rank < len(losses):
            number -= 1
            heapq.heappush(heap, (base + losses[rank], number, base, node, rank, after))

    consider(0.0, None, 0, None)
    while heap and len(found) < k:
        loss, _, base, node, rank, after = heapq.heappop(heap)
        consider(base, node, rank + 1, after)
        choice = (ends if node is None else ways(node))[1][rank]
        if node is None:
            consider(loss, choice, 0, (choice, None))
        elif choice == _START:
            found.append(_unrolled(after))
        else:
            consider(loss, int(source[choice]), 0, (choice, after))
    return found


def _unrolled(after: tuple[int, object] | None) -> tuple[int, list[int]]:
    """(last node, edges) from the linked list of edges that ends in the last node."""
    entries: list[int] = []
    while after is not None:
        entry, after = after  # type: ignore[assignment]
        entries.append(entry)
    return entries[-1], entries[:-1]


# --- hubs and width --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """A node that much of the flow passes, and how it spreads there. Over listed edges that carry flow.

    Attributes:
        token: its number. throughput: inflow + outflow.
        edges_in, edges_out: how many edges. fan_in, fan_out: how many they count for: 1 / sum of squared shares, which
            is their number where all carry the same, 1 where one carries all, and 0 where there are none.
        distance_in, distance_out: how far away, on average, inflow comes from and outflow goes, in nodes; nan for none.
    """

    token: int
    throughput: float
    edges_in: int
    edges_out: int
    fan_in: float
    fan_out: float
    distance_in: float
    distance_out: float


def hubs(flow: Flow, k: int = 10, mask: Tensor | None = None) -> list[Hub]:
    """The `k` nodes with the highest throughput, the highest first; of equal ones the earlier.

    Args:
        flow: of one graph. k: how many; nodes without flow are none.
        mask: [N] bool, the nodes that may be hubs, such as `flow.graph.credit_mask`; default: all.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    arrays = FlowArrays.of(flow)
    sinks = arrays.sinks
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(sinks),)):
        raise ValueError(f"mask must be a bool tensor [N] = [{len(sinks)}], got {list(mask.shape)} {mask.dtype}")
    throughput = flow.throughput.detach().cpu().double().numpy()
    order = np.argsort(-throughput, kind="stable")
    order = order[(throughput > 0)[order] & (True if mask is None else mask.cpu().numpy()[order])][:k]
    real = arrays.carried > FAINTEST
    source, target, carried = arrays.source[real], arrays.target[real], arrays.carried[real]
    columns: list[list[float]] = []
    for end in (target, source):
        count, total, squares, far = (
            np.bincount(end, values, minlength=len(sinks)).astype(np.float64)[order]  # of nothing: int64
            for values in (np.ones_like(carried), carried, carried**2, carried * (target - source))
        )
        fan = np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0)
        distance = np.divide(far, total, out=np.full_like(total, np.nan), where=total > 0)
        columns += [count.tolist(), fan.tolist(), distance.tolist()]
    edges_in, fan_in, distance_in, edges_out, fan_out, distance_out = columns
    return [
        Hub(
            token=token,
            throughput=float(throughput[token]),
            edges_in=int(edges_in[n]),
            edges_out=int(edges_out[n]),
            fan_in=fan_in[n],
            fan_out=fan_out[n],
            distance_in=distance_in[n],
            distance_out=distance_out[n],
        )
        for n, token in enumerate(order.tolist())
    ]


def width(flow: Flow, by: Literal["edges", "tokens"] = "edges") -> Tensor:
    """[N - 1] how many edges, or tokens, carry the flow from node t and before to node t + 1 and after.

        width(t) = (sum of phi)^2 / sum of phi^2      over the edges i -> k with i <= t < k

    It is the number of crossing edges where all carry the same, and 1 where one carries all: 1 says that everything
    goes through one edge. By tokens, what one token sends across counts as one. Listed edges only; 0 where no flow
    crosses. float64, O(E log N), and sums of positive numbers only: it is exact also where little crosses.
    """
    if by not in ("edges", "tokens"):
        raise ValueError(f'by must be "edges" or "tokens", got {by!r}')
    arrays = FlowArrays.of(flow)
    real = arrays.carried > FAINTEST
    source, target, carried = arrays.source[real], arrays.target[real], arrays.carried[real]
    cuts = len(arrays.sinks) - 1
    total = _over_intervals(source, target, carried, cuts)
    if by == "edges":
        squares = _over_intervals(source, target, carried**2, cuts)
    else:
        # What token i sends across cut t falls, as t grows, by one edge at each of its targets. So its square is a
        # staircase: from the target before (or i itself) up to the next one it is the square of what is still to come.
        order = np.lexsort((target, source))
        source, target, coming = source[order], target[order], carried[order]
        step = 1
        while step < len(source) and (same := source[:-step] == source[step:]).any():
            coming[:-step] += np.where(same, coming[step:], 0)
            step *= 2
        first = np.append(True, source[1:] != source[:-1])[: len(source)]
        since = np.where(first, source, np.append(0, target[:-1])[: len(source)])
        squares = _over_intervals(since, target, coming**2, cuts)
    return torch.from_numpy(np.divide(total**2, squares, out=np.zeros(cuts), where=squares > 0)).to(flow.flow.device)


def _over_intervals(start: np.ndarray, stop: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """[size] at t the sum of the values of the intervals start <= t < stop.

    By a segment tree: an interval is O(log size) blocks of a power of two. Running differences would be shorter, and
    what is left of them after a large number has come and gone is rounding.
    """
    leaves = 1 << max(size - 1, 1).bit_length()
    tree = np.zeros(2 * leaves)
    left, right = start + leaves, stop + leaves
    while len(left):
        odd = left % 2 == 1
        tree += np.bincount(left[odd], value[odd], minlength=2 * leaves)
        left = left + odd
        odd = right % 2 == 1
        right = right - odd
        tree += np.bincount(right[odd], value[odd], minlength=2 * leaves)
        left, right = left // 2, right // 2
        open_ = left < right
        left, right, value = left[open_], right[open_], value[open_]
    for first in (1 << level for level in range(leaves.bit_length() - 1)):
        tree[2 * first : 4 * first] += np.repeat(tree[first : 2 * first], 2)
    return tree[leaves : leaves + size]
