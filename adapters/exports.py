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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flowgraph.flow import Flow
from flowgraph.graph import MASKS, TokenGraph, graph_ptr
from flowgraph.trace import Trace

FORMAT = "flowgraph-tables/1"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
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
        return cls(columns, {name: _array(values) for name, values in edges.items()}, about)

    def graph(self) -> TokenGraph:
        """The graph again.

        Raises:
            ValueError: a column or a word about it is missing, or the graph breaks a law.
        """
        if self.about.get("format") != FORMAT:
            raise ValueError(f"its format is {self.about.get('format')!r}, not {FORMAT!r}")
        if missing := [name for name in ("token_id", *MASKS, "self_weight", "dropped") if name not in self.nodes]:
            raise ValueError(f"the nodes have no {', '.join(missing)}")
        if missing := [name for name in ("source", "target", "weight") if name not in self.edges]:
            raise ValueError(f"the edges have no {', '.join(missing)}")
        if (kind := self.about.get("dtype")) not in _DTYPES:
            raise ValueError(f"its dtype is {kind!r}; it must be one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[kind]

        def tensor(values: Any, kind: torch.dtype) -> Tensor:
            return torch.as_tensor(np.array(values), dtype=kind)

        ends = [tensor(self.edges[name], torch.int64) for name in ("source", "target")]
        masks = {name: tensor(self.nodes[name], torch.bool) for name in MASKS}
        return TokenGraph.from_edges(
            torch.stack(ends),
            tensor(self.edges["weight"], dtype),
            **masks,
            token_ids=tensor(self.nodes["token_id"], torch.int64),
            self_weight=tensor(self.nodes["self_weight"], dtype),
            dropped=tensor(self.nodes["dropped"], dtype),
            model=str(self.about.get("model", "")),
            layers=[int(layer) for layer in self.about.get("layers", ())],
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
    edges = _columns([dict(source=s, target=t, **values) for s, t, values in graph.edges(data=True)], "edge")
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
    networkx.write_graphml(graph, str(path), named_key_ids=True)
    return Path(path)


def read_graphml(path: str | Path) -> TokenGraph:
    """Read what `write_graphml` wrote."""
    import networkx

    try:
        graph = networkx.read_graphml(str(path), node_type=int, force_multigraph=False)
        graph.graph["layers"] = json.loads(graph.graph.get("layers", "[]"))
        return from_networkx(graph)
    except (ValueError, KeyError, TypeError, SyntaxError, networkx.NetworkXError) as error:
        raise ValueError(f"cannot read a graph from {path}: {error}") from error


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
    """Read what `write_parquet` wrote."""
    columns = []
    about: Any = None
    for path in _parquet_paths(stem):
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {}).get(b"flowgraph", b"null"))
        except (pa.ArrowInvalid, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if not isinstance(about, dict):
            raise ValueError(f"cannot read {path}: it was not written by flowgraph")
        columns.append({name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names})
    nodes, edges = columns
    return Tables(nodes, edges, about).graph()


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
        return Tables(found["nodes"], found["edges"], found["about"]).graph()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read a graph from {path}: {error!r}") from error


# --- cupy -------------------------------------------------------------------------------------------------------------


def to_cupy(what: Trace | Flow | TokenGraph) -> dict[str, Any]:
    """edge_index [2, E], edge_weight [E], the masks [N], and of a flow edge_flow [E], reach and throughput [N], as cupy
    arrays that share their memory with the tensors where these are on a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError('flowgraph.adapters.exports.to_cupy needs cupy: pip install "flowgraph-llm[cuda]"') from error
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
