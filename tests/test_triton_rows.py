"""Triton's kernels give the rows and edges that torch gives, as far as Triton's interpreter can tell.

The tests of the kernels run in a process of their own, which one test starts (tests/interpreted.py).

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_rows.py      runs them directly
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowgraph import rows as rows_module
from flowgraph.rows import TRITON_HEAD, AttentionRows, BlockedRows, DenseRows, KeptRows, LayerQK, choose_backend
from flowgraph.sparsify import Edges, Threshold, TopK, sparsify
from tests.interpreted import (
    IN_THE_INTERPRETER,
    SHAPES,
    compiled,
    documents,
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


@compiled
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__, of="triton_rows")


def joined(rows: BlockedRows) -> Tensor:
    """[N, N]; NaN where there are no rows."""
    N = rows.num_tokens
    W = torch.full((N, N), torch.nan)
    for start, weight in rows.blocks():
        assert weight.shape[1] == start + len(weight)
        W[start : start + len(weight)] = 0
        W[start : start + len(weight), : weight.shape[1]] = weight
    return W


def same_rows(layers: list[LayerQK], block: int, weights: str = "attention", positions: Tensor | None = None) -> Tensor:
    """W by Triton, after it was found to be torch's."""
    positions = torch.arange(layers[0].key.shape[1]) if positions is None else positions
    ours = AttentionRows(layers, positions, block, weights, backend="triton")
    assert ours.backend == "triton"
    W, theirs = joined(ours), joined(AttentionRows(layers, positions, block, weights, backend="torch"))
    assert W.isnan().equal(theirs.isnan())
    assert (W - theirs).nan_to_num().abs().max() < 1e-5
    return W


def by_kernel(W: Tensor, rule: Threshold, block: int = 7) -> Edges:
    rows = DenseRows(W, block)
    rows.backend = "triton"
    return sparsify(rows, rule)


def same_edges(W: Tensor, rule: Threshold, block: int = 7) -> Edges:
    """The edges of a matrix by the kernel, after they were found to be torch's."""
    ours, theirs = by_kernel(W, rule, block), sparsify(DenseRows(W, block), rule)
    assert ours.edge_index.dtype == torch.int64 and torch.equal(ours.edge_index, theirs.edge_index)
    assert torch.equal(ours.edge_weight, theirs.edge_weight) and torch.equal(ours.self_weight, theirs.self_weight)
    torch.testing.assert_close(ours.dropped, theirs.dropped, rtol=1e-5, atol=1e-6)
    assert ours.rule == theirs.rule
    return ours


# --- rows ------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("known", [False, True], ids=["own log-sum", "given log-sum"])
@pytest.mark.parametrize("kind", SHAPES)
def test_rows_are_those_of_torch(kind: str, known: bool, draw: torch.Generator) -> None:
    N, block, arguments = SHAPES[kind]
    one = layer(draw, N, **arguments)
    one = with_log_sum(one, torch.arange(N)) if known else one
    W = same_rows([one], block)
    assert W.triu(1).eq(0).all()
    if one.sink_logits is None:
        torch.testing.assert_close(W.sum(-1), torch.ones(N), rtol=0, atol=1e-5)
    else:
        assert W.sum(-1).max() < 1 - 1e-3


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weights", ["attention", "value_norm"])
def test_layers_of_all_kinds_together(weights: str, draw: torch.Generator) -> None:
    """Other heads, head sizes, windows, caps and sinks per layer; equal ones share a launch, apart in the list."""
    N, see = 20, window(10)
    positions = torch.arange(3, 3 + N)
    layers = [
        layer(draw, N, visible=see),
        layer(draw, N, heads=3, key_heads=3, D=16, dtype=torch.bfloat16),
        layer(draw, N, softcap=2.0, sink_logits=torch.tensor([-2.0, 3.0]), visible=see),
        with_log_sum(layer(draw, N, visible=see), positions),
    ]
    same_rows(layers, 16, weights, positions)
    ours = AttentionRows(layers, positions, 16, weights, backend="triton")
    assert len(ours._kernels._launches) == 3


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_queries_of_the_last_tokens_give_the_last_rows(draw: torch.Generator) -> None:
    N, see = 40, window(12)
    whole = [layer(draw, N), layer(draw, N, visible=see)]
    late = [replace(one, query=one.query[:, 23:]) for one in whole]
    W = same_rows(late, 10)
    assert W[:23].isnan().all()
    assert (W[23:] - joined(AttentionRows(whole, torch.arange(N)))[23:]).abs().max() < 1e-5


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weights", ["attention", "value_norm"])
def test_the_same_bits_again_and_backwards(weights: str, draw: torch.Generator) -> None:
    layers = [layer(draw, 20, dtype=torch.bfloat16), layer(draw, 20, softcap=2.0)]
    first, second = (AttentionRows(layers, torch.arange(20), 7, weights, backend="triton") for _ in range(2))
    blocks = list(first.blocks())
    for one, two in zip(blocks, reversed(list(second.blocks(last_first=True))), strict=True):
        assert one.start == two.start and torch.equal(one.weight, two.weight)
    assert torch.equal(first.block(7).weight, blocks[1].weight)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_what_may_not_be_seen_may_be_any_number_and_nan_stays_nan(draw: torch.Generator) -> None:
    calm = with_log_sum(layer(draw, 20), torch.arange(20))
    loud = replace(calm, key=calm.key.clone())
    loud.key[:, 15] *= 1e4  # 2 ** score overflows in all rows, and only rows 15 to 19 see it
    W, expected = (joined(AttentionRows([one], torch.arange(20), backend="triton")) for one in (loud, calm))
    assert torch.equal(W[:15], expected[:15])
    broken = layer(draw, 20)
    broken.query[1, 9] = torch.nan
    W = joined(AttentionRows([broken], torch.arange(20), 20, backend="triton"))
    assert W[9, :10].isnan().all() and W[9, 10:].eq(0).all() and W.isnan().sum() == 10


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_values_of_nothing_get_nothing(draw: torch.Generator) -> None:
    norms = torch.ones(2, 20)
    norms[:, 0] = 0
    W = same_rows([replace(layer(draw, 20), value_norm=norms)], 20, "value_norm")
    assert W[:, 0].eq(0).all() and (W[1:].sum(-1) - 1).abs().max() < 1e-5


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_layers_that_lie_elsewhere_are_brought(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowgraph.triton_rows import TritonRows

    monkeypatch.setattr(TritonRows, "_is_here", lambda self, layer: layer.softcap is None)
    see = window(12)
    layers = [layer(draw, 30, softcap=2.0, visible=see), layer(draw, 30)]
    same_rows(layers, 16)
    known = with_log_sum(layers[0], torch.arange(30))
    same_rows([known, layers[1]], 16, "value_norm")
    # Again: what was worked out is kept, and what was given is taken.
    kernels = TritonRows([known, *layers], torch.arange(30), by_value=False)
    assert torch.equal(kernels.rows(16, 30), kernels.rows(16, 30))


@interpreted
@pytest.mark.parametrize("D", [8, 160, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiles_that_a_gpu_gets(dtype: torch.dtype, D: int, draw: torch.Generator) -> None:
    """Larger than the trace, and more than one."""
    seen = [None, window(20)]
    same_rows([layer(draw, 150, D=D, dtype=dtype, loud=(8 / D) ** 0.5, visible=see) for see in seen], 70)


@interpreted
def test_heads_too_large_for_a_tile_are_refused(draw: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r'backend="triton" takes heads of up to 512 numbers.* heads of 520: use'):
        AttentionRows([layer(draw, 5, D=520)], torch.arange(5), backend="triton")


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_a_row_that_sees_nothing_has_no_sum(draw: torch.Generator) -> None:
    from flowgraph.triton_rows import log_sums

    one, first = layer(draw, 20), torch.zeros(20, dtype=torch.int32)
    first[7] = 8
    own, valued = log_sums(one.query, one.key, one.scaling, first=first, norm=one.value_norm)
    assert valued is not None and own[:, 7].eq(-torch.inf).all() and valued[:, 7].eq(-torch.inf).all()
    assert own.isinf().sum() == valued.isinf().sum() == 2 and not own.isnan().any() and not valued.isnan().any()


@interpreted
def test_a_mask_with_a_gap_is_refused(draw: torch.Generator) -> None:
    one = layer(draw, 20, visible=lambda query, key: (query[:, None] - key[None, :]) % 7 != 3)
    with pytest.raises(ValueError, match=r'visible: token 4 does not see an unbroken run of keys.*use backend="torch"'):
        AttentionRows([one], torch.arange(20), backend="triton").block(0)


@interpreted
def test_masks_as_data() -> None:
    from flowgraph.triton_rows import first_seen

    positions = torch.arange(5, 25)
    assert first_seen(window(4), positions).tolist() == [max(0, i - 3) for i in range(20)]
    assert first_seen(window(0), positions, before=17).tolist() == [18, 19, 20]
    packed = documents(torch.tensor([0] * 12 + [1] * 13))
    assert first_seen(packed, positions).tolist() == [0] * 7 + [7] * 13
    assert first_seen(packed, positions[2:], before=4).dtype == torch.int32


# --- edges -----------------------------------------------------------------------------------------------------------


def attention(draw: torch.Generator, N: int) -> Tensor:
    """[N, N] rows that sum to 1, some weights of which stand out."""
    return (3 * torch.randn(N, N, generator=draw)).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("value", [0.0, 1 / 64, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("N", [1, 2, 37])
def test_edges_are_those_of_torch(N: int, value: float, draw: torch.Generator) -> None:
    same_edges(attention(draw, N), Threshold(value))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", [1, 16, 64])
def test_edges_of_any_blocks(block: int, draw: torch.Generator) -> None:
    same_edges(attention(draw, 20), Threshold(0.02), block)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_edges_of_blocks_that_lie_otherwise_in_memory(draw: torch.Generator) -> None:
    W = attention(draw, 20)
    assert same_edges(W.T.contiguous().T, Threshold(0.02)).edge_index.equal(same_edges(W, Threshold(0.02)).edge_index)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_rows_that_keep_nothing_and_rows_that_keep_everything() -> None:
    even = torch.ones(40, 40).tril()
    even /= even.sum(-1, keepdim=True)
    found = same_edges(even, Threshold(1 / 30))
    assert torch.bincount(found.edge_index[1], minlength=40).tolist() == [*range(29), *[0] * 11]
    assert same_edges(even, Threshold(0.6)).edge_index.shape == (2, 0)
    everything = same_edges(even, Threshold(0.0))
    assert everything.edge_index.shape[1] == 40 * 39 // 2 and everything.dropped.eq(0).all()


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_as_many_as_fit_and_one_too_many() -> None:
    """Four weights over 1/5 fit into a row that sums to 1, and five take rounding; six take another matrix."""
    W = torch.zeros(12, 12)
    W[11, 2:7] = 0.2000001
    found = same_edges(W, Threshold(0.2))
    assert found.edge_index.tolist() == [[2, 3, 4, 5, 6], [11] * 5]
    W[11, 2:9] = 0.3
    with pytest.raises(ValueError, match=r"row 11 of W has 7 weights above 0\.2, .* sum to 1 at most"):
        by_kernel(W, Threshold(0.2))


class Seen(TorchDispatchMode):
    """The names of what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_places_that_are_taken_are_found_without_a_mask_of_all_places(draw: torch.Generator) -> None:
    """Of which there may be more than CUDA's nonzero takes; and the host waits for one tensor alone."""
    from flowgraph.triton_rows import Above

    above = Above(37, 0.04, torch.device("cpu"))
    for start, block in reversed(list(DenseRows(attention(draw, 37), 9).blocks())):
        above.take(start, block)
    with Seen() as seen:
        assert above.kept().source.numel()
    assert not {"nonzero", "masked_select", "_local_scalar_dense", "item"} & set(seen.names)
    assert len(seen.names) < 40


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_what_is_kept_and_what_is_dropped_is_the_row(draw: torch.Generator) -> None:
    from flowgraph.triton_rows import keep_above

    W = attention(draw, 37)
    found = keep_above(DenseRows(W, 9).blocks(), 37, 0.04)
    assert 0.1 < found.kept.mean() < 0.9 and found.wrong is None
    torch.testing.assert_close(found.kept + found.dropped + found.self_weight, W.sum(-1), rtol=0, atol=1e-5)
    by_edge = torch.zeros(37).index_add_(0, found.target, found.weight)
    torch.testing.assert_close(found.kept, by_edge, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -1.0])
def test_wrong_weights_are_named_as_torch_names_them(wrong: float, draw: torch.Generator) -> None:
    W = attention(draw, 30)
    W[21, 18], W[21, 19], W[25, 3] = wrong, -2.0, torch.nan
    with pytest.raises(ValueError) as theirs:
        sparsify(DenseRows(W, 7), Threshold(0.1))
    with pytest.raises(ValueError) as ours:
        by_kernel(W, Threshold(0.1))
    assert str(ours.value) == str(theirs.value) and "W[21, 18]" in str(ours.value)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_from_queries_to_edges(draw: torch.Generator) -> None:
    """The whole way, also through rows that keep their blocks; other rules choose in torch, on the same rows."""
    layers = [layer(draw, 30, loud=3.0, dtype=torch.bfloat16), layer(draw, 30, loud=3.0, visible=window(9))]
    rows = AttentionRows(layers, torch.arange(30), 16, backend="triton")
    W = joined(rows)
    kept = KeptRows(rows)
    assert kept.backend == "triton"
    for rule in (Threshold(0.03), Threshold(0.03, cap=3), TopK(4)):
        theirs = sparsify(DenseRows(W, 16), rule)
        assert 0 < theirs.edge_index.shape[1] < 435
        for ours in (sparsify(rows, rule), sparsify(kept, rule)):
            assert torch.equal(ours.edge_index, theirs.edge_index)
            assert torch.equal(ours.edge_weight, theirs.edge_weight)


# --- the choice of a backend -----------------------------------------------------------------------------------------


def test_what_is_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    one, positions = LayerQK(torch.randn(1, 4, 8), torch.randn(1, 4, 8), 1.0), torch.arange(4)
    for backend in ("auto", "torch"):
        assert AttentionRows([one], positions, backend=backend).backend == "torch"
    assert choose_backend("triton", cuda, torch.float32) == choose_backend("triton", cuda, torch.bfloat16) == "triton"
    assert choose_backend("auto", cuda, torch.bfloat16) == choose_backend("torch", cuda, torch.float32) == "torch"
    with pytest.raises(ValueError, match='backend="triton" computes in float32 and the model is float64'):
        choose_backend("triton", cuda, torch.float64)
    with pytest.raises(ValueError, match='backend must be "auto", "torch" or "triton", got \'cuda\''):
        AttentionRows([one], positions, backend="cuda")
    if not IN_THE_INTERPRETER:
        with pytest.raises(ValueError, match=r"needs a GPU and the tensors are on the CPU.*TRITON_INTERPRET=1"):
            AttentionRows([one], positions, backend="triton")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ImportError, match=r"Triton 3\.3 or later.*this is Triton 3\.2\.0"),
    ):
        patch.setattr("triton.__version__", "3.2.0")
        choose_backend("triton", cuda, torch.bfloat16)
    monkeypatch.setattr(rows_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs Triton: pip install "flowgraph-llm\[cuda13\]"'):
        choose_backend("triton", cuda, torch.bfloat16)


# --- without the interpreter -----------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_rows_compiles_for_an_h100(dtype: torch.dtype) -> None:
    """Which needs none: tensor cores for bfloat16, 16 bytes at a time, and float32 is not multiplied in TF32."""
    from flowgraph import triton_rows

    tile = triton_rows.tile_for(256, 128, dtype)
    made = of_tiles_for_an_h100(triton_rows._rows_kernel, {"out": "*fp32"}, {"ADD": False}, tile, dtype)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024 / 2  # two programs to a multiprocessor
    assert ("wgmma" in ptx and "cp.async.cg" in ptx) == (dtype == torch.bfloat16)
    assert "tf32" not in ptx and "ld.global.v4" in ptx and "atom" not in ptx


@compiled
@pytest.mark.parametrize("D", [64, 256, TRITON_HEAD])
@pytest.mark.parametrize("kind", ["plain", "soft cap", "window", "value norms"])
def test_every_kind_of_rows_fits_into_an_h100(kind: str, D: int) -> None:
    """Its shared memory; registers that are too few only cost time."""
    from flowgraph import triton_rows

    tile, dtype = triton_rows.tile_for(256, D, torch.bfloat16), torch.bfloat16
    kinds = {"HAS_CAP": kind == "soft cap", "HAS_FIRST": kind == "window", "HAS_NORM": kind == "value norms"}
    for add in (False, True):
        made = of_tiles_for_an_h100(
            triton_rows._rows_kernel, {"out": "*fp32"}, {"ADD": add, "BLOCK_D": D} | kinds, tile, dtype
        )
        assert made.metadata.shared <= 227 * 1024 and "atom" not in made.asm["ptx"]
    types = {name: "*fp32" for name in ("out", "by_value", "norm")} | {"first": "*i32", "scale": "fp32", "cap": "fp32"}
    sizes = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_D": D}
    made = for_an_h100(
        triton_rows._log_sum_kernel,
        types | {"query": "*bf16", "key": "*bf16"},
        {"GROUP": 4, "MULTIPLY": triton_rows._DTYPES[dtype]} | kinds | sizes,
        {"query", "key", "query_head", "query_row", "key_head", "key_row", "D"},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    assert made.metadata.shared <= 227 * 1024 and "wgmma" in made.asm["ptx"]


@compiled
def test_the_kernel_that_keeps_edges_compiles_for_an_h100() -> None:
    from flowgraph import triton_rows

    types = {"block": "*fp32", "columns": "*i32", "weights": "*fp32", "sums": "*fp32", "numbers": "*i32"}
    sizes = {"BLOCK_R": triton_rows.KEEP_ROWS, "BLOCK_C": triton_rows.KEEP_COLUMNS}
    made = for_an_h100(triton_rows._keep_kernel, types | {"threshold": "fp32"}, sizes, set(types), num_warps=4)
    assert "atom" not in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["attention", "value_norm"])
def test_rows_and_edges_on_a_gpu(weights: str, dtype: torch.dtype, draw: torch.Generator) -> None:
    N, see = 1111, window(300)
    layers = [layer(draw, N, 8, 2, 64, dtype, visible=see), layer(draw, N, 8, 2, 128, dtype, softcap=5.0)]
    moved = [
        replace(one, query=one.query.cuda(), key=one.key.cuda(), value_norm=one.value_norm.cuda())
        for one in layers
        if one.value_norm is not None
    ]
    positions = torch.arange(N, device="cuda")
    rows = AttentionRows(moved, positions, 256, weights, backend="triton")
    W = joined(rows)
    theirs = joined(AttentionRows(layers, torch.arange(N), 256, weights, backend="torch"))
    assert (W - theirs).abs().max() < 1e-5
    ours, again = sparsify(rows, Threshold(1 / 256)), sparsify(rows, Threshold(1 / 256))
    expected = sparsify(DenseRows(W, 256), Threshold(1 / 256))
    for one in (ours, again):
        assert torch.equal(one.edge_index.cpu(), expected.edge_index)
        assert torch.equal(one.edge_weight.cpu(), expected.edge_weight)
