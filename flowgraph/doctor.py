"""What `flowgraph doctor` looks at: versions, devices, extras, and whether a tiny model is traced right.

Nothing is downloaded: the model is random. The truth of the self-test is the attention that this model itself gives
out, and the dense float64 solver.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from flowgraph._version import __version__

REQUIRED = ("torch", "torch-geometric", "transformers", "numpy", "scipy", "pyarrow")
EXTRAS = {  # extra of pyproject.toml -> module: distribution
    "scatter": {"torch_scatter": "torch-scatter"},
    "cuda12": {"cupy": "cupy-cuda12x", "triton": "triton"},
    "cuda13": {"cupy": "cupy-cuda13x", "triton": "triton"},
    "trl": {"trl": "trl"},
    "ray": {"ray": "ray"},
    "analysis": {"pandas": "pandas"},
    "datasets": {"datasets": "datasets"},
    "report": {"plotly": "plotly"},
    "evidence": {"matplotlib": "matplotlib"},
    "demo": {"gguf": "gguf"},
}


def examine() -> tuple[Table, int]:
    """Everything as a table, and how many of the self-tests went wrong."""
    import torch

    table = Table(box=None, pad_edge=False, show_header=False)
    for heading, rows in (("versions", versions()), ("devices", devices()), ("extras", extras())):
        table.add_row(f"[bold]{heading}[/]")
        for name, what in rows:
            table.add_row(name, Text(what, style="dim" if what.startswith("no ") else ""))
        table.add_row()
    table.add_row("[bold]self-test[/]")
    wrong = 0
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for what, error, limit in self_test(device):
            good = error <= limit  # False for NaN
            wrong += not good
            verdict = Text("OK", style="green") if good else Text("WRONG", style="bold red")
            table.add_row(f"{device}, {what}", verdict + Text(f", differs by {error:.1e} of {limit:.0e} allowed"))
    return table, wrong


def versions() -> Iterator[tuple[str, str]]:
    """(name, version) of FlowGraph, Python and what FlowGraph can't do without."""
    yield "flowgraph", __version__
    yield "python", platform.python_version()
    for name in REQUIRED:
        yield name, importlib.metadata.version(name)


def devices() -> Iterator[tuple[str, str]]:
    """(device, what it is)."""
    import torch

    yield "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        yield "cuda", "none"
    yield "mps", "yes" if torch.backends.mps.is_available() else "none"


def extras() -> Iterator[tuple[str, str]]:
    """(extra, the versions of what it installs, or how to install it)."""
    from flowgraph.sums import cuda_extra

    other = {"cuda12": "cuda13", "cuda13": "cuda12"}[cuda_extra()]
    for extra, modules in EXTRAS.items():
        if extra == other:  # one of the two, or two versions of cupy would lie one over the other
            continue
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield extra, f'no {" and no ".join(missing)}: pip install "flowgraph-llm[{extra}]"'
        else:
            yield extra, ", ".join(f"{module} {_version_of(name)}" for module, name in modules.items())


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"  # cupy, say, comes as one of several distributions


def self_test(device: str) -> Iterator[tuple[str, float, float]]:
    """(what, largest error, error allowed): a tiny random model captured, and traced in every way there is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flowgraph import Flow, TokenGraph, Tracer, trace_flow
    from flowgraph.solve import solvers_for

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"  # the kernel that gives its attention out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(3, 64, (1, 48))
    model.to(device)
    place = torch.arange(48)[None]
    roles: dict[str, Any] = {"prompt_mask": place < 16, "answer_tokens": (place >= 40) & (place < 44)}
    graph = Tracer(model, mode="edges").from_ids(ids, **roles)[0].graph
    exact = Tracer(model, mode="exact").from_ids(ids, **roles)[0].flow

    with torch.no_grad():
        attention = model(ids.to(device), output_attentions=True).attentions
    dense = torch.stack([attention[layer][0].double().mean(0) for layer in graph.layers]).mean(0).cpu()
    masks = {name: getattr(graph, name).cpu() for name in ("prompt_mask", "answer_mask", "response_mask")}
    truth = trace_flow(TokenGraph.from_dense(dense, **masks), "reference")

    def error(flow: Flow) -> float:
        pairs = [(flow.reach, truth.reach), (flow.throughput, truth.throughput)]
        # torch's max: one NaN makes it NaN, which Python's max may overlook.
        return float(torch.stack([((got.double().cpu() - want).abs() / want.max()).max() for got, want in pairs]).max())

    captured = torch.zeros(48, 48, dtype=torch.float64)
    source, target = graph.edge_index.cpu()
    captured[target, source] = graph.edge_weight.double().cpu()
    yield "capture", float((captured - dense.tril(-1)).abs().max()), 1e-5
    for solver, backend in solvers_for(device):
        what = f"solver {solver}" + (f", {backend}" if backend != "torch" else "")
        yield what, error(trace_flow(graph, solver, backend)), 1e-4
    yield "mode exact", error(exact), 1e-4
