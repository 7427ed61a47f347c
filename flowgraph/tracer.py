"""Tracer: the one object for the whole way, from a model and a text to token credits.

    capture -> rows -> sparsify -> graph -> flow -> credit

Shapes: B rows of the caller's batch, T their length with pads, N tokens of one trace, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from flowgraph.capture import (
    Capture,
    capture,
    choose_layers,
    documents_of,
    is_packed,
    softmax_layers_of,
    warn_of_neighbours,
)
from flowgraph.certificate import Witnesses
from flowgraph.chunks import refusal
from flowgraph.credit import credit
from flowgraph.exact import exact_flow
from flowgraph.flow import Flow, trace_flow
from flowgraph.graph import TokenGraph
from flowgraph.interface import window_of
from flowgraph.memory import plan_batch, release_at_once
from flowgraph.options import Options
from flowgraph.rows import BlockedRows, KeptRows, Rows
from flowgraph.spans import (
    Encoded,
    Spans,
    conversation,
    encode_messages,
    encode_text,
    locate,
    question_of_messages,
    token_offsets,
)
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import sparsify
from flowgraph.stream import stream
from flowgraph.trace import Trace, Traces

Messages = list[dict[str, Any]]


class Tracer:
    """Traces responses with one model.

    Args:
        model: any causal language model of transformers that uses the attention interface; it is left as it was.
        tokenizer: its tokenizer; needed for text, chat messages and finding answers, not for `from_ids` with masks.
        options: the fields of `Options`, by name.

    While a trace runs, its model (and any that shares its configuration) is not free: another thread that uses it gets
    a RuntimeError. Give each thread a copy of the model, or put a lock around every use of it.

    Example:
        >>> question = [{"role": "user", "content": "What is 6 times 7?"}]
        >>> trace = Tracer(model, tokenizer)(question, "6 times 7 is 42.\\nA: 42")
        >>> trace.response_weights
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, **options: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must be a model of transformers, got {type(model).__name__}; load it first: "
                "AutoModelForCausalLM.from_pretrained(..)"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, Options(**options)

    def __call__(
        self,
        prompt: str | Messages,
        response: str | Messages | None = None,
        *,
        truncated: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Trace one response.

        Args:
            prompt: chat messages, laid out by the tokenizer's chat template; earlier answers of the assistant among
                them (examples, a history) are part of the prompt. Or text, taken as it is: all of what the model saw.
            response: what the model answered, and the only thing that gets credit: text, or the messages of an agent's
                rollout, of which it said those of the assistant. Leave it out if the prompt's messages hold it: then
                every assistant message is response.
            truncated: the response was cut off before its end.
            template_options: further arguments of the chat template, such as {"enable_thinking": False, "tools": [..]}.
        """
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: Tracer(model, tokenizer); or pass ids and masks to from_ids")
        question_mask = None
        if isinstance(prompt, str):
            if response is None:
                raise ValueError("response is missing; a prompt in text form comes with the response to it")
            if not isinstance(response, str):
                raise ValueError("response must be text where the prompt is, got messages; give both as messages")
            if self.options.question == "user":
                raise ValueError('question="user" needs chat messages as prompt, got a text')
            if template_options:
                raise ValueError("template_options are for chat messages; a text is taken as it is")
            encoded = encode_text(self.tokenizer, prompt, response)
        else:
            messages, first = conversation(prompt, response)
            encoded = encode_messages(self.tokenizer, messages, first, template_options)
            if self.options.question == "user":
                question_mask = question_of_messages(self.tokenizer, messages, encoded, first, template_options)
        return self._from_encoded(encoded, question_mask, truncated)

    def _from_encoded(self, encoded: Encoded, question_mask: Tensor | None, truncated: bool) -> Trace:
        return self.from_ids(
            encoded.token_ids[None],
            prompt_mask=encoded.prompt_mask[None],
            response_mask=encoded.response_mask[None],
            question_mask=None if question_mask is None else question_mask[None],
            truncated=[truncated],
        )[0]

    @torch.inference_mode(False)  # or its weights could never go into a loss
    @torch.no_grad()
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
        captured: Capture | None = None,
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
            truncated: [B] the row was cut off before its end, and so the response of its last document.
            captured: what `recording` gave of a pass over this very batch; the model doesn't run then.

        Returns:
            One `Trace` per row (per document, if packed), and the weights in the layout of `input_ids`.

        Raises:
            ValueError: names the argument and the row.
        """
        shape = _check_batch(input_ids, attention_mask, prompt_mask, position_ids, truncated)
        if self.options.question == "user" and question_mask is None:
            raise ValueError('question="user" needs question_mask here: ids do not say what the user wrote')
        if captured is not None:
            self._check_capture(captured, shape)
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
        documents = list(_documents(real, position_ids, attention_mask))
        last_of = {row: n for n, (row, _) in enumerate(documents)}
        for n, (row, positions) in enumerate(documents):
            try:
                self._check_window(len(positions))
                found = locate(
                    input_ids[row, positions.to(input_ids.device)].cpu(),
                    **{name: mask[row, positions] for name, mask in masks.items()},
                    tokenizer=self.tokenizer,
                    answer=options.answer,
                    preset=options.preset,
                    truncated=truncated is not None and bool(truncated[row]) and n == last_of[row],
                    no_answer=options.no_answer,
                    tail_tokens=options.tail_tokens,
                )
            except ValueError as error:
                where = f"row {row}" if shape[0] > 1 else "the trace"
                raise ValueError(f"{where}: {error}") from error
            spans.append(found)
            rows.append(row)
            places.append(positions)
        lengths = [len(positions) for positions in places]
        at_once = position_ids is not None and is_packed(position_ids, attention_mask)
        if at_once and captured is not None:
            warn_of_neighbours(self.model)
        if captured is None and options.chunk == "auto" and (options.memory or any(map(options.chunk_of, lengths))):
            at_once = at_once or refusal(self.model) is not None
        if options.memory is not None:
            planned = plan_batch(self.model, lengths, shape, options, packed=at_once, captured=captured is not None)
            release_at_once()
            options = planned.options
        # Whether a trace is streamed is its own affair: its credits must not depend on what else is in the batch.
        chunks = [None if at_once and options.chunk == "auto" else options.chunk_of(length) for length in lengths]
        streams = [
            captured is None and chunk is not None and _can_stream(options, position_ids, row, positions)
            for chunk, row, positions in zip(chunks, rows, places, strict=True)
        ]
        whole = sorted({row for row, streamed in zip(rows, streams, strict=True) if not streamed})
        if captured is None and whole:
            captured = capture(
                self.model,
                input_ids[whole],
                None if attention_mask is None else attention_mask[whole],
                None if position_ids is None else position_ids[whole],
                layers=options.layers,
                values=options.weights == "value_norm",
                chunk=max((c for c, streamed in zip(chunks, streams, strict=True) if c and not streamed), default=None),
                offload=options.offload,
            )
        else:
            whole = list(range(shape[0]))
        attention = (
            _captured_rows(captured, whole.index(row), positions, options)
            if captured is not None and not streamed
            else self._stream(options, input_ids, position_ids, row, positions)
            for streamed, row, positions in zip(streams, rows, places, strict=True)
        )
        flows, witnesses = _flows(options, attention, input_ids, rows, places, spans)
        flow = Flow.of_batch(flows)
        how = {name: getattr(options, name) for name in ("rule", "top", "gain", "temperature")}
        credits = credit(flow, options.score_name, **how)
        traces = []
        for n, (one, credited) in enumerate(zip(flows, credits, strict=True)):
            text = self.pieces(one.graph.token_ids)
            kept = captured if options.keep_attention else None
            seen = witnesses[n]
            traces.append(Trace(one.graph, one, credited, spans[n], text, rows[n], places[n], options, kept, seen))
        return Traces(traces, flow, credits, shape)

    def _stream(
        self, options: Options, input_ids: Tensor, position_ids: Tensor | None, row: int, positions: Tensor
    ) -> _Attention:
        """The rows of a trace out of a forward pass of its own, which runs while they are read."""
        chunk = options.chunk_of(len(positions))
        assert chunk is not None
        rows = stream(
            self.model,
            input_ids[row, positions.to(input_ids.device)][None],
            None if position_ids is None else position_ids[row, positions.to(position_ids.device)][None],
            layers=options.layers,
            chunk=chunk,
            weights=options.weights,
            offload=options.offload,
            backend=options.rows_backend,
        )
        return _Attention(rows, rows.device, rows.model, rows.layers)

    def _check_capture(self, captured: Capture, shape: tuple[int, int]) -> None:
        if captured.shape != shape:
            raise ValueError(
                f"captured is of a pass over [B, T] = {list(captured.shape)}, input_ids is {list(shape)}: pass the "
                "batch that the model saw, pads included"
            )
        layers = choose_layers(softmax_layers_of(self.model, torch.zeros(1, 4).long()), self.options.layers)
        if captured.layers != layers:
            raise ValueError(
                f"captured holds layers {captured.layers}, layers={self.options.layers!r} of this tracer are {layers}: "
                "give recording the same layers"
            )

    def _check_window(self, num_tokens: int) -> None:
        window = self.options.max_tokens
        if window is None:
            window = window_of(self.model)
        if window is not None and num_tokens > window:
            raise ValueError(
                f"input_ids has {num_tokens} tokens, more than the {window} that the model can see; shorten the trace, "
                f"or pass max_tokens={num_tokens} if you know that the model can go that far"
            )

    def pieces(self, token_ids: Tensor) -> list[str] | None:
        """The tokens as text. Of a character that is spread over several tokens, the first one gets it."""
        if self.tokenizer is None:
            return None
        text, offsets = token_offsets(self.tokenizer, token_ids.tolist())
        pieces, done = [], 0
        for start, stop in offsets:
            pieces.append(text[max(start, done) : stop])
            done = max(done, stop)
        return pieces


class _Attention(NamedTuple):
    """The rows of one trace, and where they come from."""

    rows: Rows
    device: torch.device
    model: str
    layers: list[int]


def _captured_rows(captured: Capture, row: int, positions: Tensor, options: Options) -> _Attention:
    rows = captured.rows(row, positions, weights=options.weights, backend=options.rows_backend)
    return _Attention(rows, captured.device, captured.model, captured.layers)


def _can_stream(options: Options, position_ids: Tensor | None, row: int, positions: Tensor) -> bool:
    """Is one reading of the rows, from the first to the last, all that such a trace needs?

    With gaps (pads between prompt and response) it isn't: a stream drops the pads, and sliding windows count them; in
    its position ids they read as a new document.
    """
    if options.mode_of(len(positions)) == "exact" or options.keep_attention or bool((positions.diff() != 1).any()):
        return False
    return position_ids is None or bool((position_ids[row, positions.to(position_ids.device)].diff() == 1).all())


def _flows(
    options: Options,
    attention: Iterator[_Attention],
    input_ids: Tensor,
    rows: list[int],
    places: list[Tensor],
    spans: list[Spans],
) -> tuple[list[Flow], list[Witnesses | None]]:
    """The flow through each trace, in the mode that fits it; those over graphs are solved together."""
    graphs: dict[int, TokenGraph] = {}
    flows: dict[int, Flow] = {}
    witnesses: list[Witnesses | None] = [None] * len(rows)
    for n, (one, row, positions, found) in enumerate(zip(attention, rows, places, spans, strict=True)):
        roles: dict[str, Any] = {name: getattr(found, name).to(one.device) for name in _ROLES}
        roles["token_ids"] = input_ids[row, positions.to(input_ids.device)].to(one.device, torch.int64)
        roles |= {"model": one.model, "layers": one.layers}
        mode, absorb = options.mode_of(len(positions)), options.absorb_at_prompt
        if mode == "exact":
            # Two sweeps: what fits into memory of a constant size is computed once. (A stream is never read twice.)
            rows_twice = KeptRows(one.rows) if isinstance(one.rows, BlockedRows) else one.rows
            flows[n] = exact_flow(rows_twice, absorb_at_prompt=absorb, edges=options.edges, **roles)
        elif mode == "sparse":
            if options.witnesses:
                witnesses[n] = Witnesses.up_to_the_answer(roles["answer_mask"], options.witnesses)
            graphs[n] = sparse_graph(
                one.rows, absorb_at_prompt=absorb, edges=options.edges, witnesses=witnesses[n], **roles
            )
        else:
            graphs[n] = TokenGraph.from_sparse(sparsify(one.rows, options.edges), **roles)
    if graphs:
        batch = Batch.from_data_list(list(graphs.values()))
        together = trace_flow(batch, options.solver, options.solve_backend, absorb_at_prompt=options.absorb_at_prompt)
        flows |= dict(zip(graphs, together, strict=True))
    return [flows[n] for n in range(len(rows))], witnesses


_ROLES = ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask")


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
        if given is not None and (not isinstance(given, Tensor) or given.shape != shape):
            came = str(list(given.shape)) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name} must be a tensor [B, T] = {list(shape)} like input_ids, got {came}")
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
