"""The sums that exact mode makes of rows, by Triton's kernels, are those of rows that were written out.

The tests of the kernels run in a process of their own, which one test starts (tests/interpreted.py).

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_sweeps.py      runs them directly
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import rows as rows_module
from flowgraph.exact import exact_flow
from flowgraph.flow import Flow
from flowgraph.rows import AttentionRows, BlockedRows, KeptRows, LayerQK, solve_square
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import TopK
from tests.interpreted import (
    SHAPES,
    compiled,
    for_an_h100,
    interpreted,
    layer,
    of_tiles_for_an_h100,
    run_interpreted,
    window,
    with_log_sum,
)
from tests.interpreted import draw as draw
from tests.interpreted import poisoned as poisoned

kernels = pytest.mark.usefixtures("poisoned")


@pytest.mark.slow
@compiled
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__, of="triton_sweeps")


def decades(draw: torch.Generator, *shape: int) -> Tensor:
    """float64 numbers from 1e-250 to 1, some of them 0."""
    exponent = -250 * torch.rand(*shape, generator=draw, dtype=torch.float64)
    return torch.where(torch.rand(*shape, generator=draw) < 0.1, 0, 10**exponent)


def same_sums(rows: BlockedRows, draw: torch.Generator, rtol: float = 1e-12) -> None:
    """Square and sums of every block are those of the block itself, and have the same bits when asked for again."""
    for start in rows.starts:
        whole = rows.block(start).weight
        r = len(whole)
        assert torch.equal(rows.square(start), whole[:, start:])
        reach, values = decades(draw, r), decades(draw, 2, start)
        arriving, known = rows.arriving(start, reach), rows.known(start, values)
        assert arriving.shape == (start,) and known.shape == (2, r)
        assert arriving.dtype == known.dtype == torch.float64
        torch.testing.assert_close(arriving, BlockedRows.arriving(rows, start, reach), rtol=rtol, atol=0)
        torch.testing.assert_close(known, BlockedRows.known(rows, start, values), rtol=rtol, atol=0)
        assert torch.equal(arriving, rows.arriving(start, reach)) and torch.equal(known, rows.known(start, values))


# --- sums ------------------------------------------------------------------------------------------------------------


@interpreted
@kernels
@pytest.mark.parametrize(("kind", "by_value"), list(zip(SHAPES, cycle([False, True]), strict=False)))
def test_sums_are_those_of_the_rows(kind: str, by_value: bool, draw: torch.Generator) -> None:
    """In turns of attention with a log-sum-exp of its own, and by value with a given one: rows have all of both."""
    N, block, arguments = SHAPES[kind]
    one = layer(draw, N, **arguments)
    one, weights = (with_log_sum(one, torch.arange(N)), "value_norm") if by_value else (one, "attention")
    same_sums(AttentionRows([one], torch.arange(N), block, weights, "triton"), draw)


def of_all_kinds(draw: torch.Generator, N: int = 22) -> list[LayerQK]:
    """Other heads, head sizes, windows, caps and sinks per layer."""
    see = window(10)
    return [
        layer(draw, N, visible=see),
        layer(draw, N, heads=3, key_heads=3, D=16, dtype=torch.bfloat16),
        layer(draw, N, softcap=2.0, sink_logits=torch.tensor([-2.0, 3.0]), visible=see),
        with_log_sum(layer(draw, N, visible=see), torch.arange(N)),
    ]


@interpreted
@kernels
def test_layers_of_all_kinds_together(draw: torch.Generator) -> None:
    same_sums(AttentionRows(of_all_kinds(draw), torch.arange(22), 17, "value_norm", "triton"), draw, rtol=1e-6)


@interpreted
@kernels
def test_queries_of_the_last_tokens(draw: torch.Generator) -> None:
    late = [replace(one, query=one.query[:, 23:]) for one in (layer(draw, 40), layer(draw, 40, visible=window(12)))]
    rows = AttentionRows(late, torch.arange(40), 10, backend="triton")
    assert rows.starts == range(23, 40, 10)
    same_sums(rows, draw, rtol=1e-6)


@interpreted
@kernels
def test_layers_that_lie_elsewhere(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and in bands of 20 rows."""
    from flowgraph.triton_rows import TritonRows

    layers = [layer(draw, 30, softcap=2.0, visible=window(12)), layer(draw, 30)]
    monkeypatch.setattr(TritonRows, "_is_here", lambda self, layer: layer.softcap is None)
    same_sums(AttentionRows(layers, torch.arange(30), 16, "value_norm", "triton"), draw, rtol=1e-6)
    monkeypatch.setattr(LayerQK, "lies_on", lambda self, device: self.softcap is None)
    monkeypatch.setitem(rows_module.BLOCK_ROWS, "other", 20)
    same_sums(AttentionRows(layers, torch.arange(30), 5, "value_norm", "triton"), draw, rtol=1e-6)


@interpreted
@kernels
@pytest.mark.parametrize("edges", [None, TopK(0)])
def test_keys_that_lie_elsewhere_are_sent_once_per_band_and_sweep(
    edges: TopK | None, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six blocks of 5 rows are two bands. What a layer's log-sum-exp is, is worked out in the first sweep alone."""
    from flowgraph import triton_rows

    layers = [layer(draw, 30, heads=3), with_log_sum(layer(draw, 30, heads=3), torch.arange(30))]
    place, masks = torch.arange(30), masks_of(30)
    expected = exact_flow(AttentionRows(layers, place, 5, backend="triton"), edges=edges, **masks)
    asked: list[tuple[int, int]] = []
    bring, log_sums = rows_module.bring, triton_rows.log_sums

    def bringing(heads: Tensor, device: torch.device) -> Tensor:
        asked.append((len(heads), heads.shape[1]))
        return bring(heads, device)

    def adding(query: Tensor, *rest: Any) -> Any:
        asked.append((0, query.shape[1]))
        return log_sums(query, *rest)

    monkeypatch.setattr(rows_module, "bring", bringing)
    monkeypatch.setattr(triton_rows, "log_sums", adding)
    monkeypatch.setattr(LayerQK, "lies_on", lambda self, device: False)
    monkeypatch.setitem(rows_module.BLOCK_ROWS, "other", 20)
    found = exact_flow(AttentionRows(layers, place, 5, backend="triton"), edges=edges, **masks)
    same_flow(found, expected)
    # (heads, tokens) of each: 3 of queries, 1 of keys, and 0 where the log-sum-exp of so many rows was worked out.
    last, first = [(3, 10), (1, 30)], [(3, 20), (1, 20)]
    down = [*last, (0, 10), *last, *first, (0, 20), *first]
    assert asked == [*down, *last, *last]  # the band that was the last one is held


@interpreted
def test_squares_of_rows_that_are_far_apart(draw: torch.Generator) -> None:
    """Beyond what 32 bits count: all but the square itself is never touched."""
    from flowgraph.triton_sweeps import TritonSweeps

    far = 2**30 + 3
    try:
        square = torch.empty(3 * far).as_strided((3, 3), (far, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for 13 GB of addresses: {error}")
    square.copy_(torch.rand(3, 3, generator=draw))
    rows = TritonSweeps([layer(draw, 4)], torch.arange(4), by_value=False)
    right, all_ = decades(draw, 3), torch.ones(3, dtype=torch.bool)
    for backward in (False, True):
        theirs = solve_square(square.double(), right, all_, all_, backward)
        torch.testing.assert_close(rows.solve(square, right, all_, all_, backward), theirs, rtol=1e-12, atol=1e-300)


@interpreted
@kernels
def test_scores_far_below_zero(draw: torch.Generator) -> None:
    """2 ** -log-sum-exp, which is what a token past the end would get, is more than float32 holds."""
    one = layer(draw, 20)
    low = replace(one, query=one.query.clone(), key=one.key.clone())
    low.query[..., 0], low.key[..., 0] = 20.0, -20.0
    same_sums(AttentionRows([low], torch.arange(20), 7, backend="triton"), draw)


@interpreted
def test_the_tiles_that_a_gpu_gets(draw: torch.Generator) -> None:
    layers = [layer(draw, 150, dtype=torch.bfloat16, visible=see) for see in (window(20), None)]
    rows = AttentionRows(layers, torch.arange(150), 80, backend="triton")
    same_sums(rows, draw, rtol=1e-6)
    theirs = exact_flow(AttentionRows(layers, torch.arange(150), 80, backend="torch"), edges=TopK(0), **masks_of(150))
    same_flow(exact_flow(rows, edges=TopK(0), **masks_of(150)), theirs)


@interpreted
@kernels
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("r", [1, 2, 8, 37])
def test_the_sweep_within_a_block(r: int, backward: bool, draw: torch.Generator) -> None:
    from flowgraph.triton_sweeps import TritonSweeps

    rows = TritonSweeps([layer(draw, 4)], torch.arange(4), by_value=False)
    wide = torch.rand(r, r + 5, generator=draw)
    wide[:, 5:] *= 10 ** (-30 * torch.rand(r, r, generator=draw))
    right = decades(draw, r)
    into, out_of = (torch.rand(r, generator=draw) < 0.8 for _ in range(2))
    for square in (wide[:, 5:], wide[:, 5:].mT.contiguous().mT):
        ours = rows.solve(square, right, into, out_of, backward)
        theirs = solve_square(square.double(), right, into, out_of, backward)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-300)
        assert torch.equal(ours, rows.solve(square, right, into, out_of, backward))


# --- exact mode ------------------------------------------------------------------------------------------------------


def masks_of(N: int) -> dict[str, Any]:
    place = torch.arange(N)
    return {"prompt_mask": place < N // 3, "answer_mask": (place >= N - 4) & (place < N - 1) | (place == N // 2)}


def same_flow(ours: Flow, theirs: Flow, rtol: float = 1e-5) -> None:
    for name in ("reach", "flow", "injection", "absorbed", "unlisted_inflow", "unlisted_outflow"):
        found, expected = (getattr(one, name).double() for one in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9 if "unlisted" in name else 1e-30)
    torch.testing.assert_close(ours.graph.self_weight, theirs.graph.self_weight, rtol=1e-5, atol=1e-7)


@interpreted
@kernels
@pytest.mark.parametrize(
    ("edges", "absorb", "weights"),
    [
        (None, False, "attention"),
        (TopK(2), True, "value_norm"),
        (TopK(0), True, "attention"),
        (TopK(0), False, "value_norm"),
    ],
)
def test_exact_flow_is_that_of_torch(edges: TopK | None, absorb: bool, weights: str, draw: torch.Generator) -> None:
    """Also where some of the blocks are kept: here that is the last one."""
    layers, place, options = of_all_kinds(draw), torch.arange(22), {"absorb_at_prompt": absorb, **masks_of(22)}
    ours, theirs = (AttentionRows(layers, place, 9, weights, backend) for backend in ("triton", "torch"))
    expected = exact_flow(theirs, edges=edges, **options)
    assert float(expected.absorbed) == pytest.approx(1)
    for rows in (ours, KeptRows(ours, 4 * 4 * 22)):
        found = exact_flow(rows, edges=edges, **options)
        same_flow(found, expected)
        assert torch.equal(found.graph.edge_index, expected.graph.edge_index)
        torch.testing.assert_close(found.graph.dropped, expected.graph.dropped, rtol=1e-5, atol=1e-6)
        assert found.graph.rule == expected.graph.rule
    assert (expected.graph.num_edges == 0) == (edges == TopK(0))


@interpreted
@kernels
def test_no_sweep_writes_rows_that_it_only_sums_up(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 10 tokens. What is kept is written once, and all else is made of it."""
    from flowgraph.triton_sweeps import TritonSweeps

    asked: list[str] = []
    rows, product = TritonSweeps.rows, TritonSweeps._product

    def writing(self: TritonSweeps, start: int, stop: int, low: int = 0) -> Tensor:
        asked.append(f"{start} from {low}")
        return rows(self, start, stop, low)

    def summing(self: TritonSweeps, start: int, *rest: Any, **more: Any) -> Tensor:
        asked.append(f"{start} summed")
        return product(self, start, *rest, **more)

    monkeypatch.setattr(TritonSweeps, "rows", writing)
    monkeypatch.setattr(TritonSweeps, "_product", summing)
    of = AttentionRows([layer(draw, 30)], torch.arange(30), 10, backend="triton")

    def work(rows: BlockedRows, **options: Any) -> list[str]:
        asked.clear()
        exact_flow(rows, **options, **masks_of(30))
        return list(asked)

    back = ["20 from 20", "20 summed", "10 from 10", "10 summed", "0 from 0", "0 summed"]
    assert work(of) == [*back, "0 from 0", "10 from 0", "20 from 0"]
    assert work(of, edges=TopK(0)) == [*back, *back[4:], *back[2:4], *back[:2]]
    assert work(KeptRows(of, 4 * 10 * 30), edges=TopK(0)) == ["20 from 0", *back[2:], *back[4:], *back[2:4]]
    assert work(KeptRows(of)) == work(KeptRows(of), edges=TopK(0)) == ["20 from 0", "10 from 0", "0 from 0"]


@interpreted
@kernels
def test_the_same_bits_in_every_run(draw: torch.Generator) -> None:
    layers = of_all_kinds(draw)[:2]
    first, second = (
        exact_flow(AttentionRows(layers, torch.arange(22), 9, backend="triton"), edges=TopK(0), **masks_of(22))
        for _ in range(2)
    )
    for name in ("reach", "flow", "unlisted_inflow", "unlisted_outflow"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@interpreted
@kernels
def test_a_sparse_graph_is_that_of_torch(draw: torch.Generator) -> None:
    layers = [layer(draw, 22, loud=2.0), layer(draw, 22, visible=window(9))]
    ours, theirs = (
        sparse_graph(AttentionRows(layers, torch.arange(22), 9, backend=backend), edges=TopK(3), **masks_of(22))
        for backend in ("triton", "torch")
    )
    assert torch.equal(ours.edge_index, theirs.edge_index) and torch.equal(ours.pool_index, theirs.pool_index)
    torch.testing.assert_close(ours.edge_weight, theirs.edge_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.pool_weight, theirs.pool_weight, rtol=1e-4, atol=1e-6)


@interpreted
@kernels
@pytest.mark.parametrize("where", ["query of a sink", "query", "query after the answer", "key", "last key"])
def test_wrong_weights_are_named_as_torch_names_them(where: str, draw: torch.Generator) -> None:
    one = with_log_sum(layer(draw, 30), torch.arange(30))
    token = {"query of a sink": 27, "query after the answer": 29, "last key": 29}.get(where, 14)
    (one.key if "key" in where else one.query)[0, token] = torch.nan
    rows = AttentionRows([one], torch.arange(30), 8, backend="triton")
    with pytest.raises(ValueError, match=r"^W\[\d+, \d+\] = nan") as theirs:
        exact_flow(AttentionRows([one], torch.arange(30), 8, backend="torch"), **masks_of(30))
    with pytest.raises(ValueError) as ours:
        exact_flow(rows, **masks_of(30))
    assert str(ours.value) == str(theirs.value)


# --- without the interpreter -----------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("across", [False, True])
def test_the_kernel_of_sums_compiles_for_an_h100(across: bool) -> None:
    """Two programs share a multiprocessor, as of the kernel of rows; nothing is added by atomics or kept off chip."""
    from flowgraph import triton_rows, triton_sweeps

    tile = triton_rows.tile_for(1024, 128, torch.bfloat16)
    made = of_tiles_for_an_h100(
        triton_sweeps._product_kernel,
        {"out": "*fp64", "values": "*fp64"},
        {"ACROSS": across, "VECTORS": 2},
        tile,
        torch.bfloat16,
    )
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024 / 2
    assert "wgmma" in ptx and "cp.async.cg" in ptx and "fma.rn.f64" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)


@compiled
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_of_solves_reads_what_it_has_just_written(backward: bool) -> None:
    """So it must wait for all of its threads, and take nothing ahead of its time or out of a cache of constants."""
    from flowgraph import triton_sweeps

    types = {name: "*fp64" for name in ("out", "inverse", "right", "into", "out_of")} | {"square": "*fp32"}
    constants = {"BACKWARD": backward, "SIDE": triton_sweeps.SIDE}
    made = for_an_h100(triton_sweeps._solve_kernel, types, constants, set(types), num_warps=8, num_stages=1)
    ptx = made.asm["ptx"]
    assert "bar.sync" in ptx and "cp.async" not in ptx and "ld.global.nc" not in ptx
    del constants["BACKWARD"]
    for_an_h100(triton_sweeps._invert_kernel, types, constants, set(types), num_warps=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["attention", "value_norm"])
def test_exact_mode_on_a_gpu(weights: str, dtype: torch.dtype, draw: torch.Generator) -> None:
    N, see = 1111, window(300)
    layers = [layer(draw, N, 8, 2, 64, dtype, visible=see), layer(draw, N, 8, 2, 128, dtype, softcap=5.0)]
    moved = [
        replace(one, query=one.query.cuda(), key=one.key.cuda(), value_norm=one.value_norm.cuda())
        for one in layers
        if one.value_norm is not None
    ]
    rows = AttentionRows(moved, torch.arange(N, device="cuda"), 256, weights, "triton")
    masks = masks_of(N)
    expected = exact_flow(AttentionRows(layers, torch.arange(N), 256, weights, "torch"), edges=TopK(0), **masks)
    there = {name: mask.cuda() for name, mask in masks.items()}
    for edges in (None, TopK(0)):
        for one in (rows, KeptRows(rows), KeptRows(rows, 0)):
            found, again = (exact_flow(one, edges=edges, **there) for _ in range(2))
            assert torch.equal(found.flow, again.flow) and torch.equal(found.reach, again.reach)
            torch.testing.assert_close(found.reach.cpu(), expected.reach, rtol=1e-5, atol=1e-30)
            torch.testing.assert_close(found.flow.cpu(), expected.flow, rtol=1e-5, atol=1e-30)
