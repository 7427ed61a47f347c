"""Traces in the formats of other tools: NetworkX, GraphML, parquet edge lists, JSON, cupy arrays.

Whatever the format, a trace is two tables and a few words about it:

    nodes   one row per token: token_id, the five masks, self_weight, dropped, and where there is a flow: reach, flow,
            throughput; where there is text or credit: text, credit
    edges   one row per edge: source, target (numbers of tokens), weight, and where there is a flow: flow
    about   format, model, layers, rule, dtype

What `from_*` and `read_*` give back is the `TokenGraph`, bit for bit; flows and credits are columns to look at, and are
computed anew from the graph. (safetensors files of graphs: `TokenGraph.save`.)

Shapes: N tokens, E edges.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flowgraph.flow import Flow
from flowgraph.graph import MASKS, TokenGraph, graph_ptr
from flowgraph.sums import cuda_extra
from flowgraph.trace import Trace

FORMAT = "flowgraph-tables/1"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_NODES = ("token_id", *MASKS, "self_weight", "dropped")
_EDGES = ("source", "target", "weight")
MOST_ROWS = 1 << 28
"""A parquet file of a graph with more tokens or edges is refused."""
# In XML 1.0 these can't be written at all, not even escaped.
_NOT_XML = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(0x20), 0xFFFE, 0xFFFF] if chr(code) not in "\t\n\r"}


@dataclass(frozen=True)
class Tables:
    """A trace as columns: [N] of nodes, [E] of edges, and what it is about."""

    nodes: dict[str, Any]
    edges: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def of(cls, what: Trace | Flow | TokenGraph) -> Tables:
        """The columns of a graph; with a flow those of the flow too, and with a trace its text and credits.

        Raises:
            TypeError: neither of the three. ValueError: a batch of several graphs.
        """
        flow = what.flow if isinstance(what, Trace) else what if isinstance(what, Flow) else None
        graph = what if isinstance(what, TokenGraph) else flow.graph if flow is not None else None
        if graph is None:
            raise TypeError(f"what must be a Trace, a Flow or a TokenGraph, got {type(what).__name__}")
        if len(graph_ptr(graph)) != 2:
            raise ValueError(f"what is a batch of {len(graph_ptr(graph)) - 1} graphs; export them one by one")
        nodes = {"token_id": graph.token_ids, **{name: graph[name] for name in MASKS}}
        nodes |= {"self_weight": graph.self_weight, "dropped": graph.dropped}
        edges = {"source": graph.edge_index[0], "target": graph.edge_index[1], "weight": graph.edge_weight}
        if flow is not None:
            nodes |= {"reach": flow.reach, "flow": flow.flow, "throughput": flow.throughput}
            edges["flow"] = flow.edge_flow
        columns: dict[str, Any] = {name: _array(values) for name, values in nodes.items()}
        if isinstance(what, Trace):
            columns["credit"] = _array(what.weights)
            if what.text is not None:
                columns["text"] = what.text
        about = {"format": FORMAT, "model": graph.model, "layers": list(graph.layers), "rule": graph.rule}
        about["dtype"] = str(graph.edge_weight.dtype).removeprefix("torch.")
        if graph.num_pools:
            about["pools"] = graph.num_pools
        return cls(columns, {name: _array(values) for name, values in edges.items()}, about)

    def graph(self) -> TokenGraph:
        """The graph again.

        Raises:
            ValueError: a column or a word about it is missing, or the graph breaks a law.
        """
        for name in ("nodes", "edges", "about"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be names and values, got {type(getattr(self, name)).__name__}")
        if self.about.get("format") != FORMAT:
            raise ValueError(f"its format is {reprlib.repr(self.about.get('format'))}, not {FORMAT!r}")
        if self.about.get("pools"):
            raise ValueError(
                "the graph had pools, which tables don't hold, and its edges alone give another flow; use "
                "TokenGraph.save and load"
            )
        if missing := [name for name in _NODES if name not in self.nodes]:
            raise ValueError(f"the nodes have no {', '.join(missing)}")
        if missing := [name for name in _EDGES if name not in self.edges]:
            raise ValueError(f"the edges have no {', '.join(missing)}")
        kind = self.about.get("dtype")
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise ValueError(f"its dtype is {reprlib.repr(kind)}; it must be one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[kind]

        source, target = (_tensor("source", self.edges, torch.int64), _tensor("target", self.edges, torch.int64))
        if len(source) != len(target):
            raise ValueError(f"the edges have {len(source)} of source and {len(target)} of target")
        layers = self.about.get("layers", [])
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"layers must be a list of layer numbers, got {reprlib.repr(layers)}")
        masks: dict[str, Any] = {name: _tensor(name, self.nodes, torch.bool) for name in MASKS}
        return TokenGraph.from_edges(
            torch.stack([source, target]),
            _tensor("weight", self.edges, dtype),
            **masks,
            token_ids=_tensor("token_id", self.nodes, torch.int64),
            self_weight=_tensor("self_weight", self.nodes, dtype),
            dropped=_tensor("dropped", self.nodes, dtype),
            model=str(self.about.get("model", "")),
            layers=layers,
            rule=str(self.about.get("rule", "given edges")),
        )


# --- NetworkX and GraphML ---------------------------------------------------------------------------------------------


def to_networkx(what: Trace | Flow | TokenGraph) -> Any:
    """A `networkx.DiGraph` with nodes 0 .. N-1, the columns as attributes, and `about` as `graph.graph`."""
    import networkx

    tables = Tables.of(what)
    out = networkx.DiGraph(**tables.about)
    names, columns = list(tables.nodes), [_plain(values) for values in tables.nodes.values()]
    out.add_nodes_from((n, dict(zip(names, row, strict=True))) for n, row in enumerate(zip(*columns, strict=True)))
    ends = [_plain(tables.edges[name]) for name in ("source", "target")]
    names = [name for name in tables.edges if name not in ("source", "target")]
    columns = [_plain(tables.edges[name]) for name in names]
    out.add_edges_from(
        (source, target, dict(zip(names, row, strict=True)))
        for source, target, *row in zip(*ends, *columns, strict=True)
    )
    return out


def from_networkx(graph: Any) -> TokenGraph:
    """The `TokenGraph` of what `to_networkx` or `read_graphml` gave.

    Raises:
        ValueError: nodes that are not 0 .. N-1, an attribute that is missing, or a graph that breaks a law.
    """
    if set(graph.nodes) != set(range(len(graph))):
        raise ValueError(f"graph must have the nodes 0 .. {len(graph) - 1}, the tokens in time order")
    nodes = _columns([graph.nodes[n] for n in range(len(graph))], "node")
    edges = _columns([{**values, "source": s, "target": t} for s, t, values in graph.edges(data=True)], "edge")
    edges = edges or {"source": [], "target": [], "weight": []}
    return Tables(nodes, edges, dict(graph.graph)).graph()


def write_graphml(what: Trace | Flow | TokenGraph, path: str | Path) -> Path:
    """Write GraphML, for Gephi, Cytoscape, yEd and igraph. Characters that XML cannot hold become U+FFFD."""
    import networkx

    graph = to_networkx(what)
    graph.graph["layers"] = json.dumps(graph.graph["layers"])
    for _, values in graph.nodes(data=True):
        if "text" in values:
            values["text"] = _storable(values["text"]).translate(_NOT_XML)
    with Path(path).open("wb") as file:  # by a name that ends in .gz networkx would compress it
        networkx.write_graphml(graph, file, named_key_ids=True)
    return Path(path)


def read_graphml(path: str | Path) -> TokenGraph:
    """Read what `write_graphml` wrote.

    Raises:
        ValueError: no GraphML of a token graph. A DOCTYPE is refused: entities could expand to any size.
    """
    import networkx

    with Path(path).open("rb") as file:
        try:
            _refuse_doctype(file)
            graph = networkx.read_graphml(file, node_type=int, force_multigraph=False)
            graph.graph["layers"] = json.loads(graph.graph.get("layers", "[]"))
            return from_networkx(graph)
        except Exception as error:  # networkx takes what it finds for granted, and anything may come of that
            raise ValueError(f"cannot read a graph from {path}: {_reason(error)}") from error


def _refuse_doctype(file: BinaryIO) -> None:
    """Only the beginning is read: a DOCTYPE stands before the first element."""
    parser = expat.ParserCreate()
    begun: list[bool] = []

    def doctype(*_: Any) -> None:
        raise ValueError("it has a DOCTYPE; GraphML needs none, and entities of one could expand to any size")

    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = lambda *_: begun.append(True)
    while not begun and (piece := file.read(1 << 12)):
        parser.Parse(piece, False)
    file.seek(0)


# --- parquet and JSON -------------------------------------------------------------------------------------------------


def write_parquet(what: Trace | Flow | TokenGraph, stem: str | Path) -> tuple[Path, Path]:
    """Write `stem.nodes.parquet` and `stem.edges.parquet`; `about` stands in the metadata of both."""
    tables = Tables.of(what)
    paths = _parquet_paths(stem)
    for path, columns in zip(paths, (tables.nodes, tables.edges), strict=True):
        columns = columns | ({"text": [_storable(one) for one in columns["text"]]} if "text" in columns else {})
        table = pa.table(columns).replace_schema_metadata({"flowgraph": json.dumps(tables.about)})
        pq.write_table(table, path)
    return paths


def read_parquet(stem: str | Path) -> TokenGraph:
    """Read what `write_parquet` wrote.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: corrupt, foreign or too large (`MOST_ROWS`), or the graph breaks a law; it names the file.
    """
    nodes_path, edges_path = _parquet_paths(stem)
    nodes, _ = _parquet_columns(nodes_path, _NODES)
    edges, about = _parquet_columns(edges_path, _EDGES)
    try:
        return Tables(nodes, edges, about).graph()
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read a graph from {nodes_path} and {edges_path}: {error}") from error


def _parquet_columns(path: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns that a graph is made of, and what the file says about it."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            schema = file.schema_arrow
            about = json.loads((schema.metadata or {}).get(b"flowgraph", b"null"))
            if not isinstance(about, dict):
                raise ValueError("it was not written by flowgraph")
            # By the footer, before memory is taken: a few bytes can stand for any number of equal rows.
            if file.metadata.num_rows > MOST_ROWS:
                raise ValueError(f"it says that it has {file.metadata.num_rows} rows; at most {MOST_ROWS} are read")
            if missing := [name for name in names if name not in schema.names]:
                raise ValueError(f"it has no column {', '.join(missing)}")
            if nested := [name for name in names if not pa.types.is_primitive(schema.field(name).type)]:
                raise ValueError(f"its column {nested[0]} is {schema.field(nested[0]).type}, and not plain numbers")
            table = file.read(columns=list(names))
        return {name: table[name].to_numpy(zero_copy_only=False) for name in names}, about
    except (pa.ArrowException, OSError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"cannot read {path}: {_reason(error)}") from error


def write_json(what: Trace | Flow | TokenGraph, path: str | Path) -> Path:
    """Write {"about": .., "nodes": {column: [..]}, "edges": {column: [..]}} as JSON; NaN and infinity become null."""
    tables = Tables.of(what)
    out = {"about": tables.about}
    for name, columns in (("nodes", tables.nodes), ("edges", tables.edges)):
        out[name] = {key: [_finite(value) for value in _plain(values)] for key, values in columns.items()}
    Path(path).write_text(json.dumps(out, allow_nan=False), encoding="utf-8")
    return Path(path)


def read_json(path: str | Path) -> TokenGraph:
    """Read what `write_json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, and not nodes, edges and about")
        return Tables(found["nodes"], found["edges"], found["about"]).graph()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read a graph from {path}: {error!r}") from error


# --- cupy -------------------------------------------------------------------------------------------------------------


def to_cupy(what: Trace | Flow | TokenGraph) -> dict[str, Any]:
    """edge_index [2, E], edge_weight [E], the masks [N], and of a flow edge_flow [E], reach and throughput [N], as cupy
    arrays that share their memory with the tensors where these are on a GPU."""
    try:
        import cupy
    except ImportError as error:
        extra = cuda_extra()
        raise ImportError(
            f'flowgraph.adapters.exports.to_cupy needs cupy: pip install "flowgraph-llm[{extra}]"'
        ) from error
    flow = what.flow if isinstance(what, Trace) else what if isinstance(what, Flow) else None
    graph = flow.graph if flow is not None else what
    if not isinstance(graph, TokenGraph):
        raise TypeError(f"what must be a Trace, a Flow or a TokenGraph, got {type(what).__name__}")
    tensors = {name: graph[name] for name in ("edge_index", "edge_weight", *MASKS)}
    if flow is not None:
        tensors |= {"edge_flow": flow.edge_flow, "reach": flow.reach, "throughput": flow.throughput}
    return {
        name: cupy.from_dlpack(value.contiguous()) if value.is_cuda else cupy.asarray(value.numpy())
        for name, value in tensors.items()
    }


# --- columns ----------------------------------------------------------------------------------------------------------


def _tensor(name: str, columns: Mapping[str, Any], kind: torch.dtype) -> Tensor:
    """A column as a tensor, if it is one of plain values of that kind: nothing is rounded, cut or taken for true."""
    try:
        values = np.asarray(columns[name])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a column of plain values: {error}") from error
    wanted = {torch.int64: "i", torch.bool: "b"}.get(kind, "if")
    if values.ndim != 1 or (values.dtype.kind not in wanted and values.size):
        raise ValueError(f"{name} must be a column of {str(kind)[6:]}, got {values.dtype} {list(values.shape)}")
    return torch.from_numpy(values.astype(str(kind)[6:]))


def _reason(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    return values.detach().cpu().numpy()


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _finite(value: Any) -> Any:
    if isinstance(value, str):
        return _storable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _storable(text: str) -> str:
    """Halves of surrogate pairs cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _columns(rows: list[Mapping[str, Any]], what: str) -> dict[str, list[Any]]:
    names = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"{what} {number} has no attribute {missing[0]!r}, which others have")
    return {name: [row[name] for row in rows] for name in names}


def _parquet_paths(stem: str | Path) -> tuple[Path, Path]:
    stem = Path(stem)
    return stem.with_name(f"{stem.name}.nodes.parquet"), stem.with_name(f"{stem.name}.edges.parquet")
