"""The memory of a trace, predicted: what is chosen to fit a budget, what is said where nothing does, and the truth."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flowgraph import Tracer, cli
from flowgraph.memory import plan
from flowgraph.options import Options
from flowgraph.sparsify import Threshold, TopK
from tests.models import ARCHITECTURES, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = 32_768
HUGE = 10**15


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def peak(model: Any, num_tokens: int, **options: Any) -> int:
    return plan(model, num_tokens, Options(**options)).peak_bytes


def refusal(model: Any, num_tokens: int, budget: int, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"^memory: ") as caught:
        plan(model, num_tokens, Options(**options), budget=budget)
    return str(caught.value)


def batch(num_tokens: int, rows: int = 1) -> dict[str, Any]:
    place = torch.arange(num_tokens).expand(rows, -1)
    ids = torch.randint(3, 97, (rows, num_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "prompt_mask": place < 8, "sink_mask": place >= num_tokens - 2}


# --- what is counted -------------------------------------------------------------------------------------------------


def test_the_peak_is_the_sum_of_the_parts_of_the_largest_phase(model: Any) -> None:
    found = plan(model, 1000)
    assert found.fits and found.budget is None
    sums = {phase: sum(parts.values()) for phase, parts in found.phases.items()}
    assert found.peak_bytes == max(sums.values()) == sum(found.parts.values()) == sums[found.largest]
    assert list(sums) == ["forward pass", "rows", "graph", "solve"]


def test_queries_keys_and_sums_are_counted_to_the_byte(model: Any) -> None:
    # 2 of 6 layers: 4 query and 2 key heads of 16 numbers, 4 log-sum-exps.
    assert plan(model, 1000).phases["rows"]["queries and keys"] == 2 * 1000 * (4 * 16 + 2 * 16 + 4) * 4
    assert plan(model, 1000, batch=3).phases["rows"]["queries and keys"] == 3 * 2 * 1000 * (4 * 16 + 2 * 16 + 4) * 4


def test_the_cache_of_all_layers_that_run_is_counted_to_the_byte(model: Any) -> None:
    found = plan(model, 10_000, Options(chunk=1000))
    assert found.phases["rows"]["cache"] == 4 * 10_000 * 2 * 2 * 16 * 4  # layers 0 to 3


@pytest.mark.parametrize("mode", ["edges", "sparse", "exact"])
def test_memory_grows_with_length_layers_and_batch(model: Any, mode: str) -> None:
    rule = Threshold(0.0) if mode == "edges" else None  # by default long traces get a threshold
    lengths = [peak(model, N, mode=mode, edges=rule) for N in (256, 1024, 4096, LONG)]
    assert lengths == sorted(set(lengths))
    assert peak(model, 4096, mode=mode, layers="all") > peak(model, 4096, mode=mode)
    assert plan(model, 4096, Options(mode=mode), batch=4).peak_bytes > peak(model, 4096, mode=mode)


def test_beyond_blocks_of_rows_memory_grows_linearly(model: Any) -> None:
    assert peak(model, 8 * LONG, mode="sparse", chunk=1024) < 8.5 * peak(model, LONG, mode="sparse", chunk=1024)


def test_all_edges_cost_quadratically_many_bytes_and_rules_fewer(model: Any) -> None:
    every = peak(model, 8192, mode="edges", edges=Threshold(0.0))
    assert every > 100 * 8192**2 / 2
    assert peak(model, 8192, mode="edges", edges=Threshold(1 / 256)) < every / 10
    assert peak(model, 8192, mode="edges", edges=TopK(8)) < every / 10


def test_half_the_bytes_per_number_take_less() -> None:
    assert peak(tiny("llama").bfloat16(), 4096, mode="sparse") < peak(tiny("llama"), 4096, mode="sparse")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_without_weights_takes_the_same(name: str) -> None:
    real = tiny(name)
    with torch.device("meta"):
        outline = type(real)(real.config)
    assert plan(outline, 5000) == plan(real, 5000)


def test_what_is_rough_says_so() -> None:
    assert plan(tiny("llama"), 100).rough == ""
    assert "linear attention" in plan(tiny("qwen3_5"), 100).rough
    assert "experts" in plan(tiny("gpt_oss"), 100).rough


def test_blocks_are_larger_and_more_of_them_kept_where_it_is_no_cpu(model: Any) -> None:
    place: dict[str, Any] = {"device": "cuda"}
    assert plan(model, 2000, Options(mode="sparse")).phases["rows"]["rows"] == 2000 * 256 * 42 + 4 * 2**20
    assert plan(model, 2000, Options(mode="sparse"), **place).phases["rows"]["rows"] == 2000 * 1024 * 42 + 128 * 2**20
    assert plan(model, LONG, Options(mode="exact")).phases["rows"]["rows read once"] == 64 * 2**20
    assert plan(model, LONG, Options(mode="exact"), **place).phases["rows"]["rows read once"] == 512 * 2**20
    for N in (8192, LONG, 4 * LONG):  # a block and all that is made of it stays below 1 GB
        assert plan(model, N, Options(mode="exact"), **place).phases["rows"]["rows"] < 2**30 + 128 * 2**20


def test_what_kernels_hold_is_counted(model: Any) -> None:
    def rows(backend: str, **options: Any) -> dict[str, int]:
        return plan(model, 8192, Options(backend=backend, **options), device="cuda").phases["rows"]

    by_torch, by_kernel = (rows(backend, mode="sparse") for backend in ("torch", "triton"))
    # Scores are never stored, and blocks are not copied; instead there is room for 257 edges of each token.
    assert by_torch["rows"] - by_kernel["rows"] == 128 * 2**20 + (42 - 12) * 8192 * 1024
    assert by_kernel["edges"] == 8 * 257 * 8192
    exact = rows("triton", mode="exact")
    assert exact["sums of tiles"] == 8 * (16 * 8192 + 2 * 64 * 1024)
    assert rows("triton", mode="exact", edges=TopK(0))["rows"] == 8192 * 1024 * 12 < exact["rows"]
    assert rows("triton", mode="edges", edges=Threshold(1 / 256))["edges"] == 8 * 257 * 8192
    assert "log-sums" not in exact  # SDPA gives them
    assert rows("triton", mode="exact", weights="value_norm")["log-sums"] == 4 * 4 * 2 * 8192  # 4 heads of 2 layers


def test_what_comes_back_from_cpu_memory_is_counted(model: Any) -> None:
    def rows(**options: Any) -> dict[str, int]:
        return plan(model, LONG, Options(offload=True, **options), device="cuda").phases["rows"]

    exact = rows(mode="exact", backend="triton")
    # A band of 1,024 rows, and 4 query and 2 key heads of 16 numbers of one layer.
    assert exact["band"] == 4 * 1024 * LONG and exact["layer of a band"] == 4 * 16 * (2 * LONG + 4 * 1024)
    assert exact["rows read once"] == 512 * 2**20 - exact["band"]
    assert exact["sums of rows"] == 2 * 4 * 4 * LONG  # of 4 heads of 2 layers
    here = plan(model, LONG, Options(mode="exact", backend="triton"), device="cuda").phases["rows"]
    assert exact["rows"] == here["rows"]
    by_value = rows(mode="exact", weights="value_norm")
    assert by_value["layer of a band"] == exact["layer of a band"] + exact["band"]
    streamed = rows(mode="sparse", chunk=256)
    assert streamed["band"] == 4 * 256 * LONG and "cache" not in streamed
    assert "band" not in plan(model, LONG, Options(offload=True)).phases["rows"]  # a CPU
    longest = plan(model, 8 * LONG, Options(mode="exact", offload=True, backend="triton"), device="cuda")
    assert longest.phases["rows"]["band"] == 512 * 2**20 and longest.phases["rows"].get("rows read once", 0) == 0


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_a_large_budget_changes_nothing(model: Any) -> None:
    for num_tokens in (100, 3000, LONG):
        asked, found = plan(model, num_tokens), plan(model, num_tokens, budget=HUGE)
        assert found.fits
        assert (found.mode, found.chunk, found.offload, found.phases) == (asked.mode, asked.chunk, False, asked.phases)


def test_the_largest_chunk_that_fits_is_taken(model: Any) -> None:
    chunks = {size: peak(model, 9000, chunk=size) for size in (None, 8192, 4096, 2048, 1024, 512, 256)}
    for size in (8192, 4096, 2048):
        if chunks[size] < chunks[None]:
            found = plan(model, 9000, budget=chunks[size])
            assert found.fits
            larger = [one for one in chunks if one is not None and one > size and chunks[one] <= chunks[size]]
            assert found.chunk in [size, *larger]
    assert plan(model, 9000, budget=min(chunks.values())).chunk is not None


def test_short_traces_become_sparse_in_mode_auto_only_when_chunks_do_not_help(model: Any) -> None:
    edges = min(peak(model, 2000, mode="edges", chunk=size) for size in (None, 1024, 512, 256))
    assert plan(model, 2000, budget=edges).mode == "edges"
    found = plan(model, 2000, budget=edges - 1)
    assert (found.mode, found.options.mode) == ("sparse", "sparse")


@pytest.mark.parametrize("asked", [{"mode": "edges"}, {"edges": Threshold(0.0)}])
def test_a_mode_or_rule_that_was_asked_for_stays(model: Any, asked: dict[str, Any]) -> None:
    assert "needs at least" in refusal(model, 2000, 20 * 10**6, **asked)


def test_a_chunk_that_was_asked_for_stays(model: Any) -> None:
    needed = peak(model, LONG, mode="sparse", chunk=None)
    assert plan(model, LONG, Options(mode="sparse"), budget=needed - 1).chunk is not None
    assert 'chunk="auto" would take' in refusal(model, LONG, needed - 1, mode="sparse", chunk=None)


def test_offload_is_for_accelerators(model: Any) -> None:
    options, length = Options(mode="exact", chunk=256), 32 * LONG  # the queries and keys are larger than a band
    asked = plan(model, length, options, device="cuda")
    found = plan(model, length, options, device="cuda", budget=asked.peak_bytes - 1)
    assert found.offload and found.options.offload and found.chunk == 256
    assert "queries and keys" not in found.parts
    assert peak(model, LONG, mode="exact", offload=True) == peak(model, LONG, mode="exact")
    assert "offload saves nothing on a CPU" in refusal(model, LONG, 1000)


def test_the_refusal_says_what_is_needed_and_that_is_enough(model: Any) -> None:
    message = refusal(model, 4096, 5 * 10**6, mode="exact", keep_attention=True)
    assert "budget is 5 MB" in message and "the largest part is" in message and "fewer layers (now 2)" in message
    needed = re.search(r"needs at least (\d+) MB", message)
    assert needed is not None
    assert plan(model, 4096, Options(mode="exact", keep_attention=True), budget=int(needed[1]) * 10**6).fits
    least = re.search(r'mode="sparse" with keep_attention=False would take (\d+) MB', message)
    assert least is not None and int(least[1]) < int(needed[1])
    assert plan(model, 4096, Options(mode="sparse"), budget=int(least[1]) * 10**6).fits


def test_kept_attention_rules_out_what_needs_queries_dropped(model: Any) -> None:
    found = plan(model, 3000, Options(keep_attention=True), budget=HUGE)
    assert found.mode == "exact"
    assert peak(model, LONG, mode="sparse", keep_attention=True, chunk=1024) > peak(
        model, LONG, mode="sparse", chunk=1024
    )


@pytest.mark.parametrize("wrong", [0, -5, 1.5, "2GB"])
def test_a_budget_is_a_number_of_bytes(wrong: Any) -> None:
    with pytest.raises(ValueError, match="memory must be None or a number of bytes"):
        Options(memory=wrong)


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 1), (10, 0)])
def test_lengths_and_batches_are_checked(model: Any, num_tokens: int, rows: int) -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 2 and batch at least 1"):
        plan(model, num_tokens, batch=rows)


# --- the tracer ------------------------------------------------------------------------------------------------------


def test_the_tracer_keeps_to_the_budget(model: Any) -> None:
    given = batch(200)
    asked = Tracer(model, mode="sparse", max_tokens=LONG)
    expected = asked.from_ids(**given)[0]
    roomy = Tracer(model, mode="sparse", memory=HUGE).from_ids(**given)[0]
    assert roomy.options.chunk is None
    assert torch.equal(roomy.throughput, expected.throughput)


def test_the_tracer_takes_chunks_and_sparse_mode_from_the_plan(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowgraph import memory

    N = 1200
    monkeypatch.setattr(memory, "CHUNKS", (512, 64))
    given, budget = batch(N), peak(model, N, mode="sparse", chunk=512)
    assert budget < peak(model, N, mode="sparse") and budget < peak(model, N, mode="edges", chunk=64)
    tight = Tracer(model, memory=budget, max_tokens=N).from_ids(**given)[0]
    assert (tight.options.mode, tight.options.chunk) == ("sparse", 512)
    same = Tracer(model, mode="sparse", chunk=512, max_tokens=N).from_ids(**given)[0]
    assert torch.equal(tight.throughput, same.throughput)


def test_the_tracer_refuses_before_the_model_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(model, memory=10**6)
    plan(model, 100)  # looks at the layers once
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="3 traces of up to 100 tokens needs at least"):
        tracer.from_ids(**batch(100, rows=3))


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    settings = {"NO_COLOR": "1", "COLUMNS": "200", "FLOWGRAPH_TRACEBACK": ""}
    return CliRunner().invoke(cli.app, ["plan", *arguments], env=settings)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("plan")
    model.config.save_pretrained(place)  # no weights are needed
    return str(place)


def test_the_command_shows_every_mode(folder: str) -> None:
    result = invoke("-m", folder, "--tokens", "3000", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        [mode, chunk] for mode in ("edges", "sparse", "exact") for chunk in ("none", "1024", "256")
    ]
    assert lines[-1].startswith("mode sparse, chunk none: ")
    assert "peaks are those of traces with --memory" in result.stderr


def test_the_command_says_what_fits(model: Any, folder: str) -> None:
    needed = plan(model, LONG, Options(chunk=256)).peak_bytes
    result = invoke("-m", folder, "--tokens", str(LONG), "--memory", str(needed), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "mode sparse, chunk" in result.stdout and "without it" not in result.stderr
    result = invoke("-m", folder, "--tokens", str(LONG), "--memory", "5MB", "--device", "cpu")
    assert result.exit_code == 1
    assert "needs at least" in result.stderr and "budget is 5 MB" in result.stderr


@pytest.mark.parametrize("wrong", ["much", "-1GB", "0", "2XB"])
def test_the_command_refuses_what_is_no_amount(folder: str, wrong: str) -> None:
    result = invoke("-m", folder, "--tokens", "100", f"--memory={wrong}")
    assert result.exit_code == 2
    assert "is not an amount of memory" in result.stderr.replace("\n", " ")


# --- the truth -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mode": "sparse"}, {"mode": "exact"}, {"mode": "sparse", "chunk": 512}])
@pytest.mark.parametrize("num_tokens", [1024, 2048])
def test_the_prediction_is_near_the_measured_peak(num_tokens: int, settings: dict[str, Any]) -> None:
    from benchmarks.memory import case

    found = case(num_tokens, settings)
    assert 0.8 <= found["ratio"] <= 1.25, found
