"""The whole way: from ids, text and chat messages to credits, on tiny models and on the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgraph import Threshold, TokenGraph, TopK, Tracer, credit, trace_flow
from flowgraph import options as options_module
from flowgraph.capture import recording
from tests.graphs import mask_of
from tests.models import VOCABULARY, Parallel, eager_attention, tiny
from tests.written import TOKENIZER

T = 30


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(2))


def prompts(rows: int = 3, length: int = 10) -> Tensor:
    return (torch.arange(T) < length).expand(rows, T).clone()


def answers(rows: int = 3, start: int = 26, stop: int = 28) -> Tensor:
    place = torch.arange(T)
    return ((place >= start) & (place < stop)).expand(rows, T).clone()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def by_hand(model: Any, input_ids: Tensor, layers: list[int], preset: str = "flowgraph") -> Tensor:
    """[T] throughput from dense eager attention in float64, with the definitions of docs/method.md and no FlowGraph."""
    W = eager_attention(model, layers, input_ids=input_ids[None])[0].tril(-1)
    sinks = range(25, 27) if preset == "flowgraph" else range(26, 28)
    h = torch.zeros(T, dtype=torch.float64)
    for i in reversed(range(T)):
        h[i] = 1.0 if i in sinks else sum(float(W[k, i] * h[k]) for k in range(i + 1, T))
    f = torch.zeros(T, dtype=torch.float64)
    f[:10] = 1 / 10
    for k in range(T):
        f[k] += sum(float(f[i] * W[k, i] * h[k] / h[i]) for i in range(k) if i not in sinks and h[i] > 0)
    return 2 * f


@pytest.mark.parametrize("preset", ["flowgraph", "paper"])
def test_throughput_is_the_definition(model: Any, preset: str) -> None:
    traces = Tracer(model, preset=preset).from_ids(ids(), prompt_mask=prompts(), answer_tokens=answers())
    for row, trace in enumerate(traces):
        expected = by_hand(model, ids()[row], [2, 3], preset)
        torch.testing.assert_close(trace.throughput.double(), expected, rtol=1e-4, atol=1e-9)
        assert trace.graph.layers == [2, 3]
        top = expected[10:26].argsort(descending=True)[:8] + 10  # ceil(0.4 * 18) = 8 of the 18 outside the answer
        after = expected[28:]
        assert (after == 0).all()
        assert sorted((trace.weights > 1).nonzero().flatten().tolist()) == sorted(top.tolist())


def test_a_batch_equals_its_rows_in_any_layout(model: Any) -> None:
    """Left pads, right pads, packed: each trace gets the credits that it gets alone."""
    tracer, lengths = Tracer(model), (30, 24, 27)
    alone = [
        tracer.from_ids(
            ids()[n : n + 1, :length],
            prompt_mask=prompts(1)[:, :length],
            answer_tokens=answers(1, 20, 22)[:, :length],
        )[0]
        for n, length in enumerate(lengths)
    ]

    def lay_out(values: Tensor, fill: int, side: str) -> Tensor:
        out = torch.full((3, T), fill, dtype=values.dtype)
        for n, length in enumerate(lengths):
            out[n, slice(T - length, T) if side == "left" else slice(0, length)] = values[n, :length]
        return out

    for side in ("left", "right"):
        real = lay_out(torch.ones(3, T, dtype=torch.long), 0, side)
        traces = tracer.from_ids(
            lay_out(ids(), 0, side),
            real,
            lay_out(prompts(), 0, side),
            answer_tokens=lay_out(answers(start=20, stop=22), 0, side),
        )
        assert traces.weights.shape == (3, T)
        for trace, one in zip(traces, alone, strict=True):
            torch.testing.assert_close(trace.throughput, one.throughput, rtol=1e-4, atol=1e-7)
            assert torch.equal(trace.weights, one.weights)
            assert torch.equal(traces.weights[trace.row, trace.positions], one.weights)
        assert (traces.weights[real == 0] == 1).all()

    packed = torch.cat([ids()[n, :length] for n, length in enumerate(lengths)])[None]
    traces = tracer.from_ids(
        packed,
        prompt_mask=torch.cat([prompts()[n, :length] for n, length in enumerate(lengths)])[None],
        answer_tokens=torch.cat([answers(3, 20, 22)[n, :length] for n, length in enumerate(lengths)])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
    )
    assert [len(trace) for trace in traces] == list(lengths) and traces.weights.shape == (1, sum(lengths))
    assert torch.equal(traces.weights[0], torch.cat([one.weights for one in alone]))


def test_a_recorded_pass_takes_the_place_of_our_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, real = Tracer(model), torch.ones(3, T, dtype=torch.bool)
    real[1, :4] = False
    masks: dict[str, Any] = {"prompt_mask": prompts() & real, "answer_tokens": answers()}
    expected = tracer.from_ids(ids(), real, **masks)
    with torch.no_grad(), recording(model) as captures:
        model(ids(), attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0))
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    traces = tracer.from_ids(ids(), real, **masks, captured=captures[0])
    torch.testing.assert_close(traces.flow.throughput, expected.flow.throughput, rtol=1e-4, atol=1e-7)
    assert torch.equal(traces.weights, expected.weights)
    one = {name: mask[2:] for name, mask in masks.items()}
    (alone,) = tracer.from_ids(ids()[2:], real[2:], **one, captured=captures[0].select([2]))
    assert torch.equal(alone.throughput, traces[2].throughput)


def test_a_capture_that_does_not_fit_is_refused(model: Any) -> None:
    with torch.no_grad(), recording(model, layers=[1]) as captures:
        model(ids())
    fits: dict[str, Any] = {"prompt_mask": prompts(), "answer_tokens": answers()}
    assert len(Tracer(model, layers=[1]).from_ids(ids(), **fits, captured=captures[0])) == 3
    with pytest.raises(ValueError, match=r"captured holds layers \[1\], .* are \[2, 3\]"):
        Tracer(model).from_ids(ids(), **fits, captured=captures[0])
    with pytest.raises(ValueError, match=r"captured is of a pass over \[B, T\] = \[2, 30\], input_ids is \[3, 30\]"):
        Tracer(model, layers=[1]).from_ids(ids(), **fits, captured=captures[0].select([0, 1]))


def test_options_reach_where_they_belong(model: Any) -> None:
    def weights(**options: Any) -> Tensor:
        tracer = Tracer(model, **options)
        return tracer.from_ids(ids(), prompt_mask=prompts(), answer_tokens=answers()).weights

    plain = weights()
    assert float(weights(gain=3.0).max()) == 3.0 and int(weights(top=1.0).gt(1).sum()) == 3 * 16
    for options in (
        {"layers": "all"},
        {"preset": "paper"},
        {"edges": TopK(2)},
        {"score": "reach"},
        {"rule": "rank"},
    ):
        assert not torch.equal(weights(**options), plain), options
    for solver in ("scatter", "reference"):
        assert torch.equal(weights(solver=solver), plain)
    absorbing = Tracer(model, absorb_at_prompt=True).from_ids(ids(1), prompt_mask=prompts(1), answer_tokens=answers(1))[
        0
    ]
    inside = absorbing.graph.prompt_mask[absorbing.graph.edge_index[1]]
    assert (absorbing.flow.edge_flow[inside] == 0).all()


def test_question_sinks_and_tools(model: Any) -> None:
    question, tools, sinks = (
        prompts() & (torch.arange(T) >= 5),
        answers(start=15, stop=19),
        answers(start=22, stop=23),
    )
    trace = Tracer(model, top=1.0).from_ids(
        ids(), prompt_mask=prompts(), question_mask=question, tool_mask=tools, sink_mask=sinks
    )[1]
    assert (trace.flow.injection > 0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert trace.graph.answer_mask.nonzero().flatten().tolist() == [22]
    assert trace.flow.flow[15:19].min() > 0 and (trace.weights[15:19] == 1).all() and trace.weights[14] > 1


def test_a_saved_trace_gives_the_same_flow(model: Any, tmp_path: Path) -> None:
    trace = Tracer(model).from_ids(ids(1), prompt_mask=prompts(1), answer_tokens=answers(1))[0]
    trace.graph.save(tmp_path / "trace.safetensors")
    again = trace_flow(TokenGraph.load(tmp_path / "trace.safetensors"))
    assert torch.equal(again.throughput, trace.throughput)
    assert torch.equal(credit(again).weights, trace.weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_mask": None}, r"prompt_mask is missing: \[B, T\] bool"),
        ({"prompt_mask": prompts()[:, :-1]}, r"prompt_mask must be a bool tensor \[B, T\] = \[3, 30\]"),
        ({"prompt_mask": prompts().long()}, r"prompt_mask must be a bool tensor .* torch.int64"),
        ({"prompt_mask": prompts() & mask_of(3, 0, 2)[:, None]}, r"row 1: .*prompt"),
        ({"prompt_mask": torch.ones(3, T, dtype=torch.bool)}, r"row 0: .*response"),
        ({"input_ids": ids()[0]}, r"input_ids must be a tensor of whole numbers \[B, T\], got \[30\]"),
        ({"input_ids": ids().float()}, r"input_ids must be .* torch.float32"),
        ({"input_ids": ids().tolist()}, r"input_ids must be .* got list"),
        (
            {"attention_mask": torch.ones(3, 4)},
            r"attention_mask must be a tensor \[B, T\] = \[3, 30\] like input_ids, got \[3, 4\]",
        ),
        (
            {"attention_mask": torch.ones(3, T).long() * mask_of(3, 0, 1)[:, None]},
            r"row 2 of attention_mask is all zeros",
        ),
        ({"answer_tokens": answers(start=8, stop=12)}, r"row 0: .*answer.*prompt"),
        ({"answer_tokens": answers().float()}, r"answer_tokens must be a bool tensor"),
        ({"answer_tokens": None}, r"row 0: .*tokenizer"),
        ({"truncated": [True]}, r"truncated must have one entry per row, 3, got 1"),
        ({"question_mask": prompts(length=12)}, r"row 0: .*question_mask"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids must be a tensor \[B, T\]"),
        ({"attention_mask": [[1] * T] * 3}, r"attention_mask must be a tensor \[B, T\] = \[3, 30\] .*, got list"),
        ({"attention_mask": np.ones((3, T))}, r"attention_mask must be a tensor \[B, T\] = \[3, 30\] .*, got ndarray"),
    ],
)
def test_wrong_inputs_get_their_own_errors(model: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "input_ids": ids(),
        "prompt_mask": prompts(),
        "answer_tokens": answers(),
    } | changes
    with pytest.raises(ValueError, match=message):
        Tracer(model).from_ids(**arguments)


def test_a_trace_beyond_the_window_is_refused_until_the_user_insists() -> None:
    model = tiny("llama", max_position_embeddings=20)
    arguments: dict[str, Any] = {"input_ids": ids(), "prompt_mask": prompts(), "answer_tokens": answers()}
    with pytest.raises(ValueError, match=r"row 0: input_ids has 30 tokens, more than the 20 .* max_tokens=30"):
        Tracer(model).from_ids(**arguments)
    assert len(Tracer(model, max_tokens=30).from_ids(**arguments)) == 3


def test_the_window_is_that_of_the_model_inside_its_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Parallel)
    arguments: dict[str, Any] = {"input_ids": ids(), "prompt_mask": prompts(), "answer_tokens": answers()}
    assert len(Tracer(Parallel(tiny("llama"))).from_ids(**arguments)) == 3
    with pytest.raises(ValueError, match="more than the 20 that the model can see"):
        Tracer(Parallel(tiny("llama", max_position_embeddings=20))).from_ids(**arguments)


def test_without_a_named_chunk_a_model_that_cannot_go_on_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("VERY_LONG", 20), ("CHUNK", 8)):
        monkeypatch.setattr(options_module, name, size)
    arguments: dict[str, Any] = {"input_ids": ids(), "prompt_mask": prompts(), "answer_tokens": answers()}
    able, unable = tiny("llama"), tiny("llama")
    for layer in unable.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, plain=plain, **kw: plain(*args, **(kw | {"past_key_values": None}))
    lengths: dict[Any, set[int]] = {able: set(), unable: set()}
    for model, seen in lengths.items():
        model.model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0].shape[1]))
        for memory in (None, 10**9):
            traces = Tracer(model, memory=memory).from_ids(**arguments)
            assert torch.equal(traces.weights, Tracer(tiny("llama"), chunk=None).from_ids(**arguments).weights)
    assert 8 in lengths[able] and lengths[unable] == {4, 8, T}  # 4 and 8: what was tried
    with pytest.raises(ValueError, match="doesn't go on from a cache: pass chunk=None"):
        Tracer(unable, chunk=8).from_ids(**arguments)


def test_whole_numbers_of_any_size_are_ids(model: Any) -> None:
    arguments: dict[str, Any] = {"prompt_mask": prompts(), "answer_tokens": answers()}
    (expected, found) = (Tracer(model).from_ids(one, **arguments) for one in (ids(), ids().int()))
    assert torch.equal(found.weights, expected.weights) and found[0].graph.token_ids.dtype == torch.int64


@pytest.mark.parametrize("mode", ["edges", "sparse"])
def test_pads_in_the_middle_count_in_windows_whatever_the_chunk(mode: str) -> None:
    model, real = tiny("mistral"), torch.ones(1, T, dtype=torch.bool)
    real[:, 12:18] = False
    masks: dict[str, Any] = {"prompt_mask": prompts(1), "answer_tokens": answers(1)}
    whole, parts = (
        Tracer(model, mode=mode, chunk=chunk, edges=Threshold(0.0)).from_ids(ids(1), real, **masks)[0]
        for chunk in (None, 8)
    )
    torch.testing.assert_close(parts.reach, whole.reach, rtol=1e-4, atol=1e-6)


def test_nan_in_the_model_is_named() -> None:
    model = tiny("llama")
    model.model.layers[2].self_attn.q_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"W\[0, 0\] = nan; .* check its inputs"):
        Tracer(model).from_ids(ids(), prompt_mask=prompts(), answer_tokens=answers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "system"}, 'question must be "prompt" or "user", got \'system\''),
        ({"edges": 0.01}, "edges must be Threshold, TopK, Mass"),
        ({"preset": "foo"}, r"preset must be one of \['flowgraph', 'paper'\], got 'foo'"),
        ({"no_answer": "x"}, r"no_answer must be one of \['uniform', 'tail'\], got 'x'"),
        ({"score": "entropy"}, r"score must be one of \['auto', 'throughput', 'reach', 'mix'\], got 'entropy'"),
        ({"rule": "zzz"}, "rule must be one of 'top', .*, got 'zzz'"),
        ({"top": 7}, r"top must be in \(0, 1\], got 7"),
        ({"gain": float("nan")}, "gain must be finite and >= 0, got nan"),
        ({"gain": "1.5"}, "gain must be a number, got '1.5'"),
        ({"temperature": -1}, "temperature must be > 0, got -1"),
        ({"layers": "midle"}, 'layers must be "middle", "all" or a list of layer numbers, got \'midle\''),
        ({"layers": 3}, 'layers must be "middle", "all" or a list of layer numbers, got 3'),
        ({"answer": "boxxed"}, "unknown finder 'boxxed'; use one of"),
        ({"tail_tokens": -1}, "tail_tokens must be at least 1, got -1"),
        ({"max_tokens": -5}, "max_tokens must be None or a number of tokens, 1 or more, got -5"),
        ({"memory": 1.5}, "memory must be None or a number of bytes, got 1.5"),
    ],
)
def test_bad_options_are_refused_at_once(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracer(model, **options)


@pytest.mark.parametrize("mode", ["edges", "sparse", "exact"])
def test_weights_of_a_trace_in_inference_mode_go_into_a_loss(model: Any, mode: str) -> None:
    arguments: dict[str, Any] = {"prompt_mask": prompts(), "answer_tokens": answers()}
    expected = Tracer(model, mode=mode).from_ids(ids(), **arguments)
    with torch.inference_mode():
        traces = Tracer(model, mode=mode).from_ids(ids(), **arguments)
        with recording(model) as captures:
            model(ids())
        recorded = Tracer(model, mode=mode).from_ids(ids(), **arguments, captured=captures[0])
    losses = torch.ones(3, T, requires_grad=True)
    for found in (traces, recorded):
        assert torch.equal(found.weights, expected.weights)
        (losses * found.weights).sum().backward()


def test_traces_are_themselves_and_no_other(model: Any) -> None:
    one, other = (
        Tracer(model, keep_attention=True).from_ids(ids(1), prompt_mask=prompts(1), answer_tokens=answers(1))[0]
        for _ in range(2)
    )
    for a, b in ((one, other), (one.flow, other.flow), (one.credit, other.credit), (one.captured, other.captured)):
        assert a == a and a != b and len({a, b}) == 2


def test_a_budget_may_be_written_as_a_float(model: Any) -> None:
    memory = Tracer(model, memory=8e9).options.memory
    assert memory == 8 * 10**9 and type(memory) is int


def test_of_a_packed_row_the_last_document_is_cut_off(model: Any) -> None:
    arguments: dict[str, Any] = {"prompt_mask": prompts(2), "answer_tokens": answers(2)}
    arguments["prompt_mask"][1, 15:18] = True
    arguments["answer_tokens"][1, 12:13] = True
    positions = torch.arange(T).expand(2, T).clone()
    positions[1, 15:] -= 15
    for truncated, cut in (([False, True], [False, False, True]), ([True, False], [True, False, False])):
        traces = Tracer(model).from_ids(ids(2), **arguments, position_ids=positions, truncated=truncated)
        assert ["cut_off" in trace.flags for trace in traces] == cut


def test_a_model_is_no_name_of_one() -> None:
    with pytest.raises(ValueError, match=r"model must be a model of transformers, got str; load it first"):
        Tracer("Qwen/Qwen3-0.6B")  # type: ignore[arg-type]


def test_prompts_and_responses_of_other_kinds_are_refused(model: Any) -> None:
    tracer, message = Tracer(model, TOKENIZER), {"role": "user", "content": "1+1?"}
    with pytest.raises(ValueError, match="prompt must be text or a list of chat messages, got one message"):
        tracer(message, "2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="response must be text where the prompt is, got messages"):
        tracer("1+1?", [{"role": "assistant", "content": "2"}])
    with pytest.raises(ValueError, match="response must be text or a list of chat messages, got one message"):
        tracer([message], {"role": "assistant", "content": "2"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt must be text or a list of chat messages, got list"):
        tracer(["1+1?"], "2")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="response must begin with an assistant message, got role 'tool'"):
        tracer([message], [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}])


def test_text_needs_a_tokenizer(model: Any) -> None:
    with pytest.raises(ValueError, match=r"text needs a tokenizer: Tracer\(model, tokenizer\)"):
        Tracer(model)("question", "answer")


# --- the real model --------------------------------------------------------------------------------------------------

QUESTION = "A crate holds 12 bottles. How many bottles are in 4 crates?"
RESPONSE = "There are 12 bottles in a crate.\n12 * 4 = 48, so 4 crates hold 48 bottles.\nThe answer is \\boxed{48}."


@pytest.mark.real
def test_text_and_messages(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    tracer = Tracer(model, tokenizer)
    for prompt in (QUESTION + "\n", [{"role": "user", "content": QUESTION}]):
        trace = tracer(prompt, RESPONSE)
        assert trace.answer == "48" and trace.spans.finder == "boxed" and trace.flags == ()
        assert trace.text is not None and "".join(trace.text) == tokenizer.decode(trace.graph.token_ids)
        sinks = trace.graph.answer_mask.nonzero().flatten()
        assert "".join(trace.text[i] for i in (sinks + 1).tolist()) == "48"  # the sinks predict the answer
        assert float(trace.flow.absorbed) == pytest.approx(1)
        assert (trace.weights[~trace.graph.credit_mask] == 1).all()
        assert int((trace.weights > 1).sum()) == -(-4 * int(trace.graph.credit_mask.sum()) // 10)
        assert len(trace.response_weights) == trace.summary()["response_tokens"]
        assert "answer '48'" in repr(trace)
        assert [position for position, _, _ in trace.top(5)] == sorted(
            trace.graph.credit_mask.nonzero().flatten().tolist(),
            key=lambda i: (-float(trace.credit.scores[i]), i),
        )[:5]
        assert json.loads(json.dumps(trace.to_dict()))["answer"]["text"] == "48"
    whole = tracer([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": RESPONSE}])
    assert torch.equal(whole.weights, trace.weights)


@pytest.mark.real
def test_the_preset_says_what_tokens_are_ranked_by(smollm2: tuple[Any, Any]) -> None:
    def ranked_by(**options: Any) -> tuple[str, Tensor, Any]:
        trace = Tracer(*smollm2, layers=[10], **options)(QUESTION, RESPONSE)
        return trace.to_dict()["score"], trace.credit.scores, trace.flow

    name, scores, flow = ranked_by()
    assert name == "mix" and torch.equal(scores, credit(flow, "mix").scores)
    for options in ({"preset": "paper"}, {"score": "throughput"}):
        name, scores, flow = ranked_by(**options)
        assert name == "throughput" and torch.equal(scores, flow.throughput)


@pytest.mark.real
def test_the_question_can_be_narrowed_to_what_the_user_wrote(smollm2: tuple[Any, Any]) -> None:
    trace = Tracer(*smollm2, question="user")([{"role": "user", "content": QUESTION}], RESPONSE)
    assert trace.text is not None
    sources = trace.graph.question_mask.nonzero().flatten().tolist()
    assert "".join(trace.text[i] for i in sources) == QUESTION
    assert bool((trace.graph.prompt_mask & ~trace.graph.question_mask).any())


@pytest.mark.real
def test_text_takes_no_options_of_a_template(smollm2: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="template_options are for chat messages"):
        Tracer(*smollm2)(QUESTION, RESPONSE, template_options={"enable_thinking": False})


@pytest.mark.real
def test_earlier_answers_are_part_of_the_prompt(smollm2: tuple[Any, Any]) -> None:
    talk = [
        {"role": "user", "content": "2 times 3?"},
        {"role": "assistant", "content": "It is \\boxed{6}."},
        {"role": "user", "content": QUESTION},
    ]
    unsure = Tracer(*smollm2)(talk, "I cannot tell.")
    assert unsure.answer is None and "no_answer" in unsure.flags and (unsure.weights == 1).all()
    trace = Tracer(*smollm2, question="user")(talk, RESPONSE)
    assert trace.text is not None and trace.answer == "48"
    assert "".join(trace.text[i] for i in trace.graph.question_mask.nonzero().flatten().tolist()) == QUESTION
    assert len(trace.response_weights) == len(smollm2[1](RESPONSE)["input_ids"]) + 1  # and the end of the turn
    rollout = Tracer(*smollm2)([*talk, {"role": "assistant", "content": RESPONSE}])
    assert len(rollout.response_weights) > len(trace.response_weights)
    turns = [talk[1], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": RESPONSE}]
    agent = Tracer(*smollm2)(talk[:1], turns)
    assert torch.equal(agent.weights, Tracer(*smollm2)([*talk[:1], *turns]).weights)
    one = Tracer(*smollm2, question="user")(talk, [{"role": "assistant", "content": RESPONSE}])
    assert torch.equal(one.weights, trace.weights) and torch.equal(one.graph.token_ids, trace.graph.token_ids)


@pytest.mark.real
def test_no_answer_and_cut_off_responses_are_flagged(smollm2: tuple[Any, Any]) -> None:
    tracer = Tracer(*smollm2)
    nothing = tracer(QUESTION, " Let me think about crates")
    assert "no_answer" in nothing.flags and (nothing.weights == 1).all() and float(nothing.flow.injected) == 0
    cut = tracer(QUESTION, " 12 * 4 = 48, so it is \\boxed{4", truncated=True)
    assert {"no_answer", "cut_off"} <= set(cut.flags) and (cut.weights == 1).all()
    several = tracer(QUESTION, " \\boxed{12} no, \\boxed{48}")
    assert several.answer == "48" and several.flags == ("several_answers",)
    tail = Tracer(*smollm2, no_answer="tail")(QUESTION, " Let me think about crates")
    assert {"no_answer", "tail_answer"} <= set(tail.flags) and float(tail.flow.absorbed) == pytest.approx(1)


@pytest.mark.real
@pytest.mark.parametrize("preset", ["flowgraph", "paper"])
def test_credits_equal_dense_eager_attention_on_real_reasoning(
    smollm2: tuple[Any, Any], gsm8k: list[dict[str, Any]], preset: str
) -> None:
    """20 problems: capture + scatter + float32 against eager attention + dense float64, nothing dropped."""
    from scipy.stats import spearmanr

    model, tokenizer = smollm2
    rows = [row for row in gsm8k if row["problem"] % 2 == 0][:100:5]
    assert len({row["problem"] for row in rows}) == 20
    tracer = Tracer(model, tokenizer, solver="scatter", edges=Threshold(0.0), preset=preset)
    for row in rows:
        trace = tracer([{"role": "user", "content": row["question"]}], row["response"])
        assert trace.graph.edge_weight.dtype == torch.float32
        W = eager_attention(model, list(range(10, 20)), input_ids=trace.graph.token_ids[None])[0]
        dense = TokenGraph.from_dense(W, prompt_mask=trace.graph.prompt_mask, answer_mask=trace.graph.answer_mask)
        exact = trace_flow(dense, "reference")
        for ours, theirs in ((trace.throughput, exact.throughput), (trace.reach, exact.reach)):
            mask = trace.graph.response_mask & (theirs > 0)
            assert spearmanr(ours[mask], theirs[mask]).statistic >= 0.9999
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-9)
        assert torch.equal(trace.weights.double(), credit_of(exact, trace.graph.credit_mask, trace.options.score_name))


def credit_of(flow: Any, credit_mask: Tensor, score: str) -> Tensor:
    flow.graph.credit_mask = credit_mask
    return credit(flow, score).weights
