"""Signals: each is what its definition says, from one reading that all of them share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowgraph import Tracer
from flowgraph.adapters.evidence.signals import (
    CONTROLS,
    LONGEST_CONTROL,
    SIGNALS,
    AttentionSignal,
    FlowSignal,
    Place,
    Reading,
    by_position,
    scores_of,
    shuffled,
)
from flowgraph.rl.baselines import Baseline, HeadGroups, calibrate, random_scores
from flowgraph.rows import Rows
from flowgraph.spans import encode_text, locate
from tests.graphs import attention, mask_of
from tests.models import ARCHITECTURES, VOCABULARY, eager_attention, tiny

N, PROMPT = 60, 14
FLOWS = [name for name, signal in SIGNALS.items() if isinstance(signal, FlowSignal) and signal.control is None]
CONTROLLED = [name for name in SIGNALS if name.split("/")[-1] in CONTROLS]

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed: int = 0, length: int = N) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def place(length: int = N) -> Place:
    """The answer is the third and second token from the end."""
    at = torch.arange(length)
    answer = (at >= length - 3) & (at < length - 1)
    return Place(at < PROMPT, at >= PROMPT, answer, (at >= PROMPT) & ~answer)


def other_model() -> Any:
    """The architecture of `tiny("llama")` with other weights, attention as sharp."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(
                parameter
            )
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def other() -> Any:
    return other_model()


@pytest.fixture
def reading(model: Any, other: Any) -> Reading:
    return read(model, other)


def read(model: Any, other: Any = None, **changes: Any) -> Reading:
    return Reading(model, tokens(), place(), **{"other": other, "flashtrace": _flashtrace} | changes)


def _flashtrace(reading: Reading) -> Tensor:
    return torch.arange(len(reading)).float()


def dense(rows: Rows) -> Tensor:
    """[N, N] float64."""
    W = torch.zeros(rows.num_tokens, rows.num_tokens, dtype=torch.float64)
    for start, weight in rows.blocks():
        W[start : start + len(weight), : weight.shape[1]] = weight
    return W


def slow_flow(W: Tensor, sources: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(throughput, reach) token by token, as docs/method.md defines them."""
    n = len(W)
    reach = sinks.double()
    for i in reversed(range(n)):
        if not sinks[i]:
            reach[i] = sum((W[k, i] * reach[k] for k in range(i + 1, n)), torch.tensor(0.0).double())
    flow = (sources & (reach > 0)).double()
    flow /= flow.sum()
    for k in range(n):
        for i in range(k):
            if not sinks[i] and reach[i] > 0:
                flow[k] += flow[i] * W[k, i] * reach[k] / reach[i]
    return 2 * flow, reach


# --- laws of all signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
def test_scores_are_finite_float64_on_the_cpu_and_not_negative(reading: Reading, name: str) -> None:
    scores = SIGNALS[name](reading)
    assert scores.shape == (N,) and scores.dtype == torch.float64 and scores.device.type == "cpu"
    assert bool(((scores >= 0) & scores.isfinite()).all()) and bool((scores[place().credit_mask] > 0).any())
    assert torch.equal(scores, scores_of(reading, [name])[name])


def test_a_reading_gives_the_same_bits_whatever_was_asked_before(model: Any, other: Any) -> None:
    forwards = scores_of(read(model, other), list(SIGNALS))
    shared = read(model, other)
    backwards = scores_of(shared, list(SIGNALS)[::-1])
    again = scores_of(shared, list(SIGNALS))
    for name, scores in forwards.items():
        assert torch.equal(scores, backwards[name]) and torch.equal(scores, again[name]), name
        alone = read(model, other)
        assert torch.equal(scores, scores_of(alone, [name])[name]), name


def test_who_changes_scores_changes_nobody_elses(reading: Reading) -> None:
    before = scores_of(reading, ["flow", "reach", "mix", "entropy", "answer_attention"])
    kept = {name: scores.clone() for name, scores in before.items()}
    for scores in before.values():
        scores.fill_(7)
    for name, scores in scores_of(reading, list(kept)).items():
        assert torch.equal(scores, kept[name]), name


def test_the_model_is_left_as_it_was(other: Any) -> None:
    model = tiny("llama").train()
    ids = tokens()[None]
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    scores_of(read(model, other), list(SIGNALS))
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_the_model_runs_once_for_attention_and_once_for_predictions(model: Any) -> None:
    passes: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-1] == N:
            passes.append(inputs[0].shape[-1])

    hook = model.model.embed_tokens.register_forward_pre_hook(count)
    try:
        heads = HeadGroups(((2, 0),), ((3, 1),))
        own_passes = ("routes", "gradient_input")
        names = [name for name in SIGNALS if name.split("/")[0] not in own_passes and "random_model" not in name]
        scores_of(read(model, heads=heads), names)
    finally:
        hook.remove()
    assert len(passes) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_read(name: str) -> None:
    reading = read(tiny(name), tiny(name))
    names = ["flow", "reach/value_norm/sparse", "answer_attention", "entropy", "future_attention", "flow/positions"]
    assert set(scores_of(reading, names)) == set(names)


# --- flow and reach ---------------------------------------------------------------------------------------------------


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6 * float(theirs.max()))


def test_the_names_are_two_scores_by_preset_weights_and_mode_and_the_mix() -> None:
    assert len(FLOWS) == 17 and {"flow", "reach/paper", "flow/value_norm", "reach/paper/value_norm/sparse"} < set(FLOWS)
    assert all(signal.name() == name for name, signal in SIGNALS.items() if isinstance(signal, FlowSignal))
    assert FlowSignal("flow", layers=[1, 2], first="dropped").name() == "flow/layers_1_2/first_dropped"


@pytest.mark.parametrize("layers", ["middle", "all", [1, -1]])
@pytest.mark.parametrize("name", [name for name in FLOWS if name.startswith("flow")])
def test_flow_and_reach_are_those_of_a_tracer(model: Any, name: str, layers: Any) -> None:
    signal = SIGNALS[name]
    assert isinstance(signal, FlowSignal)
    signal = replace(signal, layers=layers)
    tracer = Tracer(model, preset=signal.preset, weights=signal.weights, mode=signal.mode, layers=layers)
    trace = tracer.from_ids(
        tokens()[None], prompt_mask=place().prompt_mask[None], answer_tokens=place().answer_tokens[None]
    )[0]
    reading = read(model)
    same(signal(reading), trace.flow.throughput)
    same(replace(signal, score="reach")(reading), trace.flow.reach)


@pytest.mark.real
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_flow_and_reach_are_those_of_a_tracer_on_real_text(smollm2: tuple[Any, Any], mode: str) -> None:
    model, tokenizer = smollm2
    prompt = "A crate holds 12 bottles. How many bottles are in 4 crates?\n"
    response = "There are 12 bottles in a crate.\n12 * 4 = 48, so 4 crates hold 48 bottles.\nA: 48"
    encoded = encode_text(tokenizer, prompt, response)
    spans = locate(encoded.token_ids, encoded.prompt_mask, encoded.response_mask, tokenizer=tokenizer)
    reading = Reading(model, encoded.token_ids, Place.of(spans))
    trace = Tracer(model, tokenizer, mode=mode)(prompt, response)
    assert torch.equal(reading.sinks("flowgraph"), trace.spans.answer_mask)
    same(FlowSignal("flow", mode=mode)(reading), trace.flow.throughput)
    same(FlowSignal("reach", mode=mode)(reading), trace.flow.reach)


def test_the_mix_is_the_geometric_mean_of_shares(reading: Reading) -> None:
    credit = place().credit_mask
    flow, reach, mix = scores_of(reading, ["flow", "reach", "mix"]).values()
    torch.testing.assert_close(mix, (flow / flow[credit].sum() * reach / reach[credit].sum()) ** 0.5)


def test_without_the_first_token_its_column_is_gone_and_the_rest_is_as_it_was(reading: Reading, model: Any) -> None:
    W = dense(reading.rows())
    torch.testing.assert_close(W, eager_attention(model, [2, 3], input_ids=tokens()[None])[0], rtol=0, atol=1e-6)
    W[:, 0] = 0
    assert torch.equal(dense(reading.rows(first="dropped")), W)
    throughput, reach = slow_flow(W, place().prompt_mask, reading.sinks("flowgraph"))
    same(FlowSignal("flow", first="dropped")(reading), throughput)
    same(FlowSignal("reach", first="dropped")(reading), reach)
    assert float(FlowSignal("reach", first="dropped")(reading)[0]) == 0
    below = W.masked_fill(torch.ones(N, N).triu().bool(), 0)  # no token counts for itself
    sinks = reading.sinks("flowgraph")
    torch.testing.assert_close(AttentionSignal(first="dropped")(reading), below[sinks].mean(0))


def test_a_trace_without_answer_has_scores_of_zero(model: Any) -> None:
    nothing = Reading(model, tokens(), replace(place(), answer_tokens=torch.zeros(N, dtype=torch.bool)))
    for name in ("flow", "reach", "mix", "flow/sparse", "answer_attention"):
        assert not scores_of(nothing, [name])[name].any(), name


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_control_is_not_the_signal_itself(reading: Reading, name: str) -> None:
    ours, real = scores_of(reading, [name, name.split("/")[0]]).values()
    assert not torch.allclose(ours, real, rtol=0.05)


def test_seven_controls_are_offered() -> None:
    expected = {f"{score}/{control}" for score in ("flow", "reach") for control in CONTROLS}
    assert set(CONTROLLED) == expected | {"answer_attention/random_model"}


@pytest.mark.parametrize("weights", ["attention", "value_norm"])
@pytest.mark.parametrize("control", ["positions", "shuffled"])
def test_controls_keep_the_sums_of_rows_and_the_order_of_time(reading: Reading, control: str, weights: str) -> None:
    before, after = dense(reading.rows(weights=weights)), dense(reading.rows(weights=weights, control=control))
    torch.testing.assert_close(after.sum(1), before.sum(1), rtol=0, atol=1e-6)
    assert not after.triu(1).any() and bool((after >= 0).all())


def test_shuffling_keeps_the_weights_of_a_row_and_its_diagonal(reading: Reading) -> None:
    before, after = dense(reading.rows()), dense(reading.rows(control="shuffled"))
    assert torch.equal(before.diagonal(), after.diagonal()) and not torch.equal(before, after)
    assert torch.equal(before.sort(1).values, after.sort(1).values)
    moved = (before != after).tril(-1).double().mean() * 2
    assert moved > 0.8  # not a few places only


def test_the_shuffle_goes_by_the_token_ids() -> None:
    W = attention(30, dtype=torch.float32)
    assert torch.equal(shuffled(W, tokens(1, 30)), shuffled(W, tokens(1, 30)))
    assert not torch.equal(shuffled(W, tokens(1, 30)), shuffled(W, tokens(2, 30)))


def test_position_rows_are_means_over_a_distance() -> None:
    W = attention(50)
    W[:, 0] += 0.3
    n = len(W)

    def kind(k: int, i: int) -> str:
        if i == k:
            return "itself"
        return "first" if i == 0 else str(math.floor(math.log((n - 1) / (k - i)) / math.log(1.1)))

    pairs = [(k, i) for k in range(1, n) for i in range(k + 1)]
    members: dict[str, list[float]] = {}
    for k, i in pairs:
        members.setdefault(kind(k, i), []).append(float(W[k, i]))
    expected = torch.zeros_like(W)
    for k, i in pairs:
        expected[k, i] = sum(members[kind(k, i)]) / len(members[kind(k, i)])
    expected *= (W.sum(1) / expected.sum(1).clamp(min=1e-300))[:, None]
    expected[0, 0] = W[0, 0]
    torch.testing.assert_close(by_position(W), expected)
    assert {kind(9, 9 - d) for d in range(1, 9)} == {kind(40, 40 - d) for d in range(1, 9)}
    assert len({kind(9, 9 - d) for d in range(1, 9)}) == 8  # near ones are told apart


def test_position_rows_forget_what_stands_where_and_keep_decay_and_first_token() -> None:
    n = 120
    k, i = torch.arange(n)[:, None], torch.arange(n)
    smooth = torch.where(k >= i, 1 / (1.0 + (k - i)), 0.0).double()
    smooth[:, 0] = 1
    loud = smooth.clone()
    loud[50:, 40] += 20  # everything later looks at token 40
    smooth, loud = smooth / smooth.sum(1, keepdim=True), loud / loud.sum(1, keepdim=True)
    kept = by_position(smooth)
    late = slice(60, None)
    assert float((kept - smooth).abs()[late].sum(1).max()) < 0.1
    forgotten = by_position(loud)
    assert float(loud[late, 40].mean()) > 0.5 and float(forgotten[late, 40].max()) < 0.1
    # No other row has a token at the distance that token 1 has from the last row, so its own mean would tell on it.
    secret = smooth.clone()
    secret[-1] = 0
    secret[-1, 1] = 1
    assert float(by_position(secret)[-1, 1]) < 0.05


def test_random_models_are_read_like_the_model(other: Any, model: Any) -> None:
    reading, theirs = read(model, other), read(other)
    for score in ("flow", "reach"):
        assert torch.equal(FlowSignal(score, control="random_model")(reading), FlowSignal(score)(theirs))
    assert torch.equal(AttentionSignal(control="random_model")(reading), AttentionSignal()(theirs))


# --- the others -------------------------------------------------------------------------------------------------------

OURS = {name: name for name in ("random", "entropy", "gradient_norm", "future_attention", "windowed_distance")}


@pytest.mark.parametrize("name", [*OURS, "answer_attention"])
def test_signals_are_the_baselines_of_the_same_name(reading: Reading, model: Any, name: str) -> None:
    at = place()
    for preset in ("flowgraph", "paper") if name == "answer_attention" else ("flowgraph",):
        spans = locate(tokens(), at.prompt_mask, answer_tokens=at.answer_tokens, preset=preset)
        theirs = Baseline(name, model)(tokens()[None], None, [spans])[0]
        ours = SIGNALS[name if preset == "flowgraph" else f"{name}/paper"](reading)
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_heads_come_from_the_caller_or_from_the_trace(model: Any) -> None:
    at = place()
    spans = locate(tokens(), at.prompt_mask, answer_tokens=at.answer_tokens)
    own = calibrate(model, tokens()[None], None, [spans])
    assert read(model).heads() == own
    given = HeadGroups(own.global_heads, own.local_heads)  # the wrong way round
    assert read(model, heads=given).heads() == given
    for name in ("future_attention", "windowed_distance"):
        assert not torch.equal(SIGNALS[name](read(model, heads=given)), SIGNALS[name](read(model)))


def test_attention_to_the_answer_is_read_from_the_rows_where_flow_ends(reading: Reading) -> None:
    for preset, rows in (("flowgraph", [N - 4, N - 3]), ("paper", [N - 3, N - 2])):
        sinks = reading.sinks(preset)
        assert torch.equal(sinks, mask_of(N, *rows))
        W = dense(reading.rows())[rows].tril(N - 5 if preset == "flowgraph" else N - 4)
        torch.testing.assert_close(AttentionSignal(preset=preset)(reading), W.mean(0))
        # What nothing else reads can reach the answer by these rows alone.
        reach = FlowSignal("reach", preset=preset)(reading)
        assert bool((reach[sinks] == 1).all()) and not reach[rows[1] + 1 :].any()


def test_random_numbers_have_three_seeds(reading: Reading) -> None:
    drawn = scores_of(reading, ["random", "random/1", "random/2"])
    for seed, scores in enumerate(drawn.values()):
        assert torch.equal(scores, random_scores(tokens(), seed).double())


def test_flashtrace_is_what_the_caller_brings(model: Any) -> None:
    assert torch.equal(scores_of(read(model), ["flashtrace"])["flashtrace"], torch.arange(N).double())
    with pytest.raises(ValueError, match=r"'flashtrace' needs .* flashtrace="):
        scores_of(read(model, flashtrace=None), ["flashtrace"])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_known_ones(reading: Reading) -> None:
    with pytest.raises(ValueError, match=r"unknown signal 'flwo', 'x'; known are flow, .*random_model") as error:
        scores_of(reading, ["flow", "flwo", "x"])
    assert all(name in str(error.value) for name in SIGNALS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score", "throughput"),
        ("preset", "mine"),
        ("weights", "norm"),
        ("mode", "edges"),
        ("first", "gone"),
        ("control", "x"),
    ],
)
def test_unknown_choices_are_named(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*got '{value}'"):
        FlowSignal(**{field: value})  # type: ignore[arg-type]


def test_a_random_model_must_be_given(model: Any) -> None:
    with pytest.raises(ValueError, match=r"random_model.*other="):
        scores_of(read(model), ["flow/random_model"])


def test_long_traces_are_refused_by_controls_that_hold_all_rows() -> None:
    length = LONGEST_CONTROL + 1
    model = tiny("llama", num_hidden_layers=1, hidden_size=16, max_position_embeddings=length)
    reading = Reading(model, tokens(length=length), place(length))
    for control in ("positions", "shuffled"):
        with pytest.raises(ValueError, match=rf"at most {LONGEST_CONTROL} tokens, got {length}"):
            reading.rows(control=control)


def test_ids_and_masks_that_do_not_fit_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match=r"token_ids must be .* got \[1, 60\]"):
        Reading(model, tokens()[None], place())
    with pytest.raises(ValueError, match=r"place.credit_mask must be bool \[N\] = \[60\].*torch.int64"):
        Reading(model, tokens(), replace(place(), credit_mask=torch.ones(N).long()))
    with pytest.raises(ValueError, match=r"place.prompt_mask must be .* got \[3\]"):
        Reading(model, tokens(), replace(place(), prompt_mask=torch.ones(3).bool()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_are_none_are_refused_with_the_name_and_the_token(model: Any, bad: float) -> None:
    scores = torch.ones(N)
    scores[3] = bad
    with pytest.raises(ValueError, match=rf"'flashtrace' gave {bad} at token 3"):
        scores_of(read(model, flashtrace=lambda reading: scores), ["flashtrace"])
    with pytest.raises(ValueError, match=r"'flashtrace' gave scores \[4\], not \[N\] = \[60\]"):
        scores_of(read(model, flashtrace=lambda reading: torch.ones(4)), ["flashtrace"])


def test_only_a_few_kinds_of_rows_are_held(reading: Reading) -> None:
    first = reading.rows()
    assert reading.rows() is first
    for layer in range(6):
        reading.rows([layer])
    assert reading.rows() is not first
