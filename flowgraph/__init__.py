"""FlowGraph: which tokens of a reasoning trace carried the question to the answer?

    from flowgraph import Tracer
    trace = Tracer(model, tokenizer)(prompt, response)
    trace.response_weights   # one weight per response token, for the trainer

The names below are imported when they are first used: `flowgraph --help` need not wait for torch and transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flowgraph._version import __version__

if TYPE_CHECKING:
    from flowgraph.answers import find_answer
    from flowgraph.backbone import Backbone, Hub, Path, Paths, backbone, hubs, paths, width
    from flowgraph.capture import Capture, capture, recording
    from flowgraph.certificate import Certificate, Witnesses, certify
    from flowgraph.checkpoints import Checkpoint, Checkpoints, Removal, carriers, checkpoints, removal
    from flowgraph.coarse import contract
    from flowgraph.compare import compare
    from flowgraph.credit import Credit, credit, weights_from_scores
    from flowgraph.exact import exact_flow
    from flowgraph.flow import Flow, trace_flow
    from flowgraph.graph import TokenGraph
    from flowgraph.layers import AnswerReachability, FlowPropagation
    from flowgraph.measures import AddMeasures, measures
    from flowgraph.options import Options
    from flowgraph.pools import Pools
    from flowgraph.report import report
    from flowgraph.rows import AttentionRows, DenseRows, KeptRows
    from flowgraph.segments import Segments, split
    from flowgraph.spans import locate
    from flowgraph.sparse import sparse_graph
    from flowgraph.sparsify import Edges, Mass, Threshold, TopK, sparsify
    from flowgraph.stability import layer_agreement, stability
    from flowgraph.stream import stream
    from flowgraph.trace import Trace, Traces
    from flowgraph.tracer import Tracer

_HOME = {
    "answers": ("find_answer",),
    "backbone": ("Backbone", "Hub", "Path", "Paths", "backbone", "hubs", "paths", "width"),
    "capture": ("Capture", "capture", "recording"),
    "certificate": ("Certificate", "Witnesses", "certify"),
    "checkpoints": ("Checkpoint", "Checkpoints", "Removal", "carriers", "checkpoints", "removal"),
    "coarse": ("contract",),
    "compare": ("compare",),
    "credit": ("Credit", "credit", "weights_from_scores"),
    "exact": ("exact_flow",),
    "flow": ("Flow", "trace_flow"),
    "graph": ("TokenGraph",),
    "layers": ("AnswerReachability", "FlowPropagation"),
    "measures": ("AddMeasures", "measures"),
    "report": ("report",),
    "pools": ("Pools",),
    "rows": ("AttentionRows", "DenseRows", "KeptRows"),
    "segments": ("Segments", "split"),
    "sparse": ("sparse_graph",),
    "sparsify": ("Edges", "Mass", "Threshold", "TopK", "sparsify"),
    "spans": ("locate",),
    "stream": ("stream",),
    "stability": ("layer_agreement", "stability"),
    "options": ("Options",),
    "trace": ("Trace", "Traces"),
    "tracer": ("Tracer",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # `flowgraph.credit` is the function: importing the module of that name must not put the module in its place.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_MODULE_OF})


sys.modules[__name__].__class__ = _Package

__all__ = [
    "AddMeasures",
    "AnswerReachability",
    "AttentionRows",
    "Backbone",
    "Capture",
    "Certificate",
    "Checkpoint",
    "Checkpoints",
    "Credit",
    "DenseRows",
    "Edges",
    "Flow",
    "FlowPropagation",
    "Hub",
    "KeptRows",
    "Mass",
    "Options",
    "Path",
    "Paths",
    "Pools",
    "Removal",
    "Segments",
    "Threshold",
    "TokenGraph",
    "TopK",
    "Trace",
    "Tracer",
    "Traces",
    "Witnesses",
    "__version__",
    "backbone",
    "capture",
    "carriers",
    "certify",
    "checkpoints",
    "compare",
    "contract",
    "credit",
    "exact_flow",
    "find_answer",
    "hubs",
    "layer_agreement",
    "locate",
    "measures",
    "paths",
    "recording",
    "removal",
    "report",
    "sparse_graph",
    "sparsify",
    "split",
    "stability",
    "stream",
    "trace_flow",
    "weights_from_scores",
    "width",
]
