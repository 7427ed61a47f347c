"""Rollout, routes, gradient x input and recency equal their definitions, written out with dense float64 matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from flowgraph import capture
from flowgraph.rl import Baseline, attributions
from flowgraph.rl.attributions import gradient_input, layer_rows, proximity, recency, rollout, routes
from flowgraph.rows import TILE_BYTES, DenseRows, RowBlock
from flowgraph.spans import locate
from tests.models import _SIZES, VOCABULARY, tiny
from tests.test_baselines import largest_tensor, padded, spans, tokens

N = 150


def sinks_at(*places: int, N: int = N) -> Tensor:
    return torch.isin(torch.arange(N), torch.tensor(places))


def gpt2() -> Any:
    """Biases everywhere, queries, keys and values in one projection."""
    torch.manual_seed(7)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=3, n_head=4, bos_token_id=1)
    )
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def model_of(name: str) -> Any:
    return gpt2() if name == "gpt2" else tiny(name)


# --- the definitions, written out ---


def slow_rollout(attention: Tensor, sinks: Tensor) -> Tensor:
    """Args: attention [L, N, N], the lowest layer first."""
    product = torch.eye(len(sinks), dtype=torch.float64)
    for A in attention:
        M = 0.5 * A + 0.5 * torch.eye(len(A), dtype=torch.float64)
        product = M / M.sum(1, keepdim=True) @ product
    return product[sinks].mean(0)


def eager(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer: its input [N, C], and its attention [H, N, N]; float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return [x[0].double() for x in out.hidden_states[:-1]], [a[0].double() for a in out.attentions]


def parts_of(model: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per layer: x [N, C], the parts c of each head [H, N, N, C] and the bias [C], float64."""
    states, model = eager(model, ids), copy.deepcopy(model).double()
    for number, (x, attention) in enumerate(zip(*states, strict=True)):
        H = len(attention)
        if isinstance(model, GPT2LMHeadModel):
            block: Any = model.transformer.h[number]
            value = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)[2].view(len(ids), H, -1)
            out, bias = block.attn.c_proj.weight, block.attn.c_proj.bias
        else:
            block = model.model.layers[number]
            value = block.self_attn.v_proj(block.input_layernorm(x)).view(len(ids), 2, -1)
            value = value.repeat_interleave(H // 2, dim=1)
            out, bias = block.self_attn.o_proj.weight.T, block.self_attn.o_proj.bias
        per_head = torch.einsum("shd,hdc->hsc", value, out.view(H, -1, x.shape[-1]))
        yield x, torch.einsum("hts,hsc->htsc", attention, per_head), torch.zeros(()) if bias is None else bias


def near(part: Tensor, whole: Tensor) -> Tensor:
    return (whole.abs().sum(-1) - (whole - part).abs().sum(-1)).clamp(min=0)


@torch.no_grad()
def slow_routes(model: Any, ids: Tensor, sinks: Tensor, per_head: bool) -> Tensor:
    product = torch.eye(len(ids), dtype=torch.float64)
    for x, parts, bias in parts_of(model, ids):
        y = x + parts.sum((0, 2)) + bias
        written = near(parts, y[:, None]).sum(0) if per_head else near(parts.sum(0), y[:, None])
        M = written + near(x, y).diag()
        product = M / M.sum(1, keepdim=True) @ product
    return product[sinks].mean(0)


@torch.no_grad()
def slow_gradient_input(model: Any, ids: Tensor, answer: Tensor) -> Tensor:
    """What log p(answer) gains per change of the length of each embedding, by central differences."""
    embedding = model.get_input_embeddings()(ids)

    def log_p(token: int, change: float) -> float:
        scaled = embedding.clone()
        scaled[token] *= 1 + change
        logp = model(inputs_embeds=scaled[None]).logits[0].log_softmax(-1)
        return sum(float(logp[t - 1, ids[t]]) for t in answer.nonzero().flatten().tolist())

    def slope(t: int, step: float = 1e-2) -> float:
        near, far = (log_p(t, change) - log_p(t, -change) for change in (step, 2 * step))
        return (8 * near - far) / (12 * step)

    return torch.tensor([abs(slope(t)) for t in range(len(ids))], dtype=torch.float64)


# --- rollout ---


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_rollout_equals_the_product_of_matrices(block: int) -> None:
    attention = torch.rand(4, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).pow(6).tril()
    attention /= attention.sum(-1, keepdim=True)
    attention[1] *= 0.7  # a sink logit, which is no token, has the rest
    sinks = sinks_at(100, 147)
    found = rollout([DenseRows(A, block) for A in attention.flip(0)], sinks)
    assert (found - slow_rollout(attention, sinks)).abs().max() < 1e-12
    assert float(found.sum()) == pytest.approx(1)
    assert found.dtype == torch.float64
    wrong = rollout([DenseRows(A, block) for A in attention], sinks)  # the lowest layer first
    assert (found - wrong).abs().max() > 1e-3


def test_rollout_by_hand() -> None:
    """Token 2 reads 1 in the top layer, 1 reads 0 in the lower one: half of a half gets to token 0."""
    upper, lower = torch.eye(3), torch.eye(3)
    upper[2] = torch.tensor([0.0, 1, 0])
    lower[1] = torch.tensor([1.0, 0, 0])
    sinks = sinks_at(2, N=3)
    assert rollout([DenseRows(upper), DenseRows(lower)], sinks).tolist() == [0.25, 0.25, 0.5]
    assert rollout([DenseRows(lower), DenseRows(upper)], sinks).tolist() == [0, 0.5, 0.5]
    assert rollout([], sinks).tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_rollout_of_a_model_goes_through_all_of_its_layers(name: str) -> None:
    model, ids, sinks = tiny(name), tokens(0), sinks_at(140, 147, 148)
    found = rollout(layer_rows(capture(model, ids[None], layers="all"), 0, torch.arange(N)), sinks)
    attention = torch.stack([heads.mean(0) for heads in eager(model, ids)[1]])
    assert len(attention) == 6
    assert (found - slow_rollout(attention, sinks)).abs().max() < 1e-6


def test_rollout_reads_no_rows_that_no_share_reaches() -> None:
    class Counted(DenseRows):
        def block(self, start: int) -> RowBlock:
            read.append(start)
            return super().block(start)

    read: list[int] = []
    rollout([Counted(torch.eye(N), 10)], sinks_at(125))
    assert read == [140, 130, 120]
    assert rollout([Counted(torch.eye(N), 10)], sinks_at()).tolist() == [0] * N
    assert len(read) == 3


def test_rows_that_do_not_fit_are_refused() -> None:
    class Late(DenseRows):
        def __init__(self) -> None:
            super().__init__(torch.eye(N), 10)
            self.starts = range(100, N, 10)

    with pytest.raises(ValueError, match=r"rows: number 1 is over 4 tokens, sinks over 150"):
        rollout([DenseRows(torch.eye(N)), DenseRows(torch.eye(4))], sinks_at(3))
    with pytest.raises(ValueError, match="must have those of token 99"):
        rollout([Late()], sinks_at(99, 120))
    with pytest.raises(ValueError, match=r"sinks must be bool \[N\] or \[S, N\], got \[150\] torch.int64"):
        rollout([], torch.ones(N).long())


# --- routes ---


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("per_head", [False, True])
def test_routes_equal_the_dense_computation(name: str, per_head: bool) -> None:
    model, ids, sinks = model_of(name), tokens(0)[:90], sinks_at(70, 85, 86, N=90)
    if name != "gpt_oss":  # whose experts have no float64
        model.double()
    found, expected = routes(model, ids, sinks, per_head=per_head), slow_routes(model, ids, sinks, per_head)
    # The eager attention of transformers takes its softmax in float32.
    assert (found - expected).abs().max() < (1e-5 if name == "gpt_oss" else 1e-6)
    assert float(found.sum()) == pytest.approx(1)
    assert found.dtype == torch.float64 and (found[87:] == 0).all() and found[:70].max() > 1e-3
    assert (routes(model.float(), ids, sinks, per_head=per_head) - expected).abs().max() < 1e-5
    assert (routes(model, ids, sinks, per_head=not per_head) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_the_parts_add_up_to_what_the_block_gives(name: str) -> None:
    """Else the dense computation would be of something else than the model."""
    model, ids = model_of(name).double(), tokens(1)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    seen: list[Tensor] = []
    for block in blocks:
        norm = block.ln_2 if name == "gpt2" else block.post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    sums = [x + parts.sum((0, 2)) + bias for x, parts, bias in parts_of(model, ids)]
    assert len(seen) == len(sums) == len(blocks)
    for found, expected in zip(sums, seen, strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_routes_are_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, sinks = tiny("qwen3"), tokens(0), sinks_at(148)
    whole = routes(model, ids, sinks)
    monkeypatch.setitem(TILE_BYTES, "cpu", 7 * 64 * 64 * 4)  # seven sources of a full block at a time
    assert (routes(model, ids, sinks) - whole).abs().max() < 1e-6
    monkeypatch.setattr("flowgraph.rl.attributions._BLOCK", 11)
    assert (routes(model, ids, sinks) - whole).abs().max() < 1e-6


def test_proximity_is_exact_where_norms_cancel() -> None:
    torch.manual_seed(1)
    whole, part = torch.randn(40, 64, dtype=torch.float64), torch.randn(5, 40, 64, dtype=torch.float64) / 2
    whole[:, 3] = 0
    assert (proximity(part, whole) - near(part, whole)).abs().max() < 1e-12
    assert proximity(part, whole).min() == 0 < proximity(part, whole).max()
    # A stream with one huge number, of which a small part says nothing.
    whole[:, 0] = 1e5
    part = 1e-3 * whole
    part[:, 0] = 0
    expected = near(part, whole)
    assert (proximity(part.float(), whole.float()) / expected - 1).abs().max() < 1e-5
    assert (near(part.float(), whole.float()) / expected - 1).abs().max() > 1e-2
    # The way that routes take, of a part as a product.
    fast = attributions._Near(whole.float())
    found, expected = fast.of(torch.ones(1, 40, 1), part[None, :1].float())[0], near(part[:1].expand(40, -1), whole)
    assert (found - expected).abs().max() < 1e-5 * part.abs().sum(-1).max()


@pytest.mark.parametrize("heads", [1, 4])
def test_the_fast_proximity_of_products_is_the_plain_one(heads: int) -> None:
    torch.manual_seed(2)
    whole, paid = torch.randn(30, 64, dtype=torch.float64), torch.rand(6, 30, heads, dtype=torch.float64)
    writes = torch.randn(6, heads, 64, dtype=torch.float64)
    whole[:, :3] = torch.tensor([0.0, 1e-3, -1e-3])
    fast = attributions._Near(whole)
    expected = proximity(paid @ writes, whole)
    assert (fast.of(paid, writes) - expected).abs().max() < 1e-12
    assert (fast.of(paid[:2], writes[:2]) - expected[:2]).abs().max() < 1e-12, "the memory of an earlier tile"


def test_several_sets_of_sinks_at_once_are_the_same_as_one_by_one() -> None:
    model, ids = tiny("llama"), tokens(0)
    sets = torch.stack([sinks_at(100, 103), sinks_at(140), sinks_at()])
    for function in (
        partial(routes, model, ids),
        lambda sinks: rollout(layer_rows(capture(model, ids[None], layers="all"), 0, torch.arange(N)), sinks),
    ):
        found = function(sets)
        assert found.shape == (3, N) and (found[2] == 0).all()
        for scores, sinks in zip(found[:2], sets, strict=False):
            assert (scores - function(sinks)).abs().max() < 1e-7 and scores.sum() == pytest.approx(1)


def test_a_token_none_of_whose_parts_is_near_keeps_what_it_has() -> None:
    """Attention writes -0.9 x, so that the sum, 0.1 x, is nearer to 0 than to either."""
    model = tiny("llama", num_hidden_layers=2, num_key_value_heads=4)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(table[5].sign())  # all tokens the same, of size 1
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.copy_(torch.eye(64))
            layer.self_attn.o_proj.weight.copy_(-0.9 * torch.eye(64))
            layer.mlp.down_proj.weight.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data *= 0.1
    assert routes(model, tokens(0), sinks_at(20, 60)).nonzero().flatten().tolist() == [20, 60]


def test_routes_of_lora_are_those_of_the_merged_model() -> None:
    peft = pytest.importorskip("peft")
    ids, sinks = tokens(1), sinks_at(38, N=40)
    config = peft.LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = peft.get_peft_model(tiny("llama"), config).train()
    found = routes(adapted, ids, sinks)
    assert adapted.training
    attributed = gradient_input(adapted, ids, sinks)
    merged = adapted.merge_and_unload()
    assert (found - routes(merged, ids, sinks)).abs().max() < 1e-6
    assert (found - routes(tiny("llama"), ids, sinks)).abs().max() > 1e-4
    assert (attributed - gradient_input(merged, ids, sinks)).abs().max() < 1e-5


def test_models_that_cannot_be_split_are_refused() -> None:
    ids, sinks = tokens(1), sinks_at(38, N=40)
    cohere: Any = CohereForCausalLM(CohereConfig(**{key: value for key, value in _SIZES.items() if key != "head_dim"}))
    for model, message in (
        (tiny("gemma2"), "in layer 5 .Gemma2DecoderLayer. nothing reads the sum"),
        (cohere.eval(), "in layer 5 .CohereDecoderLayer. nothing reads the sum"),
        (tiny("qwen3_5"), r"only the layers \[3\] of 6 of Qwen3_5ForCausalLM have softmax attention"),
    ):
        with pytest.raises(ValueError, match=message):
            routes(model, ids, sinks)
        assert not hooks_of(model)
    gated = tiny("llama")
    gated.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (0.5 * args[0],))
    with pytest.raises(ValueError, match=r"layer 2 .LlamaDecoderLayer. adds something else .* a gate"):
        routes(gated, ids, sinks)
    with pytest.raises(ValueError, match=r"token_ids must be whole numbers \[40\], got \[150\]"):
        routes(gated, tokens(0), sinks)


def test_routes_hold_nothing_of_n_by_n() -> None:
    N = 2048
    model, ids = tiny("llama", max_position_embeddings=N, num_hidden_layers=1), torch.randint(3, VOCABULARY, (N,))
    assert largest_tensor(lambda: routes(model, ids, sinks_at(N - 2, N=N))) < N * N / 2


def hooks_of(model: Any) -> list[Any]:
    return [hook for one in model.modules() for hook in (*one._forward_hooks, *one._forward_pre_hooks)]


# --- gradient x input ---


@pytest.mark.parametrize("name, tolerance", [("gpt2", 1e-6), ("llama", 1e-3), ("gemma3", 1e-3)])
def test_gradient_input_equals_finite_differences(name: str, tolerance: float) -> None:
    """GPT-2 is float64 throughout; the norms of the others round to float32, which differences magnify."""
    model, ids = model_of(name).double(), tokens(0)[:12]
    answer = sinks_at(7, 9, 10, N=12)
    found = gradient_input(model, ids, answer)
    assert (found - slow_gradient_input(model, ids, answer)).abs().max() < tolerance * found.max()
    assert found.dtype == torch.float64 and (found[10:] == 0).all() and (found[:10] > 0).all()


def test_gradient_input_leaves_gradients_alone() -> None:
    model, ids, answer = tiny("llama", attention_dropout=0.5), tokens(1), sinks_at(36, 37, N=40)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, 2.0) if number % 2 else None
    expected = gradient_input(model, ids, answer)
    model.train()
    model.model.layers[0].eval()
    modes = [one.training for one in model.modules()]
    with torch.no_grad():
        assert torch.equal(gradient_input(model, ids, answer), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(gradient_input(model, ids.clone(), answer), expected)
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient_input(model, ids, answer), expected)
    assert not expected.requires_grad
    assert [one.training for one in model.modules()] == modes
    for number, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (number % 3 > 0)
        assert (parameter.grad is not None and (parameter.grad == 2).all()) if number % 2 else parameter.grad is None


def test_gradient_input_of_a_model_without_any_trainable_weight() -> None:
    model, ids, answer = tiny("llama"), tokens(1), sinks_at(36, N=40)
    expected = gradient_input(model, ids, answer)
    assert torch.equal(gradient_input(model.requires_grad_(False), ids, answer), expected) and expected.sum() > 0


def test_gradient_input_makes_logits_of_the_answer_alone() -> None:
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    gradient_input(model, tokens(0), sinks_at(100, 103))
    assert seen == [(1, 4, VOCABULARY)]


def test_gradient_input_at_its_edges() -> None:
    model = tiny("llama")
    assert gradient_input(model, tokens(1), sinks_at(N=40)).tolist() == [0] * 40
    assert gradient_input(model, tokens(1), sinks_at(1, N=40)).nonzero().flatten().tolist() == [0]
    with pytest.raises(ValueError, match="answer_tokens marks token 0"):
        gradient_input(model, tokens(1), sinks_at(0, 5, N=40))
    with pytest.raises(ValueError, match="token_ids and answer_tokens must be"):
        gradient_input(model, tokens(1), sinks_at(5))


# --- as baselines ---


def test_recency_is_later_better() -> None:
    assert recency(4).tolist() == [0.25, 0.5, 0.75, 1]
    assert recency(0).tolist() == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_baselines_are_these_functions_row_by_row(side: str) -> None:
    model = tiny("llama")

    def rolled(row: int) -> Tensor:
        attention = torch.stack([heads.mean(0) for heads in eager(model, tokens(row))[1]])
        return slow_rollout(attention, spans(row).answer_mask)

    expected: dict[str, Callable[[int], Tensor]] = {
        "rollout": rolled,
        "routes": lambda row: routes(model, tokens(row), spans(row).answer_mask),
        "gradient_input": lambda row: gradient_input(model, tokens(row), spans(row).answer_tokens),
        "recency": lambda row: recency(len(tokens(row))),
    }
    for name, function in expected.items():
        for row, scores in enumerate(Baseline(name, model)(*padded(side))):
            assert (scores - function(row)).abs().max() < 1e-5, name
            assert scores.max() > 0.01


def test_a_response_without_an_answer_is_uniform() -> None:
    place = torch.arange(40)
    none = locate(tokens(1), place < 9, sink_mask=place < 0)
    for name in ("rollout", "routes", "gradient_input"):
        assert Baseline(name, tiny("llama"))(tokens(1)[None], None, [none])[0].tolist() == [0] * 40


def test_gradient_input_says_that_it_needs_the_answer_and_not_only_sinks() -> None:
    place = torch.arange(40)
    only_sinks = locate(tokens(1), place < 9, sink_mask=place == 37)
    baseline = partial(Baseline("gradient_input", tiny("llama")), tokens(1)[None].repeat(2, 1), None)
    with pytest.raises(ValueError, match="spans of row 1 have sinks but no answer_tokens"):
        baseline([spans(1), only_sinks])


@pytest.mark.parametrize("name", ["rollout", "routes", "gradient_input"])
def test_the_model_is_left_without_hooks(name: str) -> None:
    model = tiny("llama")
    Baseline(name, model)(*padded("left"))
    assert not hooks_of(model)
    assert model.config._attn_implementation == "sdpa"
