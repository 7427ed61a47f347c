"""Hidden tokens: leaving them out equals closing their columns in a dense mask, for every kind of model that is let in.

Shapes: N tokens of a trace, M variants.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from flowgraph.adapters.evidence.hiding import answer_logp, area, curves, hideable, pick, regenerate
from tests.models import VOCABULARY, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

N = 40
ARCHITECTURES = ("llama", "qwen3", "mistral", "gpt_oss", "gpt2", "gpt_neox")


def build(name: str) -> Any:
    """A tiny random model in float64 whose windows, if it has any, are longer than the trace."""
    model: Any
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64))
    elif name == "gpt_neox":
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    else:
        model = tiny(name, experts_implementation="eager")  # grouped products have no float64
        if getattr(model.config, "sliding_window", None):
            model.config.sliding_window = 64
        return model.double()
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("c_attn", "query_key_value", "wpe")):
            parameter.data.mul_(8)  # attention and positions that a mistake in them would show by
    return model.double().eval()


def closed(hidden: Tensor) -> Tensor:
    """[1, 1, N, N] float mask: causal, and the columns of hidden [N] tokens are closed to the rows after them."""
    see = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril() & (
        ~hidden | torch.eye(len(hidden), dtype=torch.bool)
    )
    return torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, -1e300)[None, None]


@torch.no_grad()
def slow_logits(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """[N, V] with the whole sequence in one pass."""
    return model(input_ids=ids[None], attention_mask=closed(hidden), use_cache=False).logits[0]


def slow_answer_logp(model: Any, ids: Tensor, hidden: Tensor, answer: Tensor) -> Tensor:
    token = answer.nonzero().flatten()
    rows = [slow_logits(model, ids, one).log_softmax(-1)[token - 1, ids[token]].sum() for one in hidden]
    return torch.stack(rows)


def slow_text(model: Any, ids: Tensor, hidden: Tensor, start: int, new_tokens: int) -> list[int]:
    ids, hidden = ids[:start], hidden[:start]
    for _ in range(new_tokens):
        ids = torch.cat([ids, slow_logits(model, ids, hidden)[-1:].argmax(-1)])
        hidden = F.pad(hidden, (0, 1), value=False)
    return ids[start:].tolist()


def trace() -> tuple[Tensor, Tensor]:
    """(ids [N], answer_tokens [N])."""
    answer = torch.zeros(N, dtype=torch.bool)
    answer[34:37] = True
    return torch.randint(3, VOCABULARY, (N,)), answer


def variants(answer: Tensor, count: int = 8, first: int = 6) -> Tensor:
    """[M, N]: more and more is hidden, from `first` on; the first hides nothing, the last is the second once more."""
    share = torch.linspace(0, 0.8, count)[:, None]
    hidden = (torch.rand(count, len(answer)) < share) & (torch.arange(len(answer)) >= first)
    hidden = hidden & hideable(torch.ones_like(answer), answer)
    return torch.cat([hidden, hidden[1:2]])


# --- which tokens ---------------------------------------------------------------------------------------------------


def test_pick_takes_the_highest_or_the_lowest_of_the_mask_and_the_earlier_of_equals() -> None:
    scores = torch.tensor([9.0, 1, 3, 3, 0, 3, 0])
    mask = torch.tensor([False, True, True, True, True, True, True])
    assert pick(scores, mask, 0.3).nonzero().flatten().tolist() == [2, 3]  # ceil(0.3 * 6)
    assert pick(scores, mask, 0.1, "bottom").nonzero().flatten().tolist() == [4]
    assert not pick(scores, mask, 0).any() and torch.equal(pick(scores, mask, 1), mask)


@pytest.mark.parametrize("n", range(1, 60))
def test_pick_takes_the_rounded_up_share(n: int) -> None:
    for percent in (5, 10, 20, 30, 40, 70):
        assert pick(torch.rand(n), torch.ones(n, dtype=torch.bool), percent / 100).sum() == -(-percent * n // 100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"share": 20}, r"share must be in 0 \.\. 1, got 20"),
        ({"end": "middle"}, "end must be"),
        ({"mask": torch.ones(4)}, "bool"),
        ({"scores": torch.tensor([0, torch.nan, 1, torch.inf])}, "token 1 has nan"),
    ],
)
def test_pick_refuses_what_it_cannot_rank(change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"scores": torch.rand(4), "mask": torch.ones(4, dtype=torch.bool), "share": 0.5}
    with pytest.raises(ValueError, match=says):
        pick(**good | change)


def test_scores_outside_the_mask_may_be_anything() -> None:
    assert pick(torch.tensor([torch.nan, 1, 2]), torch.tensor([False, True, True]), 0.5).tolist() == [
        False,
        False,
        True,
    ]


def test_hideable_leaves_the_answer_and_what_predicts_it() -> None:
    answer = torch.tensor([False, False, True, True, False, True])
    assert hideable(torch.ones(6, dtype=torch.bool), answer).tolist() == [True, False, False, False, False, False]
    assert hideable(torch.ones(4, dtype=torch.bool), torch.tensor([False, False, True, False])).tolist() == [
        True, False, False, True,
    ]  # fmt: skip


# --- the log-probability of the answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaving_tokens_out_equals_a_dense_mask_over_the_whole_sequence(name: str) -> None:
    model, (ids, answer) = build(name), trace()
    hidden = variants(answer)
    slow = slow_answer_logp(model, ids, hidden, answer)
    assert slow.std() > 5e-3  # hiding matters to this model
    for max_batch_tokens in (1, 70, 4096):
        found = answer_logp(model, ids, hidden, answer, max_batch_tokens=max_batch_tokens)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [0, 1, 33])
def test_whatever_the_length_of_the_shared_prefix(name: str, first: int) -> None:
    model, (ids, answer) = build(name), trace()
    hidden = variants(answer, first=first)
    hidden[3:, first] = first < 33
    found = answer_logp(model, ids, hidden, answer, max_batch_tokens=100)
    torch.testing.assert_close(found, slow_answer_logp(model, ids, hidden, answer), rtol=0, atol=1e-10)


def test_an_answer_in_several_places_with_hidden_tokens_between() -> None:
    model, (ids, answer) = build("llama"), trace()
    answer[[12, 20]] = True
    hidden = variants(answer)
    assert hidden[:, 13:19].any()
    found = answer_logp(model, ids, hidden, answer)
    torch.testing.assert_close(found, slow_answer_logp(model, ids, hidden, answer), rtol=0, atol=1e-10)


def test_one_variant_that_hides_nothing_gives_what_the_model_gives() -> None:
    model, (ids, answer) = build("llama"), trace()
    token = answer.nonzero().flatten()
    with torch.no_grad():
        plain = model(input_ids=ids[None]).logits[0].log_softmax(-1)[token - 1, ids[token]].sum()
    found = answer_logp(model, ids, torch.zeros(1, N, dtype=torch.bool), answer)
    torch.testing.assert_close(found, plain[None], rtol=0, atol=1e-10)


def test_it_does_not_matter_what_a_hidden_token_is_nor_what_stands_behind_the_answer() -> None:
    model, (ids, answer) = build("llama"), trace()
    hidden = variants(answer)[4:5]
    other = torch.where(hidden[0] | (torch.arange(N) > 36), (ids + 11) % VOCABULARY, ids)
    behind = hidden | (torch.arange(N) > 36)
    expected = answer_logp(model, ids, hidden, answer)
    assert torch.equal(answer_logp(model, other, behind, answer), expected)
    assert not torch.equal(answer_logp(model, torch.where(hidden[0], ids, other.roll(1)), hidden, answer), expected)


def test_the_shared_prefix_and_equal_variants_run_once() -> None:
    model, (ids, answer) = build("llama"), trace()
    hidden = torch.zeros(5, N, dtype=torch.bool)
    hidden[0, 20], hidden[1, 22], hidden[2:, 24] = True, True, True
    answer_logp(model, ids, hidden, answer)  # the first time, a look at the model's layers comes before
    ran: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *call: ran.append(call[1][0].numel()))
    answer_logp(model, ids, hidden, answer)
    hook.remove()
    assert ran == [20, 3 * (36 - 20 - 1)]  # the last token of the answer predicts nothing


def test_a_kernel_that_takes_gaps_for_packed_documents_never_sees_a_lone_row_of_them() -> None:
    """As flash attention does, which gets no mask where there are no pads."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        rows, length, total = query.shape[0], query.shape[2], key.shape[2]
        if mask is None:
            assert not _is_packed_sequence(arguments["position_ids"], rows)
            mask = torch.ones(rows, total, dtype=torch.bool)
        causal = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        return sdpa_attention_forward(module, query, key, value, causal & mask[:, None, None].bool(), **arguments)

    AttentionInterface.register("gaps", attention)
    AttentionMaskInterface.register("gaps", flash_attention_mask)
    model, (ids, answer) = build("llama"), trace()
    hidden = variants(answer)
    expected = answer_logp(model, ids, hidden, answer)
    model.set_attn_implementation("gaps")
    for max_batch_tokens in (1, 4096):
        found = answer_logp(model, ids, hidden, answer, max_batch_tokens=max_batch_tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_model_in_training_is_read_without_dropout_and_left_in_training() -> None:
    model, (ids, answer) = build("gpt2"), trace()
    hidden = variants(answer)
    expected = answer_logp(model, ids, hidden, answer)
    model.train()
    found = answer_logp(model, ids, hidden, answer)
    assert torch.equal(found, expected) and not found.requires_grad
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("token", "says"), [(35, "hides token 35, which is a token"), (33, "hides token 33, which predicts")]
)
def test_the_answer_and_what_predicts_it_cannot_be_hidden(token: int, says: str) -> None:
    model, (ids, answer) = build("llama"), trace()
    hidden = variants(answer)
    hidden[2, token] = True
    with pytest.raises(ValueError, match=f"variant 2 {says}"):
        answer_logp(model, ids, hidden, answer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": torch.zeros(2, N).long()}, r"token_ids must be whole numbers \[N\]"),
        ({"hidden": torch.zeros(3, N - 1).bool()}, r"hidden must be \[M, N\] bool"),
        ({"hidden": torch.zeros(0, N).bool()}, "M >= 1"),
        ({"hidden": torch.zeros(3, N)}, "float32"),
        ({"answer_tokens": torch.zeros(N).bool()}, "marks no token"),
        ({"answer_tokens": torch.arange(N) < 2}, "token 0, which no token predicts"),
        ({"answer_tokens": torch.arange(N)}, r"answer_tokens must be \[N\] bool"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    ids, answer = trace()
    good: dict[str, Any] = {"token_ids": ids, "hidden": torch.zeros(3, N).bool(), "answer_tokens": answer}
    with pytest.raises(ValueError, match=says):
        answer_logp(build("llama"), **good | change)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mistral", "layer 0 of MistralForCausalLM has a window of 7 tokens"),
        ("gpt_oss", "has a window of 8 tokens"),
        ("qwen3_5", "otherwise than by softmax attention"),
    ],
)
def test_models_in_which_hiding_is_more_than_leaving_out_are_refused(name: str, says: str) -> None:
    ids, answer = trace()
    with pytest.raises(ValueError, match=says):
        answer_logp(tiny(name), ids, variants(answer), answer)


def test_positions_that_depend_on_the_length_of_a_pass_are_refused_where_they_do() -> None:
    ids, answer = trace()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    short, long = (tiny("llama", rope_parameters=rope, max_position_embeddings=n) for n in (32, 64))
    with pytest.raises(ValueError, match=r"beyond 32 tokens \(rope_type 'dynamic'\)"):
        answer_logp(short, ids, variants(answer), answer)
    hidden = variants(answer)
    expected = slow_answer_logp(long.double(), ids, hidden, answer)
    torch.testing.assert_close(answer_logp(long, ids, hidden, answer), expected, rtol=0, atol=1e-10)


# --- what the model would have written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_equal_those_of_whole_passes_with_a_dense_mask(name: str) -> None:
    model, (ids, answer) = build(name), trace()
    model.generation_config.eos_token_id = None
    hidden = variants(answer, count=5)[1:5]
    slow = [slow_text(model, ids, one, 34, 6) for one in hidden]
    assert len({tuple(text) for text in slow}) > 1
    for max_batch_tokens in (1, 8192):
        found = regenerate(model, ids, hidden, 34, new_tokens=6, max_batch_tokens=max_batch_tokens)
        assert [text.tolist() for text in found] == slow


def test_without_hidden_tokens_the_text_is_that_of_generate() -> None:
    model, (ids, _) = build("llama"), trace()
    for start in (1, 20, N):
        generated = model.generate(ids[None, :start], max_new_tokens=10, do_sample=False)[0, start:]
        (found,) = regenerate(model, ids, torch.zeros(1, N, dtype=torch.bool), start, new_tokens=10)
        assert torch.equal(found, generated)


def test_each_text_stops_by_itself_and_the_others_go_on() -> None:
    model, (ids, answer) = build("llama"), trace()
    model.generation_config.eos_token_id = None
    hidden = variants(answer)
    free = regenerate(model, ids, hidden, 34, new_tokens=12)
    stop = max(range(VOCABULARY), key=lambda one: len({(text == one).int().argmax().item() for text in free}))

    def cut(text: Tensor) -> list[int]:
        tokens = text.tolist()
        return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens

    expected = [cut(text) for text in free]
    assert len({len(text) for text in expected}) > 1
    assert [text.tolist() for text in regenerate(model, ids, hidden, 34, new_tokens=12, stop_ids={stop})] == expected
    model.generation_config.eos_token_id = [stop, 1000]
    assert [text.tolist() for text in regenerate(model, ids, hidden, 34, new_tokens=12)] == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"start": 21}, "variant 1 hides token 20, whose row predicts"),
        ({"start": 0}, r"start must be in 1 \.\. 40"),
        ({"start": N + 1}, "start must be"),
        ({"new_tokens": 0}, "new_tokens must be at least 1"),
    ],
)
def test_a_cut_behind_a_hidden_token_or_outside_the_trace_is_refused(change: dict[str, Any], says: str) -> None:
    ids, _ = trace()
    hidden = torch.zeros(2, N, dtype=torch.bool)
    hidden[1, 20] = True
    with pytest.raises(ValueError, match=says):
        regenerate(build("llama"), ids, hidden, **{"start": 30, "new_tokens": 4} | change)


def test_a_window_must_hold_what_will_be_written_too() -> None:
    model, (ids, _) = build("mistral"), trace()
    with pytest.raises(ValueError, match="window of 64 tokens, too short for the 70"):
        regenerate(model, ids, torch.zeros(1, N, dtype=torch.bool), 30, new_tokens=40)


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curves_hide_and_show_the_most_important_tokens_first() -> None:
    model, (ids, answer) = build("llama"), trace()
    mask = hideable(torch.arange(N) >= 8, answer)
    scores = {"one": torch.rand(N), "two": torch.rand(N).double()}
    found = curves(model, ids, scores, mask, answer, steps=4)
    for name, score in scores.items():
        hidden = torch.stack([pick(score, mask, k / 4) for k in range(5)])
        deletion = slow_answer_logp(model, ids, hidden, answer).tolist()
        insertion = slow_answer_logp(model, ids, mask & ~hidden, answer).tolist()
        assert found[name]["deletion"] == pytest.approx(deletion, abs=1e-10)
        assert found[name]["insertion"] == pytest.approx(insertion, abs=1e-10)
        assert found[name]["area"] == [area(found[name]["deletion"]), area(found[name]["insertion"])]
        assert found[name]["deletion"][-1] == found[name]["insertion"][0]
    assert found["one"]["deletion"][0] == found["two"]["insertion"][-1]
    assert found["one"]["deletion"][2] != found["two"]["deletion"][2]


def test_the_area_is_the_mean_height() -> None:
    assert area([-3.0, -3, -3]) == -3
    assert area([0.0, 1, 2, 3, 4]) == 2
    assert area([0.0, 4, 0]) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": torch.ones(N).bool()}, r"mask has token 33, which belongs to the answer or predicts .* hideable"),
        ({"steps": 0}, "steps 0"),
        ({"scores": {}}, "0 scores"),
    ],
)
def test_curves_refuse_a_mask_with_the_answer_in_it(change: dict[str, Any], says: str) -> None:
    ids, answer = trace()
    good: dict[str, Any] = {"scores": {"one": torch.rand(N)}, "mask": torch.arange(N) < 30, "answer_tokens": answer}
    with pytest.raises(ValueError, match=says):
        curves(build("llama"), ids, **good | change)
