"""Graphs and arguments that nobody would write by hand: laws hold, or a ValueError or TypeError says which does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph import TokenGraph, credit, trace_flow
from flowgraph.rl.samples import samples_of
from flowgraph.spans import locate, sinks_of, tokens_of
from tests.fuzz.targets import check_flow
from tests.graphs import mask_of

pytestmark = pytest.mark.fuzz
SOLVERS = st.sampled_from(["scipy", "scatter", "reference"])


@st.composite
def adversarial(draw: st.DrawFn, dtype: torch.dtype | None = None) -> TokenGraph:
    """Chains that all but vanish, rows without edges, weights of 0, many sinks, sinks in the prompt, no path at all."""
    N = draw(st.integers(2, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64])) if dtype is None else dtype
    tiny = 1e-30 if dtype == torch.float32 else 1e-300
    weights = st.sampled_from([0.0, tiny, 1e-8, 0.5, 1.0, 1e8])
    shape = draw(st.sampled_from(["chain", "comb", "any", "none"]))
    if shape == "chain":
        pairs = [(k, k + 1) for k in range(N - 1)]
    elif shape == "comb":
        pairs = [(0, k) for k in range(1, N)] + [(k, N - 1) for k in range(1, N - 1)]
    else:
        ends = st.tuples(st.integers(0, N - 2), st.integers(1, N - 1)).filter(lambda pair: pair[0] < pair[1])
        pairs = sorted(draw(st.sets(ends, max_size=0 if shape == "none" else 80)))
    same = draw(st.booleans())
    weight = [draw(weights)] * len(pairs) if same else [draw(weights) for _ in pairs]
    prompt_length = draw(st.integers(1, N - 1))
    sinks = draw(st.sets(st.integers(0, N - 1), max_size=5))
    return TokenGraph.from_edges(
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
        torch.tensor(weight, dtype=dtype),
        prompt_mask=torch.arange(N) < prompt_length,
        question_mask=mask_of(N, *draw(st.sets(st.integers(0, prompt_length - 1), min_size=1))),
        answer_mask=mask_of(N, *sinks),
    )


@given(graph=adversarial(), solver=SOLVERS, absorb=st.booleans())
def test_flow_is_conserved_where_weights_vanish(graph: TokenGraph, solver: str, absorb: bool) -> None:
    flow = trace_flow(graph, solver, absorb_at_prompt=absorb)
    check_flow(flow)
    weights = credit(flow).weights
    assert weights.isfinite().all() and (weights[~graph.credit_mask] == 1).all()


@given(graphs=st.lists(adversarial(dtype=torch.float64), min_size=1, max_size=4), solver=SOLVERS)
def test_a_batch_is_its_graphs(graphs: list[TokenGraph], solver: str) -> None:
    together = trace_flow(Batch.from_data_list(graphs), solver)
    for one, graph in zip(together, graphs, strict=True):
        torch.testing.assert_close(one.flow, trace_flow(graph, solver).flow, rtol=1e-12, atol=1e-280)


# ------------------------------------------------------------------------- arguments that are not what they should be

WRONG: tuple[Any, ...] = (
    None, 3, -1, 1.5, float("nan"), "text", b"x", [], [True, False], {}, object(), torch.tensor(1), torch.tensor(True),
    torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(2, 2), torch.ones(4, dtype=torch.int32),
    torch.tensor([float("nan")] * 4), torch.tensor([float("inf"), 1.0, 1.0, 1.0]), torch.tensor([-1.0] * 4),
    torch.ones(4, dtype=torch.float16), torch.ones(4, dtype=torch.complex64), torch.ones(4, dtype=torch.bool),
    torch.zeros(4, dtype=torch.bool), torch.tensor([[1, 0, 0, 0], [0, 1, 1, 2]]), torch.tensor([[0, 0], [1, 1]]),
    torch.tensor([[0] * 4, [2**62] * 4]), torch.tensor([[-1] * 4, [1] * 4]),
    torch.tensor([[-(2**63)] * 4, [2**63 - 1] * 4]), torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int64),
    torch.zeros(2, 0, dtype=torch.int64), torch.ones(4).to_sparse(),
)  # fmt: skip


def sound() -> dict[str, Any]:
    """Arguments of `TokenGraph.from_edges` that are right."""
    prompt = mask_of(4, 0, 1)
    return {
        "edge_index": torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]]), "edge_weight": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "prompt_mask": prompt, "answer_mask": mask_of(4, 3), "question_mask": prompt, "response_mask": ~prompt,
        "credit_mask": mask_of(4, 2), "token_ids": torch.arange(4), "self_weight": torch.ones(4),
        "dropped": torch.zeros(4),
    }  # fmt: skip


def says(error: Exception, *names: str) -> bool:
    return any(name in str(error) for name in names)


@given(st.data())
def test_edges_and_masks_of_any_kind(data: st.DataObject) -> None:
    arguments = sound()
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = data.draw(st.sampled_from(range(len(WRONG))).map(WRONG.__getitem__))
    note(str(arguments))
    try:
        graph = TokenGraph.from_edges(**arguments)
    except (ValueError, TypeError) as error:
        assert says(error, *arguments, "edge number", "graph 0"), error
    else:
        check_flow(trace_flow(graph))


@given(st.data())
def test_spans_of_any_kind(data: st.DataObject) -> None:
    prompt = mask_of(4, 0, 1)
    arguments: dict[str, Any] = {
        "token_ids": torch.arange(4), "prompt_mask": prompt, "response_mask": ~prompt, "question_mask": prompt,
        "answer_tokens": mask_of(4, 3), "tool_mask": mask_of(4), "special_ids": (3,), "tail_tokens": 2,
        "no_answer": "tail", "preset": "paper",
    }  # fmt: skip
    wrong = (*WRONG, (2**70,), (-5,), ("x",), 2**70, torch.ones(4, dtype=torch.int8))
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = data.draw(st.sampled_from(range(len(wrong))).map(wrong.__getitem__))
    note(str(arguments))
    try:
        spans = locate(**arguments)
    except (ValueError, TypeError) as error:
        assert says(error, *arguments, "tokenizer", "a trace needs"), error
    else:
        assert not (spans.credit_mask & ~spans.response_mask).any()
        assert not (spans.question_mask & ~spans.prompt_mask).any()


@given(masks=st.lists(st.booleans(), max_size=12), preset=st.sampled_from(["paper", "flowgraph", "other"]))
def test_sinks_are_one_before_the_answer_or_refused(masks: list[bool], preset: str) -> None:
    tokens = torch.tensor(masks, dtype=torch.bool)
    try:
        sinks = sinks_of(tokens, preset)
    except ValueError as error:
        assert says(error, "preset", "answer_tokens")
    else:
        assert sinks.sum() == tokens.sum()


@given(st.lists(st.integers(0, 6), max_size=10), st.integers(-2, 40), st.integers(-2, 40))
def test_characters_of_tokens_cover_what_was_asked(sizes: list[int], start: int, stop: int) -> None:
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    offsets = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    if not 0 <= start < stop:
        with pytest.raises(ValueError, match="0 <= start < stop"):
            tokens_of(offsets, start, stop)
        return
    first, last = tokens_of(offsets, start, stop)
    assert set(range(start, stop)) & set(range(sum(sizes))) <= {c for s, e in offsets[first:last] for c in range(s, e)}


@given(st.data())
def test_batches_of_any_layout(data: st.DataObject) -> None:
    good = torch.tensor([[0, 1, 1], [1, 1, 0]])
    arguments: dict[str, Any] = {
        "token_ids": good,
        "response_mask": good,
        "attention_mask": good,
        "prompt_mask": 1 - good,
    }
    wrong = (
        *WRONG,
        good.bool(),
        good.float(),
        2 * good,
        good[:, :2],
        [[0, 1], [1]],
        [good[0], good[1, :2]],
        [torch.tensor(1)],
    )
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = data.draw(st.sampled_from(range(len(wrong))).map(wrong.__getitem__))
    note(str(arguments))
    try:
        samples = samples_of(**arguments)
    except (ValueError, TypeError):
        return
    for sample in samples:
        assert len(sample) == len(sample.prompt_mask) == len(sample.response_mask) == len(sample.positions)
