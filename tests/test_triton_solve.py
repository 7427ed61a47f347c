"""The sweep of Triton solves what the other solvers solve, as far as Triton's interpreter can tell.

The tests of the kernel run in a process of their own, which one test starts (tests/interpreted.py), the laws in
another.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_solve.py      runs them directly
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import TokenGraph, trace_flow
from flowgraph.rows import DenseRows
from flowgraph.sparse import sparse_graph
from flowgraph.sparsify import Threshold
from tests.graphs import attention, chain, mask_of, random_graph
from tests.interpreted import compiled, for_an_h100, interpreted, run_interpreted
from tests.interpreted import draw as draw
from tests.interpreted import poisoned as poisoned

HERE = Path(__file__).resolve()
INTERPRETED: dict[str, Any] = {"seconds": 900, "FLOWGRAPH_SOLVERS": "sweep", "OMP_NUM_THREADS": "1"}


@compiled
def test_the_kernel_in_the_interpreter() -> None:
    run_interpreted(HERE, of="triton_solve", **INTERPRETED)


@compiled
@pytest.mark.slow
def test_the_laws_hold_in_the_interpreter() -> None:
    run_interpreted(HERE.with_name("test_laws.py"), **INTERPRETED)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop goes round, and most rows are long."""
    from flowgraph import triton_solve

    for name, size in {"BLOCK": 16, "CHUNK": 4, "LONG": 8, "WIDE": 16}.items():
        monkeypatch.setattr(triton_solve, name, size)


def triangle(draw: torch.Generator, N: int, density: float) -> Tensor:
    """[N, N] float64 strictly lower triangular, rows sum to 1 at most."""
    M = torch.rand(N, N, generator=draw, dtype=torch.float64).tril(-1)
    M *= torch.rand(N, N, generator=draw) < density
    return M / M.sum(-1, keepdim=True).clamp(min=1)


def swept(several: list[Tensor], rhs: list[Tensor], backward: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The kernel on triangular matrices, side by side."""
    from flowgraph.triton_solve import sweep

    M = torch.block_diag(*several)
    ptr = torch.tensor([0, *(len(one) for one in several)]).cumsum(0)
    token, other = (M.T if backward else M).nonzero().T
    edge_ptr = torch.searchsorted(token.contiguous(), torch.arange(len(M) + 1))
    weight = (M.T if backward else M)[token, other].to(dtype)
    x = sweep(ptr, edge_ptr, other, weight, torch.cat(rhs), backward=backward)
    return list(x.split([len(one) for one in several]))


@interpreted
@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_triangular_systems(density: float, backward: bool, draw: torch.Generator) -> None:
    """Of odd sizes, of one token, of a whole block; dense ones, rows without edges."""
    several = [triangle(draw, N, density) for N in (37, 1, 16, 2, 50)]
    rhs = [torch.rand(len(M), generator=draw, dtype=torch.float64) for M in several]
    for M, b, x in zip(several, rhs, swept(several, rhs, backward), strict=True):
        M = M.T if backward else M
        torch.testing.assert_close(x, torch.linalg.solve(torch.eye(len(M)).double() - M, b), rtol=1e-13, atol=0)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_hub_that_everything_passes(backward: bool, draw: torch.Generator) -> None:
    """Rows of 1,499 edges, in the sizes that a GPU gets; weights in float32."""
    N = 1500
    M = torch.zeros(N, N, dtype=torch.float64)
    M[1:, 0] = M[-1, :-1] = 1 / 2048
    M[torch.arange(1, N), torch.arange(N - 1)] = 0.5
    b = torch.rand(N, generator=draw, dtype=torch.float64)
    (x,) = swept([M], [b], backward, torch.float32)
    M = M.T if backward else M
    torch.testing.assert_close(x, torch.linalg.solve(torch.eye(N).double() - M, b), rtol=1e-13, atol=0)


@interpreted
@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_same_bits_alone_and_in_any_order(backward: bool, draw: torch.Generator) -> None:
    several = [triangle(draw, N, 0.4) for N in (33, 5, 47)]
    rhs = [torch.rand(len(M), generator=draw, dtype=torch.float64) for M in several]
    together = swept(several, rhs, backward)
    mixed = swept(several[::-1], rhs[::-1], backward)[::-1]
    for M, b, x, y in zip(several, rhs, together, mixed, strict=True):
        (alone,) = swept([M], [b], backward)
        assert torch.equal(x, alone) and torch.equal(y, alone)


@interpreted
@pytest.mark.usefixtures("poisoned", "small")
def test_a_graph_that_overflows_spoils_no_other(draw: torch.Generator) -> None:
    good = triangle(draw, 40, 0.5)
    loud = torch.zeros(40, 40, dtype=torch.float64)
    loud[torch.arange(1, 40), torch.arange(39)] = 1e200
    one = torch.ones(40, dtype=torch.float64)
    spoiled, x = swept([loud, good], [one, one], False)
    assert not spoiled.isfinite().all() and torch.equal(x, swept([good], [one], False)[0])


def same_flow(graph: TokenGraph, rtol: float = 1e-9) -> None:
    ours, theirs = trace_flow(graph, "sweep"), trace_flow(graph, "reference")
    assert (ours.solver, ours.backend) == ("sweep", "triton")
    for name in ("reach", "flow", "edge_flow", "injected", "absorbed", "unlisted_inflow", "unlisted_outflow"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=rtol, atol=1e-30)
    torch.testing.assert_close(ours.log_reach, theirs.log_reach, rtol=rtol, atol=rtol)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_through_a_batch(dtype: torch.dtype) -> None:
    """One has a path to its answer that floats can't follow, one has none, one has it in its prompt."""
    broken = chain(40, 1.0, dtype)
    broken.edge_weight = broken.edge_weight.clone()
    broken.edge_weight[17] = 0
    prompt = random_graph(9, 3, dtype)
    prompt.answer_mask = mask_of(9, 2)
    several = [random_graph(70, 1, dtype), chain(400, 0.1, dtype), broken, prompt, random_graph(2, 1, dtype)]
    same_flow(Batch.from_data_list(several), rtol=1e-4 if dtype == torch.float32 else 1e-9)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_flow_through_pools() -> None:
    N = 90
    roles: dict[str, Any] = {"prompt_mask": torch.arange(N) < 30, "answer_mask": mask_of(N, 85, 86)}
    graphs = [sparse_graph(DenseRows(attention(N, seed)), edges=Threshold(0.03), **roles) for seed in (1, 2)]
    assert all(graph.num_pools > 0 for graph in graphs)
    same_flow(Batch.from_data_list(graphs))


# --- without the interpreter -----------------------------------------------------------------------------------------


@compiled
def test_on_a_cpu_it_is_refused() -> None:
    for names in (("sweep",), ("auto", "triton")):
        with pytest.raises(ValueError, match=r"needs a GPU and the graph is on the CPU.*TRITON_INTERPRET=1"):
            trace_flow(random_graph(5), *names)


@compiled
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_kernel_compiles_for_an_h100(backward: bool) -> None:
    """No atomics; no load by ways that miss stores or run ahead of them; and a token hands on by one shuffle."""
    from flowgraph import triton_solve

    kernel = triton_solve._sweep_kernel
    sizes = ("BLOCK", "CHUNK", "LONG", "WIDE")
    constants = {"BACKWARD": backward} | {name: getattr(triton_solve, name) for name in sizes}
    pointers = {name for name in kernel.arg_names if name not in constants}
    types = dict.fromkeys(pointers, "*fp64") | {"graph_ptr": "*i64", "edge_ptr": "*i64", "other": "*i32"}
    made = for_an_h100(kernel, types | {"weight": "*fp32"}, constants, pointers, **triton_solve._LAUNCH)
    ptx = made.asm["ptx"]
    for unwanted in ("atom", "red.global", "ld.global.nc", "cp.async"):
        assert unwanted not in ptx
    (loop,) = [part for part in ptx.split("$L__BB") if "shfl.sync.idx" in part]
    assert loop.count("shfl") == 2 and "fma.rn.f64" in loop and "bar.sync" not in loop.partition("bra")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_on_a_gpu(dtype: torch.dtype) -> None:
    several = [random_graph(N, seed, dtype, 0.01) for seed, N in enumerate((700, 2, 33, 1500))]
    several.append(chain(400, 0.1, dtype))
    batch = Batch.from_data_list(several).cuda()
    ours, again = trace_flow(batch, "sweep"), trace_flow(batch, "sweep")
    assert torch.equal(ours.flow, again.flow) and torch.equal(ours.log_reach, again.log_reach)
    for graph, one in zip(several, ours, strict=True):
        theirs = trace_flow(graph, "scipy")
        torch.testing.assert_close(one.flow.cpu(), theirs.flow, rtol=1e-5, atol=1e-30)
        assert torch.equal(trace_flow(graph.cuda(), "sweep").flow, one.flow)
