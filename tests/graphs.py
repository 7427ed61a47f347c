"""Graphs for the tests: random ones, and those on which a solver could go wrong."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from flowgraph import TokenGraph


def mask_of(num_tokens: int, *tokens: int) -> Tensor:
    """[N] bool, True at the given tokens."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[list(tokens)] = True
    return mask


def attention(num_tokens: int, seed: int = 0, sharpness: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[N, N] a causal attention matrix: rows sum to 1, zero above the diagonal."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_tokens, generator=draw, dtype=torch.float64) * sharpness
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1).to(dtype)


def random_graph(
    num_tokens: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64, threshold: float = 0.0
) -> TokenGraph:
    """Attention-like: the first third is the prompt, the answer stands just before the end."""
    prompt = torch.arange(num_tokens) < max(1, num_tokens // 3)
    answer = (
        mask_of(num_tokens, *range(max(1, num_tokens - 3), num_tokens - 1))
        if num_tokens > 3
        else mask_of(num_tokens, -1)
    )
    W = attention(num_tokens, seed, dtype=dtype)
    return TokenGraph.from_dense(W, prompt_mask=prompt, answer_mask=answer, threshold=threshold)


def chain(num_edges: int, weight: float, dtype: torch.dtype = torch.float32) -> TokenGraph:
    """One path from a prompt of one token to a sink at the end."""
    N = num_edges + 1
    return TokenGraph.from_edges(
        torch.stack([torch.arange(num_edges), torch.arange(1, N)]),
        torch.full((num_edges,), weight, dtype=dtype),
        prompt_mask=mask_of(N, 0),
        answer_mask=mask_of(N, N - 1),
    )


def layered(depth: int, width: int, dtype: torch.dtype = torch.float64) -> TokenGraph:
    """All to all between consecutive layers: the single paths are exponentially many and exponentially weak."""
    N = depth * width
    layer = torch.arange(N) // width
    W = (layer[:, None] == layer[None, :] + 1).to(dtype) / width
    return TokenGraph.from_dense(W, prompt_mask=layer == 0, answer_mask=layer == depth - 1)


@st.composite
def graphs(draw: st.DrawFn, max_tokens: int = 24, dtype: torch.dtype = torch.float64) -> TokenGraph:
    """Any graph: dense or nearly empty, weights over 16 decades, sinks anywhere, dead ends, tokens of neither role."""
    N = draw(st.integers(2, max_tokens))
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    density = draw(st.sampled_from([0.05, 0.2, 0.5, 1.0]))
    decades = draw(st.sampled_from([0.0, 1.0, 8.0]))
    W = torch.rand(N, N, generator=random, dtype=torch.float64)
    W = W * 10 ** (decades * (torch.rand(N, N, generator=random, dtype=torch.float64) * 2 - 1))
    W = W * (torch.rand(N, N, generator=random, dtype=torch.float64) < density)
    W = W.tril(-1)
    if draw(st.booleans()):
        W = W / W.sum(-1, keepdim=True).clamp(min=1e-300)
    prompt_length = draw(st.integers(1, N - 1))
    prompt = torch.arange(N) < prompt_length
    answer = mask_of(N, *draw(st.sets(st.integers(0, N - 1), min_size=0, max_size=4)))
    question = prompt & (torch.rand(N, generator=random) < 0.7)
    question[draw(st.integers(0, prompt_length - 1))] = True
    return TokenGraph.from_dense(W.to(dtype), prompt_mask=prompt, answer_mask=answer, question_mask=question)
