"""Options: everything that a `Tracer` can be told, validated in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from flowgraph.answers import Finder, check_finder
from flowgraph.capture import Layers, check_layers
from flowgraph.certificate import WITNESSES
from flowgraph.credit import SCORES, check_rule
from flowgraph.rows import check_kind
from flowgraph.solve import LIBRARIES_OF, check_names
from flowgraph.spans import NO_ANSWER, PRESETS, check_tail
from flowgraph.sparsify import EdgeRule

LONG = 2048
"""Traces of more tokens are traced in sparse mode, unless the user says otherwise."""

VERY_LONG, CHUNK = 16384, 4096
"""Traces of more than `VERY_LONG` tokens go through the model `CHUNK` at a time, unless the user says otherwise."""

_SCORE_OF = {"flowgraph": "mix", "paper": "throughput"}
"""What a preset ranks tokens by."""

_SOLVED_BY_TRITON = [solver for solver, libraries in LIBRARIES_OF.items() if "triton" in libraries]


@dataclass(frozen=True)
class Options:
    """What a `Tracer` does, and what a saved trace says about how it came about.

    Raises:
        ValueError: an option that makes no sense; names it, what came and what is allowed. (A TypeError for an `answer`
            that is no name, pattern or function.)

    Attributes:
        layers: "middle" (third of the softmax layers), "all", or layer numbers.
        preset: "flowgraph": the sinks are the positions that predict the answer, and tokens are ranked by the mix of
            flow and reach; "paper": the answer tokens themselves, and throughput.
        mode: "edges": attention becomes the edges of a graph, and the flow runs through these. "sparse": the same, and
            what became no edge is kept at low resolution (flowgraph/sparse.py); read once. "exact": the flow of the
            whole attention, streamed twice and never stored; the graph lists the edges that carry most of it. "auto":
            edges up to 2,048 tokens (all of them: nothing is lost) or if `edges` is given, which above 2,048 tokens is
            thresholding alone; else sparse, or exact with `keep_attention` (unless `solver` is given), since what is
            then read anew is all of the attention.
        edges: the rule that chooses edges, by attention; in exact mode by the share of the flow that they carry. None:
            all edges up to 2,048 tokens, above that those over 1/1024; in sparse mode those over 1/256; in exact mode
            the top 32 into each token.
        weights: "attention", or "value_norm": attention times the norm of what it moves (docs/method.md, section 10).
        answer: how to find the answer: "auto", "boxed", "####", "A:", "<answer>", "answer is" (or "Answer:"), a
            compiled regular expression (its group 1, if it has one), or a function from the response to a (start, stop)
            in it.
        question: "prompt": flow starts at every prompt token; "user": only at the user's last turn before the
            response (chat messages).
        no_answer: "uniform": weights stay 1, flagged; "tail": the last `tail_tokens` tokens stand for the answer.
        solver, absorb_at_prompt: as in `trace_flow`. rule, top, gain, temperature: as in `credit`.
        score: what tokens are ranked by, as in `credit`. "auto" is what the preset says: "flowgraph": "mix", which won
            where signals were chosen (docs/evidence.md); "paper": "throughput".
        keep_attention: keep the queries and keys of every trace with it, for `Trace.rows` and what reads attention anew
            (checkpoints, heads of an edge, exact contraction of long traces). O(N) memory per layer and head.
        chunk: tokens per pass through the model, for memory: activations are those of a chunk, and in sparse mode the
            queries of a chunk are dropped once it is read (not with `keep_attention`). None: all in one pass. "auto":
            4,096 in traces of more than 16,384 tokens, where the model can go on from its cache (not in packed rows).
        offload: let queries and keys wait in CPU memory.
        memory: bytes above the model that a batch of traces may take. `flowgraph.memory` predicts the peak before
            anything runs and chooses chunk, offload and (in mode "auto") sparse mode to stay below it; where nothing
            does, a ValueError says what to change. On a CPU, malloc is told to give freed tensors back at once, for the
            whole process. None: nobody checks.
        witnesses: in sparse mode, of so many tokens whole rows and columns are kept, for the estimates of the
            certificate; 0: none. Two float32 numbers per token each.
        backend: the library that computes. "torch". "triton": attention by the kernels of FlowGraph (a GPU, and a model
            that is not float64; refused elsewhere), and graphs, unless another `solver` is named, by `solver="sweep"`.
            "torch_scatter", "cupy": attention by torch, graphs as in `trace_flow` (not in mode "exact", which has
            none). "auto": torch, until a GPU has seen and timed the kernels.
        max_tokens: longest trace; None takes the model's own window, `config.max_position_embeddings`.
    """

    layers: Layers = "middle"
    preset: str = "flowgraph"
    mode: str = "auto"
    edges: EdgeRule | None = None
    weights: str = "attention"
    answer: Finder = "auto"
    question: str = "prompt"
    no_answer: str = "uniform"
    tail_tokens: int = 16
    solver: str = "auto"
    absorb_at_prompt: bool = False
    score: str = "auto"
    rule: str = "top"
    top: float = 0.4
    gain: float = 1.5
    temperature: float = 1.0
    chunk: int | Literal["auto"] | None = "auto"
    offload: bool = False
    memory: int | None = None
    max_tokens: int | None = None
    keep_attention: bool = False
    witnesses: int = WITNESSES
    backend: str = "auto"

    scores: ClassVar[tuple[str, ...]] = ("auto", *SCORES)
    """What `score` may be."""

    def __post_init__(self) -> None:
        for name, choices in (("preset", PRESETS), ("no_answer", NO_ANSWER), ("score", self.scores)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.question not in ("prompt", "user"):
            raise ValueError(f'question must be "prompt" or "user", got {self.question!r}')
        if self.mode not in ("auto", "edges", "sparse", "exact"):
            raise ValueError(f'mode must be "auto", "edges", "sparse" or "exact", got {self.mode!r}')
        check_layers(self.layers)
        check_kind(self.weights)
        check_finder(self.answer)
        check_tail(self.tail_tokens)
        check_names(self.solver, self.solve_backend)
        check_rule(self.rule, self.top, self.gain, self.temperature)
        if isinstance(self.memory, float) and self.memory.is_integer():  # 8e9 is how one writes 8 GB
            object.__setattr__(self, "memory", int(self.memory))
        if self.memory is not None and (type(self.memory) is not int or self.memory < 1):
            raise ValueError(f"memory must be None or a number of bytes, got {self.memory!r}")
        if self.max_tokens is not None and (not isinstance(self.max_tokens, int) or self.max_tokens < 1):
            raise ValueError(f"max_tokens must be None or a number of tokens, 1 or more, got {self.max_tokens!r}")
        if self.chunk not in ("auto", None) and (not isinstance(self.chunk, int) or self.chunk < 2):
            raise ValueError(f'chunk must be "auto", None or a number of tokens >= 2, got {self.chunk!r}')
        if self.mode == "exact" and self.solver != "auto":
            raise ValueError(
                f'mode="exact" has a solver of its own, got solver={self.solver!r}; use mode="edges" for it'
            )
        if self.mode == "exact" and self.rows_backend != self.backend:
            raise ValueError(
                f'mode="exact" has no graph to solve, and backend={self.backend!r} does nothing else; use mode="edges" '
                'for it, or backend="auto"'
            )
        if isinstance(self.witnesses, bool) or not isinstance(self.witnesses, int) or self.witnesses < 0:
            raise ValueError(f"witnesses must be a number of tokens, 0 or more, got {self.witnesses!r}")
        if self.edges is not None and not hasattr(self.edges, "keep"):
            raise ValueError(f"edges must be Threshold, TopK, Mass or another rule with keep(), got {self.edges!r}")

    def mode_of(self, num_tokens: int) -> str:
        """ "edges", "sparse" or "exact": how a trace of this length is to be traced."""
        if self.mode != "auto":
            return self.mode
        if num_tokens <= LONG or self.edges is not None:
            return "edges"
        by_rows = self.solver == "auto" and self.rows_backend == self.backend
        return "exact" if self.keep_attention and by_rows else "sparse"

    @property
    def score_name(self) -> str:
        """What tokens are ranked by; never "auto"."""
        return _SCORE_OF.get(self.preset, "throughput") if self.score == "auto" else self.score

    @property
    def rows_backend(self) -> str:
        """What computes attention rows: "auto", "torch" or "triton"."""
        return self.backend if self.backend in ("auto", "triton") else "torch"

    @property
    def solve_backend(self) -> str:
        """The `backend` of `trace_flow`: where rows are Triton's and the solver is another, the solver's own."""
        for_rows = self.backend == "triton" and self.solver not in ("auto", *_SOLVED_BY_TRITON)
        return "auto" if for_rows else self.backend

    def chunk_of(self, num_tokens: int) -> int | None:
        """Tokens per pass for a trace of this length; None: all."""
        if self.chunk != "auto":
            return self.chunk
        return CHUNK if num_tokens > VERY_LONG else None

    def to_dict(self) -> dict[str, Any]:
        """As text and numbers, for files."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in values.items()}
