"""Trace: one traced response, with graph, flow, credit and text over the same tokens; Traces: those of a batch.

Shapes: B rows of the caller's batch, T their length with pads, N tokens of one trace, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from flowgraph._version import __version__
from flowgraph.capture import Capture
from flowgraph.certificate import Certificate, Witnesses, certify
from flowgraph.coarse import contract
from flowgraph.credit import Credit
from flowgraph.flow import Flow
from flowgraph.graph import TokenGraph
from flowgraph.options import Options
from flowgraph.page import write
from flowgraph.report import report
from flowgraph.rows import AttentionRows
from flowgraph.segments import Segments, Splitter, split
from flowgraph.spans import Spans


@dataclass(frozen=True, eq=False)
class Trace:
    """One traced response: graph, flow, credit and text, all over the same N tokens.

    Attributes:
        graph: the `TokenGraph`. flow: the `Flow` through it. credit: the `Credit` of its tokens.
        spans: where question, response and answer are, and what was odd about finding them.
        text: the N tokens as pieces of text that join to the whole; None without a tokenizer.
        row, positions: where the tokens stood in the caller's batch: its row, and [N] the places in that row.
        options: what the tracer was told.
        captured: the queries and keys that the trace came from, with `keep_attention=True`; else None.
        witnesses: in sparse mode, rows and columns of the attention kept for the certificate; else None.
    """

    graph: TokenGraph
    flow: Flow
    credit: Credit
    spans: Spans
    text: list[str] | None
    row: int
    positions: Tensor
    options: Options = field(repr=False)
    captured: Capture | None = field(default=None, repr=False)
    witnesses: Witnesses | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Number of tokens, N."""
        return int(self.graph.num_nodes)

    @property
    def weights(self) -> Tensor:
        """[N] the credit: what to multiply each token's loss with."""
        return self.credit.weights

    @property
    def response_weights(self) -> Tensor:
        """[response tokens] the credit of the response alone, in its order."""
        return self.weights[self.graph.response_mask]

    @property
    def throughput(self) -> Tensor:
        """[N] inflow + outflow of each token."""
        return self.flow.throughput

    @property
    def reach(self) -> Tensor:
        """[N] influence of each token on the answer."""
        return self.flow.reach

    @property
    def answer(self) -> str | None:
        """The answer that was found, as text."""
        return self.spans.answer_text

    @property
    def flags(self) -> tuple[str, ...]:
        """Everything odd: "no_answer", "cut_off", "several_answers", "tail_answer", "no_flow"."""
        return tuple(dict.fromkeys((*self.spans.flags, *self.credit.flags[0])))

    @cached_property
    def certificate(self) -> Certificate:
        """How exact the flow is: mass per row, bounds and estimates. Worked out when it is asked for."""
        return certify(self.flow, self.witnesses, absorb_at_prompt=self.options.absorb_at_prompt)

    def top(self, k: int = 10) -> list[tuple[int, str, float]]:
        """The `k` tokens of the response with the highest score: (position in the trace, text, score)."""
        scores = self.credit.scores.masked_fill(~self.credit.mask, -1)
        order = torch.sort(scores, descending=True, stable=True).indices[: min(k, int(self.credit.mask.sum()))]
        return [(i, self.text[i] if self.text else "", float(scores[i])) for i in order.tolist()]

    def summary(self) -> dict[str, float | int]:
        """What a trace is in numbers. Shares are of the flow that passes through all tokens together."""
        graph, flow = self.graph, self.flow.flow.double()
        total = max(float(flow.sum()), 1e-300)
        return {
            "tokens": len(self),
            "prompt_tokens": int(graph.prompt_mask.sum()),
            "response_tokens": int(graph.response_mask.sum()),
            "edges": int(graph.edge_weight.numel()),
            "sinks": int(graph.answer_mask.sum()),
            "credited": int(self.credit.credited.sum()),
            "injected": float(self.flow.injected),
            "absorbed": float(self.flow.absorbed),
            "iterations": int(self.flow.iterations),
            "prompt_share": float(flow[graph.prompt_mask].sum()) / total,
            "first_token_share": float(flow[0]) / total,
            "dropped_per_row": float(graph.dropped.double().mean()),
            "modelled_per_row": float(graph.modelled.double().mean()),
        }

    def segments(self, by: str | Splitter = "sentences") -> Segments:
        """The trace as words, lines, sentences, steps, turns, or what your own function makes of its text.

        Raises:
            ValueError: there is no text (the tracer has no tokenizer), or as in `split`.
        """
        if self.text is None:
            raise ValueError("the trace has no text to divide: give the Tracer a tokenizer, or make Segments yourself")
        graph = self.graph
        masks = {"prompt_mask": graph.prompt_mask, "response_mask": graph.response_mask}
        return split(self.text, by, sink_mask=graph.answer_mask, **masks)

    def rows(self) -> AttentionRows:
        """The attention of the trace once more, as a stream of row blocks.

        Raises:
            ValueError: its queries and keys were not kept.
        """
        if self.captured is None:
            raise ValueError("the attention of this trace is gone; trace it with keep_attention=True to read it again")
        how = self.options
        return self.captured.rows(self.row, self.positions, weights=how.weights, backend=how.rows_backend)

    def contract(self, by: str | Splitter | Segments = "sentences") -> Flow:
        """The flow between segments; see `flowgraph.contract`. In exact mode from the attention, if it was kept."""
        segments = by if isinstance(by, Segments) else self.segments(by)
        # By edges the flow ran through the listed ones alone, which may be a part of the attention.
        rows = None if self.captured is None or self.flow.solver != "exact" else self.rows()
        return contract(self.flow, segments, rows, absorb_at_prompt=self.options.absorb_at_prompt)

    def to_dict(self, edges_per_token: int = 5) -> dict[str, Any]:
        """The trace as plain lists and numbers, for JSON and for the page.

        Args:
            edges_per_token: of the edges, each token's strongest so many in and out by flow; `edges.share` says which
                part of all edge flow they carry.
        """
        graph, spans = self.graph, self.spans
        answer = spans.answer_tokens.nonzero().flatten().tolist()
        role = np.select(
            [spans.answer_tokens.numpy(), graph.prompt_mask.cpu().numpy(), graph.response_mask.cpu().numpy()],
            ["answer", "prompt", "response"],
            "other",
        )
        text = self.text or [""] * len(self)
        found = {"text": spans.answer_text or "", "finder": spans.finder or "mask"}
        return {
            "version": __version__,
            "model": graph.model,
            "layers": graph.layers,
            "rule": graph.rule,
            "preset": self.options.preset,
            "solver": self.flow.solver,
            "score": self.options.score_name,
            "flags": list(self.flags),
            "answer": found | {"start": answer[0], "stop": answer[-1] + 1} if answer else None,
            "tokens": {
                "text": text,
                "id": graph.token_ids.tolist(),
                "role": role.tolist(),
                "source": graph.question_mask.tolist(),
                "sink": graph.answer_mask.tolist(),
                "credited": graph.credit_mask.tolist(),
                "reach": self.reach.tolist(),
                "throughput": self.throughput.tolist(),
                "weight": self.weights.tolist(),
            },
            "edges": _strongest_edges(self.flow, edges_per_token),
            "summary": self.summary(),
        }

    def report(self, by: str | Splitter | Segments | None = "sentences", **how: Any) -> dict[str, Any]:
        """`to_dict` with the sentence graph, backbone, checkpoints and measures; see `flowgraph.report`."""
        return report(self, by, **how)

    def to_html(
        self, path: str | Path, title: str = "FlowGraph", by: str | Splitter | Segments | None = "sentences"
    ) -> Path:
        """Write the report as one self-contained HTML page. (Several traces on a page: `flowgraph.page.write`.)"""
        return write(
            path, [self.report(by if self.text is not None or isinstance(by, Segments) else None)], title=title
        )

    def __repr__(self) -> str:
        facts = self.summary()
        answer = f"answer {self.answer!r}" if self.answer is not None else f"{facts['sinks']} sinks"
        flags = f", flags: {', '.join(self.flags)}" if self.flags else ""
        return (
            f"Trace({facts['prompt_tokens']} prompt + {facts['response_tokens']} response tokens, "
            f"{facts['edges']} edges, {answer}, {facts['credited']} tokens credited{flags})"
        )


class Traces(Sequence[Trace]):
    """The traces of a batch, in the order of its rows (and documents within a row).

    Attributes:
        batch: all graphs as one PyG batch. flow: the `Flow` through it. credit: the `Credit` of all its tokens.
        weights: [B, T] credits in the caller's own layout; 1 at pads and prompts.
    """

    def __init__(self, traces: list[Trace], flow: Flow, credit: Credit, shape: tuple[int, int]) -> None:
        self._traces, self.batch, self.flow, self.credit = traces, flow.graph, flow, credit
        self.weights = credit.to_layout([t.row for t in traces], [t.positions for t in traces], shape)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        return self._traces[index]

    def __len__(self) -> int:
        return len(self._traces)

    def __iter__(self) -> Iterator[Trace]:
        return iter(self._traces)

    def __repr__(self) -> str:
        return f"Traces({len(self)} traces, weights {list(self.weights.shape)})"


def _strongest_edges(flow: Flow, per_token: int) -> dict[str, Any]:
    source, target = flow.graph.edge_index.cpu().numpy()
    carried = flow.edge_flow.cpu().double().numpy()
    chosen = np.zeros(len(carried), dtype=bool)
    for end in (source, target):
        order = np.lexsort((-carried, end))
        begins = np.searchsorted(end[order], end[order])
        chosen[order[np.arange(len(order)) - begins < per_token]] = True
    chosen &= carried > 0
    return {
        "source": source[chosen].tolist(),
        "target": target[chosen].tolist(),
        "weight": flow.graph.edge_weight.cpu().numpy()[chosen].tolist(),
        "flow": carried[chosen].tolist(),
        "share": float(carried[chosen].sum() / max(carried.sum(), 1e-300)),
    }
