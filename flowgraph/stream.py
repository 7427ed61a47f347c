"""Attention rows of a long trace out of a model that runs while they are read, chunk by chunk.

`capture` keeps the queries and keys of a whole trace; a stream keeps the keys alone, in the model's own cache, and the
queries of one chunk. That is all that rows in ascending order need: `sparsify` reads them so, and so does any other
reader that asks for them once, first rows first.

Shapes: N tokens of the trace, n tokens of a chunk, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowgraph.capture import Capture, Layers, choose_layers, name_of
from flowgraph.chunks import Store, check_chunk, passes
from flowgraph.interface import Recorder, device_of, model_inputs, softmax_layers_of, unwrap
from flowgraph.rows import RowBlock, check_kind, choose_backend


class StreamedRows:
    """The rows that `stream` gives: readable once, first rows first.

    Attributes:
        model: name of the model. layers: the numbers of the chosen layers, ascending. num_tokens: N.
        device: where the model takes its tokens. dtype: of the rows, float32 or float64.
        backend: what computes them, "torch" or "triton".
    """

    once = True
    """Says to `sparse_graph` in which order to read."""

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        layers: list[int],
        chunk: int,
        weights: str,
        offload: bool,
        block: int | None,
        backend: str,
    ) -> None:
        self.model, self.layers = name_of(model), layers
        self.num_tokens = inputs["input_ids"].shape[1]
        self.device = inputs["input_ids"].device
        self.dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self._model, self._inputs = model, inputs
        self._chunk, self._weights, self._offload, self._block = chunk, weights, offload, block
        self.backend = choose_backend(backend, self.device, self.dtype)
        self._read = False

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        """Run the model from chunk to chunk, and give the rows of each before the next one runs.

        Between two blocks the model is free for anything else, and may be left there: a reader that stops early saves
        the rest of the pass.

        Raises:
            ValueError: last rows first, or a second time; both need the queries of all chunks, which `capture` keeps.
        """
        if last_first or self._read:
            what = "its last rows first" if last_first else "a second time"
            raise ValueError(
                f"a stream drops the queries of every chunk and cannot be read {what}: use capture(model, input_ids, "
                "chunk=...).rows(...), which keeps them"
            )
        self._read = True
        return self._blocks()

    def _blocks(self) -> Iterator[RowBlock]:
        recorder = Recorder(frozenset(self.layers), self.layers[-1], values=self._weights == "value_norm")
        store = Store(self.num_tokens, queries=False, offload=self._offload)
        for chunk in passes(self._model, recorder, self._inputs, self._chunk, self._offload):
            kept = store.join(chunk)
            queries = Capture(self.model, self.layers, [kept[layer] for layer in self.layers], _place=store.device)
            places = torch.arange(chunk.stop)
            rows = queries.rows(0, places, self._block, weights=self._weights, backend=self.backend)
            for start, weight in rows.blocks():
                yield RowBlock(start, weight.to(self.device))
            del kept, queries, rows  # or the next chunk would keep the keys twice


def stream(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    *,
    layers: Layers = "middle",
    chunk: int = 1024,
    weights: str = "attention",
    offload: bool = False,
    block: int | None = None,
    backend: str = "auto",
) -> StreamedRows:
    """The attention of one trace as rows that are read once, while the model runs up to its deepest chosen layer.

        edges = sparsify(stream(model, input_ids), Threshold(1 / 1024))

    The rows are those of `capture(...).rows(...)`, to rounding; no more than one chunk of queries is ever held. The
    passes run without gradients and in evaluation mode, each when the rows of its chunk are asked for.

    Args:
        model: what `capture` takes.
        input_ids: [1, N] int64, no pads.
        position_ids: [1, N], one after the other; default: 0 .. N - 1.
        layers: as in `capture`.
        chunk: n, tokens per pass.
        weights: "attention" or "value_norm", as `flowgraph.rows.AttentionRows` has them.
        offload: let the cache wait in CPU memory; each layer comes to the model while it is used.
        block: rows per block, in blocks that end with their chunk; default: as many as `flowgraph.rows` sees fit.
        backend: "auto", "torch" or "triton", as `flowgraph.rows.AttentionRows` has them.

    Raises:
        ValueError: `input_ids` are not one trace, `position_ids` don't go up by one, `chunk` or `weights` make no
            sense; or what `capture` refuses.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must be one trace [1, N], got {list(input_ids.shape)}; read traces one by one")
    check_kind(weights)
    model = unwrap(model)
    input_ids = input_ids.to(device_of(model))
    chosen = choose_layers(softmax_layers_of(model, input_ids), layers)
    inputs = model_inputs(input_ids, None, position_ids)
    check_chunk(chunk, inputs)
    return StreamedRows(model, inputs, chosen, chunk, weights, offload, block, backend)
