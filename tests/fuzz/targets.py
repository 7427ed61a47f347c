"""What is fuzzed: everything that reads a file or searches a text, with valid inputs to begin from.

A target takes bytes. Whatever they are, it either returns or raises one of `DECLARED`; what it accepts must keep the
laws of what it is (a graph's, a span's). Anything else is a finding.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowgraph import DenseRows, Flow, TokenGraph, TopK, page, sparse_graph, trace_flow
from flowgraph.adapters import exports, inputs, records, shards
from flowgraph.adapters.inputs import Shard
from flowgraph.adapters.service import ServiceConfig, newest_checkpoint
from flowgraph.answers import FINDERS, find_answer
from flowgraph.rl import FlowConfig
from flowgraph.segments import split
from flowgraph.spans import locate, token_offsets
from tests.graphs import attention, mask_of, random_graph
from tests.written import TOKENIZER, VOCABULARY

DECLARED = (ValueError, TypeError)
"""What the readers say they raise. FileNotFoundError is for files that are not there, and here they are."""


@dataclass(frozen=True)
class Target:
    """`run(data, folder)`, with a place for files; `seeds` are valid inputs, `words` what the format knows."""

    name: str
    run: Callable[[bytes, Path], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()


# ------------------------------------------------------------------------- graphs


def check_graph(graph: TokenGraph) -> None:
    """A graph that a reader let pass is one, and flow runs through it."""
    graph.validate()
    if graph.num_nodes <= 256:
        check_flow(trace_flow(graph))


def check_flow(flow: Flow) -> None:
    """What flows in flows out, up to rounding; and all of it, or nothing where no source reaches the answer."""
    graph = flow.graph
    single = flow.flow.dtype == torch.float32
    zero = torch.zeros(int(graph.num_nodes), dtype=torch.float64)
    inflow = flow.injection.double() + zero.scatter_add(0, graph.edge_index[1], flow.edge_flow.double())
    outflow = zero.scatter_add(0, graph.edge_index[0], flow.edge_flow.double())
    inflow, outflow = inflow + flow.unlisted_inflow.double(), outflow + flow.unlisted_outflow.double()
    outflow = torch.where(graph.answer_mask, flow.flow.double(), outflow)
    torch.testing.assert_close(outflow, inflow, rtol=1e-4 if single else 1e-9, atol=1e-25)
    torch.testing.assert_close(flow.absorbed, flow.injected, rtol=1e-4 if single else 1e-9, atol=0)
    for name in ("reach", "flow", "edge_flow", "injection", "injected"):
        values = getattr(flow, name)
        assert not values.isnan().any() and (values >= 0).all(), f"{name} is negative or NaN"


def _safetensors(data: bytes, folder: Path) -> None:
    (folder / "graph.safetensors").write_bytes(data)
    check_graph(TokenGraph.load(folder / "graph.safetensors"))


def _graphml(data: bytes, folder: Path) -> None:
    (folder / "graph.graphml").write_bytes(data)
    check_graph(exports.read_graphml(folder / "graph.graphml"))


def _json(data: bytes, folder: Path) -> None:
    (folder / "graph.json").write_bytes(data)
    check_graph(exports.read_json(folder / "graph.json"))


def _parquet(what: str, other: str, sound: bytes, data: bytes, folder: Path) -> None:
    (folder / f"graph.{what}.parquet").write_bytes(data)
    (folder / f"graph.{other}.parquet").write_bytes(sound)
    check_graph(exports.read_parquet(folder / "graph"))


def _files(write: Callable[[TokenGraph, Path], Any], suffix: str, more: Sequence[TokenGraph] = ()) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"graph{suffix}"
        found = []
        for graph in (*some_graphs(), *more):
            write(graph, path)
            found.append(path.read_bytes())
        return found


def some_graphs() -> list[TokenGraph]:
    """Small ones of both dtypes, one without edges."""
    empty = TokenGraph.from_edges(
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), prompt_mask=mask_of(3, 0), answer_mask=mask_of(3, 2)
    )
    return [random_graph(5), random_graph(9, dtype=torch.float32, threshold=0.1), empty]


def with_pools() -> TokenGraph:
    rows = DenseRows(attention(9))
    return sparse_graph(rows, prompt_mask=mask_of(9, 0, 1, 2), answer_mask=mask_of(9, 7), edges=TopK(1))


# ------------------------------------------------------------------------- configurations and rows


def _flow_config(data: bytes, folder: Path) -> None:
    FlowConfig.from_dict(_loaded(data))


def _loaded(data: bytes) -> Any:
    """Of JSON, for what begins at a mapping: what is no JSON is of no interest."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("too deep for JSON") from error


def _service(suffix: str, data: bytes, folder: Path) -> None:
    path = folder / f"service{suffix}"
    path.write_bytes(data)
    config = ServiceConfig.read(path)
    assert config.workers >= 0 and config.timeout > 0 and math.isfinite(config.timeout)
    assert len(repr(config)) < 4 * len(data) + 4000, "a small file makes a large configuration"


def _checkpoint(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").touch()
    newest_checkpoint(folder)


def _rows(suffix: str, data: bytes, folder: Path) -> None:
    """A file of rollouts, planned and read as `flowgraph score` does it: each row is one, or a reason."""
    path = folder / f"in{suffix}"
    path.write_bytes(data)
    source = inputs.sources(path)[0]
    for shard in inputs.plan([source], rows=2, most_bytes=1 << 16, max_row_bytes=1 << 12):
        for line, row in inputs.read(source, shard, max_row_bytes=1 << 12):
            assert line >= 1 and isinstance(row, dict | ValueError)
            if isinstance(row, dict):
                records.records_of(line, row)


def _manifest(data: bytes, folder: Path) -> None:
    (folder / shards.MANIFEST).write_bytes(data)
    manifest = shards.Manifest.read(folder)
    assert manifest.rows >= 0 and len(manifest.digest) == 32 and isinstance(manifest.changes(manifest), list)


def _part(shard: Shard, data: bytes, folder: Path) -> None:
    shards.part(folder, shard.number).write_bytes(data)
    about = shards.finished(folder, shard, "digest")
    assert about is None or about["shard"] == shard.to_dict()


def _graphs(data: bytes, folder: Path) -> None:
    (folder / shards.GRAPHS).mkdir(exist_ok=True)
    (folder / shards.GRAPHS / "part-000000.safetensors").write_bytes(data)
    for number in (0, 1):
        check_graph(shards.graph_of(folder, f"part-000000/{number}"))


def _rollouts() -> bytes:
    """As Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"{n} + 2?", "response": "It is \\boxed{4}", "id": str(n)} for n in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(rows), Path(folder) / "in.parquet", row_group_size=2)
        return (Path(folder) / "in.parquet").read_bytes()


def _job() -> tuple[Shard, bytes, bytes, bytes]:
    """A shard; and what a job leaves: its manifest, a part, and a file of graphs."""
    import pyarrow as pa

    shard = Shard(0, "a.jsonl", 1, 2, 0, 90)
    settings: dict[str, Any] = {"model": "m", "options": {"top": 0.4, "edges": None}}
    manifest = shards.Manifest(settings, {"a.jsonl": {"size": 90, "sha256": "ab", "changed": 1.5}}, [shard])
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        manifest.write(out)
        table = pa.Table.from_pylist([], schema=shards.schema(graphs=True))
        about = {"job": "digest", "written": 0, "failed": 0, "tokens": 0, "flags": {}}
        shards.write_shard(out, shard, table, [], about, graphs=[random_graph(5), with_pools()])
        graphs = (out / shards.GRAPHS / "part-000000.safetensors").read_bytes()
        return shard, (out / shards.MANIFEST).read_bytes(), shards.part(out, 0).read_bytes(), graphs


def _line(data: bytes, folder: Path) -> None:
    record = records.parse(1, data)
    assert record.line == 1


def _scores(data: bytes, folder: Path) -> None:
    (folder / "scores.parquet").write_bytes(data)
    assert records.read_scores(folder / "scores.parquet").num_rows


def _score_file() -> bytes:
    row: dict[str, Any] = {
        "line": 1, "id": "a", "prompt_tokens": 2, "response_tokens": 2, "token_ids": [1, 2], "weights": [1.0, 1.5],
        "throughput": [0.5, 1.0], "reach": [0.5, 1.0], "answer": "4", "flags": [],
    }  # fmt: skip
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        pq.write_table(pa.Table.from_pylist([row] * 3), path)
        return path.read_bytes()


# ------------------------------------------------------------------------- text


def as_text(data: bytes) -> str:
    """Any bytes as text; what is no UTF-8 becomes halves of surrogate pairs, which JSON can carry too."""
    return data.decode("utf-8", "surrogateescape")


def _answers(data: bytes, folder: Path) -> None:
    text = as_text(data)
    for finder in ("auto", *FINDERS):
        found = find_answer(text, finder)
        assert ("no_answer" in found.flags) == (found.match is None)
        if found.match:
            answer = text[found.match.start : found.match.stop]
            assert answer and answer == answer.strip(), f"{finder}: {answer!r}"


def _segments(data: bytes, folder: Path) -> None:
    text = as_text(data)
    pieces = [text[k : k + 3] for k in range(0, len(text), 3)]
    for by in ("words", "lines", "sentences", "steps", "turns"):
        if pieces:
            assert split(pieces, by).num_tokens == len(pieces)


def _spans(data: bytes, folder: Path) -> None:
    ids = [byte % VOCABULARY for byte in data[:2048]]
    text, offsets = token_offsets(TOKENIZER, ids)
    assert len(offsets) == len(ids)
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    assert starts == sorted(starts) and stops == sorted(stops)
    assert not ids or (starts[0] == 0 and stops[-1] == len(text))
    if len(ids) > 1:
        found = locate(torch.tensor(ids), torch.arange(len(ids)) < 1, tokenizer=TOKENIZER)
        assert not (found.credit_mask & ~found.response_mask).any()
        assert ("no_answer" in found.flags) == (not found.answer_mask.any())


def _page(data: bytes, folder: Path) -> None:
    values = _loaded(data)
    check_page(page.render([values], title=str(values.get("rule")) if isinstance(values, dict) else "x"))


def check_page(html: str) -> None:
    """One script that runs, one that holds data, and nothing that ends either early."""
    lower = html.lower()
    assert lower.count("<script") == lower.count("</script") == 2
    data = html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(data)
    json.loads(data)
    html.encode("utf-8")


def a_trace() -> dict[str, Any]:
    """What `page.render` takes, with two tokens."""
    tokens = {
        "text": ["Q", "4"], "id": [5, 6], "role": ["prompt", "answer"], "source": [True, False], "sink": [False, True],
        "credited": [False, False], "reach": [0.5, 1.0], "throughput": [2.0, 2.0], "weight": [1.0, 1.0],
    }  # fmt: skip
    edges = {"source": [0], "target": [1], "weight": [0.5], "flow": [1.0], "share": 1.0}
    segments = {"by": "sentences", "start": [0, 1], "stop": [1, 2], "kind": ["prompt", "answer"], "flow": [1.0, 1.0]}
    return {
        "version": "0", "model": "m", "layers": [1], "rule": "all edges", "preset": "paper", "solver": "scipy",
        "score": "throughput", "flags": ["cut_off"], "answer": {"text": "4", "start": 1, "stop": 2, "finder": "boxed"},
        "tokens": tokens, "edges": edges, "title": "t",
        "summary": {"tokens": 2, "absorbed": 1.0, "ok": [True, None, "x"]},
        "segments": segments | {"edges": {"source": [0], "target": [1], "flow": [1.0]}},
        "backbone": {"delivered": 0.9, "edges": {"source": [0], "target": [1], "flow": [1.0]}},
        "checkpoints": [{"start": 0, "stop": 1, "lost": 0.5}],
        "measures": {"depth": {"value": 1.0, "about": "of paths"}},
    }  # fmt: skip


_ANSWER_TEXTS = (
    r"Thus $x = \boxed{\frac{1}{2}}$.", "so 3 + 4 = 7.\n#### 7", "A: 5\n**A:** 6", "<answer> 9 </answer>",
    "The final answer is: **$12$**. Is it? answer is \\(3.5\\)!", "answer is $$a_{1}$$",
    r"\fbox{{a}} \\boxed {b} {", "",
)  # fmt: skip
_SEGMENT_TEXTS = (
    "<think>\nStep 1: e.g. 3.14.\n\n- item\n</think>\n# Title\n```python\nx = 1\n```\n1. First, Dr. X left! Then he...",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<tool_call>{}</tool_call> ok.",
    "[INST] q [/INST] a <start_of_turn>model\nb <|start_header_id|>user<|end_header_id|>", "\u597d\u3002\u4e0d\uff01 x",
)  # fmt: skip
_FLOW = {
    "gain": "1.2", "top": 0.2, "warmup_steps": 10, "normalize": "true", "anneal_after": None, "max_tokens": "4096",
    "answer": r"re:=(\d)", "layers": [3, 4], "edges": {"top_k": 32}, "score": "entropy", "signs": "positive",
    "heads": {"local_heads": [[1, 0]], "global_heads": [[2, 3]]}, "temperature": 0.5, "per": "batch",
}  # fmt: skip
_CONFIG: dict[str, Any] = {
    "model": "m", "workers": 1, "gpus_per_worker": 0.5, "timeout": 60.0, "dtype": "bfloat16", "refresh_from": "/ckpt",
    "flow": {"gain": 1.5, "answer": "boxed", "edges": {"threshold": 0.01}},
}  # fmt: skip
_YAML = """
model: m  # a comment
workers: 1
timeout: 60
refresh_from: ~
flow:
  gain: 1.5
  answer: 'boxed'
  layers: [1, 2]
"""
_TOML = "model = 'm'\nworkers = 1\ntimeout = 6e1\n[flow]\ngain = 1.5\nanswer = '''boxed'''\nlayers = [1, 2]\n"
_YAML_WORDS = (
    b"!!int ", b"!!float ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ", b"<<: ", b"? ", b"- ", b"&a [*a]",
    b"1:99", b"0b", b"0x_", b"---\n", b"%YAML 9.9\n", b"2001-99-99", b"|\n", b">\n",
)  # fmt: skip
_XML_WORDS = (
    b"<!DOCTYPE x [<!ENTITY a 'b'>]>", b"&a;", b"<node id='0'/>", b"<edge source='0' target='1'/>", b"<port/>",
    b"<graph>", b"<hyperedge/>", b"attr.type='boolean'", b"edgedefault='undirected'", b"<![CDATA[",
    b"<?xml version='1.0' encoding='utf-16'?>", b"yfiles.type='nodegraphics'", b"<default>1</default>", b"key='d0'",
)  # fmt: skip


@functools.cache
def targets() -> dict[str, Target]:
    """All of them, by name."""

    def dumps(values: Any) -> bytes:
        return json.dumps(values).encode()

    shard, manifest, part, graphs = _job()
    tensors = _files(TokenGraph.save, ".safetensors", [with_pools()])
    nodes = _files(lambda graph, path: exports.write_parquet(graph, path.with_name("graph")), ".nodes.parquet")
    edges = _files(lambda graph, path: exports.write_parquet(graph, path.with_name("graph")), ".edges.parquet")
    rows = [
        {"prompt": "2 + 2?", "response": "4. \\boxed{4}", "id": "a"},
        {"prompt_ids": [1, 2], "response_ids": [3], "id": 7},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"question": "q", "response": "r"}, {"prompt": [{"role": "user", "content": None}], "response": "r"},
    ]  # fmt: skip
    configs = [dumps(_FLOW), dumps({"edges": {"mass": 0.9}, "layers": "all"})]
    checkpoints = [dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}), b"{}", b'{"architectures": null}']
    answers = [text.encode() for text in _ANSWER_TEXTS]
    segments = [text.encode() for text in _SEGMENT_TEXTS]
    tokens = [bytes(TOKENIZER(text)["input_ids"]) or b"\x03" for text in _ANSWER_TEXTS]

    def service(suffix: str, seeds: Sequence[bytes], words: Sequence[bytes]) -> Target:
        return Target(f"service {suffix[1:]}", functools.partial(_service, suffix), seeds, words)

    def parquet(what: str, seed: bytes, other: str, sound: bytes) -> Target:
        return Target(f"parquet {what}", functools.partial(_parquet, what, other, sound), [seed], (b"PAR1",))

    found = [
        Target("safetensors", _safetensors, tensors, (b"F16", b"BF16", b"U64", b"I64")),
        Target("graphml", _graphml, _files(exports.write_graphml, ".graphml"), _XML_WORDS),
        Target("json", _json, _files(exports.write_json, ".json"), (b"true", b'"float32"', b'"about"', b'"layers"')),
        parquet("nodes", nodes[0], "edges", edges[0]),
        parquet("edges", edges[0], "nodes", nodes[0]),
        Target("flow config", _flow_config, configs, (b'"re:(a"', b'"scorer"')),
        service(".yaml", [_YAML.encode(), dumps(_CONFIG)], _YAML_WORDS),
        service(".toml", [_TOML.encode()], (b"[[flow]]", b"1979-05-27", b"nan", b'"""')),
        service(".json", [dumps(_CONFIG)], (b'"flow"', b'"dtype"', b'"float64"')),
        Target("checkpoint config", _checkpoint, checkpoints, (b'"architectures"',)),
        Target("json lines", _line, [dumps(row) for row in rows], (b'"role"', b'"content"', b'"response"')),
        Target("rows jsonl", functools.partial(_rows, ".jsonl"), [b"\n".join(map(dumps, rows))], (b'"prompt"', b"\n")),
        Target("rows parquet", functools.partial(_rows, ".parquet"), [_rollouts()], (b"PAR1",)),
        Target("manifest", _manifest, [manifest], (b'"shards"', b'"inputs"', b'"sha256"')),
        Target("part", functools.partial(_part, shard), [part], (b"PAR1", b'"job"')),
        Target("graphs", _graphs, [graphs], (b"F16", b"I64", b'"graphs"')),
        Target("scores", _scores, [_score_file()], (b"PAR1",)),
        Target("answers", _answers, answers, answers),
        Target("segments", _segments, segments, (b". ", b"...", b"\n\n", b"```", b"<think>", b"\n1. ")),
        Target("spans", _spans, tokens, ("\U0001f600".encode(),)),
        Target("page", _page, [dumps(a_trace())], (b"</script><script>x()</script>", b"<!--", b"\\u2028", b'"><img>')),
    ]
    return {target.name: target for target in found}
