"""What the flow of a trace is like, in numbers that compare between traces. `ABOUT` says what each one is.

The flow of a token is what passes through it (`Flow.flow`, half its throughput), that of some tokens the sum over them:
a unit that passes two of them counts twice. Tokens that may get credit are those of `credit_mask`. All sums are over
one graph. A path is taken with the probability that flow takes it. Where a trace has no flow, no text or nothing to
divide by, a measure is NaN.

Shapes: N tokens, E edges, B graphs of a batch.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from flowgraph.flow import Flow, check_flow, trace_flow
from flowgraph.graph import graph_batch, graph_ptr

CLASSES = ("digit", "operator", "delimiter", "word")
_OPERATORS = frozenset("+-*/%^=<>\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}\N{MINUS SIGN}")
_LOCAL = 10
_NEAR = (8, 32, 128, 512)
_CROSSES = 1e-3

_MAY = "the tokens that may get credit"

ABOUT = {
    "path_length_mean": "edges on a path from question to answer, mean by flow",
    "path_length_p90": "the length that 90 % of the flow does not exceed",
    "path_length_max": "the length that 99.9 % of the flow does not exceed",
    "direct_share": "share of the flow that goes from the question to the answer over one edge",
    "effective_tokens": f"over how many of {_MAY} the flow is spread: 1 / sum of (share of the flow)^2",
    "effective_share": f"effective_tokens over the number of {_MAY}",
    "entropy": f"of the flow among {_MAY}, over its largest value: 1 if all carry the same, 0 if one carries all",
    "gini": f"inequality of the flow among {_MAY}: 0 if all carry the same, towards 1 if one carries all",
    "top_tenth": f"share of the flow of {_MAY} in the strongest tenth of them, rounded up",
    "distance_mean": "tokens from one end of an edge to the other, mean by flow",
    "distance_relative": "distance_mean over the number of tokens of the trace",
    "local_share": f"flow on edges over at most {_LOCAL} tokens, of the flow on all edges",
    "width_mean": "effective number of edges, (sum of flow)^2 / sum of flow^2, that cross from one position of the "
    f"response to the next; mean over positions that at least {_CROSSES:g} of the flow crosses",
    "width_min": "the least of these widths",
    "width_min_place": "where that is: 0 the begin of the response, 1 its end",
    **{f"width_quarter_{q}": f"mean width in quarter {q} of the response" for q in (1, 2, 3, 4)},
    "place_mean": "where the flow of the response is, mean place: 0 its begin, 1 its end",
    **{f"quarter_{q}": f"share of the flow of the response in its quarter {q}" for q in (1, 2, 3, 4)},
    **{f"near_{n}": f"share of the flow of {_MAY} within {n} tokens before the first sink" for n in _NEAR},
    "question_share": "effective number of tokens of the question by reach, over their number: how much of it was used",
    "prompt_share": "share of the flow of all tokens in the prompt",
    "response_share": "share of the flow of all tokens in the response",
    "sink_share": "share of the flow of all tokens in the sinks, where the flow ends",
    **{f"{name}_share": f"share of the flow of {_MAY} in those that are a {name} (needs text)" for name in CLASSES},
    **{f"{name}_lift": f"{name}_share over the share of such tokens among {_MAY}" for name in CLASSES},
    "unlisted_share": "flow on edges that the graph does not list, of all: pools, and in exact mode the rest",
}
"""What each measure is, in one line. The tests hold them against plain loops."""
MEASURES = tuple(ABOUT)


def measures(
    flow: Flow, text: Sequence[Sequence[str] | None] | None = None, *, max_hops: int = 256
) -> dict[str, Tensor]:
    """Measure every graph of a flow.

    Args:
        flow: of one graph or a batch.
        text: per graph its N tokens as pieces of text; without it the shares of token classes are NaN.
        max_hops: longest path that is followed; a distribution of lengths that is not over by then is NaN.

    Returns:
        One float64 tensor [B] per name of `MEASURES`, on the CPU.

    Raises:
        TypeError: flow is no `Flow`. ValueError: text of another number of graphs or tokens.
    """
    check_flow(flow)
    return _Graphs(flow, text).measures(max_hops)


def frame(flow: Flow, text: Sequence[Sequence[str] | None] | None = None) -> Any:
    """`measures` as a pandas DataFrame, one row per graph. (Needs pandas; `.to_parquet` writes it.)"""
    try:
        import pandas
    except ImportError as error:
        raise ImportError('flowgraph.measures.frame needs pandas: pip install "flowgraph-llm[analysis]"') from error
    return pandas.DataFrame({name: values.numpy() for name, values in measures(flow, text).items()})


class AddMeasures(BaseTransform):
    """A PyG transform: puts the measures of a `TokenGraph` on it, as the features of the whole graph.

    `data.measures` is [1, F] float32 (so that a batch of B graphs has [B, F]), in the order of `names`.

    Example:
        >>> loader = DataLoader(list_of_token_graphs_after(AddMeasures()), batch_size=32)
    """

    def __init__(self, names: Sequence[str] = MEASURES, solver: str = "auto") -> None:
        if unknown := [name for name in names if name not in MEASURES]:
            raise ValueError(f"names holds {unknown[0]!r}; measures are {', '.join(MEASURES)}")
        self.names, self.solver = tuple(names), solver

    def forward(self, data: Any) -> Data:
        found = measures(trace_flow(data, self.solver))
        data.measures = torch.stack([found[name] for name in self.names], dim=1).float()
        return data


def token_class(piece: str) -> str:
    """What a token is: "digit", "operator", "delimiter" (blanks and punctuation only), "word", or "other"."""
    bare = piece.strip()
    if bare and all(c.isdigit() or (c in ".," and len(bare) > 1) for c in bare) and any(map(str.isdigit, bare)):
        return "digit"
    if bare and all(c in _OPERATORS for c in bare):
        return "operator"
    if piece and all(c.isspace() or unicodedata.category(c)[0] == "P" for c in piece):
        return "delimiter"
    return "word" if any(map(str.isalpha, bare)) else "other"


class _Graphs:
    """A flow over a batch, with the sums per graph that every measure is made of. All float64 on the CPU."""

    def __init__(self, flow: Flow, text: Sequence[Sequence[str] | None] | None) -> None:
        graph = flow.graph
        self.ptr = graph_ptr(graph).cpu()
        self.B, self.batch = len(self.ptr) - 1, graph_batch(graph).cpu()
        self.size = self.ptr[1:] - self.ptr[:-1]
        self.source, self.target = graph.edge_index.cpu()
        self.of_edge = self.batch[self.target]
        self.prompt, self.question = graph.prompt_mask.cpu(), graph.question_mask.cpu()
        self.response, self.credit = graph.response_mask.cpu(), graph.credit_mask.cpu()
        self.answer = graph.answer_mask.cpu()
        self.f, self.phi = flow.flow.cpu().double(), flow.edge_flow.cpu().double()
        self.transition, self.injection = flow.transition.cpu().double(), flow.injection.cpu().double()
        self.log_reach = flow.log_reach.cpu().double()
        self.unlisted = self.sum(flow.unlisted_inflow.cpu().double())
        self.injected = self.sum(self.injection)
        self.text = self._text(text)
        self.place = torch.arange(len(self.batch)) - self.ptr[self.batch]

    def _text(self, text: Sequence[Sequence[str] | None] | None) -> list[str] | None:
        """N classes of tokens, if there is text."""
        if text is None:
            return None
        if len(text) != self.B:
            raise ValueError(f"text must have one entry per graph, {self.B}, got {len(text)}")
        classes: list[str] = []
        for number, pieces in enumerate(text):
            if pieces is not None and len(pieces) != self.size[number]:
                raise ValueError(
                    f"text[{number}] has {len(pieces)} pieces, graph {number} has {self.size[number]} tokens"
                )
            classes += [""] * int(self.size[number]) if pieces is None else map(token_class, pieces)
        return classes

    def sum(self, values: Tensor) -> Tensor:
        """[B] of values [N]."""
        return torch.zeros(self.B, dtype=torch.float64).index_add_(0, self.batch, values.double())

    def over_edges(self, values: Tensor) -> Tensor:
        """[B] of values [E]."""
        return torch.zeros(self.B, dtype=torch.float64).index_add_(0, self.of_edge, values.double())

    def measures(self, max_hops: int) -> dict[str, Tensor]:
        found = self._lengths(max_hops) | self._concentration() | self._locality() | self._width()
        found |= self._places() | self._roles() | self._classes()
        moved = self.over_edges(self.phi)
        found["unlisted_share"] = self.unlisted / (self.unlisted + moved)
        # Listed edges are the strong and near ones: how far all of the flow goes, and how wide it is, they don't say.
        hidden = found["unlisted_share"] > 1e-3
        for name in found:
            if name.startswith(("distance_", "width_")) or name == "local_share":
                found[name] = found[name].masked_fill(hidden, torch.nan)
        return {name: found[name].masked_fill(self.injected == 0, torch.nan) for name in MEASURES}

    def _lengths(self, max_hops: int) -> dict[str, Tensor]:
        """By following the flow hop by hop, all graphs at once, and noting when it arrives."""
        arrived = [self.sum(self.injection * self.answer)]
        moving = self.injection * ~self.answer
        while len(arrived) <= max_hops and float(self.sum(moving).max()) > 1e-9:
            step = moving[self.source] * self.transition
            here = torch.zeros_like(moving).index_add_(0, self.target, step)
            arrived.append(self.sum(here * self.answer))
            moving = here * ~self.answer
        share = torch.stack(arrived) / self.injected  # [L, B]
        done = share.cumsum(0)
        # What exact mode has not listed is not followed: then there is no distribution, and the mean is all there is.
        whole = done[-1] > 1 - 1e-3
        mean = (self.over_edges(self.phi) + self.unlisted) / self.injected

        def least(part: float) -> Tensor:
            return (done < part - 1e-9).sum(0).double().where(whole, torch.nan)

        direct = share[1] if len(share) > 1 else torch.zeros_like(mean)
        return {
            "path_length_mean": mean,
            "path_length_p90": least(0.9),
            "path_length_max": least(0.999),
            "direct_share": direct.where(whole, torch.nan),
        }

    def _concentration(self) -> dict[str, Tensor]:
        f = self.f * self.credit
        total, n = self.sum(f), self.sum(self.credit)
        p = f / total[self.batch]
        effective = 1 / self.sum(p.square().where(self.credit, 0))
        gini, top = torch.full_like(total, torch.nan), torch.full_like(total, torch.nan)
        for number in range(self.B):  # ranks are within a graph
            mine = f[self.ptr[number] : self.ptr[number + 1]][self.credit[self.ptr[number] : self.ptr[number + 1]]]
            if mine.sum() > 0:
                ranked, rank = mine.sort().values, torch.arange(1, len(mine) + 1)
                gini[number] = ((2 * rank - len(mine) - 1) * ranked).sum() / (len(mine) * mine.sum())
                top[number] = ranked[-math.ceil(len(mine) / 10) :].sum() / mine.sum()
        return {
            "effective_tokens": effective.where(total > 0, torch.nan),
            "effective_share": (effective / n).where(total > 0, torch.nan),
            "entropy": (self.sum(torch.special.entr(p).where(self.credit, 0)) / n.log()).where(n > 1, torch.nan),
            "gini": gini,
            "top_tenth": top,
        }

    def _locality(self) -> dict[str, Tensor]:
        distance, total = self.target - self.source, self.over_edges(self.phi)
        mean = self.over_edges(self.phi * distance) / total
        return {
            "distance_mean": mean,
            "distance_relative": mean / self.size,
            "local_share": self.over_edges(self.phi * (distance <= _LOCAL)) / total,
        }

    def _width(self) -> dict[str, Tensor]:
        """Between a position of the response and the next one, up to the last sink."""

        def crossing(values: Tensor) -> Tensor:
            """[N] the sum of values [E] over the edges from at most this token to a later one."""
            begin = torch.zeros(len(self.batch), dtype=torch.float64).index_add_(0, self.source, values)
            return (begin - torch.zeros_like(begin).index_add_(0, self.target, values)).cumsum(0)

        total, squares = crossing(self.phi), crossing(self.phi.square())
        last = torch.zeros(self.B, dtype=torch.int64).scatter_reduce(
            0, self.batch, self.place * (self.answer & (self.f > 0)), "amax"
        )
        # Differences of running sums are nothing but rounding where hardly anything crosses.
        cut = self.response & (self.place < last[self.batch]) & (total > _CROSSES)
        width = (total.square() / squares.clamp(min=1e-300)).where(cut, torch.nan)
        place = self._place_in_response()
        found = {name: torch.full((self.B,), torch.nan, dtype=torch.float64) for name in ("mean", "min", "min_place")}
        for number in range(self.B):
            tokens = slice(int(self.ptr[number]), int(self.ptr[number + 1]))
            if cut[tokens].any():
                mine = width[tokens][cut[tokens]]
                least = int(mine.argmin())
                found["mean"][number], found["min"][number] = mine.mean(), mine[least]
                found["min_place"][number] = place[tokens][cut[tokens]][least]
        for q in range(4):
            here = cut & ((place * 4).floor().clamp(0, 3) == q)
            found[f"quarter_{q + 1}"] = self.sum(width.where(here, 0)) / self.sum(here)
        return {f"width_{name}": values for name, values in found.items()}

    def _place_in_response(self) -> Tensor:
        """[N] from 0 (its first token) to 1 (its last), in order; anything outside the response."""
        rank = self.response.cumsum(0) - 1
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.response.cumsum(0)])[self.ptr[:-1]]
        count = self.sum(self.response)[self.batch]
        return (rank - before[self.batch]) / (count - 1).clamp(min=1)

    def _places(self) -> dict[str, Tensor]:
        f, place = self.f * self.response, self._place_in_response()
        total = self.sum(f)
        quarter = (place * 4).floor().clamp(0, 3)
        found = {"place_mean": self.sum(f * place) / total}
        found |= {f"quarter_{q + 1}": self.sum(f * (quarter == q)) / total for q in range(4)}
        first = torch.full((self.B,), 2**62).scatter_reduce(
            0, self.batch, torch.where(self.answer, self.place, 2**62), "amin"
        )[self.batch]
        credited = self.f * self.credit
        for n in _NEAR:
            near = (self.place < first) & (self.place >= first - n)
            found[f"near_{n}"] = self.sum(credited * near) / self.sum(credited)
        top = torch.full((self.B,), -torch.inf, dtype=torch.float64).scatter_reduce(
            0, self.batch, self.log_reach.where(self.question, -torch.inf), "amax"
        )
        reach = torch.exp(self.log_reach - top[self.batch]).where(self.question & torch.isfinite(self.log_reach), 0)
        effective = self.sum(reach).square() / self.sum(reach.square())
        found["question_share"] = effective / self.sum(self.question)
        return found

    def _roles(self) -> dict[str, Tensor]:
        total = self.sum(self.f)
        roles = {"prompt": self.prompt, "response": self.response, "sink": self.answer}
        return {f"{name}_share": self.sum(self.f * mask) / total for name, mask in roles.items()}

    def _classes(self) -> dict[str, Tensor]:
        nothing = torch.full((self.B,), torch.nan, dtype=torch.float64)
        if self.text is None:
            return {f"{name}_{what}": nothing for name in CLASSES for what in ("share", "lift")}
        f, known = self.f * self.credit, self.sum(torch.tensor([bool(one) for one in self.text])) > 0
        total, n = self.sum(f), self.sum(self.credit)
        found = {}
        for name in CLASSES:
            mask = torch.tensor([one == name for one in self.text])
            share = (self.sum(f * mask) / total).where(known, torch.nan)
            found[f"{name}_share"], found[f"{name}_lift"] = share, share / (self.sum(self.credit & mask) / n)
        return found


def rows(found: Mapping[str, Tensor]) -> Iterable[dict[str, float]]:
    """What `measures` gave, as one dict per graph; for JSON, NaN is left out."""
    size = len(next(iter(found.values())))
    for number in range(size):
        row = {name: float(values[number]) for name, values in found.items()}
        yield {name: value for name, value in row.items() if value == value}
