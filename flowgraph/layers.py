"""Answer reachability and conserved flow as message-passing layers: one hop is one pass over all edges.

Both solve a system `x = b + M x` with `M >= 0` by adding up hops, `x = b + M b + M^2 b + ...`. A trace is a DAG, so the
sum ends; long before that, a bound on everything still to come is small. If a hop shrank every term by at least the
factor `rho < 1`, then so will all later hops (`M >= 0` keeps `M t <= rho t`), and what is missing at a token is at most
`rho / (1 - rho)` times its last term. The layers stop when that is below `tol` times the value, for each token of a
graph: a rule that no scaling of weights can change. A chain, where each hop reaches a new token, runs to its end.

Reach may be as small as 0.1 ** 2000, so it is carried as `mantissa * 2 ** exponent` (`Scaled`) and never underflows.

Messages are added up in groups, token by token, and not by PyG's scatter, which on a GPU adds in any order
(`flowgraph.sums`).

Shapes: N tokens, E edges, B graphs in the batch; all edges of a batch are handled at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from flowgraph.sums import Groups

LOOK_EVERY = {"cpu": 1, "other": 4}
"""Hops after which it is asked whether any graph goes on: the answer is waited for. What a hop adds to graphs that have
stopped is 0, so that asking late changes nothing."""

_ZERO_EXPONENT = -(2**28)
"""Exponent of the number 0: below every other one, and far from overflow when a few of them are added."""


class Scaled(NamedTuple):
    """Numbers `mantissa * 2 ** exponent`, elementwise; 0 has mantissa 0. For values far below the smallest float."""

    mantissa: Tensor
    """[N] float, 0 or in [0.5, 1)."""
    exponent: Tensor
    """[N] int64."""

    @classmethod
    def of(cls, value: Tensor, exponent: Tensor | None = None) -> Scaled:
        """`value * 2 ** exponent`, brought to normal form."""
        mantissa, shift = torch.frexp(value)
        shift = shift.long() if exponent is None else shift + exponent
        return cls(mantissa, torch.where(mantissa == 0, _ZERO_EXPONENT, shift))

    @property
    def value(self) -> Tensor:
        """[N] as ordinary floats: 0 where the number is too small for them."""
        return _ldexp(self.mantissa, self.exponent)

    @property
    def log(self) -> Tensor:
        """[N] natural logarithm, -inf where the number is 0."""
        exponent = self.exponent.to(self.mantissa.dtype)
        return torch.where(self.mantissa == 0, -torch.inf, self.mantissa.log() + exponent * 0.6931471805599453)

    def plus(self, other: Scaled) -> Scaled:
        top = torch.maximum(self.exponent, other.exponent)
        return Scaled.of(_ldexp(self.mantissa, self.exponent - top) + _ldexp(other.mantissa, other.exponent - top), top)

    def times(self, other: Scaled) -> Scaled:
        return Scaled.of(self.mantissa * other.mantissa, self.exponent + other.exponent)

    def at(self, index: Tensor) -> Scaled:
        return Scaled(self.mantissa[index], self.exponent[index])

    def where(self, mask: Tensor) -> Scaled:
        """These numbers where `mask` [N], 0 elsewhere."""
        return Scaled(self.mantissa * mask, torch.where(mask, self.exponent, _ZERO_EXPONENT))

    def over(self, other: Scaled) -> Tensor:
        """[N] the quotient as ordinary floats; 0 / 0 is 0, and x / 0 is inf."""
        quotient = _ldexp(self.mantissa / other.mantissa, (self.exponent - other.exponent).clamp(-2000, 2000))
        return torch.where(self.mantissa == 0, 0, quotient)


class AnswerReachability(MessagePassing):
    """Backward pass: how much influence of each token reaches the answer, over all paths.

    .. math:: h(a) = 1 \\text{ for } a \\in S, \\qquad h(i) = \\sum_{k > i} W[k, i] \\, h(k) \\text{ otherwise}

    (arXiv 2606.10646, answer reachability.) Edges that leave a sink do not exist.

    Args:
        tol: bound on the relative error of every token, up to rounding.
        max_hops: give up after so many hops; by default the sum is never cut short.

    Inputs: `edge_index` [2, E], `edge_weight` [E], `sinks` [N] bool, `batch` [N]; `groups`, the edges by source, where
    they are known.
    Outputs: reach as `Scaled` [N], and the number of hops per graph [B].
    """

    def __init__(self, tol: float = 1e-6, max_hops: int | None = None) -> None:
        super().__init__(aggr=None, flow="target_to_source", node_dim=0)
        self.tol, self.max_hops = tol, max_hops

    def forward(
        self,
        edge_index: Tensor,
        edge_weight: Tensor,
        sinks: Tensor,
        batch: Tensor | None = None,
        groups: Groups | None = None,
    ) -> tuple[Scaled, Tensor]:
        batch = edge_index.new_zeros(len(sinks)) if batch is None else batch
        groups = Groups.by(edge_index[0], len(sinks)) if groups is None else groups
        edges = groups.arrange(edge_index)
        weight = Scaled.of(groups.arrange(edge_weight) * ~sinks[edges[0]])
        reach = term = Scaled.of(sinks.to(edge_weight.dtype))
        stop = Stop(batch, self.tol, self.max_hops)
        while stop.any_running:
            new = self.propagate(edges, mantissa=term.mantissa, exponent=term.exponent, weight=weight, groups=groups)
            # A graph that has converged adds nothing more: it gets the same numbers alone and in a batch.
            new = new.where(stop.running[batch])
            reach = reach.plus(new)
            stop.step(new.over(term), new.over(reach))
            term = new
        return reach, stop.hops

    def message(self, mantissa_j: Tensor, exponent_j: Tensor, weight: Scaled) -> Scaled:
        return Scaled(mantissa_j, exponent_j).times(weight)

    def aggregate(self, inputs: Scaled, index: Tensor, groups: Groups) -> Scaled:
        """Scaled sum: the largest exponent among a token's messages, then the sum in units of it."""
        top = groups.highest(inputs.exponent)
        return Scaled.of(groups.sum(_ldexp(inputs.mantissa, inputs.exponent - top[index])), top)


class FlowPropagation(MessagePassing):
    """Forward pass: the flow through each token, from the question to the answer, nothing lost on the way.

    .. math:: f(k) = \\text{injection}(k) + \\sum_{i < k} f(i) \\, P(i \\to k)

    (arXiv 2606.10646, conserved flow.) `P` comes from `transitions`; its rows sum to 1, or to 0 at sinks.

    Args: as for `AnswerReachability`.
    Inputs: `edge_index` [2, E], `transition` [E], `injection` [N], `batch` [N]; `groups`, the edges by target.
    Outputs: flow [N], and the number of hops per graph [B].
    """

    def __init__(self, tol: float = 1e-6, max_hops: int | None = None) -> None:
        super().__init__(aggr=None, flow="source_to_target", node_dim=0)
        self.tol, self.max_hops = tol, max_hops

    def forward(
        self,
        edge_index: Tensor,
        transition: Tensor,
        injection: Tensor,
        batch: Tensor | None = None,
        groups: Groups | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch = edge_index.new_zeros(len(injection)) if batch is None else batch
        groups = Groups.by(edge_index[1], len(injection)) if groups is None else groups
        edges, transition = groups.arrange(edge_index), groups.arrange(transition)
        flow = term = injection
        stop = Stop(batch, self.tol, self.max_hops)
        while stop.any_running:
            new = self.propagate(edges, x=term, transition=transition, groups=groups) * stop.running[batch]
            flow = flow + new
            stop.step(over(new, term), over(new, flow))
            term = new
        return flow, stop.hops

    def message(self, x_j: Tensor, transition: Tensor) -> Tensor:
        return x_j * transition

    def aggregate(self, inputs: Tensor, groups: Groups) -> Tensor:
        return groups.sum(inputs)


class Stop:
    """Decides per graph when the sum of hops is long enough."""

    def __init__(self, batch: Tensor, tol: float, max_hops: int | None) -> None:
        self._batch, self._tol, self._max_hops = batch, tol, max_hops
        self._num_graphs = int(batch[-1]) + 1
        self._look_every = LOOK_EVERY["cpu" if batch.device.type == "cpu" else "other"]
        self._steps = 0
        self.running = torch.ones(self._num_graphs, dtype=torch.bool, device=batch.device)
        self.hops = torch.zeros(self._num_graphs, dtype=torch.int64, device=batch.device)
        self.any_running = max_hops is None or max_hops > 0

    def step(self, growth: Tensor, share: Tensor) -> None:
        """Args: growth [N], each new term over the one before; share [N], each new term over the sum so far."""
        self.hops += self.running
        rho = scatter(growth, self._batch, dim_size=self._num_graphs, reduce="max")
        last = scatter(share, self._batch, dim_size=self._num_graphs, reduce="max")
        # Numbers that have overflowed (NaN here) end a graph: no further hop would mend them.
        missing = torch.where(rho >= 1, torch.inf, rho / (1 - rho) * last)
        self.running = self.running & (missing > self._tol)
        if self._max_hops is not None:
            self.running = self.running & (self.hops < self._max_hops)
        self._steps += 1
        if self._steps % self._look_every == 0:
            self.any_running = bool(self.running.any())


def _ldexp(value: Tensor, exponent: Tensor) -> Tensor:
    """`value * 2 ** exponent` in the dtype of `value` (torch.ldexp computes the power in float32)."""
    return value * torch.exp2(exponent.clamp(min=-4000).to(value.dtype))


def over(new: Tensor, old: Tensor) -> Tensor:
    """[N] the quotient; 0 / 0 is 0."""
    return torch.where(new == 0, 0, new / old)
