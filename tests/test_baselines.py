"""Every rival signal equals its formula, written out slowly from dense attention and full logits, in any layout."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from flowgraph import capture
from flowgraph.credit import weights_from_scores
from flowgraph.rl.baselines import (
    BASELINES,
    Baseline,
    HeadGroups,
    answer_attention,
    calibrate,
    coupled_bonus,
    future_attention,
    logit_gradient_norm,
    predictions,
    random_scores,
    token_entropy,
    variation,
    windowed_distance,
)
from flowgraph.rows import DenseRows
from flowgraph.spans import Spans, locate
from tests.models import _SIZES, ARCHITECTURES, VOCABULARY, tiny

module = importlib.import_module("flowgraph.rl.baselines")

LENGTHS = (150, 40, 97)
PROMPTS = (12, 9, 30)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
names = pytest.mark.parametrize("name", list(BASELINES))


def tokens(row: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (LENGTHS[row],), generator=torch.Generator().manual_seed(row))


def spans(row: int) -> Spans:
    """The answer is the third and second token from the end; a run of four tokens in the response is tool output."""
    place = torch.arange(LENGTHS[row])
    hole = (place >= 30) & (place < 34)
    return locate(
        tokens(row),
        place < PROMPTS[row],
        (place >= PROMPTS[row]) & ~hole,
        answer_tokens=(place >= LENGTHS[row] - 3) & (place < LENGTHS[row] - 1),
    )


def padded(side: str, order: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, Tensor, list[Spans]]:
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(order), width, dtype=torch.long), torch.zeros(len(order), width, dtype=torch.long)
    for place, row in enumerate(order):
        where = slice(width - LENGTHS[row], None) if side == "left" else slice(LENGTHS[row])
        ids[place, where], mask[place, where] = tokens(row), 1
    return ids, mask, [spans(row) for row in order]


def eager_heads(model: Any, row: int) -> Tensor:
    """[L, H, N, N] float64 attention of one row alone, layer by layer and head by head."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(tokens(row)[None], output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    return torch.stack([layer[0].double() for layer in found])


def random_attention(N: int) -> Tensor:
    """[N, N] float64, rows sum to 1, nothing above the diagonal."""
    generator = torch.Generator().manual_seed(3)
    W = torch.rand(N, N, generator=generator, dtype=torch.float64).pow(6).tril()
    return W / W.sum(1, keepdim=True)


# --- the formulas, written out ----------------------------------------------------------------------------------------


def slow_waad(A: Tensor, response: Tensor) -> Tensor:
    out = torch.zeros(len(A), dtype=torch.float64)
    for t in range(len(A)):
        if response[t]:
            out[t] = sum(float(A[t, s]) * min(t - s, 10) for s in range(t + 1))
    return out


def slow_variation(waad: Tensor, response: Tensor) -> Tensor:
    out = torch.zeros(len(waad), dtype=torch.float64)
    for t in range(len(waad) - 1):
        if response[t] and response[t + 1]:
            out[t] = abs(float(waad[t]) - float(waad[t + 1]))
    return out


def slow_fai(A: Tensor, response: Tensor) -> Tensor:
    out = torch.zeros(len(A), dtype=torch.float64)
    for s in range(len(A)):
        later = [float(A[t, s]) for t in range(s + 10, min(s + 100, len(A) - 1) + 1) if response[t]]
        out[s] = sum(later) / len(later) if later else 0
    return out


def slow_answer(A: Tensor, sinks: Tensor) -> Tensor:
    out = torch.zeros(len(A), dtype=torch.float64)
    places = sinks.nonzero().flatten().tolist()
    for s in range(len(A)):
        out[s] = sum(float(A[a, s]) for a in places if a > s) / len(places)
    return out


def slow_coupled(waad: Tensor, changes: Tensor, fai: Tensor, mask: Tensor) -> Tensor:
    among = mask.nonzero().flatten().tolist()
    ranked = sorted((t for t in among if fai[t] > 0), key=lambda t: (-float(fai[t]), t))
    anchors = ranked[: math.ceil(round(0.4 * len(among), 6))]
    low = sorted(float(waad[t]) for t in among)[(len(among) - 1) // 2]
    high = sorted(float(changes[t]) for t in among)[(len(among) - 1) // 2]
    bonus, introductions = torch.zeros(len(waad), dtype=torch.float64), set()
    for t in anchors:
        bonus[t] = 1
        near = [u for u in range(t - 3, t) if u in among]
        if near and waad[t] <= low and max(changes[u] for u in near) >= high:
            bonus[t] = 0.5
            introductions.add(max(near, key=lambda u: (float(changes[u]), -u)))
    for u in introductions:
        bonus[u] = min(1.0, float(bonus[u]) + 0.5)
    return bonus


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_formulas_equal_their_slow_twins(block: int) -> None:
    A, found = random_attention(150), spans(0)
    rows, response = DenseRows(A, block), found.response_mask
    waad, fai = windowed_distance(rows, response), future_attention(rows, response)
    changes = variation(waad, response)
    bonus = coupled_bonus(waad, changes, fai, found.credit_mask)
    assert (waad - slow_waad(A, response)).abs().max() < 1e-12
    assert (changes - slow_variation(waad, response)).abs().max() < 1e-12
    assert (fai - slow_fai(A, response)).abs().max() < 1e-12
    assert (answer_attention(rows, found.answer_mask) - slow_answer(A, found.answer_mask)).abs().max() < 1e-12
    assert torch.equal(bonus, slow_coupled(waad, changes, fai, found.credit_mask))
    assert {0.0, 0.5, 1.0} <= set(bonus.tolist())


@pytest.mark.parametrize("distance, counts", [(1, False), (9, False), (10, True), (100, True), (101, False)])
def test_future_attention_looks_ten_to_a_hundred_tokens_ahead(distance: int, counts: bool) -> None:
    A = torch.zeros(260, 260)
    A[130 + distance, 130] = 1
    found = future_attention(DenseRows(A, 16), torch.ones(260, dtype=torch.bool))
    assert found.sum() == (pytest.approx(1 / 91) if counts else 0)
    assert found[130] == found.sum()


def test_future_attention_at_the_edges_of_the_response() -> None:
    """The mean is over the rows that there are; rows of the prompt don't count; the last ten tokens have none."""
    A, response = torch.full((40, 40), 0.5).tril(), torch.arange(40) >= 25
    found = future_attention(DenseRows(A, 16), response)
    assert found.tolist() == [0.5] * 30 + [0.0] * 10
    A[:25] = 7.0
    assert torch.equal(future_attention(DenseRows(A.tril(), 16), response), found)


def test_windowed_distance_clips_and_ends_with_the_response() -> None:
    A = torch.zeros(40, 40)
    A[20, 17] = A[21, 2] = A[22, 22] = A[23, 19] = 1
    response = (torch.arange(40) >= 20) & (torch.arange(40) < 24)
    waad = windowed_distance(DenseRows(A), response)
    assert waad[19:25].tolist() == [0, 3, 10, 0, 4, 0]
    # Token 19 is of the prompt, and token 23 has no successor in the response.
    assert variation(waad, response)[18:25].tolist() == [0, 0, 7, 10, 4, 0, 0]


def test_answer_attention_leaves_out_what_a_sink_pays_to_itself() -> None:
    A = torch.full((6, 6), 0.25).tril()
    sinks = torch.tensor([False, False, False, True, True, False])
    assert answer_attention(DenseRows(A), sinks).tolist() == [0.25, 0.25, 0.25, 0.125, 0, 0]
    assert answer_attention(DenseRows(A), sinks & False).tolist() == [0] * 6


def test_coupling_by_hand() -> None:
    """Token 3 is an anchor with a low WAAD behind the jump at 1, which gets half of its bonus; token 5 is free."""
    waad = torch.tensor([1.0, 9, 1, 1, 5, 8])
    changes = torch.tensor([8.0, 9, 0, 4, 3, 0])
    influence = torch.tensor([0.0, 0.1, 0.1, 0.9, 0.2, 0.8])
    mask = torch.ones(6, dtype=torch.bool)
    bonus = coupled_bonus(waad, changes, influence, mask, top=1 / 3)
    assert bonus.tolist() == [0, 0.5, 0, 0.5, 0, 1]
    weights = weights_from_scores(bonus, mask, "proportional", gain=1.5)
    assert weights.tolist() == [1, 1.25, 1, 1.25, 1, 1.5]
    assert coupled_bonus(waad, changes, influence, mask & False).tolist() == [0] * 6
    # Where the jump may get no credit, the next best neighbour is the introduction.
    mask[1] = False
    assert coupled_bonus(waad, changes, influence, mask, top=0.4).tolist() == [0.5, 0, 0, 0.5, 0, 1]


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_chosen_heads_equal_eager_attention_of_these_heads(name: str, side: str) -> None:
    model = tiny(name)
    ids, mask, _ = padded(side)
    heads = {1: [0, 1, 3], 4: [2]}  # of 4 query heads for 2 key heads
    captured = capture(model, ids, mask, layers=[1, 3, 4])
    assert captured.num_heads == {1: 4, 3: 4, 4: 4}
    for row, length in enumerate(LENGTHS):
        W = torch.zeros(length, length, dtype=torch.float64)
        for start, weight in captured.rows(row, mask[row].nonzero().flatten(), 16, heads=heads).blocks():
            W[start : start + len(weight), : weight.shape[1]] = weight.double()
        dense = eager_heads(model, row)
        expected = (dense[1, [0, 1, 3]].sum(0) + dense[4, 2]) / 4
        assert (W - expected).abs().max() < 1e-5


def test_heads_that_do_not_exist_are_refused() -> None:
    captured, place = capture(tiny("llama"), tokens(1)[None], layers=[1, 2]), torch.arange(LENGTHS[1])
    for heads in ({}, {3: [0]}):
        with pytest.raises(ValueError, match=r"heads must be of some of the layers \[1, 2\]"):
            captured.rows(0, place, heads=heads)
    for wrong in ([4], [-1], [], [1, 1]):
        with pytest.raises(ValueError, match=r"heads must be different numbers in 0\.\.3"):
            captured.rows(0, place, heads={1: wrong})


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_calibration_ranks_heads_by_their_mean_distance(name: str) -> None:
    model = tiny(name, num_hidden_layers=24)  # the middle third: 8..15; five of them: 8, 10, 12, 13, 15
    ids, mask, found = padded("left")
    layers = [8, 10, 12, 13, 15]
    total, count = torch.zeros(len(layers), 4, dtype=torch.float64), 0
    for row, length in enumerate(LENGTHS):
        place = torch.arange(length)
        distance = (place[:, None] - place).clamp(min=0)
        response = found[row].response_mask
        total += (eager_heads(model, row)[layers] * distance).sum(-1)[:, :, response].sum(-1)
        count += int(response.sum())
    order = (total / count).flatten().argsort().tolist()
    pairs = [(layers[place // 4], place % 4) for place in order]
    groups = calibrate(model, ids, mask, found)
    assert groups.local_heads == tuple(sorted(pairs[:6]))  # 30 % of 20
    assert groups.global_heads == tuple(sorted(pairs[-6:]))
    assert HeadGroups.from_dict(groups.to_dict()) == groups


def test_calibration_takes_layer_numbers_as_they_are() -> None:
    ids, mask, found = padded("right")
    groups = calibrate(tiny("llama"), ids, mask, found, layers=[5, 0], share=0.5)
    assert sorted(groups.local_heads + groups.global_heads) == [(layer, head) for layer in (0, 5) for head in range(4)]


def test_calibration_refuses_what_it_cannot_do() -> None:
    ids, mask, found = padded("right")
    with pytest.raises(ValueError, match="share must be"):
        calibrate(tiny("llama"), ids, mask, found, share=0.6)
    with pytest.raises(ValueError, match="one head only"):
        calibrate(tiny("llama", num_attention_heads=1, num_key_value_heads=1), ids, mask, found, layers=[0])
    with pytest.raises(ValueError, match="local_heads must be pairs"):
        HeadGroups((), ((0, 0),))
    with pytest.raises(ValueError, match="must have the keys"):
        HeadGroups.from_dict({"local_heads": [[0, 0]]})


def test_heads_are_calibrated_once_and_can_be_given() -> None:
    model, (ids, mask, found) = tiny("llama"), padded("left")
    baseline = Baseline("future_attention", model)
    first = baseline(ids[:1], mask[:1], found[:1])
    groups = baseline.heads
    assert groups is not None
    assert groups == calibrate(model, ids[:1], mask[:1], found[:1])
    second = baseline(ids, mask, found)
    assert baseline.heads is groups
    assert (first[0] - second[0]).abs().max() < 1e-5
    other = HeadGroups(groups.global_heads, groups.local_heads)
    given = Baseline("future_attention", model, heads=other)(ids, mask, found)
    assert (given[0] - second[0]).abs().max() > 1e-4


# --- whole baselines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_attention_baselines_equal_their_formulas_on_eager_attention(name: str) -> None:
    model, (ids, mask, found) = tiny(name), padded("left")
    groups = HeadGroups(((1, 0), (1, 3), (2, 1)), ((1, 1), (3, 2), (4, 0)))
    scores = {
        which: Baseline(which, model, layers=[1, 2, 4], heads=groups)(ids, mask, found)
        for which in ("future_attention", "windowed_distance", "coupled", "answer_attention")
    }
    for row in range(len(LENGTHS)):
        dense, roles = eager_heads(model, row), found[row]
        local = torch.stack([dense[pair] for pair in groups.local_heads]).mean(0)
        far = torch.stack([dense[pair] for pair in groups.global_heads]).mean(0)
        waad, fai = slow_waad(local, roles.response_mask), slow_fai(far, roles.response_mask)
        changes = slow_variation(waad, roles.response_mask)
        expected = {
            "future_attention": fai,
            "windowed_distance": changes,
            "coupled": slow_coupled(waad, changes, fai, roles.credit_mask),
            "answer_attention": slow_answer(dense[[1, 2, 4]].mean((0, 1)), roles.answer_mask),
        }
        for which, values in expected.items():
            assert (scores[which][row] - values).abs().max() < 2e-5, which
            assert values.max() > 1e-3


@names
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_shuffled_equals_one_by_one(name: str, side: str) -> None:
    model = tiny("qwen3")
    heads = calibrate(model, *padded("right"))
    baseline = Baseline(name, model, heads=heads)
    order = (2, 0, 1)
    together = baseline(*padded(side, order))
    for place, row in enumerate(order):
        alone = baseline(tokens(row)[None], None, [spans(row)])[0]
        assert together[place].shape == (LENGTHS[row],)
        assert together[place].dtype == torch.float32
        assert together[place].isfinite().all() and (together[place] >= 0).all()
        assert (together[place] - alone).abs().max() < 1e-5
        assert name == "uniform" or len(alone.unique()) > 2


def test_random_depends_on_the_seed_and_the_ids_alone() -> None:
    scores = random_scores(tokens(0), seed=5)
    assert torch.equal(random_scores(tokens(0), seed=5), scores)
    assert ((scores > 0) & (scores <= 1)).all()
    assert not torch.equal(random_scores(tokens(0), seed=6), scores)
    other = tokens(0)
    other[-1] += 1
    assert not torch.equal(random_scores(other, seed=5)[:-1], scores[:-1])
    shuffled = Baseline("random", tiny("llama"), seed=5)(*padded("left", (1, 0)))
    assert torch.equal(shuffled[1], scores)
    picked = weights_from_scores(scores, spans(0).credit_mask) > 1
    assert int(picked.sum()) == math.ceil(0.4 * int(spans(0).credit_mask.sum()))


@pytest.mark.parametrize("rule", ["top", "proportional", "rank", "softmax", "keep"])
def test_uniform_leaves_every_weight_at_one(rule: str) -> None:
    scores = Baseline("uniform", tiny("llama"))(*padded("left"))
    assert all((weights_from_scores(one, spans(row).credit_mask, rule) == 1).all() for row, one in enumerate(scores))


def test_what_does_not_fit_is_refused() -> None:
    model, (ids, mask, found) = tiny("llama"), padded("left")
    with pytest.raises(ValueError, match=r"name must be one of 'uniform', .*got 'luck'"):
        Baseline("luck", model)
    with pytest.raises(ValueError, match="one entry per row of input_ids, 3, got 2"):
        Baseline("uniform", model)(ids, mask, found[:2])
    with pytest.raises(ValueError, match="spans of row 1 are over 40 tokens, but attention_mask marks 150"):
        Baseline("uniform", model)(ids, None, found)
    with pytest.raises(ValueError, match="attention_mask must be"):
        Baseline("uniform", model)(ids, mask[:, 1:], found)
    with pytest.raises(ValueError, match="mask must be bool"):
        future_attention(DenseRows(torch.eye(4)), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature"):
        predictions(model, ids, mask, temperature=0)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_entropy_and_gradient_norm_equal_autograd() -> None:
    logits = (3 * torch.randn(50, VOCABULARY, dtype=torch.float64)).requires_grad_()
    token = torch.randint(VOCABULARY, (50,))
    logp = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(logp[torch.arange(50), token].sum(), logits)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    logp = logp.detach()
    assert (token_entropy(logp) - expected).abs().max() < 1e-12
    assert (logit_gradient_norm(logp, token) - gradient.norm(dim=-1)).abs().max() < 1e-12
    p = logp.exp()
    by_sum = (1 - 2 * p[torch.arange(50), token] + p.square().sum(-1)).sqrt()
    assert (logit_gradient_norm(logp, token) - by_sum).abs().max() < 1e-12


def test_entropy_and_gradient_norm_at_their_ends() -> None:
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert token_entropy(sure).item() == 0
    assert logit_gradient_norm(sure, torch.tensor([0])).item() == 0
    assert logit_gradient_norm(sure, torch.tensor([1])).item() == pytest.approx(math.sqrt(2))
    # The square of this one is far below what float32 keeps of 1 - 2 p + sum p^2.
    nearly = torch.tensor([[0.0, -12.0, -30.0]]).log_softmax(-1)
    assert logit_gradient_norm(nearly, torch.tensor([0])).item() == pytest.approx(
        math.sqrt(2) * math.exp(-12), rel=0.02
    )


def scaled(name: str) -> Any:
    """Models whose logits are not just what the output head gives."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {key: value for key, value in _SIZES.items() if key != "head_dim"}
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5)).eval()
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)).eval()
    model = tiny(name)
    if name == "gemma2":
        model.config.final_logit_softcapping = 0.5
    return model


def slow_predictions(model: Any, row: int, temperature: float = 1.0) -> Tensor:
    """[3, N] from full logits of one row alone."""
    ids = tokens(row)
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double() / temperature
    out = torch.zeros(3, len(ids), dtype=torch.float64)
    for t in range(1, len(ids)):
        p = logits[t - 1].softmax(-1)
        out[0, t] = -(p * p.log()).sum()
        out[1, t] = (1 - 2 * p[ids[t]] + p.square().sum()).sqrt()
        out[2, t] = p[ids[t]].log()
    return out


@pytest.mark.parametrize("name", [*ARCHITECTURES, "cohere", "granite"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_predictions_equal_those_from_full_logits(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS", 40 * VOCABULARY)  # several slices
    model, (ids, mask, _) = scaled(name), padded(side)
    found = torch.stack(predictions(model, ids, mask, temperature=0.7))
    assert found.shape == (3, *ids.shape)
    assert (found[:, mask == 0] == 0).all()
    for row in range(len(LENGTHS)):
        mine = found[:, row, mask[row].bool()]
        assert (mine - slow_predictions(model, row, 0.7)).abs().max() < 1e-5
        assert (mine[:, 0] == 0).all()


def test_predictions_step_over_pads_inside_a_row() -> None:
    model, ids = tiny("llama"), tokens(1)[None]
    holes = torch.cat([ids[:, :17], torch.zeros(1, 3, dtype=torch.long), ids[:, 17:]], dim=1)
    mask = torch.ones_like(holes)
    mask[0, 17:20] = 0
    found = predictions(model, holes, mask)
    assert (found.entropy[mask.bool()] - predictions(model, ids).entropy[0]).abs().max() < 1e-5


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS", 16 * 5000)
    model, (ids, mask, _) = tiny("llama", vocab_size=5000), padded("left")
    largest = largest_tensor(lambda: predictions(model, ids, mask))
    assert largest <= 5000 * 64  # the output head itself, and far from 3 * 150 * 5000


def test_attention_baselines_hold_no_tensor_of_n_by_n() -> None:
    N = 2048
    model, ids = tiny("llama", max_position_embeddings=N), torch.randint(3, VOCABULARY, (1, N))
    place = torch.arange(N)
    roles = locate(ids[0], place < 1500, answer_tokens=place == N - 2)
    baseline = Baseline("coupled", model, layers=[0])
    assert largest_tensor(lambda: baseline(ids, None, [roles])) < N * N


def largest_tensor(work: Any) -> int:
    """Elements of the largest tensor that an operation gives while `work` runs."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        work()
    return largest


@pytest.fixture
def training() -> Iterator[Any]:
    """A model in training mode, with dropout and a forward of its own on the backbone, as accelerate puts one there."""
    model = tiny("llama", attention_dropout=0.5)
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    model.train()
    model.model.layers[0].eval()
    yield model


def test_the_model_is_left_as_it_was(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, found = padded("left")
    modes, forward = [one.training for one in training.modules()], training.model.forward
    first = predictions(training, ids, mask)
    assert torch.equal(torch.stack(first), torch.stack(predictions(training, ids, mask)))  # no dropout
    assert not first.logp.requires_grad
    for name in BASELINES:
        Baseline(name, training)(ids, mask, found)
    monkeypatch.setattr(training.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predictions(training, ids, mask)
    assert [one.training for one in training.modules()] == modes
    assert training.model.forward is forward
    assert all(parameter.grad is None for parameter in training.parameters())


def test_models_whose_logits_do_not_come_from_one_backbone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask, _) = tiny("llama"), padded("left")
    with pytest.raises(ValueError, match="LlamaModel has no backbone apart from its head"):
        predictions(model.model, ids, mask)
        predictions(model, ids, mask)


def test_adapters_of_peft_are_part_of_the_predictions() -> None:
    peft = pytest.importorskip("peft")
    model, (ids, mask, _) = tiny("llama"), padded("left")
    plain = predictions(model, ids, mask).logp
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    found = predictions(adapted, ids, mask).logp
    with torch.no_grad():
        logits = adapted(tokens(1)[None]).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(-1, tokens(1)[1:, None])[:, 0]
    assert (found[1, mask[1].bool()][1:] - expected).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-3
