"""The verl adapter without verl: its layout, what it asks losses, and its step over a TransferQueue of the same shapes.

The real verl is tested in tests/verl, by `make test-verl`.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph.adapters.verl import FlowMixin, follows_tokens, of_response, over_sequence, refuse_images, rows_of
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.crediting import Crediting
from flowgraph.rl.scorer import Scorer
from tests.written import ANSWERS, TOKENIZER, ids, is_mark, marked, written_by_hand

GAIN = 3.0
PROMPTS = [ids(text, end=False) for text in ("?;?;?", "?", "?;", "?;?;")]
RESPONSES = [marked(2, 5), marked(9, 1), marked(0, 0), ids("no answer @ here")]
ADVANTAGES = [0.5, -2.0, 1.0, 1.0]


def jagged(rows: list[Any]) -> Tensor:
    """A field as the TransferQueue gives it out."""
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_jagged_field() -> None:
    rows = [[1, 2, 3], [4], [5, 6]]
    assert [row.tolist() for row in rows_of(jagged(rows))] == rows


def test_rows_of_a_field_with_an_empty_row() -> None:
    rows: list[list[float]] = [[1.0, 2.0], [], [3.0]]
    assert [row.tolist() for row in rows_of(jagged([torch.tensor(row) for row in rows]))] == rows


def test_rows_of_a_dense_field() -> None:
    assert [row.tolist() for row in rows_of(torch.tensor([[1, 2], [3, 4]]))] == [[1, 2], [3, 4]]


def test_a_response_stands_at_the_end_of_its_sequence() -> None:
    token_ids, response = torch.arange(5), torch.tensor([7.0, 8.0])
    whole = over_sequence(response, token_ids)
    assert whole.tolist() == [0, 0, 0, 7, 8]
    assert of_response(whole, response).tolist() == [7, 8]


def test_an_empty_response_gets_no_factor() -> None:
    """Counting from the end would give it all of them."""
    empty = torch.zeros(0)
    assert over_sequence(empty, torch.arange(3)).tolist() == [0, 0, 0]
    assert of_response(torch.ones(3), empty).shape == (0,)


def test_factors_take_the_dtype_of_the_advantages() -> None:
    assert of_response(torch.ones(3), torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_response_longer_than_its_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="response_mask has 4 entries, input_ids only 3"):
        over_sequence(torch.ones(4), torch.arange(3))


# --- what losses are asked --------------------------------------------------------------------------------------------

ACTOR = SimpleNamespace(loss_agg_mode="token-mean")


def clipped(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(), {}


def geometric_mean(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, **_: Any
) -> tuple[Tensor, dict[str, Any]]:
    return -((log_prob - old_log_prob).mean(1).exp() * advantages.mean(1)).mean(), {}


def without_advantages(log_prob: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
    return -log_prob.mean(), {}


def without_gradient(log_prob: Tensor, advantages: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
    return (log_prob * 0 * advantages).mean(), {}


def test_a_loss_by_token_follows_its_tokens() -> None:
    assert follows_tokens(clipped, ACTOR)


@pytest.mark.parametrize("loss", [geometric_mean, without_advantages, without_gradient])
def test_a_loss_that_undoes_credits_is_found_out(loss: Any) -> None:
    assert not follows_tokens(loss, ACTOR)


def test_images_are_refused_and_text_is_not() -> None:
    refuse_images([{}, {"token_type_ids": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"row 1 has multi_modal_inputs \(image_grid_thw, pixel_values\)"):
        refuse_images([{}, {"pixel_values": torch.zeros(1), "image_grid_thw": torch.zeros(1)}])


# --- a step -----------------------------------------------------------------------------------------------------------


class Queue:
    """Stands in for the package transfer_queue: fields by name, rows in the order of the keys."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        return {name: self.fields[name] for name in select_fields}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: dict[str, Any]) -> Any:
        self.fields |= fields
        return Batch(keys)


class Batch:
    """KVBatchMeta, as much as is read of it."""

    def __init__(self, keys: list[str], padding: int = 0) -> None:
        self.keys, self.partition_id = keys, "train"
        self.tags = [{"is_padding": row >= len(keys) - padding} for row in range(len(keys))]

    def __len__(self) -> int:
        return len(self.keys)


class Plain:
    """The part of verl's trainer below the mixin: it gives every response its advantage."""

    def _compute_advantage(self, batch: Batch, metrics: dict[str, Any]) -> Batch:
        mask = self.queue.fields["response_mask"].unbind(0)  # type: ignore[attr-defined]
        self.queue.fields["advantages"] = jagged(  # type: ignore[attr-defined]
            [advantage * row for advantage, row in zip(ADVANTAGES, mask, strict=False)]
        )
        metrics["theirs"] = 1.0
        return batch


class Mine(FlowMixin, Plain):
    def __init__(self, queue: Queue, **flow: Any) -> None:
        self.queue, self.processor, self.global_steps = queue, None, 1
        self.config = SimpleNamespace(
            actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(response_length=max(map(len, RESPONSES))))
        )
        config = FlowConfig.from_dict({"preset": "paper", "answer": ANSWERS, "gain": GAIN} | flow)
        self.crediting: Any = Crediting(Scorer(written_by_hand(), TOKENIZER, config))


def run(monkeypatch: pytest.MonkeyPatch, padding: int = 0, **flow: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """(advantages [R_i], metrics) of a step over PROMPTS and RESPONSES."""
    queue = Queue(
        {
            "input_ids": jagged([prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]),
            "response_mask": jagged([[1] * len(response) for response in RESPONSES]),
            "rm_scores": jagged([[0.0] * (len(response) - 1) + [1.0] for response in RESPONSES]),
        }
    )
    transfer_queue, tensordict = ModuleType("transfer_queue"), ModuleType("tensordict")
    transfer_queue.__dict__.update(kv_batch_get=queue.kv_batch_get, kv_batch_put=queue.kv_batch_put)
    tensordict.__dict__["TensorDict"] = lambda fields, batch_size: fields
    monkeypatch.setitem(sys.modules, "transfer_queue", transfer_queue)
    monkeypatch.setitem(sys.modules, "tensordict", tensordict)
    metrics: dict[str, Any] = {}
    batch: Any = Batch([f"uid_{row}_0" for row in range(len(RESPONSES))], padding)
    Mine(queue, **flow)._compute_advantage(batch, metrics)
    return rows_of(queue.fields["advantages"]), metrics


def test_only_the_marked_token_gets_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    advantages, metrics = run(monkeypatch)
    for row, response, advantage in zip(advantages[:3], RESPONSES, ADVANTAGES, strict=False):
        torch.testing.assert_close(row, advantage * torch.where(is_mark(torch.tensor(response)), GAIN, 1.0))
    assert torch.equal(advantages[3], torch.ones(len(RESPONSES[3])))
    assert metrics["theirs"] == 1 and metrics["flow/scored"] == 1 and metrics["flow/no_answer"] == 1 / 4
    assert metrics["flow/cut_off"] == 1 / 4  # the longest is as long as verl lets them be


def test_first_step_of_a_warm_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl counts its steps from 1: step 1 is the one whose weights are all 1."""
    advantages, _ = run(monkeypatch, warmup_steps=5)
    for row, advantage in zip(advantages, ADVANTAGES, strict=True):
        assert torch.equal(row, torch.full_like(row, advantage))


def test_padding_rows_of_verl_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    advantages, metrics = run(monkeypatch, padding=1)
    assert metrics["flow/no_answer"] == 0  # the last row is padding here
    assert torch.equal(advantages[3], torch.ones(len(RESPONSES[3])))
