"""Pools that Triton's kernels add up are those of torch, and so are sparse graphs made of them.

The tests of the kernels run in a process of their own, which one test starts (tests/interpreted.py).

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_pools.py      runs them directly
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowgraph.certificate import Witnesses
from flowgraph.flow import trace_flow
from flowgraph.graph import TokenGraph
from flowgraph.pools import PoolBuilder
from flowgraph.rows import AttentionRows, DenseRows, KeptRows, LayerQK, RowBlock
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import EdgeRule, Mass, Threshold, TopK
from tests.interpreted import compiled, for_an_h100, interpreted, layer, run_interpreted, window, with_log_sum
from tests.interpreted import draw as draw
from tests.interpreted import poisoned as poisoned

kernels = pytest.mark.usefixtures("poisoned", "small")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that every loop goes round, and some runs are larger than a tile."""
    from flowgraph import triton_pools

    monkeypatch.setattr(triton_pools, "PAY_COLUMNS", 8)
    monkeypatch.setattr(triton_pools, "TILE_ROWS", 16)
    monkeypatch.setattr(triton_pools, "TILE_COLUMNS", 8)
    yield


@pytest.mark.slow
@compiled
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__, of="triton_pools")


# --- pools -----------------------------------------------------------------------------------------------------------


def weak(draw: torch.Generator, N: int, share: float = 1.0) -> Tensor:
    """[N, N] float32 below the diagonal, over nine decades; so much of it is not 0. The first token gets most."""
    W = torch.rand(N, N, generator=draw) * 10 ** (-9 * torch.rand(N, N, generator=draw))
    W[:, 0] = 0.9
    return (W * (torch.rand(N, N, generator=draw) < share)).tril(-1)


def decades(draw: torch.Generator, N: int) -> Tensor:
    """[N] float64 from 1e-290 to 1, as reach is."""
    return 10 ** (-290 * torch.rand(N, generator=draw, dtype=torch.float64) ** 4)


def same_pools(
    W: Tensor,
    weight: Tensor,
    cuts: list[int],
    kinds: Tensor | None,
    starts: list[int],
    above: float = float("inf"),
    last_first: bool = True,
) -> None:
    """Blocks begin at `starts`. What is on and above the diagonal of W [N, N] is not looked at."""
    from flowgraph.triton_pools import TritonPools

    N = len(W)
    place = torch.arange(N)
    rest = torch.where((above < W) | (place >= place[:, None]), 0, W)
    ours, theirs = TritonPools(N, cuts, kinds, W.device), PoolBuilder(N, cuts, kinds, W.device)
    spans = list(zip(starts, [*starts[1:], N], strict=True))
    for start, stop in reversed(spans) if last_first else spans:
        theirs.add(start, rest[start:stop, :stop], weight[start:stop])
        ours.add(start, W[start:stop, :stop], weight[start:stop], above)
    for name in ("_paid", "_collected", "_shape"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=0)
    found, expected = ours.pools(torch.float64), theirs.pools(torch.float64)
    assert torch.equal(found.index, expected.index) and torch.equal(found.collects, expected.collects)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-12, atol=0)


BLOCKS = {
    "one": (41, [0], []),
    "of one row": (18, list(range(18)), [5, 11]),
    "of tiles": (40, [0, 16, 32], [16]),
    "of tiles, cut within": (40, [0, 16, 32], [7, 13]),
    "anywhere": (50, [0, 1, 14, 31, 32, 49], [17, 35]),
    "anywhere, backwards": (50, [0, 1, 14, 31, 32, 49], [17, 35]),
    "cut everywhere": (35, [0, 20], [1, 2, 34]),
    "of one token": (1, [0], []),
    "of two": (2, [0], [1]),
    "a power of 2 and one": (33, [0, 32], [32]),
}


@interpreted
@kernels
@pytest.mark.parametrize(("blocks", "last_first"), list(zip(BLOCKS, cycle([False, True]), strict=False)))
def test_pools_are_those_of_torch(blocks: str, last_first: bool, draw: torch.Generator) -> None:
    """In turns as a stream is read, with two kinds of later tokens; and from the last to the first, with one."""
    N, starts, cuts = BLOCKS[blocks]
    kinds = None if last_first else (torch.rand(N, generator=draw) < 0.2).long()
    if kinds is not None:
        kinds[-1] = 1
    same_pools(weak(draw, N), decades(draw, N), cuts, kinds, starts, last_first=last_first)


@interpreted
@kernels
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_little_left_or_nothing(share: float, draw: torch.Generator) -> None:
    same_pools(weak(draw, 45, share), decades(draw, 45), [10, 20], None, [0, 25])


@interpreted
@kernels
@pytest.mark.parametrize("above", [0.0, 1e-4, 0.9])
def test_what_became_an_edge_is_left_out(above: float, draw: torch.Generator) -> None:
    W = weak(draw, 40)
    assert (W[1:, 0] == W[1, 0]).all()  # equal to the threshold is not above it
    above = float(W[1, 0]) if above == 0.9 else above
    same_pools(W, decades(draw, 40), [11], None, [0, 25], above)


@interpreted
@kernels
def test_nothing_is_read_on_or_above_the_diagonal(draw: torch.Generator) -> None:
    W = torch.where(torch.ones(40, 40).triu() > 0, torch.nan, weak(draw, 40))
    same_pools(W, decades(draw, 40), [11], None, [0, 25])


@interpreted
@kernels
def test_blocks_may_lie_anyhow_in_memory(draw: torch.Generator) -> None:
    wide = torch.full((40, 70), torch.nan)
    wide[:, 7:47] = weak(draw, 40)
    for W in (wide[:, 7:47], wide[:, 7:47].mT.contiguous().mT):
        same_pools(W, decades(draw, 40), [11], None, [0, 25])


@interpreted
def test_the_tiles_that_a_gpu_gets(draw: torch.Generator) -> None:
    kinds = (torch.arange(100) > 93).long()
    same_pools(weak(draw, 100), decades(draw, 100), [31, 62], kinds, [0, 3, 71], 0.1)


@interpreted
@kernels
def test_reach_that_arrives_from_a_block(draw: torch.Generator) -> None:
    from flowgraph.triton_pools import add_arriving

    W, reach = weak(draw, 60), decades(draw, 60)
    for start, stop in ((0, 20), (1, 2), (16, 40), (37, 60)):
        arriving = decades(draw, 60)
        expected = arriving.clone()
        expected[:start] += reach[start:stop] @ W[start:stop, :start].double()
        add_arriving(arriving, start, W[start:stop, :stop], reach[start:stop])
        torch.testing.assert_close(arriving, expected, rtol=1e-12, atol=0)


# --- sparse graphs ---------------------------------------------------------------------------------------------------


class OfKernels(DenseRows):
    """Rows of a dense matrix, whose edges and pools come from kernels."""

    backend = "triton"


class Once:
    """Rows that come but once, the first ones first."""

    once = True

    def __init__(self, W: Tensor, block: int, backend: str = "torch") -> None:
        self.num_tokens, self.backend, self._rows = len(W), backend, DenseRows(W, block)

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        assert not last_first
        return self._rows.blocks()


def attention(draw: torch.Generator, N: int) -> Tensor:
    """[N, N] float32, with a first token that gets much of it, and rows that sum to 1."""
    scores = torch.randn(N, N, generator=draw) * 2
    scores[:, 0] += 4
    return scores.masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf).softmax(-1)


def masks_of(N: int) -> dict[str, Any]:
    place = torch.arange(N)
    return {"prompt_mask": place < N // 3, "answer_mask": (place >= N - 4) & (place < N - 1) | (place == N // 2)}


def same_graph(ours: TokenGraph, theirs: TokenGraph) -> None:
    assert ours.rule == theirs.rule
    for name in ("edge_index", "edge_weight", "self_weight", "pool_index", "pool_collects"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours.dropped, theirs.dropped, rtol=1e-5, atol=1e-7)
    # Weights are float32 and shares were rounded to it.
    for name in ("pool_weight", "pool_shape"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=0)


RULES: list[tuple[EdgeRule, bool]] = [
    (Threshold(0.03), False),
    (Threshold(0.03), True),
    (Threshold(0.0), False),
    (TopK(0), True),
    (Threshold(0.03, cap=3), False),
    (TopK(4), True),
    (Mass(0.5), False),
]


@interpreted
@kernels
@pytest.mark.parametrize("kind", ["kept", "stream"])
@pytest.mark.parametrize(("rule", "absorb"), RULES, ids=str)
def test_graphs_of_the_same_rows_are_the_same(rule: EdgeRule, absorb: bool, kind: str, draw: torch.Generator) -> None:
    """Whatever the rule and the order of reading; and witnesses see all of it."""
    N = 27
    W, all_ = attention(draw, N), torch.ones(N, dtype=torch.bool)
    ours, theirs = (
        (OfKernels(W, 10), DenseRows(W, 10)) if kind == "kept" else (Once(W, 10, "triton"), Once(W, 10, "torch"))
    )
    seen = [Witnesses.of(all_, 9) for _ in range(2)]
    found, expected = (
        sparse_graph(rows, absorb_at_prompt=absorb, edges=rule, witnesses=one, **masks_of(N))
        for rows, one in zip((ours, theirs), seen, strict=True)
    )
    same_graph(found, expected)
    assert torch.equal(seen[0].rows, W.tril(-1)[seen[0].tokens])
    assert torch.equal(seen[0].rows, seen[1].rows) and torch.equal(seen[0].columns, seen[1].columns)


@interpreted
@kernels
def test_the_same_bits_in_every_run(draw: torch.Generator) -> None:
    rows = OfKernels(attention(draw, 20), 7)
    first, second = (sparse_graph(rows, edges=Threshold(0.01), **masks_of(20)) for _ in range(2))
    for name in ("edge_index", "edge_weight", "pool_index", "pool_weight", "dropped", "self_weight"):
        assert torch.equal(first[name], second[name])


@interpreted
@kernels
@pytest.mark.parametrize(
    ("edges", "weights"), [(None, "attention"), (TopK(0), "value_norm"), (TopK(3), "attention")], ids=str
)
def test_from_queries_to_flow(edges: EdgeRule | None, weights: str, draw: torch.Generator) -> None:
    N = 30
    layers = [layer(draw, N, loud=2.0), layer(draw, N, visible=window(9), dtype=torch.bfloat16)]
    rows, theirs = (AttentionRows(layers, torch.arange(N), 12, weights, name) for name in ("triton", "torch"))
    expected = trace_flow(sparse_graph(theirs, edges=edges, **masks_of(N)))
    found = trace_flow(sparse_graph(rows if edges is None else KeptRows(rows), edges=edges, **masks_of(N)))
    assert torch.equal(found.graph.edge_index, expected.graph.edge_index)
    for name in ("reach", "throughput"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-8)
    assert float(found.absorbed) == pytest.approx(1)


@interpreted
@kernels
@pytest.mark.parametrize("kind", ["kept", "stream"])
@pytest.mark.parametrize("edges", [None, TopK(0), TopK(3)])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_is_named_as_torch_names_it(where: str, edges: EdgeRule | None, kind: str, draw: torch.Generator) -> None:
    one = with_log_sum(layer(draw, 30), torch.arange(30))
    getattr(one, where)[0, 14] = torch.nan
    messages = []
    for backend in ("triton", "torch"):
        rows = AttentionRows([one], torch.arange(30), 8, backend=backend)
        with pytest.raises(ValueError, match=r"^W\[\d+, \d+\] = nan") as error:
            sparse_graph(rows if kind == "kept" else Streamed(rows), edges=edges, **masks_of(30))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number that it asks for, and sizes that follow from numbers."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal")
        return function(*args, **kwargs or {})


@interpreted
@kernels
@pytest.mark.parametrize("kind", ["kept", "stream"])
@pytest.mark.parametrize(("rule", "waits"), [(Threshold(0.01), False), (TopK(0), False), (TopK(1), True)], ids=str)
def test_the_host_does_not_wait_between_blocks(rule: EdgeRule, waits: bool, kind: str, draw: torch.Generator) -> None:
    """Edges over a threshold: a block costs launches, and no look at what came of them."""
    layers, counts = [layer(draw, 20)], []
    for block in (20, 7):
        rows = AttentionRows(layers, torch.arange(20), block, backend="triton")
        with Looks() as looks:
            sparse_graph(rows if kind == "kept" else Streamed(rows), edges=rule, **masks_of(20))
        counts.append(looks.count)
    assert counts[0] > 0 and (counts[1] > counts[0]) == waits


class Streamed:
    """Rows as a stream gives them."""

    once = True

    def __init__(self, rows: AttentionRows) -> None:
        self.num_tokens, self.backend, self._rows, self._read = rows.num_tokens, rows.backend, rows, False

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        assert not last_first and not self._read
        self._read = True
        return self._rows.blocks()


# --- without the interpreter -----------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("name", ["_pay_kernel", "_collect_kernel", "_arrive_kernel"])
def test_the_kernels_compile_for_an_h100(name: str) -> None:
    """Sums in float64, in registers, without atomics."""
    from flowgraph import triton_pools

    doubles = ("paid", "collected", "arriving", "weights", "reach")
    types = {one: "*fp64" for one in doubles} | {"block": "*fp32", "bounds": "*i32", "kinds": "*i64", "above": "fp32"}
    tile = {"BLOCK_R": triton_pools.TILE_ROWS, "BLOCK_C": triton_pools.TILE_COLUMNS}
    constants = {"block_column": 1} | ({"BLOCK_C": triton_pools.PAY_COLUMNS} if name == "_pay_kernel" else tile)
    kernel = getattr(triton_pools, name)
    made = for_an_h100(kernel, types, constants, set(types) - {"above"}, num_warps=4)
    ptx = made.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert re.search(r"(add|fma)\.(rn\.)?f64", ptx)
    assert made.metadata.shared <= 1024  # for the sums of 4 warps alone


@pytest.mark.gpu
def test_sparse_graphs_on_a_gpu(draw: torch.Generator) -> None:
    N = 1111
    layers = [layer(draw, N, 8, 2, 64, torch.bfloat16), layer(draw, N, 8, 2, 64, torch.bfloat16, visible=window(300))]

    def moved(one: LayerQK) -> LayerQK:
        return replace(one, query=one.query.cuda(), key=one.key.cuda(), value_norm=None)

    rows = AttentionRows([moved(one) for one in layers], torch.arange(N, device="cuda"), 256, backend="triton")
    W = torch.cat([torch.nn.functional.pad(block, (0, N - block.shape[1])) for _, block in rows.blocks()])
    masks = masks_of(N)
    there = {name: mask.cuda() for name, mask in masks.items()}
    for edges in (Threshold(1 / 256), TopK(0), TopK(4)):
        expected = sparse_graph(DenseRows(W.cpu(), 256), edges=edges, **masks)
        found, again = (sparse_graph(rows, edges=edges, **there) for _ in range(2))
        assert torch.equal(found.pool_weight, again.pool_weight)
        same_graph(found.cpu(), expected)
