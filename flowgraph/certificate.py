"""What a trace lost on the way from attention to flow, and what that can do to reach, flow and credit.

Three answers, from the surest to the most telling:

* Mass, per row: how much of the attention of each token is in listed edges, how much in pools, how much nowhere.
* Bounds, true whatever the attention was, as long as its rows sum to at most 1. With W the attention, V what the graph
  stands for (edges and pools), h and y = f / h of V, and D = W - V:

      reach   |h' - h|(i) <= sum_{j >= i} |h^T D|(j)       a walk visits a token at most once
      flow    |f' - f|(k) <= sum_{j <= k} h(j) |D y|(j)    a unit of flow passes a token at most once; if h' = h

  What pools know of D makes these computable: each row of a pool keeps its sum, each column its sum weighted by
  `shape`. So a pool of payments p and shares c adds at most 2 sum_k p(k) |h(k) - s shape(k)| to the first, whatever s,
  and 2 sum_k h(k) p(k) sum_i c(i) |y(i) - m| to the second, whatever m. Without pools, where a row just lost d(k):
  |h' - h|(i) <= sum_{k > i} h(k) d(k) =: x(i), and flows from source q differ by at most x(q) / (h(q) + x(q)) in sum.
* Estimates, from witnesses: the rows and columns of a few tokens, kept whole while the attention streamed by. On them
  the error that V makes is known, |D y|(k) and |h^T D|(i), each over its own size. Errors of that size and random
  sign at all tokens, sent through the solver some times, tell how far flow and the choice of the top tokens move.
  Errors that all point one way would move them further, so it is no bound.

Shapes: N tokens, B graphs, m witnesses.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowgraph.flow import Flow, check_flow
from flowgraph.graph import TokenGraph, closed_tokens, graph_ptr
from flowgraph.pools import expand
from flowgraph.solve import Triangle

WITNESSES, DRAWS = 32, 16
"""How many tokens bear witness, and how many times errors are drawn for the estimates."""

_ROUNDING, _FLOAT32 = 1e-5, 1e-6
"""Relative differences below these are rounding: of sums over many tokens, and of single numbers."""


@dataclass(frozen=True)
class Witnesses:
    """Whole rows and columns of the attention for some tokens of a trace.

    Attributes:
        tokens: [m] int64, ascending. rows: [m, N] what each pays to earlier tokens. columns: [m, N] what later ones pay
            to each. The diagonal is 0 in both.
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def up_to_the_answer(cls, answer_mask: Tensor, count: int) -> Witnesses:
        """`of` the tokens up to the last sink, [N] bool; of all where there is none. What follows carries no flow."""
        return cls.of((_sum_from(answer_mask.long()) > 0) | ~answer_mask.any(), count)

    @classmethod
    def of(cls, candidates: Tensor, count: int = WITNESSES, dtype: torch.dtype = torch.float32) -> Witnesses:
        """Evenly spread over the `candidates` [N] bool, nothing seen yet."""
        where = candidates.nonzero()[:, 0]
        tokens = where[torch.linspace(0, len(where) - 1, min(count, len(where)), device=where.device).long()]
        empty = torch.zeros(len(tokens), len(candidates), dtype=dtype, device=where.device)
        return cls(tokens, empty, empty.clone())

    def see(self, start: int, past: Tensor) -> None:
        """Take what rows `start ..` have of it; `past` [r, >= start + r], zero on and above the diagonal."""
        stop, width = start + len(past), past.shape[1]
        # Slices of an ascending list: masks as indices would make the host wait for the device in every block.
        first, last, end = (bisect_left(self._places, place) for place in (start, stop, width))
        self.rows[first:last, :width] = past[self.tokens[first:last] - start].to(self.rows)
        self.columns[:end, start:stop] = past[:, self.tokens[:end]].T.to(self.columns)

    @cached_property
    def _places(self) -> list[int]:
        found: list[int] = self.tokens.tolist()
        return found


@dataclass(frozen=True)
class Certificate:
    """How exact the flow of one trace is.

    Attributes:
        listed, modelled, lost: [N] attention of each token in edges, in pools, in neither. In exact mode all that is
            not listed counts as modelled: it is not in the graph, but in the flow.
        reach_bound: [N] the true reach differs by no more than this, if rows of attention sum to at most 1.
        flow_bound: [N] the true flow differs by no more than this; 1 where nothing better can be said. Both up to
            rounding, in the dtype of the graph.
        flow_error: [N] estimate (one standard deviation) of the difference of flow; None where there are no witnesses.
        top_overlap: estimate: of the 40 % of the credit tokens with the highest flow, the share that the true flow has
            among its own; None where there are no witnesses.
    """

    listed: Tensor
    modelled: Tensor
    lost: Tensor
    reach_bound: Tensor
    flow_bound: Tensor
    flow_error: Tensor | None = None
    top_overlap: float | None = None

    def __repr__(self) -> str:
        found = self.summary()
        mass = ", ".join(f"{name} {found[f'{name}_share']:.1%}" for name in ("listed", "modelled", "lost"))
        bounds = f"reach within {found['reach_bound']:.2g}, flow within {found['flow_bound']:.2g}"
        overlap = "not estimated" if self.top_overlap is None else f"{self.top_overlap:.1%}"
        return f"Certificate({mass}; {bounds}; overlap of the top tokens {overlap})"

    def summary(self) -> dict[str, float | None]:
        """As columns of a table: means over rows for mass, the largest of each bound."""
        mass = (self.listed + self.modelled + self.lost).double().sum().clamp(min=1e-30)
        return {
            "listed_share": float(self.listed.double().sum() / mass),
            "modelled_share": float(self.modelled.double().sum() / mass),
            "lost_share": float(self.lost.double().sum() / mass),
            "reach_bound": float(self.reach_bound.max()),
            "flow_bound": float(self.flow_bound.max()),
            "flow_error": None if self.flow_error is None else float(self.flow_error.max()),
            "top_overlap": self.top_overlap,
        }


def certify(
    flow: Flow, witnesses: Witnesses | None = None, *, absorb_at_prompt: bool = False, top: float = 0.4, seed: int = 0
) -> Certificate:
    """What the flow through one graph is worth.

    Args:
        flow: of one graph. witnesses: what `sparse_graph` kept of the attention that the graph came from.
        absorb_at_prompt: how the flow was made. top: the share of tokens that `top_overlap` is about.
        seed: of the random signs; the same seed gives the same estimate.

    Raises:
        TypeError: flow is no `Flow`. ValueError: a batch, or witnesses of another trace.
    """
    check_flow(flow)
    graph = flow.graph
    if len(graph_ptr(graph)) != 2:
        raise ValueError(f"flow is over a batch of {len(flow)} graphs; certify them one by one: for one in flow")
    N = int(graph.num_nodes or 0)
    if witnesses is not None and witnesses.rows.shape[1] != N:
        raise ValueError(f"witnesses are of a trace of {witnesses.rows.shape[1]} tokens, the flow of one of {N}")
    listed = torch.zeros_like(graph.dropped).scatter_add_(0, graph.edge_index[1], graph.edge_weight)
    if flow.solver == "exact":
        zeros = torch.zeros_like(listed)
        return Certificate(listed, graph.dropped, zeros, zeros, zeros, zeros, 1.0)
    lost = graph.dropped
    if graph.pool_index.numel():
        lost = lost - graph.modelled
        lost = torch.where(lost <= _ROUNDING * (graph.dropped + listed), 0, lost)
    closed = closed_tokens(graph.prompt_mask, graph.answer_mask, absorb_at_prompt)
    reach_bound = _reach_bound(flow, lost, closed)
    flow_bound = _flow_bound(flow, lost, reach_bound, closed)
    error, overlap = (None, None)
    if not graph.pool_index.numel() and not lost.any():
        error, overlap = torch.zeros_like(listed), 1.0
    elif witnesses is not None:
        error, overlap = _estimate(flow, witnesses, closed, top, seed)
    return Certificate(listed, graph.modelled, lost, reach_bound.to(listed), flow_bound.to(listed), error, overlap)


def _reach_bound(flow: Flow, lost: Tensor, closed: Tensor) -> Tensor:
    """[N] float64."""
    graph = flow.graph
    pools, N = graph.pools, len(lost)
    reach = flow.reach.double() * ~closed
    # x(i) = sum over later tokens of h d; a token's own loss concerns only tokens before it.
    behind = _sum_from(reach * lost.double())
    bound = torch.cat([behind[1:], behind.new_zeros(1)])
    if pools.index.numel():
        (token, pool), weight = pools.index, pools.weight.double()
        pays, count = ~pools.collects, pools.count
        shape = pools.shape.double()

        def per_pool(values: Tensor) -> Tensor:
            return values.new_zeros(count).index_add_(0, pool[pays], values)

        paid = weight[pays]
        scale = per_pool(paid * reach[token[pays]]) / per_pool(paid * shape[token[pays]]).clamp(min=1e-300)
        wrong = per_pool(2 * paid * (reach[token[pays]] - scale[pool[pays]] * shape[token[pays]]).abs())
        wrong = torch.where(wrong <= _FLOAT32 * per_pool(paid * reach[token[pays]]), 0, wrong)
        bound = bound + _sum_from(wrong.new_zeros(N).index_add_(0, pools.last_collected, wrong))
    return bound.clamp(max=max(float(graph.answer_mask.sum()), 1.0))


def _flow_bound(flow: Flow, lost: Tensor, reach_bound: Tensor, closed: Tensor) -> Tensor:
    """[N] float64, at most 1."""
    graph = flow.graph
    pools, reach = graph.pools, flow.reach.double()
    nothing = torch.ones_like(reach)
    passes = (reach > 0) & ~graph.answer_mask & (flow.flow > 0)
    if not pools.index.numel():
        # From each source, the paths that the graph lacks are a share x / (h + x) of all, at most.
        question, reaches = graph.question_mask, graph.question_mask & (reach > 0)
        missing = (question & ~reaches & (reach_bound > 0)).sum()
        share = (reach_bound / (reach + reach_bound).clamp(min=1e-300))[reaches]
        mean = float(share.mean()) if len(share) else 0.0
        return nothing * min(1.0, mean + 2 * float(missing) / max(int(reaches.sum() + missing), 1))
    if lost.any() or (reach_bound[passes] > _ROUNDING * reach[passes]).any():
        return nothing  # the bound stands on reach being exact
    y = torch.where(passes, flow.flow.double() / reach.clamp(min=1e-300), 0)
    (token, pool), weight, count = pools.index, pools.weight.double(), pools.count
    collects = pools.collects
    open_ = (reach * ~closed)[token] * ~collects
    through = reach.new_zeros(count).index_add_(0, pool, weight * open_)
    share = weight * collects  # of sinks too: their y is 0, and what a row pays them it pays to no other token
    middle = reach.new_zeros(count).index_add_(0, pool, share * y[token])
    middle = middle / reach.new_zeros(count).index_add_(0, pool, share).clamp(min=1e-300)
    spread = reach.new_zeros(count).index_add_(0, pool, share * (y[token] - middle[pool]).abs())
    added = reach.new_zeros(len(reach)).index_add_(0, pools.first_paid, 2 * through * spread)
    return added.cumsum(0).clamp(max=1)


def _sum_from(values: Tensor) -> Tensor:
    """[N] the sum of each token's and all later values."""
    return values.flip(0).cumsum(0).flip(0)


def _estimate(flow: Flow, witnesses: Witnesses, closed: Tensor, top: float, seed: int) -> tuple[Tensor, float]:
    """Standard deviation of flow [N] and mean overlap of the top tokens, over random errors of the witnessed size."""
    graph = flow.graph
    reach, got = flow.reach.double(), flow.flow.double()
    passes = (reach > 0) & ~graph.answer_mask
    y = torch.where(passes, got / reach.clamp(min=1e-300), 0)
    injection = torch.where(reach > 0, flow.injection.double() / reach.clamp(min=1e-300), 0)
    tokens = witnesses.tokens
    # What the graph says of a witness is in its solution: (V y)(k) = y(k) - injection(k) / h(k), (h^T V)(i) = h(i).
    inflow = torch.where(reach > 0, got / reach.clamp(min=1e-300), 0) - injection
    forward = witnesses.rows.double() @ y
    backward = witnesses.columns.double() @ (reach * ~closed)
    open_ = ~closed[tokens] & (reach[tokens] > 0)
    forward_error = _relative(forward, inflow[tokens], open_)
    backward_error = _relative(backward, reach[tokens], passes[tokens])
    solver = _Perturbed(graph, closed)
    draw = np.random.default_rng(seed)
    flows = torch.stack(
        [
            solver.flow(
                backward_error * draw.choice([-1.0, 1.0], len(reach)) * (reach * passes).cpu().numpy(),
                forward_error * draw.choice([-1.0, 1.0], len(reach)) * inflow.cpu().numpy(),
                (flow.injection > 0).cpu().numpy(),
            )
            for _ in range(DRAWS)
        ]
    )
    error = (flows - got.cpu()).square().mean(0).sqrt().to(flow.flow)
    credit = graph.credit_mask.cpu()
    count = int(np.ceil(top * int(credit.sum())))
    if count == 0:
        return error, 1.0
    chosen = got.cpu()[credit].topk(count).indices
    member = torch.zeros(int(credit.sum()), dtype=torch.bool).index_fill_(0, chosen, True)
    overlap = member[flows[:, credit].topk(count, dim=1).indices].double().mean()
    return error, float(overlap)


def _relative(true: Tensor, graph: Tensor, counts: Tensor) -> float:
    """Root mean square of the relative differences."""
    counts = counts & (true > 0)
    if not counts.any():
        return 0.0
    return float(((true - graph)[counts] / true[counts]).square().mean().sqrt().clamp(max=1))


class _Perturbed:
    """The two solves of a graph again, with something added on the right."""

    def __init__(self, graph: TokenGraph, closed: Tensor) -> None:
        weight = graph.edge_weight.double() * ~closed[graph.edge_index[1]]
        edges, tokens = graph.edge_index, torch.arange(len(closed))
        if graph.pool_index.numel():
            nodes = expand(graph.edge_index, weight, graph.pools.closed_to(closed))
            edges, weight, tokens = nodes.edge_index, nodes.edge_weight, nodes.tokens
        self._tokens, self._sinks = tokens.cpu().numpy(), graph.answer_mask.cpu().numpy()
        count = int(self._tokens[-1]) + 1
        ends = np.zeros(count, dtype=bool)
        ends[self._tokens] = self._sinks
        source, target = edges.cpu().numpy()
        self._weight = weight.cpu().numpy() * ~ends[source]
        self._triangle, self._count = Triangle(source, target, count), count

    def flow(self, backward: np.ndarray, forward: np.ndarray, injects: np.ndarray) -> Tensor:
        """[N] flow with `backward` [N] added to reach and `forward` [N] to flow per reach, on the right-hand sides."""
        right = np.zeros(self._count)
        right[self._tokens] = self._sinks + backward
        reach = self._triangle.solve(self._weight, right, backward=True)[self._tokens].clip(min=0)
        alive = injects & (reach > 0)
        right[self._tokens] = forward
        right[self._tokens[alive]] += 1 / (max(int(alive.sum()), 1) * reach[alive])
        return torch.from_numpy(self._triangle.solve(self._weight, right, backward=False)[self._tokens] * reach)
