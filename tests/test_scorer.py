"""The scorer: layouts, batches, bad samples, newer weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from flowgraph import Tracer, capture
from flowgraph.credit import SCORES
from flowgraph.rl import BASELINES, FlowConfig, Scored, Scorer
from flowgraph.rl.baselines import NEED_HEADS, HeadGroups
from tests.models import tiny
from tests.written import ANSWERS, TOKENIZER, VOCABULARY, ids, is_mark, marked, policy, written_by_hand

PROMPTS = ["?", ";;;;;;;", "?;?;", ";;;;;;;;;;;;"]
RESPONSES = [marked(3, 4), marked(9, 0), marked(0, 6, end=False), marked(5, 2)]


def rollouts() -> tuple[list[Tensor], list[Tensor]]:
    """Jagged ids and response masks."""
    token_ids, masks = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        start = ids(prompt, end=False)
        token_ids.append(torch.tensor(start + response))
        masks.append(torch.arange(len(start) + len(response)) >= len(start))
    return token_ids, masks


def by_hand(**changes: Any) -> Scorer:
    defaults = {"answer": ANSWERS, "preset": "paper", "gain": 3.0}
    return Scorer(written_by_hand(), TOKENIZER, FlowConfig(**{**defaults, **changes}))


def pad(values: list[Tensor], side: str) -> Tensor:
    width = max(map(len, values)) + 3
    out = values[0].new_zeros(len(values), width)
    for row, value in zip(out, values, strict=True):
        row[slice(-len(value), None) if side == "left" else slice(len(value))] = value
    return out


def scored_in(layout: str, scorer: Scorer) -> tuple[Scored, tuple[int, int] | None, Tensor | None]:
    """Scores of the rollouts in a layout; its shape and ids, where it is one tensor."""
    token_ids, masks = rollouts()
    if layout == "jagged":
        return scorer.credits(token_ids, masks), None, None
    if layout == "nested":
        nested = [torch.nested.nested_tensor(values, layout=torch.jagged) for values in (token_ids, masks)]
        return scorer.credits(*nested), None, None
    if layout == "packed":
        batch = torch.cat(token_ids)[None]
        places = torch.cat([torch.arange(len(one)) for one in token_ids])[None]
        return scorer.credits(batch, torch.cat(masks)[None], position_ids=places), (1, batch.shape[1]), batch
    batch, real = pad(token_ids, layout), pad([torch.ones_like(one) for one in token_ids], layout)
    scored = scorer.credits(batch, pad(masks, layout), attention_mask=real)
    return scored, (batch.shape[0], batch.shape[1]), batch


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("layout", ["jagged", "nested", "left", "right", "packed"])
def test_the_token_that_carries_all_flow_gets_the_gain_in_every_layout(layout: str, budget: int) -> None:
    scored, shape, batch = scored_in(layout, by_hand(max_batch_tokens=budget))
    for weights, token_ids in zip(scored, rollouts()[0], strict=True):
        assert torch.equal(weights, torch.where(is_mark(token_ids), 3.0, 1.0))
    if shape is not None and batch is not None:
        assert torch.equal(scored.to_layout(shape), torch.where(is_mark(batch), 3.0, 1.0))


@pytest.mark.parametrize("score", [*SCORES, *BASELINES])
def test_batching_changes_nothing(score: str) -> None:
    model = policy()
    token_ids, masks = rollouts()
    heads = HeadGroups(local_heads=((1, 0),), global_heads=((1, 3),))
    found = []
    for budget in (1, 60, 10_000):
        config = FlowConfig(score=score, answer=ANSWERS, rule="proportional", max_batch_tokens=budget, heads=heads)
        found.append(Scorer(model, TOKENIZER, config).credits(token_ids, masks))
    backwards = Scorer(model, TOKENIZER, config).credits(token_ids[::-1], masks[::-1])
    for number in range(len(token_ids)):
        for other in (found[1][number], found[2][number], backwards[len(token_ids) - 1 - number]):
            torch.testing.assert_close(found[0][number], other, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    token_ids, masks = rollouts()
    scorer = Scorer(policy(), TOKENIZER, FlowConfig(answer=ANSWERS))
    one, two = scorer.credits(token_ids, masks), scorer.credits(token_ids, masks)
    assert all(torch.equal(a, b) for a, b in zip(one.scores, two.scores, strict=True))


@pytest.mark.parametrize("mode", ["edges", "exact"])
def test_the_same_queries_and_keys_give_the_same_bits(mode: str) -> None:
    """One pass over a batch; scored together, in another order, and row by row."""
    token_ids, masks = rollouts()
    batch, real = pad(token_ids, "right"), pad([torch.ones_like(one) for one in token_ids], "right").bool()
    prompt = real & ~pad(masks, "right")
    model = policy()
    captured = capture(model, batch, real)
    tracer = Tracer(model, TOKENIZER, answer=ANSWERS, mode=mode)

    def scores(rows: list[int]) -> list[Tensor]:
        some = captured.select(rows)
        return [one.throughput for one in tracer.from_ids(batch[rows], real[rows], prompt[rows], captured=some)]

    together = scores([0, 1, 2, 3])
    backwards = scores([3, 2, 1, 0])[::-1]
    alone = [scores([row])[0] for row in range(4)]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_it_is_the_tracer() -> None:
    token_ids, masks = rollouts()
    model = policy()
    scored = Scorer(model, TOKENIZER, FlowConfig(answer=ANSWERS)).credits(token_ids, masks)
    for number, (one, response) in enumerate(zip(token_ids, masks, strict=True)):
        (trace,) = Tracer(model, TOKENIZER, answer=ANSWERS).from_ids(one[None], prompt_mask=~response[None])
        torch.testing.assert_close(scored[number], trace.weights, rtol=1e-5, atol=1e-5)
        assert torch.equal(scored.masks[number], trace.graph.credit_mask)
        assert scored.flags[number] == trace.flags and scored.text[number] == trace.text


@pytest.mark.parametrize("score", NEED_HEADS)
def test_heads_are_calibrated_once(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the responses of the first call, all together: neither chunks nor order have a say."""
    token_ids, masks = rollouts()
    config = FlowConfig(score=score, answer=ANSWERS, rule="proportional", max_batch_tokens=100)
    scorer = Scorer(policy(), TOKENIZER, config)
    first = scorer.credits(token_ids, masks)
    backwards = Scorer(policy(), TOKENIZER, config).credits(token_ids[::-1], masks[::-1])
    monkeypatch.setattr("flowgraph.rl.scorer.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    for one, other, again in zip(first, list(backwards)[::-1], scorer.credits(token_ids, masks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(one, again)


@pytest.mark.parametrize("score", ["throughput", "entropy"])
def test_tool_output_is_never_credited(score: str) -> None:
    token_ids, masks = rollouts()
    tools = [is_mark(one) for one in token_ids]
    config = FlowConfig(score=score, answer=ANSWERS, preset="paper")
    scorer = Scorer(written_by_hand(), TOKENIZER, config)
    by_mask = scorer.credits(token_ids, masks, tool_mask=tools)
    by_hole = scorer.credits(token_ids, [mask & ~tool for mask, tool in zip(masks, tools, strict=True)])
    for number, tool in enumerate(tools):
        for scored in (by_mask, by_hole):
            assert (scored[number][tool] == 1).all() and not scored.masks[number][tool].any()
            assert (score == "entropy") == bool((scored[number] > 1).any())


def test_per_batch_ranks_all_tokens_together() -> None:
    token_ids, masks = rollouts()
    how: dict[str, Any] = {"answer": ANSWERS, "top": 0.1, "gain": 2.0}
    model = policy()
    by_row = Scorer(model, TOKENIZER, FlowConfig(**how)).credits(token_ids, masks)
    together = Scorer(model, TOKENIZER, FlowConfig(**how, per="batch")).credits(token_ids, masks)
    credited = torch.cat(list(together)) > 1
    scores, allowed = torch.cat(together.scores), torch.cat(together.masks)
    assert scores[credited].min() >= scores[allowed & ~credited].max()
    assert not torch.equal(credited, torch.cat(list(by_row)) > 1)


# --- what could not score anything -----------------------------------------------------------------------------------


def test_without_a_tokenizer_no_answer_is_found() -> None:
    with pytest.raises(ValueError, match="tokenizer is None: answers are found in the text"):
        Scorer(policy(), None, FlowConfig(no_answer="tail"))


def test_a_model_or_a_layer_that_cannot_be_read_is_said_when_asked() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"BloomForCausalLM can't be traced: .*attention interface"):
        Scorer(bloom, TOKENIZER).check()
    for score in ("throughput", "answer_attention", "coupled"):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM can't be traced: .*layers \[40\]"):
            Scorer(policy(), TOKENIZER, FlowConfig(layers=[40], score=score)).check()
    with pytest.raises(ValueError, match="Gemma2ForCausalLM can't be traced"):
        Scorer(tiny("gemma2", vocab_size=VOCABULARY), TOKENIZER, FlowConfig(score="routes")).check()
    Scorer(bloom, TOKENIZER, FlowConfig(score="entropy")).check()  # reads no attention


@pytest.mark.parametrize("score", [*SCORES, *BASELINES])
def test_asking_leaves_nothing_behind(score: str) -> None:
    scorer, other = (Scorer(policy(), TOKENIZER, FlowConfig(score=score, answer=ANSWERS)) for _ in range(2))
    scorer.check()
    assert all(parameter.grad is None for parameter in scorer.model.parameters())
    for one, two in zip(scorer.credits(*rollouts()).scores, other.credits(*rollouts()).scores, strict=True):
        assert torch.equal(one, two)


# --- bad samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 10_000])
def test_bad_samples_cost_only_themselves(budget: int) -> None:
    token_ids, masks = rollouts()
    alone = by_hand().credits(token_ids, masks)
    long = torch.tensor(ids("?", end=False) + marked(300, 4))
    bad = {
        "id": (torch.tensor([5, 6, VOCABULARY, 7]), torch.tensor([0, 0, 1, 1])),
        "long": (long, torch.arange(len(long)) > 0),
        "no prompt": (torch.tensor(marked(1, 1)), torch.ones(len(marked(1, 1)))),
        "empty": (torch.tensor([5, 6]), torch.tensor([0, 0])),
        "nothing": (torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.bool)),
        "no answer": (torch.tensor(ids("?@aaa")), torch.tensor([0, 1, 1, 1, 1, 1])),
    }
    mixed = by_hand(max_batch_tokens=budget).credits(
        [token_ids[0], *(one for one, _ in bad.values()), *token_ids[1:]],
        [masks[0], *(mask for _, mask in bad.values()), *masks[1:]],
    )
    for number in range(1, 1 + len(bad)):
        assert (mixed[number] == 1).all()
    flags = dict(zip(bad, mixed.flags[1:], strict=False))
    assert flags["id"] == flags["long"] == flags["no prompt"] == ("failed",)
    assert flags["empty"] == flags["nothing"] == ("empty",) and flags["no answer"] == ("no_answer",)
    assert sorted(mixed.failed) == [1, 2, 3]
    assert "token_ids must be in 0.." in mixed.failed[1] and "more than the 256" in mixed.failed[2]
    assert "prompt_mask marks no token" in mixed.failed[3]
    for good, other in zip(alone, [mixed[0], *mixed[1 + len(bad) :]], strict=True):
        assert torch.equal(good, other)


def test_heads_are_calibrated_on_sound_samples() -> None:
    token_ids, masks = rollouts()
    without_prompt = torch.tensor(marked(200, 4))
    config = FlowConfig(score="future_attention", answer=ANSWERS)
    scored = Scorer(policy(), TOKENIZER, config).credits(
        [without_prompt, *token_ids], [torch.ones(len(without_prompt)), *masks]
    )
    assert list(scored.failed) == [0]


def test_without_an_answer_no_pass_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowgraph.tracer.capture", lambda *_, **__: pytest.fail("a pass"))
    token_ids, response = torch.tensor(ids("?@aaa")), torch.tensor([0, 1, 1, 1, 1, 1])
    scored = by_hand().credits([token_ids], [response], truncated=[True])
    assert set(scored.flags[0]) == {"no_answer", "cut_off"} and (scored[0] == 1).all()
    assert scored.masks[0].tolist() == [False, True, True, True, True, False] and scored.text[0] is not None


def test_weights_of_nan_fail_samples_and_say_so() -> None:
    model = policy()
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)
    scored = Scorer(model, TOKENIZER, FlowConfig(answer=ANSWERS)).credits(*rollouts())
    assert sorted(scored.failed) == [0, 1, 2, 3] and "nan" in scored.failed[0].lower()


def test_out_of_memory_is_met_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = by_hand()
    trace = scorer.tracer.from_ids

    def small(token_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(token_ids) > 1 or token_ids.shape[1] > 24:
            raise torch.OutOfMemoryError("no memory left")
        return trace(token_ids, *args, **kwargs)

    monkeypatch.setattr(scorer.tracer, "from_ids", small)
    scored = scorer.credits(*rollouts())
    assert scored.failed == {2: "no memory left"} or set(scored.failed) < {0, 1, 2, 3}
    assert all((scored[n] == 1).all() == (n in scored.failed) for n in range(4))


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    scorer = by_hand()
    monkeypatch.setattr(scorer.tracer, "from_ids", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        scorer.credits(*rollouts())


def test_an_empty_batch() -> None:
    assert len(by_hand().credits([], [])) == 0


# --- newer weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "state dict", "folder"])
def test_a_stale_copy_takes_over_the_policy(source: str, tmp_path: Path) -> None:
    newer, stale = policy(), policy()
    for parameter in newer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    config = FlowConfig(answer=ANSWERS, rule="proportional")
    wanted = Scorer(newer, TOKENIZER, config).credits(*rollouts())
    scorer = Scorer(stale, TOKENIZER, config)
    before = scorer.credits(*rollouts())
    if source == "folder":
        newer.save_pretrained(tmp_path)
    scorer.refresh({"model": newer, "state dict": newer.state_dict(), "folder": tmp_path}[source])
    after = scorer.credits(*rollouts())
    assert all(torch.equal(a, b) for a, b in zip(after.scores, wanted.scores, strict=True))
    assert not torch.equal(torch.cat(before.scores), torch.cat(after.scores))


def test_tied_weights_may_be_left_out() -> None:
    tied = policy(tie_word_embeddings=True)
    weights = {name: value for name, value in tied.state_dict().items() if name != "lm_head.weight"}
    Scorer(copy.deepcopy(tied), TOKENIZER).refresh(weights)


def test_weights_that_do_not_fit_change_nothing() -> None:
    scorer = Scorer(policy(), TOKENIZER)
    before = copy.deepcopy(scorer.model.state_dict())
    weights = {name: value + 1 for name, value in before.items()}
    weights["more"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
    with pytest.raises(
        ValueError,
        match=r"don't fit LlamaForCausalLM: missing: model.norm.weight; unknown: more; other shape: lm_head.weight \[",
    ):
        scorer.refresh(weights)
    assert all(torch.equal(before[name], value) for name, value in scorer.model.state_dict().items())


def with_adapters(model: Any) -> dict[str, Tensor]:
    """The state dict of a PEFT model, which verl leaves beside a config.json."""
    names = {name: name.replace("q_proj.weight", "q_proj.base_layer.weight") for name in model.state_dict()}
    weights = {f"base_model.model.{names[name]}": value for name, value in model.state_dict().items()}
    return weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 64)}


def without_a_layer(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "layers.1." not in name}


def with_a_shorter_norm(model: Any) -> dict[str, Tensor]:
    return model.state_dict() | {"model.norm.weight": torch.ones(63)}


@pytest.mark.parametrize(
    ("weights_of", "message"),
    [
        (with_adapters, r"missing: lm_head.weight, .* and more; unknown: base_model.model.*merge_and_unload"),
        (without_a_layer, r"missing: model.layers.1.input_layernorm.weight, .* and more$"),
        (with_a_shorter_norm, r"other shape: model.norm.weight \[63\] instead of \[64\]$"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(weights_of: Any, message: str, tmp_path: Path) -> None:
    """transformers would draw what is missing at random."""
    scorer = Scorer(policy(), TOKENIZER)
    before = copy.deepcopy(scorer.model.state_dict())
    policy().config.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in weights_of(policy()).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path} doesn't fit LlamaForCausalLM: {message}"):
        scorer.refresh(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in scorer.model.state_dict().items())


def test_a_checkpoint_with_more_than_the_scorer_has_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as the head of a critic."""
    model, trained = policy(), policy()
    scorer = Scorer(model, TOKENIZER)
    trained.lm_head.weight.data += 1
    trained.config.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in trained.state_dict().items()} | {"v_head.weight": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scorer.refresh(tmp_path)
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight)
    assert "has no place for: unknown: v_head.weight" in caplog.text


def test_a_folder_of_adapters_alone_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    peft.get_peft_model(policy(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has adapters of PEFT apart from .*merge_and_unload"):
        Scorer(policy(), TOKENIZER).refresh(tmp_path)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone is no folder"):
        Scorer(policy(), TOKENIZER).refresh(tmp_path / "gone")


def test_another_model_with_the_same_tokenizer_may_score() -> None:
    smaller = tiny("qwen3", vocab_size=VOCABULARY, num_hidden_layers=2)
    scored = Scorer(smaller, TOKENIZER, FlowConfig(answer=ANSWERS)).credits(*rollouts())
    assert not scored.failed and all((one > 1).any() for one in scored)
