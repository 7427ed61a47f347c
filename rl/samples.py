"""Samples: rollouts one by one, without pads, out of any layout that trainers have.

    padded left or right  [B, T] and an attention mask
    packed                [B, T] and position ids that restart at 0 with each document
    jagged                a list of [N_i], or a nested tensor of layout `torch.jagged`

Shapes: B rows, T their length with pads, S samples, N_i tokens of sample i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgraph.capture import documents_of, is_packed

Jagged = Sequence[Tensor]
Layout = Tensor | Jagged


@dataclass(frozen=True)
class Sample:
    """One rollout. All on the CPU, over its N tokens in time order.

    Attributes:
        token_ids: [N] int64.
        prompt_mask: [N] bool. response_mask: [N] bool, what the model wrote, with holes where tools spoke.
        tool_mask: [N] bool, response tokens that the model did not write after all: read, never credited.
        truncated: the response was cut off before its end.
        row, positions: the row of the caller's layout, and [N] the places in it.
    """

    token_ids: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    tool_mask: Tensor
    truncated: bool
    row: int
    positions: Tensor

    def __len__(self) -> int:
        """Number of tokens, N."""
        return len(self.token_ids)


def samples_of(
    token_ids: Layout,
    response_mask: Layout,
    *,
    attention_mask: Tensor | None = None,
    prompt_mask: Layout | None = None,
    tool_mask: Layout | None = None,
    position_ids: Tensor | None = None,
    truncated: Sequence[bool] | Tensor | None = None,
) -> list[Sample]:
    """Take a batch apart.

    Args:
        token_ids: [B, T], or jagged. Every mask has the same layout; bool, or 0 and 1.
        response_mask: the tokens that the model wrote.
        attention_mask: [B, T], 0 at pads; default: no pads. Jagged input has none.
        prompt_mask: default: the real tokens before the first one of the response.
        tool_mask: response tokens that a tool wrote. Holes in `response_mask` after its first token mean the same.
        position_ids: [B, T]; where they restart within a row, the next packed sample begins.
        truncated: [S] the response was cut off.

    Returns:
        S samples: one per row (per document, if packed), in order. A row of pads only is a sample without tokens.

    Raises:
        ValueError: names the argument and the sample.
    """
    ids = _rows("token_ids", token_ids, None)
    padded = isinstance(token_ids, Tensor) and not token_ids.is_nested
    if not padded and (attention_mask is not None or position_ids is not None):
        raise ValueError("jagged token_ids have no pads: attention_mask and position_ids don't go with them")
    response = _masks("response_mask", response_mask, ids)
    prompt = None if prompt_mask is None else _masks("prompt_mask", prompt_mask, ids)
    tool = None if tool_mask is None else _masks("tool_mask", tool_mask, ids)
    real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    if attention_mask is not None:
        real = _masks("attention_mask", attention_mask, ids)
    samples = []
    for row, positions in _places(real, position_ids, attention_mask):
        said = response[row][positions]
        before = said.cumsum(0) == 0 if prompt is None else prompt[row][positions]
        samples.append(
            Sample(
                token_ids=ids[row][positions],
                prompt_mask=before,
                response_mask=said,
                tool_mask=torch.zeros_like(said) if tool is None else tool[row][positions],
                truncated=False,
                row=row,
                positions=positions,
            )
        )
    if truncated is None:
        return samples
    if len(truncated) != len(samples):
        raise ValueError(f"truncated must have one entry per sample, {len(samples)}, got {len(truncated)}")
    return [_replace(one, bool(cut)) for one, cut in zip(samples, truncated, strict=True)]


def _replace(sample: Sample, truncated: bool) -> Sample:
    return Sample(**{**vars(sample), "truncated": truncated})


def _places(real: Jagged, position_ids: Tensor | None, attention_mask: Tensor | None) -> list[tuple[int, Tensor]]:
    """(row, [N] its positions) of every sample."""
    packed = False
    if position_ids is not None:
        shape = (len(real), len(real[0]) if len(real) else 0)
        if position_ids.shape != shape:
            raise ValueError(f"position_ids must be [B, T] = {list(shape)}, got {list(position_ids.shape)}")
        packed = is_packed(position_ids, attention_mask)
    if not packed:
        return [(row, mask.nonzero().flatten()) for row, mask in enumerate(real)]
    assert position_ids is not None
    places = []
    for row, documents in enumerate(documents_of(position_ids.cpu())):
        for document in documents[real[row]].unique_consecutive():
            places.append((row, (real[row] & (documents == document)).nonzero().flatten()))
    return places


def _rows(name: str, values: Any, ids: Jagged | None) -> list[Tensor]:
    """Rows on the CPU; with `ids`, as many and as long as these."""
    if isinstance(values, Tensor):
        rows = list(values.detach().cpu().unbind(0)) if values.ndim == 2 else []
        if values.ndim != 2:
            raise ValueError(f"{name} must be [B, T] or jagged, got {list(values.shape)}; one sample is {name}[None]")
    else:
        rows = [row.detach().cpu() if isinstance(row, Tensor) else torch.as_tensor(row) for row in values]
    if ids is not None and len(rows) != len(ids):
        raise ValueError(f"{name} has {len(rows)} rows, token_ids {len(ids)}")
    for number, row in enumerate(rows):
        if row.ndim != 1 or (ids is None and row.is_floating_point() and row.numel()):
            raise ValueError(
                f"{name}[{number}] must be a tensor [N] of whole numbers, got {list(row.shape)} {row.dtype}"
            )
        if ids is not None and row.shape != ids[number].shape:
            raise ValueError(f"{name}[{number}] has {len(row)} entries, token_ids[{number}] has {len(ids[number])}")
    return rows if ids is not None else [row.long() for row in rows]


def _masks(name: str, values: Any, ids: Jagged) -> list[Tensor]:
    rows = _rows(name, values, ids)
    for number, row in enumerate(rows):
        if row.dtype != torch.bool and not ((row == 0) | (row == 1)).all():
            raise ValueError(f"{name}[{number}] must be bool, or 0 and 1; got {row[(row != 0) & (row != 1)][0].item()}")
    return [row.bool() for row in rows]
