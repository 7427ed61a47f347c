"""FlowGraph: which tokens of a reasoning trace carried the question to the answer?

from flowgraph import Tracer
trace = Tracer(model, tokenizer)(prompt, response)
trace.response_weights   # one weight per response token, for the trainer
"""

from flowgraph._version import __version__
from flowgraph.capture import Capture, capture
from flowgraph.credit import Credit, credit, weights_from_scores
from flowgraph.flow import Flow, trace_flow
from flowgraph.graph import TokenGraph
from flowgraph.layers import AnswerReachability, FlowPropagation
from flowgraph.rows import AttentionRows, DenseRows
from flowgraph.spans import find_answer, locate
from flowgraph.sparsify import Edges, Mass, Threshold, TopK, sparsify
from flowgraph.tracer import Options, Trace, Tracer, Traces

__all__ = [
    "AnswerReachability",
    "AttentionRows",
    "Capture",
    "Credit",
    "DenseRows",
    "Edges",
    "Flow",
    "FlowPropagation",
    "Mass",
    "Options",
    "Threshold",
    "TokenGraph",
    "TopK",
    "Trace",
    "Tracer",
    "Traces",
    "__version__",
    "capture",
    "credit",
    "find_answer",
    "locate",
    "sparsify",
    "trace_flow",
    "weights_from_scores",
]
