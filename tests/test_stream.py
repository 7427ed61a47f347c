"""A stream gives the rows that a capture gives, while it holds no more than a chunk of queries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import Threshold, capture, sparsify, stream
from flowgraph.chunks import ChunkCache, passes, refusal
from flowgraph.interface import Recorder, model_inputs
from flowgraph.rows import Rows
from tests.models import ARCHITECTURES, VOCABULARY, tiny

N = 45


def ids(num_tokens: int = N) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(4))


def dense(rows: Rows) -> Tensor:
    """[N, N] of rows that come in order, each once."""
    W = torch.zeros(rows.num_tokens, rows.num_tokens, dtype=torch.float64)
    end = 0
    for start, block in rows.blocks():
        assert start == end and block.shape[1] == start + len(block)
        end = start + len(block)
        W[start:end, :end] = block.double()
    assert end == rows.num_tokens
    return W


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("weights", ["attention", "value_norm"])
def test_equals_the_rows_of_a_capture(name: str, weights: str) -> None:
    model = tiny(name)
    expected = dense(capture(model, ids(), layers="all", values=True).rows(0, torch.arange(N), weights=weights))
    assert expected.sum(1).min() > 0.1
    for chunk, offload, block in ((8, False, 3), (8, True, None), (44, True, None), (N, False, 7), (1000, True, None)):
        rows = stream(model, ids(), layers="all", chunk=chunk, weights=weights, offload=offload, block=block)
        assert (dense(rows) - expected).abs().max() < 1e-5, (chunk, offload, block)


def test_what_waits_in_cpu_memory_is_written_there_once() -> None:
    """The cache of each layer grows in one place, and holds what it would hold elsewhere."""
    model, given = tiny("llama"), model_inputs(ids(), None, None)

    def caches(offload: bool) -> Iterator[tuple[int, ChunkCache]]:
        for one in passes(model, Recorder(frozenset([2]), 2), given, 16, offload):
            assert one.cache is not None
            yield one.stop, one.cache

    places = set()
    for (stop, ours), (_, theirs) in zip(caches(True), caches(False), strict=True):
        for layer in (0, 1, 2):
            assert torch.equal(ours.keys(layer), theirs.keys(layer)) and ours.keys(layer).shape[2] == stop
            places.add(ours.keys(layer).data_ptr())
            assert ours.keys(layer)[0, 0].is_contiguous()  # which a copy to a GPU needs
    assert len(places) == 3


def test_positions_that_begin_elsewhere() -> None:
    model, later = tiny("llama"), torch.arange(N)[None] + 30
    expected = dense(capture(model, ids(), position_ids=later).rows(0, torch.arange(N)))
    assert (dense(stream(model, ids(), later, chunk=16)) - expected).abs().max() < 1e-5


def test_edges_are_those_of_the_capture() -> None:
    model = tiny("qwen3")
    ours = sparsify(stream(model, ids(), chunk=16), Threshold(1 / 20))
    theirs = sparsify(capture(model, ids()).rows(0, torch.arange(N)), Threshold(1 / 20))
    assert torch.equal(ours.edge_index, theirs.edge_index)
    assert (ours.edge_weight - theirs.edge_weight).abs().max() < 1e-6


def test_what_it_says_about_itself() -> None:
    rows = stream(tiny("llama"), ids(), layers=[1, 4])
    assert (rows.num_tokens, rows.layers, rows.model) == (N, [1, 4], "LlamaForCausalLM")
    assert rows.device == torch.device("cpu") and rows.dtype == torch.float32
    assert stream(tiny("llama").bfloat16(), ids()).dtype == torch.float32
    double = stream(tiny("llama").double(), ids(), chunk=16)
    assert double.dtype == torch.float64 == next(double.blocks()).weight.dtype


def test_it_is_read_once_and_forwards() -> None:
    rows = stream(tiny("llama"), ids(), chunk=16)
    with pytest.raises(ValueError, match=r"last rows first: use capture\(model, input_ids, chunk"):
        rows.blocks(last_first=True)
    dense(rows)
    with pytest.raises(ValueError, match="a second time: use capture"):
        rows.blocks()


def state_of(model: Any) -> tuple[Any, ...]:
    modules = list(model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    return hooks, model.config.to_json_string(), model.config._attn_implementation, [m.training for m in modules]


def test_the_model_is_free_between_blocks_and_as_it_was() -> None:
    model = tiny("gemma3").train()
    before = state_of(model)
    expected = dense(capture(model, ids()).rows(0, torch.arange(N)))
    seen = 0
    for start, block in stream(model, ids(), chunk=10).blocks():
        assert state_of(model) == before
        model(ids()).logits.sum().backward()
        assert (block - expected[start : start + len(block), : block.shape[1]]).abs().max() < 1e-5
        seen += 1
    assert seen >= 5 and state_of(model) == before


def test_the_model_runs_no_further_than_it_is_read() -> None:
    model = tiny("llama")
    assert refusal(model) is None
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    blocks = stream(model, ids(), chunk=10, block=5).blocks()
    assert lengths == []
    next(blocks), next(blocks)
    assert lengths == [10]
    next(blocks)
    assert lengths == [10, 10]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_more_than_a_chunk_of_queries_and_one_copy_of_keys(name: str) -> None:
    """All tensors alive while rows are read: none of a query's width is as long as the trace, keys exist once."""
    model, num_tokens = tiny(name, max_position_embeddings=1024), 600
    model(ids(num_tokens))
    others = [
        thing for thing in gc.get_objects() if type(thing) is Tensor
    ]  # of other tests; held, so no id comes again
    known = {id(thing) for thing in others}
    queries, key_elements = 0, 2 * 16 * num_tokens
    alive: list[int] = []
    for start, _ in stream(model, ids(num_tokens), layers=[1, 2], chunk=50, block=50).blocks():
        if start < num_tokens - 150:
            continue
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) is Tensor and id(thing) not in known:
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
                queries = max(queries, thing.shape[2] if thing.dim() == 4 and thing.shape[1] == 4 else 0)
        alive.append(sum(size == key_elements for size in storages.values()))
    assert queries <= 50
    # Llama: keys and values of layers 0, 1 and 2 in the cache; Mistral: keys of layers 1 and 2 beside its windows.
    assert alive[-1] == {"llama": 6, "mistral": 2}[name]


def test_nonsense_is_refused() -> None:
    model = tiny("llama")
    for wrong in (ids()[0], ids().expand(2, -1), ids()[:, :0]):
        with pytest.raises(ValueError, match=r"input_ids must be one trace \[1, N\]"):
            stream(model, wrong)
    with pytest.raises(ValueError, match="chunk must be a number of tokens, 2 or more"):
        stream(model, ids(), chunk=1)
    with pytest.raises(ValueError, match='weights must be "attention" or "value_norm"'):
        stream(model, ids(), weights="norm")
    for second in (0, 30):
        positions = torch.cat([torch.arange(20), torch.arange(second, second + N - 20)])[None]
        with pytest.raises(ValueError, match=r"position_ids don't go up by one at \[0, 20\]"):
            stream(model, ids(), positions)
    with pytest.raises(ValueError, match=r"layers \[9\] have no softmax attention"):
        stream(model, ids(), layers=[9])
