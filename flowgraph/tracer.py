"""Tracer: the one object for the whole way, from a model and a text to token credits.

    capture -> rows -> sparsify -> graph -> flow -> credit

Shapes: B rows of the caller's batch, T their length with pads, N tokens of one trace, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from flowgraph._version import __version__
from flowgraph.answers import Finder
from flowgraph.capture import Capture, Layers, capture, documents_of, is_packed
from flowgraph.credit import Credit, credit
from flowgraph.exact import exact_flow
from flowgraph.flow import Flow, trace_flow
from flowgraph.graph import TokenGraph
from flowgraph.spans import (
    Encoded,
    Spans,
    encode_messages,
    encode_text,
    locate,
    question_of_messages,
    token_offsets,
)
from flowgraph.sparsify import EdgeRule, sparsify

Messages = list[dict[str, Any]]

LONG = 2048
"""Traces of more tokens are traced in exact mode, unless the user says otherwise."""


@dataclass(frozen=True)
class Options:
    """What a `Tracer` does, and what a saved trace says about how it came about.

    Attributes:
        layers: "middle" (third of the softmax layers), "all", or layer numbers.
        preset: "flowgraph": the sinks are the positions that predict the answer; "paper": the answer tokens themselves.
        mode: "edges": attention becomes the edges of a graph, and the flow runs through these. "exact": the flow of the
            whole attention, streamed twice and never stored; the graph lists the edges that carry most of it. "auto":
            edges up to 2,048 tokens (all of them: nothing is lost) or if `edges` or `solver` is given, else exact.
        edges: the rule that chooses edges, by attention; in exact mode by the share of the flow that they carry. None:
            all edges up to 2,048 tokens, above that those over 1/1024; in exact mode the top 32 into each token.
        answer: how to find the answer: "auto", "boxed", "####", "A:", "<answer>", "answer is", a compiled regular
            expression (its group 1, if it has one), or a function from the response to a (start, stop) in it.
        question: "prompt": flow starts at every prompt token; "user": only at what the user wrote (chat messages).
        no_answer: "uniform": weights stay 1, flagged; "tail": the last `tail_tokens` tokens stand for the answer.
        solver, absorb_at_prompt: as in `trace_flow`. score, rule, top, gain, temperature: as in `credit`.
        max_tokens: longest trace; None takes the model's own window, `config.max_position_embeddings`.
    """

    layers: Layers = "middle"
    preset: str = "flowgraph"
    mode: str = "auto"
    edges: EdgeRule | None = None
    answer: Finder = "auto"
    question: str = "prompt"
    no_answer: str = "uniform"
    tail_tokens: int = 16
    solver: str = "auto"
    absorb_at_prompt: bool = False
    score: str = "throughput"
    rule: str = "top"
    top: float = 0.4
    gain: float = 1.5
    temperature: float = 1.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.question not in ("prompt", "user"):
            raise ValueError(f'question must be "prompt" or "user", got {self.question!r}')
        if self.mode not in ("auto", "edges", "exact"):
            raise ValueError(f'mode must be "auto", "edges" or "exact", got {self.mode!r}')
        if self.mode == "exact" and self.solver != "auto":
            raise ValueError(
                f'mode="exact" has a solver of its own, got solver={self.solver!r}; use mode="edges" for it'
            )
        if self.edges is not None and not hasattr(self.edges, "keep"):
            raise ValueError(f"edges must be Threshold, TopK, Mass or another rule with keep(), got {self.edges!r}")

    def exact(self, num_tokens: int) -> bool:
        """Is a trace of this length to be traced in exact mode?"""
        if self.mode == "auto":
            return num_tokens > LONG and self.edges is None and self.solver == "auto"
        return self.mode == "exact"


@dataclass(frozen=True)
class Trace:
    """One traced response: graph, flow, credit and text, all over the same N tokens.

    Attributes:
        graph: the `TokenGraph`. flow: the `Flow` through it. credit: the `Credit` of its tokens.
        spans: where question, response and answer are, and what was odd about finding them.
        text: the N tokens as pieces of text that join to the whole; None without a tokenizer.
        row, positions: where the tokens stood in the caller's batch: its row, and [N] the places in that row.
        options: what the tracer was told.
    """

    graph: TokenGraph
    flow: Flow
    credit: Credit
    spans: Spans
    text: list[str] | None
    row: int
    positions: Tensor
    options: Options = field(repr=False)

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
            "credited": int((self.weights != 1).sum()),
            "injected": float(self.flow.injected),
            "absorbed": float(self.flow.absorbed),
            "iterations": int(self.flow.iterations),
            "prompt_share": float(flow[graph.prompt_mask].sum()) / total,
            "first_token_share": float(flow[0]) / total,
            "dropped_per_row": float(graph.dropped.double().mean()),
        }

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
            "score": self.options.score,
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

    def to_html(self, path: str | Path, title: str = "FlowGraph") -> Path:
        """Write the trace as one self-contained HTML page."""
        from flowgraph.page import write

        return write(path, [self.to_dict()], title=title)

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


class Tracer:
    """Traces responses with one model.

    Args:
        model: any causal language model of transformers that uses the attention interface; it is left as it was.
        tokenizer: its tokenizer; needed for text, chat messages and finding answers, not for `from_ids` with masks.
        options: the fields of `Options`, by name.

    Example:
        >>> trace = Tracer(model, tokenizer)("What is 6 times 7?", "6 times 7 is 42.\\nA: 42")
        >>> trace.response_weights
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, **options: Any) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, Options(**options)

    def __call__(self, prompt: str | Messages, response: str | None = None, *, truncated: bool = False) -> Trace:
        """Trace one response.

        Args:
            prompt: text, taken as it is; or chat messages, laid out by the tokenizer's chat template.
            response: what the model answered. Leave it out if the last message is the assistant's.
            truncated: the response was cut off before its end.
        """
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: Tracer(model, tokenizer); or pass ids and masks to from_ids")
        question_mask = None
        if isinstance(prompt, str):
            if response is None:
                raise ValueError("response is missing; a prompt in text form comes with the response to it")
            if self.options.question == "user":
                raise ValueError('question="user" needs chat messages as prompt, got a text')
            encoded = encode_text(self.tokenizer, prompt, response)
        else:
            messages = list(prompt)
            if response is not None:
                messages.append({"role": "assistant", "content": response})
            encoded = encode_messages(self.tokenizer, messages)
            if self.options.question == "user":
                question_mask = question_of_messages(self.tokenizer, messages, encoded)
        return self._from_encoded(encoded, question_mask, truncated)

    def _from_encoded(self, encoded: Encoded, question_mask: Tensor | None, truncated: bool) -> Trace:
        return self.from_ids(
            encoded.token_ids[None],
            prompt_mask=encoded.prompt_mask[None],
            response_mask=encoded.response_mask[None],
            question_mask=None if question_mask is None else question_mask[None],
            truncated=[truncated],
        )[0]

    def from_ids(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        *,
        response_mask: Tensor | None = None,
        question_mask: Tensor | None = None,
        answer_tokens: Tensor | None = None,
        sink_mask: Tensor | None = None,
        tool_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        truncated: Sequence[bool] | None = None,
    ) -> Traces:
        """Trace a batch of token ids: padded left or right, or packed.

        Args:
            input_ids: [B, T]. All masks are [B, T] bool (`attention_mask` may be 0 and 1).
            attention_mask: 0 at pads; default: no pads.
            prompt_mask: the prompt. Required.
            response_mask: what the model wrote; default: every real token outside the prompt.
            question_mask: the sources of flow; default: the prompt.
            answer_tokens: the answer; default: it is searched for in the text (needs a tokenizer).
            sink_mask: the sinks themselves, taken as they are, in place of an answer.
            tool_mask: tool output inside the response: part of the trace, never credited.
            position_ids: where they restart at 0 within a row, a new packed document begins: one trace each.
            truncated: [B] the response was cut off before its end.

        Returns:
            One `Trace` per row (per document, if packed), and the weights in the layout of `input_ids`.

        Raises:
            ValueError: names the argument and the row.
        """
        shape = _check_batch(input_ids, attention_mask, prompt_mask, position_ids, truncated)
        real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        given = {
            "prompt_mask": prompt_mask,
            "response_mask": response_mask,
            "question_mask": question_mask,
            "answer_tokens": answer_tokens,
            "sink_mask": sink_mask,
            "tool_mask": tool_mask,
        }
        masks = {name: _check_mask(name, mask, shape) for name, mask in given.items() if mask is not None}
        options = self.options
        spans: list[Spans] = []
        rows: list[int] = []
        places: list[Tensor] = []
        for row, positions in _documents(real, position_ids, attention_mask):
            try:
                self._check_window(len(positions))
                found = locate(
                    input_ids[row, positions.to(input_ids.device)].cpu(),
                    **{name: mask[row, positions] for name, mask in masks.items()},
                    tokenizer=self.tokenizer,
                    answer=options.answer,
                    preset=options.preset,
                    truncated=bool(truncated[row]) if truncated is not None else False,
                    no_answer=options.no_answer,
                    tail_tokens=options.tail_tokens,
                )
            except ValueError as error:
                where = f"row {row}" if shape[0] > 1 else "the trace"
                raise ValueError(f"{where}: {error}") from error
            spans.append(found)
            rows.append(row)
            places.append(positions)
        captured = capture(self.model, input_ids, attention_mask, position_ids, layers=options.layers)
        flows = self._flows(captured, input_ids, rows, places, spans)
        flow = Flow.of_batch(flows)
        how = {name: getattr(options, name) for name in ("rule", "top", "gain", "temperature")}
        credits = credit(flow, options.score, **how)
        traces = []
        for n, (one, credited) in enumerate(zip(flows, credits, strict=True)):
            text = self._pieces(one.graph.token_ids)
            traces.append(Trace(one.graph, one, credited, spans[n], text, rows[n], places[n], options))
        return Traces(traces, flow, credits, shape)

    def _flows(
        self, captured: Capture, input_ids: Tensor, rows: list[int], places: list[Tensor], spans: list[Spans]
    ) -> list[Flow]:
        """The flow through each trace, in the mode that fits it; those by edges are solved together."""
        options = self.options
        graphs: dict[int, TokenGraph] = {}
        flows: dict[int, Flow] = {}
        for n, (row, positions, found) in enumerate(zip(rows, places, spans, strict=True)):
            attention = captured.rows(row, positions)
            roles: dict[str, Any] = {name: getattr(found, name).to(captured.device) for name in _ROLES}
            roles["token_ids"] = input_ids[row, positions.to(input_ids.device)].to(captured.device)
            roles |= {"model": captured.model, "layers": captured.layers}
            if options.exact(len(positions)):
                absorb = options.absorb_at_prompt
                flows[n] = exact_flow(attention, absorb_at_prompt=absorb, edges=options.edges, **roles)
            else:
                graphs[n] = TokenGraph.from_sparse(sparsify(attention, options.edges), **roles)
        if graphs:
            batch = Batch.from_data_list(list(graphs.values()))
            together = trace_flow(batch, options.solver, absorb_at_prompt=options.absorb_at_prompt)
            flows |= dict(zip(graphs, together, strict=True))
        return [flows[n] for n in range(len(rows))]

    def _check_window(self, num_tokens: int) -> None:
        window = self.options.max_tokens
        if window is None:
            config = self.model.config
            config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore
            window = getattr(config, "max_position_embeddings", None)
        if window is not None and num_tokens > window:
            raise ValueError(
                f"input_ids has {num_tokens} tokens, more than the {window} that the model can see; shorten the trace, "
                f"or pass max_tokens={num_tokens} if you know that the model can go that far"
            )

    def _pieces(self, token_ids: Tensor) -> list[str] | None:
        """The tokens as text. Of a character that is spread over several tokens, the first one gets it."""
        if self.tokenizer is None:
            return None
        text, offsets = token_offsets(self.tokenizer, token_ids.tolist())
        pieces, done = [], 0
        for start, stop in offsets:
            pieces.append(text[max(start, done) : stop])
            done = max(done, stop)
        return pieces


_ROLES = ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask")


def options_dict(options: Options) -> dict[str, Any]:
    """Options as text and numbers, for files."""
    values = {name.name: getattr(options, name.name) for name in fields(options)}
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in values.items()}


def _check_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_mask: Tensor | None,
    position_ids: Tensor | None,
    truncated: Sequence[bool] | None,
) -> tuple[int, int]:
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.ndim != 2
        or input_ids.is_floating_point()
        or not input_ids.numel()
    ):
        came = (
            f"{list(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(
            f"input_ids must be a tensor of whole numbers [B, T], got {came}; one trace is input_ids[None]"
        )
    shape = (input_ids.shape[0], input_ids.shape[1])
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be [B, T] = {list(shape)} like input_ids, got {list(given.shape)}")
    if prompt_mask is None:
        raise ValueError("prompt_mask is missing: [B, T] bool, True at the tokens of the prompt, where flow starts")
    if truncated is not None and len(truncated) != shape[0]:
        raise ValueError(f"truncated must have one entry per row, {shape[0]}, got {len(truncated)}")
    return shape


def _check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != shape or mask.dtype != torch.bool:
        came = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a bool tensor [B, T] = {list(shape)} like input_ids, got {came}")
    return mask.cpu()


def _documents(
    real: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """(row, [N] positions of its tokens) for each trace of a batch: pads are never nodes."""
    packed = position_ids is not None and is_packed(position_ids, attention_mask)
    documents = documents_of(position_ids.cpu()) if packed and position_ids is not None else torch.zeros(real.shape)
    for row in range(len(real)):
        if not real[row].any():
            raise ValueError(f"row {row} of attention_mask is all zeros: there is nothing to trace")
        for document in documents[row][real[row]].unique_consecutive():
            yield row, (real[row] & (documents[row] == document)).nonzero().flatten()


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
