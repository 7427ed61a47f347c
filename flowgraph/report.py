"""Everything that is worth looking at in one trace, as plain data for the page and for JSON.

    trace -> sentences (or steps, ...) and the flow between them -> its backbone -> checkpoints
          -> the strongest token edges, the backbone of tokens, the measures

Checkpoints are looked for between segments, because flow between single tokens is too diffuse to have any; what is lost
without one is computed on all tokens, on the full attention if the trace kept it.

Shapes: N tokens, M segments.
"""

from __future__ import annotations

from typing import Any

import torch

from flowgraph.backbone import backbone
from flowgraph.checkpoints import checkpoints, removal
from flowgraph.flow import Flow
from flowgraph.measures import ABOUT, measures
from flowgraph.segments import Segments, Splitter


def report(
    trace: Any,
    by: str | Splitter | Segments | None = "sentences",
    *,
    share: float = 0.5,
    edges_per_token: int = 8,
) -> dict[str, Any]:
    """`Trace.to_dict()` with segments, backbone, checkpoints and measures, for `flowgraph.page`.

    Args:
        trace: a `Trace`. With `keep_attention=True`, what is lost without a segment is worked out on the full
            attention; without it on the edges that the graph lists, and in exact mode the `flow` of a segment then
            counts what moves within it too, and may exceed 1 (see `flowgraph.contract`).
        by: how to divide it, as in `Trace.segments`, which needs text; or `Segments`; None: not at all.
        share: of the flow that backbones deliver.
        edges_per_token: strongest edges in and out of each token, and of each segment.

    Returns:
        The keys of `Trace.to_dict()` and "segments" (with what of the answer's reach is lost without each), "backbone",
        "checkpoints" (of one segment each, the trivial ones left out) and "measures". Without flow, or without
        segments, the first three are missing.
    """
    found = trace.to_dict(edges_per_token)
    text = [trace.text] if trace.text is not None else None
    values = {name: float(value) for name, value in measures(trace.flow, text).items()}
    found["measures"] = {
        name: {"value": value if value == value else None, "about": ABOUT[name]} for name, value in values.items()
    }
    if float(trace.flow.injected) == 0 or by is None:
        return found
    segments = by if isinstance(by, Segments) else trace.segments(by)
    coarse = trace.contract(segments)
    spans = segments.spans()
    rows = None if trace.captured is None else trace.rows()
    how: dict[str, Any] = {"rows": rows, "absorb_at_prompt": trace.options.absorb_at_prompt}
    without = removal(trace.flow, [[number] for number in range(len(spans))], segments=segments, **how)
    found["segments"] = {
        "by": by if isinstance(by, str) else "segments",
        "start": [start for start, _ in spans],
        "stop": [stop for _, stop in spans],
        "kind": segments.kinds,
        "flow": coarse.flow.tolist(),
        "lost": without.lost.tolist(),
        "edges": _strongest(coarse, edges_per_token),
    }
    token_backbone = backbone(trace.flow, share)
    kept = token_backbone.edge_mask.cpu()
    source, target = trace.graph.edge_index.cpu()[:, kept].tolist()
    carried = trace.flow.edge_flow.cpu()[kept].tolist()
    edges = {"source": source, "target": target, "flow": carried}
    found["backbone"] = {"delivered": token_backbone.delivered, "edges": edges}
    cuts = checkpoints(coarse, backbone(coarse, share), max_cut=1, fine=(trace.flow, segments), **how)
    found["checkpoints"] = [
        {"start": spans[one.tokens[0]][0], "stop": spans[one.tokens[0]][1], "lost": one.lost}
        for one in cuts
        if not one.trivial
    ]
    return found


def _strongest(flow: Flow, per_node: int) -> dict[str, list[Any]]:
    """The edges that are among the `per_node` strongest into or out of one of their ends."""
    carried = flow.edge_flow.cpu()
    chosen = torch.zeros(len(carried), dtype=torch.bool)
    for end in flow.graph.edge_index.cpu():
        order = torch.argsort(carried, descending=True, stable=True)
        order = order[torch.argsort(end[order], stable=True)]
        begins = torch.searchsorted(end[order], end[order])
        chosen[order[torch.arange(len(order)) - begins < per_node]] = True
    chosen &= carried > 0
    source, target = flow.graph.edge_index.cpu()[:, chosen].tolist()
    return {"source": source, "target": target, "flow": carried[chosen].tolist()}
