"""Every layout of a batch is taken apart into the same samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.rl import samples_of

LENGTHS = ((3, 4), (1, 2), (5, 6))  # prompt, response


def rollouts() -> tuple[list[Tensor], list[Tensor]]:
    ids = [torch.arange(10 * n, 10 * n + sum(pair)) for n, pair in enumerate(LENGTHS)]
    return ids, [torch.arange(sum(pair)) >= pair[0] for pair in LENGTHS]


def padded(values: list[Tensor], side: str) -> Tensor:
    width = max(map(len, values)) + 2
    out = values[0].new_zeros(len(values), width)
    for row, value in zip(out, values, strict=True):
        row[slice(-len(value), None) if side == "left" else slice(len(value))] = value
    return out


def layouts() -> dict[str, dict[str, Any]]:
    ids, response = rollouts()
    real = [torch.ones(len(one), dtype=torch.bool) for one in ids]
    found: dict[str, dict[str, Any]] = {"list": {"token_ids": ids, "response_mask": response}}
    found["nested"] = {
        "token_ids": torch.nested.nested_tensor(ids, layout=torch.jagged),
        "response_mask": torch.nested.nested_tensor([one.long() for one in response], layout=torch.jagged),
    }
    for side in ("left", "right"):
        found[side] = {
            "token_ids": padded(ids, side),
            "response_mask": padded(response, side),
            "attention_mask": padded(real, side).long(),
        }
    found["packed"] = {
        "token_ids": torch.cat(ids)[None],
        "response_mask": torch.cat(response)[None],
        "position_ids": torch.cat([torch.arange(len(one)) for one in ids])[None],
    }
    return found


@pytest.mark.parametrize("name", ["list", "nested", "left", "right", "packed"])
def test_a_layout_gives_its_samples(name: str) -> None:
    given = layouts()[name]
    samples = samples_of(**given, truncated=[False, True, False])
    for number, (sample, ids, response) in enumerate(zip(samples, *rollouts(), strict=True)):
        assert torch.equal(sample.token_ids, ids) and torch.equal(sample.response_mask, response)
        assert torch.equal(sample.prompt_mask, ~response) and not sample.tool_mask.any()
        assert sample.truncated == (number == 1)
        if name in ("left", "right", "packed"):
            assert torch.equal(given["token_ids"][sample.row, sample.positions], ids)


def test_holes_in_a_response_are_neither_prompt_nor_response() -> None:
    (sample,) = samples_of([torch.arange(6)], [torch.tensor([0, 0, 1, 0, 0, 1])])
    assert sample.prompt_mask.tolist() == [True, True, False, False, False, False]
    assert sample.response_mask.tolist() == [False, False, True, False, False, True]


def test_a_row_of_pads_is_a_sample_without_tokens() -> None:
    real = torch.tensor([[0, 0, 0], [0, 1, 1]])
    empty, sample = samples_of(torch.ones(2, 3).long(), torch.zeros(2, 3).bool(), attention_mask=real)
    assert len(empty) == 0 and len(sample) == 2


def test_what_a_sample_says_is_its_own() -> None:
    """A later change to the batch must not reach into samples that were taken out of it."""
    ids, response = rollouts()
    batch = padded(ids, "left")
    samples = samples_of(batch, padded(response, "left"), attention_mask=batch.bool())
    batch.zero_()
    assert samples[2].token_ids[-1] == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"token_ids": torch.ones(3)},
            r"token_ids must be \[B, T\] or jagged, got \[3\]; one sample is token_ids\[None\]",
        ),
        ({"token_ids": [torch.ones(3)]}, r"token_ids\[0\] must be a tensor \[N\] of whole numbers"),
        ({"response_mask": [torch.ones(3)]}, "response_mask has 1 rows, token_ids 2"),
        ({"response_mask": [torch.ones(3), torch.ones(1)]}, r"response_mask\[1\] has 1 entries, token_ids\[1\] has 2"),
        (
            {"response_mask": [torch.ones(3), torch.tensor([0, 2])]},
            r"response_mask\[1\] must be bool, or 0 and 1; got 2",
        ),
        ({"attention_mask": torch.ones(2, 3)}, "jagged token_ids have no pads"),
        ({"truncated": [True]}, "truncated must have one entry per sample, 2, got 1"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str) -> None:
    given = {
        "token_ids": [torch.arange(3), torch.arange(2)],
        "response_mask": [torch.ones(3), torch.ones(2)],
    }
    with pytest.raises(ValueError, match=message):
        samples_of(**{**given, **changes})
