"""Streamed rows equal attention worked out densely in float64, however they are cut, read and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowgraph import rows as rows_module
from flowgraph.rows import AttentionRows, BlockedRows, DenseRows, KeptRows, LayerQK, RowBlock, rows_of_a_band
from tests import attention

N, D = 45, 8
POSITIONS = torch.arange(3, 3 + N)
WINDOW = 10


def window(query: Tensor, key: Tensor) -> Tensor:
    """A sliding window that also looks a little into the future, as no model does and a mask function may."""
    return (query[:, None] - key[None, :] < WINDOW) & (query[:, None] - key[None, :] > -3)


def layer(
    seed: int = 0, heads: int = 6, key_heads: int = 2, dtype: torch.dtype = torch.float32, **more: Any
) -> LayerQK:
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, N, D, generator=draw, dtype=torch.float64).to(dtype)
    key = torch.randn(key_heads, N, D, generator=draw, dtype=torch.float64).to(dtype)
    norms = torch.rand(heads, N, generator=draw) + 0.1
    return LayerQK(query, key, scaling=0.7, value_norm=norms, **more)


def log_sum(one: LayerQK) -> Tensor:
    """[H, N] float64, the sink included."""
    return attention.log_sum(one, POSITIONS)


def by_head(one: LayerQK) -> Tensor:
    """[H, N, N] float64 attention."""
    return (attention.scores(one, POSITIONS) - log_sum(one)[:, :, None]).exp()


def dense(layers: list[LayerQK], weights: str = "attention") -> Tensor:
    """[N, N] float64: the slow twin."""
    if weights == "attention":
        return torch.cat([by_head(one) for one in layers]).mean(0)
    parts = []
    for one in layers:
        assert one.value_norm is not None
        part = (by_head(one) * one.value_norm.double()[:, None, :]).sum(0)
        parts.append(part / part.sum(-1, keepdim=True))
    return torch.stack(parts).mean(0)


def joined(blocks: Iterator[RowBlock]) -> Tensor:
    """[N, N] out of blocks in any order."""
    W = torch.full((N, N), torch.nan, dtype=torch.float64)
    for start, weight in blocks:
        W[start : start + len(weight)] = 0
        W[start : start + len(weight), : weight.shape[1]] = weight.double()
    return W


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sink_logits": torch.linspace(-2, 3, 6)},
    "window": {"visible": window},
    "everything": {"softcap": 2.0, "sink_logits": torch.linspace(-2, 3, 6), "visible": window},
}
kinds = pytest.mark.parametrize("kind", KINDS)
known = pytest.mark.parametrize("known", [False, True], ids=["softmax", "log_sum"])
weighings = pytest.mark.parametrize("weights", ["attention", "value_norm"])


def two_layers(kind: str, known: bool, dtype: torch.dtype = torch.float32) -> list[LayerQK]:
    """One layer of the kind and a plain one of fewer heads; with the log-sum-exp known in both, or in none."""
    layers = [layer(1, dtype=dtype, **KINDS[kind]), layer(2, heads=3, key_heads=3, dtype=dtype)]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return [replace(one, log_sum=log_sum(one).to(kept)) for one in layers] if known else layers


@pytest.fixture(params=[False, True], ids=["whole", "tiny tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, where everything fits into one tile, and once in tiles smaller than any block."""
    if request.param:
        monkeypatch.setattr(rows_module, "TILE_ROWS", 5)
        monkeypatch.setitem(rows_module.TILE_BYTES, "cpu", 1)
        monkeypatch.setattr(rows_module, "TILE_COLUMNS", 3)


@pytest.mark.usefixtures("tiles")
@kinds
@known
@weighings
@pytest.mark.parametrize("block", [1, 7, 20, None])
def test_equals_dense_attention(kind: str, known: bool, weights: str, block: int | None) -> None:
    layers = two_layers(kind, known)
    ours = joined(AttentionRows(layers, POSITIONS, block, weights).blocks())
    assert (ours - dense(layers, weights)).abs().max() < 1e-6


@pytest.mark.usefixtures("tiles")
@kinds
@known
@weighings
def test_float64_models_are_read_in_float64(kind: str, known: bool, weights: str) -> None:
    layers = two_layers(kind, known, torch.float64)
    rows = AttentionRows(layers, POSITIONS, 7, weights)
    assert rows.block(0).weight.dtype == torch.float64
    assert (joined(rows.blocks()) - dense(layers, weights)).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_multiplied_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps 11 bits of each factor, as many as float16 has: what was scaled before would lose digits in it."""
    factors: list[Tensor] = []

    def product(added: Tensor, one: Tensor, other: Tensor, **how: Any) -> Tensor:
        factors.extend((one.clone(), other.clone()))
        return baddbmm(added, one, other, **how)

    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", product)
    for one in (layer(dtype=dtype), layer(dtype=dtype, softcap=2.0)):
        for known in (one, replace(one, log_sum=log_sum(one).float())):
            AttentionRows([known], POSITIONS, 16).block(16)
    assert len(factors) >= 8
    assert all(torch.equal(factor, factor.to(dtype).float()) for factor in factors)


@known
def test_bfloat16_is_multiplied_in_float32(known: bool) -> None:
    layers = two_layers("everything", known, torch.bfloat16)
    rows = AttentionRows(layers, POSITIONS, 7)
    assert rows.block(0).weight.dtype == torch.float32
    assert (joined(rows.blocks()) - dense(layers)).abs().max() < 1e-6


@pytest.mark.usefixtures("tiles")
@kinds
@known
@weighings
def test_the_same_bits_in_both_directions_and_again(kind: str, known: bool, weights: str) -> None:
    rows = AttentionRows(two_layers(kind, known), POSITIONS, 7, weights)
    first, backwards, again = list(rows.blocks()), list(rows.blocks(last_first=True)), list(rows.blocks())
    assert [one.start for one in first] == list(range(0, N, 7)) == [one.start for one in reversed(backwards)]
    for one, two, three in zip(first, reversed(backwards), again, strict=True):
        assert torch.equal(one.weight, two.weight) and torch.equal(one.weight, three.weight)


@known
def test_rows_sum_to_one_less_what_sinks_take(known: bool) -> None:
    layers = two_layers("sinks", known)[:1]
    sums = joined(AttentionRows(layers, POSITIONS, 7).blocks()).sum(-1)
    taken = (torch.linspace(-2, 3, 6).double()[:, None] - log_sum(layers[0])).exp().mean(0)
    assert taken.min() > 1e-3
    torch.testing.assert_close(sums, 1 - taken, rtol=0, atol=1e-6)
    by_value = joined(AttentionRows(layers, POSITIONS, 7, "value_norm").blocks()).sum(-1)
    torch.testing.assert_close(by_value, torch.ones_like(by_value), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tiles")
@known
@pytest.mark.parametrize("visible", [None, window])
def test_what_may_not_be_seen_may_be_any_number(known: bool, visible: Any) -> None:
    """Scores of the future are computed beside those of the past: 2 ** score overflows there."""
    one = layer(visible=visible)
    one.key[:, 30] *= 1e4
    one = replace(one, log_sum=log_sum(one).float()) if known else one
    W = joined(AttentionRows([one], POSITIONS, 20).blocks())[:30]
    assert torch.isfinite(W).all() and (W - dense([one])[:30]).abs().max() < 1e-6


@known
def test_nan_stays_nan(known: bool) -> None:
    one = layer()
    one.query[2, 17] = torch.nan
    one = replace(one, log_sum=log_sum(one).float()) if known else one
    W = joined(AttentionRows([one], POSITIONS, 20).blocks())
    assert W[17, :18].isnan().all() and W[17, 18:].eq(0).all() and not W[:17].isnan().any() and not W[18:].isnan().any()


@known
def test_columns_that_a_window_hides_from_all_rows_are_not_computed(known: bool) -> None:
    def flops(visible: Any) -> int:
        one = layer(visible=visible)
        one = replace(one, log_sum=log_sum(one).float()) if known else one
        with FlopCounterMode(display=False) as counter:
            list(AttentionRows([one], POSITIONS, 5).blocks())
        return counter.get_total_flops()

    # 14 columns (window and block) instead of 25 on average; the first blocks see fewer either way.
    assert flops(window) < 0.6 * flops(None)


def test_queries_of_the_last_tokens_give_the_last_rows() -> None:
    layers = two_layers("everything", known=True)
    whole = joined(AttentionRows(layers, POSITIONS, 7).blocks())
    for part in (layers, [replace(one, log_sum=None) for one in layers]):
        late = [
            replace(one, query=one.query[:, 30:], log_sum=None if one.log_sum is None else one.log_sum[:, 30:])
            for one in part
        ]
        rows = AttentionRows(late, POSITIONS, 7)
        assert rows.num_tokens == N and [one.start for one in rows.blocks()] == [30, 37, 44]
        W = joined(rows.blocks())
        assert W[:30].isnan().all() and (W[30:] - whole[30:]).abs().max() < 1e-6


@pytest.mark.parametrize("block", [1, 4, 7])
@kinds
@known
@weighings
def test_layers_that_lie_elsewhere_are_brought_once_per_band(
    kind: str, known: bool, weights: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bands of 7 or 8 rows, the last of which is held; blocks are those of layers that lie here."""
    layers = two_layers(kind, known)
    theirs = list(AttentionRows(layers, POSITIONS, block, weights).blocks())
    moved: list[int] = []

    def bring(heads: Tensor, device: torch.device) -> Tensor:
        moved.append(heads.shape[1])
        return heads.clone()

    monkeypatch.setattr(rows_module, "bring", bring)
    monkeypatch.setattr(LayerQK, "lies_on", lambda self, device: self.key is not layers[0].key)
    monkeypatch.setitem(rows_module.BLOCK_ROWS, "other", 8)
    rows, band = AttentionRows(layers, POSITIONS, block, weights), 7 if block == 7 else 8
    ends = [min(start + band, N) for start in range(0, N, band)]
    for order in (False, True, False):
        moved.clear()
        held = rows._band
        found = sorted(rows.blocks(last_first=order))
        sent = ends if not held else ends[:-1] if order else ends[1:]
        assert sorted(moved[1::2]) == sent  # keys, after the queries
        for ours, expected in zip(found, theirs, strict=True):
            assert ours.start == expected.start
            torch.testing.assert_close(ours.weight, expected.weight, rtol=1e-5, atol=1e-7)
    start = found[-1].start
    assert torch.equal(rows.square(start), found[-1].weight[:, start:])
    assert found[-1].weight.untyped_storage().nbytes() == found[-1].weight.nbytes  # nobody holds a band by a block
    assert rows.held_bytes == 4 * band * N == 4 * N * rows_of_a_band(N, block)


def test_no_tile_is_larger_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "TILE_ROWS", 6)
    monkeypatch.setattr(rows_module, "TILE_COLUMNS", 2)
    monkeypatch.setitem(rows_module.TILE_BYTES, "cpu", 4 * 6 * 6 * 10)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.baddbmm.out:
                largest = max(largest, out.numel())
            return out

    one = replace(layer(), log_sum=log_sum(layer()).float())
    with Watch():
        list(AttentionRows([one], POSITIONS, 20).blocks())
    assert largest == 6 * 6 * 10


@kinds
@weighings
def test_heads_give_bare_attention_of_single_rows(kind: str, weights: str) -> None:
    layers = two_layers(kind, known=True)
    rows = AttentionRows(layers, POSITIONS, weights=weights)
    for token, parts in zip((0, 44, 13), rows.heads([0, 44, 13]), strict=True):
        for one, part in zip(layers, parts, strict=True):
            assert (part - by_head(one)[:, token, : token + 1]).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"tokens holds 45, the trace has tokens 0\.\.44"):
        list(rows.heads([45]))


@kinds
@weighings
def test_some_heads_take_all_that_is_theirs_along(kind: str, weights: str) -> None:
    one = two_layers(kind, known=True)[0]
    some = [5, 0, 3]
    assert one.value_norm is not None
    alone = replace(
        one,
        query=one.query[some],
        key=one.key.repeat_interleave(3, 0)[some],
        sink_logits=None if one.sink_logits is None else one.sink_logits[some],
        value_norm=one.value_norm[some],
        log_sum=None,
    )
    ours = joined(AttentionRows([one.only(some)], POSITIONS, 7, weights).blocks())
    assert (ours - dense([alone], weights)).abs().max() < 1e-6


# --- value norms -----------------------------------------------------------------------------------------------------


def test_only_the_proportions_of_value_norms_in_a_layer_count() -> None:
    layers = two_layers("plain", known=True)
    norms = layers[0].value_norm
    assert norms is not None
    louder = [replace(layers[0], value_norm=1000 * norms), layers[1]]
    ours, theirs = (joined(AttentionRows(some, POSITIONS, 7, "value_norm").blocks()) for some in (layers, louder))
    assert (ours - theirs).abs().max() < 1e-6


def test_equal_value_norms_change_nothing_and_a_value_of_nothing_gets_nothing() -> None:
    one = layer()
    even = replace(one, value_norm=torch.ones(6, N))
    ours = joined(AttentionRows([even], POSITIONS, 7, "value_norm").blocks())
    assert (ours - dense([one])).abs().max() < 1e-6
    silent = torch.ones(6, N)
    silent[:, 0] = 0
    W = joined(AttentionRows([replace(one, value_norm=silent)], POSITIONS, 7, "value_norm").blocks())
    assert W[:, 0].eq(0).all()  # the whole of the first row too: it sees nothing else
    torch.testing.assert_close(W[1:].sum(-1), torch.ones(N - 1).double(), rtol=0, atol=1e-6)


def test_weights_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match='weights must be "attention" or "value_norm", got \'values\''):
        AttentionRows([layer()], POSITIONS, weights="values")
    with pytest.raises(ValueError, match=r'weights="value_norm" needs value_norm in every layer.*values=True'):
        AttentionRows([layer(), replace(layer(), value_norm=None)], POSITIONS, weights="value_norm")


# --- blocks that are kept --------------------------------------------------------------------------------------------


class Counted(BlockedRows):
    """Rows that note which blocks they were asked for."""

    def __init__(self, rows: BlockedRows) -> None:
        self.num_tokens, self.starts, self.rows = rows.num_tokens, rows.starts, rows
        self.asked: list[int] = []

    def block(self, start: int) -> RowBlock:
        self.asked.append(start)
        return self.rows.block(start)


@pytest.mark.parametrize("budget", [0, 4 * 10 * 45, 4 * 10 * (45 + 40) + 1, 2**20])
def test_kept_blocks_are_those_of_the_rows_and_are_not_computed_again(budget: int) -> None:
    rows = Counted(AttentionRows(two_layers("plain", known=True), POSITIONS, 10))
    kept = KeptRows(rows, budget)
    read = list(chain(kept.blocks(last_first=True), kept.blocks()))
    assert [one.start for one in read] == [40, 30, 20, 10, 0, 0, 10, 20, 30, 40]
    for one in read:
        assert torch.equal(one.weight, rows.rows.block(one.start).weight)
    again = rows.asked[5:]
    fit = [start for start in rows.starts if start not in again]
    sizes = {one.start: one.weight.numel() * 4 for one in read}
    assert sum(sizes[start] for start in fit) <= budget
    # Nothing that was computed again would have fitted when it was first read.
    for start in again:
        before = [other for other in fit if other > start]
        assert sum(sizes[other] for other in before) + sizes[start] > budget
    assert (again == []) == (budget == 2**20)


def test_dense_rows_can_be_kept_too() -> None:
    W = torch.rand(N, N).tril()
    kept = KeptRows(DenseRows(W, block=7))
    assert kept.num_tokens == N
    assert torch.equal(joined(kept.blocks(last_first=True)), joined(kept.blocks()))
    assert torch.equal(joined(kept.blocks()), W.double())
