"""Checkpoints: the few tokens that every way along a backbone passes, what is lost without them, and who attends there.

A set of nodes through which all flow runs always exists (the sinks are one), and in the whole graph, where every token
attends to every other, none is small. In a backbone small ones mean something. Here are its *minimal vertex cuts*: sets
of nodes that every path from a source to a sink passes, and no part of which is such a set. A cut of one node is what
graph theory calls a dominator. Sources and sinks may be in cuts like any other node: the only sink is always a cut.

How: the nodes stand in time order. Where every node lies on a path from a source to a sink, node v is a cut exactly if
nothing jumps over it: no edge i -> k with i < v < k, no source behind it, no sink before it. (A path through such an
edge goes around v, since it only moves forward.) Cuts of two are the cuts of one in what is left without a node. The
size of the smallest cut is a maximum flow with every node split in two (SciPy).

What a cut of the backbone carries in the *whole* graph is another matter, and that is what `removal` answers.

Shapes: N nodes, E edges, S sets of nodes, n nodes and U columns of a search, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgraph.backbone import Backbone, FlowArrays
from flowgraph.capture import Capture
from flowgraph.flow import Flow
from flowgraph.rows import Rows
from flowgraph.segments import Segments
from flowgraph.sparsify import check_weights

PAIRS_WORK = 3e8
"""All cuts of two are searched for where nodes * (nodes + edges) of the backbone is at most this: some seconds."""
_COLUMNS = 1024
_NUMBERS = 2**25  # that one sweep of `removal` keeps, a few times over


@dataclass(frozen=True)
class Checkpoint:
    """Nodes that every path of the backbone passes; no part of them is enough.

    Attributes:
        tokens: their numbers, ascending.
        shares: for each of them, the share of what the backbone delivers that passes it.
        flow: the share of the whole flow, in the whole graph, that passes at least one of them.
        lost: the share of the answer's reach that is lost without them; see `removal`.
        trivial: they are the sources, or the sinks, of the backbone: no news.
    """

    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    flow: float
    lost: float
    trivial: bool


class Checkpoints(list[Checkpoint]):
    """Checkpoints by size, then in time order.

    Attributes:
        minimum: the size of the smallest cut of the backbone, up to max_cut + 1 ("more"); 0 where it is empty.
        complete: up to this size all minimal cuts are listed.
    """

    def __init__(self, items: Sequence[Checkpoint], minimum: int, complete: int) -> None:
        super().__init__(items)
        self.minimum, self.complete = minimum, complete

    def __repr__(self) -> str:
        def counted(count: int, what: str) -> str:
            return f"{count} {what}{'s' * (count != 1)}"

        smallest, listed = counted(self.minimum, "node"), counted(self.complete, "node")
        return f"Checkpoints({counted(len(self), 'cut')}, smallest of {smallest}, all up to {listed} listed)"


def checkpoints(
    flow: Flow,
    backbone: Backbone,
    max_cut: int = 2,
    *,
    rows: Rows | None = None,
    fine: tuple[Flow, Segments] | None = None,
    absorb_at_prompt: bool | None = None,
    limit: int = 100,
) -> Checkpoints:
    """The minimal vertex cuts of a backbone with up to `max_cut` nodes, and what the whole graph loses without them.

    Cuts of one node are all found. Cuts of two are all found in backbones of some thousand nodes (`PAIRS_WORK`). Of
    larger ones, and of two where that is too much, one is listed if it is the smallest cut there is. `complete` of the
    result says which sizes are listed in full.

    Args:
        flow: of one graph, over tokens or segments. backbone: of this flow.
        max_cut: the most nodes of a cut.
        rows: the full attention that the flow over tokens was computed from: removal is computed on all of it. Without
            it, on all edges of the graph.
        fine: (flow over tokens, segments), where `flow` is the one contracted over the other: removal takes all
            tokens of a segment out of the token graph (or out of `rows`). Without it, nodes out of the coarse graph.
        absorb_at_prompt: as in `removal`.
        limit: most cuts of one size; of more, those whose nodes have the most flow.

    Raises:
        ValueError: a batch, a backbone of another flow, or as in `removal`.
    """
    if max_cut < 1 or limit < 1:
        raise ValueError(f"max_cut and limit must be at least 1, got {max_cut} and {limit}")
    arrays = FlowArrays.of(flow)
    if len(backbone.edge_mask) != len(arrays.source) or len(backbone.nodes) != len(arrays.sinks):
        raise ValueError(
            f"backbone is over {len(backbone.nodes)} nodes and {len(backbone.edge_mask)} edges, the flow over "
            f"{len(arrays.sinks)} and {len(arrays.source)}: pass the flow that it was made of"
        )
    net = _Net.of(arrays, backbone)
    chosen, minimum, complete = _cuts(net, flow.flow.detach().cpu().double().numpy()[net.nodes], max_cut, limit)
    if not chosen:
        return Checkpoints([], minimum, complete)
    shares = _delivered_through(arrays, backbone)
    groups = [tuple(int(net.nodes[node]) for node in cut) for cut in chosen]
    whole, segments = (flow, None) if fine is None else fine
    if segments is not None and len(segments) != len(arrays.sinks):
        raise ValueError(f"fine holds {len(segments)} segments, the flow is over {len(arrays.sinks)} nodes")
    without = removal(whole, groups, rows=rows, segments=segments, absorb_at_prompt=absorb_at_prompt)
    ends = [tuple(net.nodes[mask].tolist()) for mask in (net.starts, net.ends)]
    found = [
        Checkpoint(group, tuple(shares[list(group)].tolist()), through, lost, trivial=group in ends)
        for group, through, lost in zip(groups, without.flow.tolist(), without.lost.tolist(), strict=True)
    ]
    return Checkpoints(found, minimum, complete)


def _delivered_through(arrays: FlowArrays, backbone: Backbone) -> np.ndarray:
    """[N] the share of what a backbone delivers that passes each node."""
    transition = np.where(backbone.edge_mask.cpu().numpy(), arrays.transition, 0.0)
    through = arrays.push(transition) * arrays.arrive(transition, arrays.sinks)
    return through / max(float(through[arrays.sinks].sum()), 1e-300)


# --- vertex cuts -----------------------------------------------------------------------------------------------------


class _Net(NamedTuple):
    """A backbone with its n nodes numbered anew, in time order; every node lies on a path from a start to an end."""

    nodes: np.ndarray
    """[n] their old numbers."""
    source: np.ndarray
    target: np.ndarray
    """[m] edges sorted by target."""
    starts: np.ndarray
    ends: np.ndarray
    """[n] bool."""

    @classmethod
    def of(cls, arrays: FlowArrays, backbone: Backbone) -> _Net:
        nodes = backbone.nodes.cpu().numpy()
        number = np.cumsum(nodes) - 1
        edges = backbone.edge_mask.cpu().numpy()
        return cls(
            nodes=np.flatnonzero(nodes),
            source=number[arrays.source[edges]],
            target=number[arrays.target[edges]],
            starts=arrays.injection[nodes] > 0,
            ends=arrays.sinks[nodes],
        )


def _cuts(net: _Net, flow: np.ndarray, max_cut: int, limit: int) -> tuple[list[tuple[int, ...]], int, int]:
    """Minimal cuts, by size; the size of the smallest, at most max_cut + 1; the size up to which all are listed.

    Of more than `limit` cuts of a size, those with the most `flow` [n].
    """
    n = len(net.nodes)
    if n == 0:
        return [], 0, max_cut

    def strongest(cuts: np.ndarray) -> np.ndarray:
        """Rows of cuts [count, size], at most `limit`."""
        return cuts[np.sort(np.argsort(-flow[cuts].sum(1), kind="stable")[:limit])]

    single = _jumped_over_by_none(net, np.array([-1]))[:, 0]
    ones = np.flatnonzero(single)[:, None]
    pairs = np.empty((0, 2), dtype=np.int64)
    searched = complete = 1
    if max_cut > 1 and n * (n + len(net.source)) <= PAIRS_WORK:
        candidates, count = np.flatnonzero(~single), 0
        for begin in range(0, len(candidates), _COLUMNS):
            first = candidates[begin : begin + _COLUMNS]
            second, column = np.nonzero(_jumped_over_by_none(net, first) & ~single[:, None])
            found = np.stack([first[column], second], axis=1)[second > first[column]]
            count += len(found)
            # There may be millions: those in excess go at once.
            pairs = strongest(np.concatenate([pairs, found]))
        searched, complete = 2, 1 if count > limit else 2
    complete = 0 if len(ones) > limit else complete
    cuts = [tuple(cut) for size in (strongest(ones), pairs) for cut in sorted(size.tolist())]
    if cuts:
        return cuts, len(cuts[0]), complete
    if max_cut <= searched:
        return [], max_cut + 1, complete
    smallest = _smallest_cut(net)
    if len(smallest) > max_cut:
        return [], max_cut + 1, max_cut
    # There are none of the sizes below, so those are listed in full.
    return [smallest], len(smallest), len(smallest) - 1


def _jumped_over_by_none(net: _Net, without: np.ndarray) -> np.ndarray:
    """[n, U] bool: is node v a cut of the net without node u = without[column] (-1: without none)?

    It holds for the nodes behind u: what led to u alone is a dead end now, and all of that lies before u. Columns in
    which no path is left at all must not be asked for.
    """
    n, U = len(net.nodes), len(without)
    by_source = np.argsort(net.source, kind="stable")
    into = np.searchsorted(net.target, np.arange(n + 1)).tolist()
    out = np.searchsorted(net.source[by_source], np.arange(n + 1)).tolist()
    later = net.target[by_source]
    present = np.arange(n)[:, None] != without
    # alive: there is a way from a start that does not touch u.
    alive = present & net.starts[:, None]
    for v in range(n):
        if into[v] < into[v + 1]:
            alive[v] |= alive[net.source[into[v] : into[v + 1]]].any(0) & present[v]
    # Edges open at v: begun before it and not ended yet. Before the first node all starts are waited for, and an end
    # is an edge that is never closed: it jumps over every node behind it.
    open_ = (alive & net.starts[:, None]).sum(0, dtype=np.int64)
    cut = np.empty((n, U), dtype=bool)
    for v in range(n):
        if net.starts[v]:
            open_ -= alive[v]
        if into[v] < into[v + 1]:
            open_ -= alive[net.source[into[v] : into[v + 1]]].sum(0) * alive[v]
        cut[v] = alive[v] & (open_ == 0)
        if out[v] < out[v + 1]:
            open_ += alive[later[out[v] : out[v + 1]]].sum(0) * alive[v]
        if net.ends[v]:
            open_ += alive[v]
    return cut


def _smallest_cut(net: _Net) -> tuple[int, ...]:
    """One cut of the smallest size, by maximum flow: node v is an arc 2v -> 2v + 1 of capacity 1."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n = len(net.nodes)
    starts, ends, nodes = np.flatnonzero(net.starts), np.flatnonzero(net.ends), np.arange(n)
    tail = np.concatenate([2 * nodes, 2 * net.source + 1, np.full(len(starts), 2 * n), 2 * ends + 1])
    head = np.concatenate([2 * nodes + 1, 2 * net.target, 2 * starts, np.full(len(ends), 2 * n + 1)])
    capacity = np.where(np.arange(len(tail)) < n, 1, n + 1).astype(np.int32)
    arcs = csr_array((capacity, (tail, head)), shape=(2 * n + 2,) * 2)
    left = csr_array(arcs - maximum_flow(arcs, 2 * n, 2 * n + 1).flow)
    left.eliminate_zeros()
    reached = np.zeros(2 * n + 2, dtype=bool)
    reached[breadth_first_order(left, 2 * n, directed=True, return_predecessors=False)] = True
    return tuple(np.flatnonzero(reached[: 2 * n : 2] & ~reached[1 : 2 * n : 2]).tolist())


# --- removal ---------------------------------------------------------------------------------------------------------


class Removal(NamedTuple):
    """What the whole graph loses without each of S sets of tokens; float64."""

    lost: Tensor
    """[S] the share of the answer's reach that is lost."""
    flow: Tensor
    """[S] the share of the flow that would have passed the set."""


def removal(
    flow: Flow,
    groups: Sequence[Sequence[int]],
    *,
    rows: Rows | None = None,
    segments: Segments | None = None,
    absorb_at_prompt: bool | None = None,
) -> Removal:
    """The share of the answer's reach that is lost when tokens are taken out of the graph, set by set.

        R = sum over sources q of h(q)        lost = 1 - R without the set / R

    with the reach h of docs/method.md, section 1. Taken out means that no walk from the answer to the question may
    touch the token: its reach is 0, also if it is a sink (then less arrives) or a source (then less starts; all of
    them: 1). The share of the flow that would have passed the set is the mean of 1 - h(q) without the set / h(q) over
    the sources that reach the answer: the same loss, but every source counts the same.

    Args:
        flow: of one graph. groups: S sets of nodes, by number.
        rows: the full attention [N, N] that the flow was computed from, read once for all sets; memory is O(N (r + S))
            for blocks of r rows. Without it, the listed edges with the transitions of the flow, O(E S). The edges of
            an `exact_flow` are a part of all. Those of a contracted flow are chances between segments, which forget
            what within a segment leads where: give the flow over tokens, and `segments`.
        segments: over the N tokens of `flow`; groups then hold segments.
        absorb_at_prompt: how the flow was made; with `rows`. None: told by whether any of it enters a prompt token.

    Raises:
        ValueError: a batch, numbers out of range, rows or segments of another trace; or nothing arrives anyway.
    """
    arrays = FlowArrays.of(flow)
    N = len(arrays.sinks)
    most = max(1, _NUMBERS // N)
    if len(groups) > most:  # sweep by sweep, so that memory does not grow with the sets
        how: dict[str, Any] = {"rows": rows, "segments": segments, "absorb_at_prompt": absorb_at_prompt}
        parts = [removal(flow, groups[start : start + most], **how) for start in range(0, len(groups), most)]
        return Removal(torch.cat([part.lost for part in parts]), torch.cat([part.flow for part in parts]))
    if segments is not None and segments.num_tokens != N:
        raise ValueError(f"segments are over {segments.num_tokens} tokens, the flow over {N}")
    if rows is not None and rows.num_tokens != N:
        raise ValueError(f"rows are over {rows.num_tokens} tokens, the flow over {N}")
    spans = [(node, node + 1) for node in range(N)] if segments is None else segments.spans()
    removed = torch.zeros(N, len(groups), dtype=torch.bool)
    for column, group in enumerate(groups):
        for node in group:
            if not 0 <= node < len(spans):
                raise ValueError(f"groups[{column}] holds node {node}, there are 0..{len(spans) - 1}")
            removed[slice(*spans[node]), column] = True
    if not bool((flow.injection > 0).any()):
        raise ValueError("no source of the flow reaches the answer, so nothing can be lost: flow.injected is 0")
    if rows is not None:
        return _removal_from_rows(flow, rows, removed, absorb_at_prompt)
    # h(q) without the set is h(q) times the chance that flow from q gets to a sink around it: no underflow.
    starts = arrays.injection > 0
    weight = torch.softmax(flow.log_reach.detach().cpu().double()[torch.from_numpy(starts)], dim=0).numpy()
    injection = arrays.injection[starts] / arrays.injection.sum()
    arrived = _arrived(arrays, np.concatenate([np.zeros((N, 1), dtype=bool), removed.numpy()], axis=1))[starts]
    before, fewer = arrived[:, 0], arrived[:, :1] - arrived[:, 1:]
    return Removal(
        torch.from_numpy(weight @ fewer / (weight @ before)),
        torch.from_numpy(injection @ fewer / (injection @ before)),
    )


def _arrived(arrays: FlowArrays, removed: np.ndarray) -> np.ndarray:
    """[N, U] the share of what passes each node that arrives at a sink, in every column without its own nodes."""
    order = np.argsort(arrays.source, kind="stable")
    target, transition = arrays.target[order], arrays.transition[order]
    begins = np.searchsorted(arrays.source[order], np.arange(len(removed) + 1)).tolist()
    arrived = np.zeros(removed.shape)
    for node in range(len(removed) - 1, -1, -1):
        if arrays.sinks[node]:
            arrived[node] = 1
        elif begins[node] < begins[node + 1]:
            out = slice(begins[node], begins[node + 1])
            arrived[node] = transition[out] @ arrived[target[out]]
        arrived[node, removed[node]] = 0
    return arrived


def _removal_from_rows(flow: Flow, rows: Rows, removed: Tensor, absorb_at_prompt: bool | None) -> Removal:
    """One descending sweep, as in `flowgraph.exact`, with a column for each set; column 0 is without none."""
    graph, device = flow.graph, flow.flow.device
    removed = torch.cat([torch.zeros(len(removed), 1, dtype=torch.bool), removed], dim=1).to(device)
    sinks = graph.answer_mask
    inner = graph.prompt_mask & ~sinks
    if absorb_at_prompt is None:  # then none of the flow enters a prompt token
        entered = flow.unlisted_inflow > 0
        entered[graph.edge_index[1][flow.edge_flow > 0]] = True
        absorb_at_prompt = not bool((entered & inner).any())
    closed = inner & absorb_at_prompt
    reach = torch.zeros(removed.shape, dtype=torch.float64, device=device)
    arriving = torch.zeros_like(reach)
    for start, block in rows.blocks(last_first=True):
        check_weights(block, start)
        stop = start + len(block)
        weight = block.double() * ~closed[start:stop, None]
        here = torch.where(sinks[start:stop, None], 1.0, arriving[start:stop]) * ~removed[start:stop]
        # x(i) - sum_k W[k, i] x(k) = arriving(i), where x is not given: 1 at sinks, 0 at what is removed.
        fixed = sinks[start:stop, None] | removed[start:stop]
        special = removed[start:stop].any(0)
        # Sets without a token among these rows share one system; the others have their own.
        for columns in ((~special).nonzero()[:, 0], *special.nonzero()):
            system = -weight[:, start:].tril(-1).mT * ~fixed[:, columns[:1]]
            here[:, columns] = torch.linalg.solve_triangular(system, here[:, columns], upper=True, unitriangular=True)
        reach[start:stop] = here
        arriving[:start] += weight[:, :start].mT @ here
    starts = graph.question_mask & (reach[:, 0] > 0)
    if not bool(starts.any()):
        raise ValueError("no source reaches the answer in rows: they are not those that the flow was computed from")
    whole, without = reach[starts, 0], reach[starts, 1:]
    if flow.solver == "exact" and not torch.allclose(whole, flow.reach.double()[starts], rtol=1e-3, atol=0):
        raise ValueError(
            "reach in rows is not the reach of the flow: pass the rows that exact_flow read (the same layers and heads)"
        )
    lost, passing = 1 - without.sum(0) / whole.sum(), 1 - (without / whole[:, None]).mean(0)
    return Removal(lost.clamp(min=0), passing.clamp(min=0))  # below 0 is rounding


# --- layers and heads ------------------------------------------------------------------------------------------------


def carriers(captured: Capture, row: int, positions: Tensor, edges: Tensor, segments: Segments | None = None) -> Tensor:
    """Which layers and heads carry edges: the attention of each head on each of them, read again for these rows only.

    The mean over layers and heads is the weight of the edge in the full attention. (Where layers differ in their
    number of heads, the mean over all heads of all layers.) Memory is one row of one token in all layers and heads.

    Args:
        captured: of the pass. row, positions: of the trace in it, as in `Capture.rows` (`trace.row`,
            `trace.positions`).
        edges: [2, K] int64, earlier tokens above later ones, such as `graph.edge_index[:, backbone.edge_mask]`.
        segments: over the N tokens; edges are then between segments, and the attention is what the tokens of
            the later segment pay to all of the earlier one, on average.

    Returns:
        [K, L, H] float64, in the order of `captured.layers`; nan where a layer has fewer heads than another.
    """
    N = len(positions)
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.int64:
        raise ValueError(f"edges must be [2, K] int64, got {list(edges.shape)} {edges.dtype}")
    if segments is not None and segments.num_tokens != N:
        raise ValueError(f"segments are over {segments.num_tokens} tokens, positions over {N}")
    spans = [(token, token + 1) for token in range(N)] if segments is None else segments.spans()
    pairs = edges.T.tolist()
    for source, target in pairs:
        if not 0 <= source < target < len(spans):
            raise ValueError(f"edge {source} -> {target} must lead forward among nodes 0..{len(spans) - 1}")
    heads = list(captured.num_heads.values())
    table = torch.full((len(pairs), len(heads), max(heads)), torch.nan, dtype=torch.float64)
    for layer, count in enumerate(heads):
        table[:, layer, :count] = 0
    # The edges of each token that is read: their numbers and where their earlier ends begin and stop.
    wanted: dict[int, list[int]] = {}
    for number, (_, target) in enumerate(pairs):
        for token in range(*spans[target]):
            wanted.setdefault(token, []).append(number)
    read = captured.rows(row, positions).heads(sorted(wanted))
    for token, layers in zip(sorted(wanted), read, strict=True):
        numbers = wanted[token]
        earlier = torch.tensor([pairs[number][0] for number in numbers])
        for layer, attention in enumerate(layers):
            paid = attention.double().cpu()
            if segments is not None:
                paid = paid.new_zeros(len(paid), len(segments)).index_add_(1, segments.index[: token + 1], paid)
            table[numbers, layer, : len(paid)] += paid[:, earlier].T
    size = torch.tensor([spans[target][1] - spans[target][0] for _, target in pairs])
    return table / size[:, None, None]
