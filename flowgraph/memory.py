"""How much memory a trace will take, said before anything runs, and the settings that make it fit a budget.

Counted is what the code of this package holds above the model, phase by phase: the forward pass (residual stream, the
wide part of one layer, what is kept of chosen layers), reading rows, building the graph, solving. Shapes come from the
model's configuration. How many edges a threshold leaves is known from real text only (`_expected_edges`).

On a CPU with glibc, memory that was freed would not always go back: tensors under 32 MiB come from a heap, in which
those that are kept leave holes between them. Measured, the same trace took 1.2 to 2 times of what it held, differently
in every run, and no prediction can be near that. So a tracer with a budget first tells malloc to give tensors back
(`release_at_once`), and what is predicted is the peak of such a tracer.

Rough, and `Plan.rough` says so: mixtures of experts, linear attention, attention of other kinds than multi-head, and
other devices than the CPU, where kernels hold scratch memory of their own.

Shapes: B rows of a batch, T their length with pads, N tokens of one trace, n tokens of one pass (T, or a chunk), E
edges, L links of pools, C width of the residual stream, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from torch import nn

from flowgraph.capture import choose_layers, softmax_layers_of, unwrap
from flowgraph.options import Options
from flowgraph.rows import KEPT_BYTES, TILE_BYTES, of_device, rows_of_a_band, rows_of_a_block
from flowgraph.sparse import DEFAULT_RULE
from flowgraph.sparsify import EdgeRule, Mass, Threshold, TopK, default_rule

CHUNKS = (8192, 4096, 2048, 1024, 512, 256)
"""Tokens per pass that are tried, the largest first: a small chunk costs time."""

_ROW_BYTES = {"edges": 17, "sparse": 42, "streamed": 29, "exact": 54, "kept": 4, "pooled": 12, "sums": 12}
"""Per number of a block [r, N] of rows: itself, its copies in float64, masks, the rest of the last one. Measured; but
reckoned where kernels choose the edges ("kept", with pools "pooled") or sum rows up and list no edges ("sums")."""
_WAITING_BYTES = {"edges": 5, "sparse": 17, "kept": 4, "pooled": 8}
"""Of these, what stays while the model runs on the next chunk."""
_FOUND_BYTES, _JOINED_BYTES = 28, {"edges": 64, "sparse": 89, "exact": 100}
"""Per edge: in the lists of blocks; at the highest point of making these one graph and checking it."""
_GRAPH_BYTES, _LINK_BYTES = 20, 25
"""Per edge of a graph, and per link of its pools."""
_SOLVE_BYTES = {"edges": 60, "sparse": 96}
"""Per edge and link, beyond the graph and its copy in the batch: expanding pools, solves, transitions. Measured."""
_POOL_BYTES = 70
"""Per link: keys, their order and the links themselves, while pools are numbered."""

_LIBRARIES = 12 * 10**6
"""Of a CPU: buffers of matrix products, threads, and small things; measured with two threads."""

_RELEASED = 2**17
"""Tensors of so many bytes and more are given back: where malloc begins too, before it learns to keep larger ones."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Plan:
    """What a trace, or a batch of traces, will take.

    Attributes:
        num_tokens: of the longest trace. mode: how that one is traced: "edges", "sparse" or "exact".
        chunk: tokens per pass; None: all at once. offload: do queries and keys wait in CPU memory?
        phases: phase -> part -> bytes, in the order in which they happen.
        budget: bytes that there are; None: nobody asked.
        rough: why the prediction may be further off than 20 %; empty: it should not be.
        options: the options asked for, with mode, chunk and offload of this plan.
    """

    num_tokens: int
    mode: str
    chunk: int | None
    offload: bool
    phases: dict[str, dict[str, int]]
    budget: int | None = None
    rough: str = ""
    options: Options = field(default_factory=Options, repr=False)

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes, of the phase with the peak."""
        return self.phases[self.largest]

    @property
    def peak_bytes(self) -> int:
        """The highest point, above the model."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Is the peak within the budget? True without one."""
        return self.budget is None or self.peak_bytes <= self.budget


def plan(
    model: nn.Module,
    num_tokens: int,
    options: Options | None = None,
    *,
    batch: int = 1,
    budget: int | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Predict the peak of memory above the model, and choose the settings that keep it within a budget.

    Without a budget: what the options take as they are. With one, the first of these that fits: the options as they
    are; smaller and smaller chunks; the same with queries and keys in CPU memory, where the model is on an accelerator
    (on a CPU that saves nothing); in mode "auto" all of this again in sparse mode. What was given as a number or by
    name is not changed: a `chunk` other than "auto", a `mode` other than "auto".

    Args:
        model: the one to trace with. On the meta device it need not have weights.
        num_tokens: N, of the trace. batch: how many of that length go through the model together.
        options: of the `Tracer`.
        budget: bytes above the model; default: `options.memory`.
        device: where the model will be; default: where it is (the CPU, if it is on the meta device).

    Raises:
        ValueError: nothing fits; the message has the least that is needed, its largest part, and what to change.
    """
    if num_tokens < 2 or batch < 1:
        raise ValueError(f"num_tokens must be at least 2 and batch at least 1, got {num_tokens} and {batch}")
    options = Options() if options is None else options
    if budget is not None:
        options = replace(options, memory=budget)
    return plan_batch(model, [num_tokens] * batch, (batch, num_tokens), options, device=device)


def plan_batch(
    model: nn.Module,
    lengths: Sequence[int],
    shape: tuple[int, int],
    options: Options,
    *,
    packed: bool = False,
    captured: bool = False,
    device: torch.device | str | None = None,
) -> Plan:
    """`plan` for the traces of a batch, within `options.memory`.

    Args:
        lengths: N of each trace. shape: (B, T) of the batch.
        packed: rows hold several documents, and can't go through the model by chunks.
        captured: queries and keys are there already, and count as somebody else's.
    """
    shapes = _Shapes.of(model, options, device)
    work = _Work(tuple(lengths), shape, captured)
    best: Plan | None = None
    for candidate in _candidates(options, work, packed, shapes.accelerator):
        found = _predict(shapes, work, candidate)
        if found.fits:
            return found
        if best is None or found.peak_bytes < best.peak_bytes:
            best = found
    assert best is not None
    raise ValueError(_refusal(shapes, work, options, packed, best))


def _candidates(options: Options, work: _Work, packed: bool, accelerator: bool) -> Iterator[Options]:
    """Options with a chunk in place of "auto", the least costly first."""
    free = options.chunk == "auto" and not packed and not work.captured
    asked = None if options.chunk == "auto" and packed else options.chunk_of(work.longest)
    chunks = [asked, *(chunk for chunk in CHUNKS if free and chunk < min(asked or work.longest, work.longest))]
    offloads = [False, True] if accelerator and not options.offload and not work.captured else [options.offload]
    modes = [options.mode]
    chosen_by_length = options.mode == "auto" and options.edges is None
    if chosen_by_length and not options.keep_attention and "edges" in map(options.mode_of, work.lengths):
        modes.append("sparse")
    for mode in modes:
        for offload in offloads:
            for chunk in chunks:
                yield replace(options, mode=mode, chunk=chunk, offload=offload)


def _refusal(shapes: _Shapes, work: _Work, options: Options, packed: bool, best: Plan) -> str:
    part = max(best.parts, key=lambda name: best.parts[name])
    changes: dict[str, dict[str, Any]] = {}
    if options.chunk != "auto" and not packed and not work.captured:
        changes['chunk="auto"'] = {"chunk": "auto"}
    if options.mode in ("edges", "exact"):
        changes['mode="sparse"'] = {"mode": "sparse", "solver": "auto"}
    if options.keep_attention:
        changes["keep_attention=False"] = {"keep_attention": False}
    if len(changes) > 1:
        changes[" with ".join(changes)] = {name: value for change in changes.values() for name, value in change.items()}
    advice = []
    for what, change in changes.items():
        candidates = _candidates(replace(options, **change), work, packed, shapes.accelerator)
        least = min(_predict(shapes, work, candidate).peak_bytes for candidate in candidates)
        if least < best.peak_bytes:
            advice.append(f"{what} would take {in_words(least)}")
    if not shapes.accelerator:
        advice.append("offload saves nothing on a CPU")
    advice.append(
        f"fewer layers (now {shapes.chosen}), shorter traces or a budget of {in_words(best.peak_bytes)} would do"
    )
    many = f"{len(work.lengths)} traces of up to" if len(work.lengths) > 1 else "a trace of"
    return (
        f"memory: {many} {work.longest:,} tokens needs at least {in_words(best.peak_bytes)} above the model, and the "
        f"budget is {in_words(options.memory or 0)}. At its peak ({best.largest}) the largest part is {part}, "
        f"{in_words(best.parts[part])}. {'; '.join(advice)}"
    )


def release_at_once() -> bool:
    """Let glibc's malloc give tensors back to the system as soon as they are freed; False where there is no glibc.

    For the whole process, and for good. It costs what the system takes to hand out fresh pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    malloc = ctypes.CDLL(None)
    return bool(malloc.mallopt(_M_MMAP_THRESHOLD, _RELEASED) and malloc.mallopt(_M_TRIM_THRESHOLD, _RELEASED))


def in_words(num_bytes: int) -> str:
    """ "85 MB", "1.3 GB"; rounded up, so that a budget of so much is enough."""
    return f"{ceil(num_bytes / 1e8) / 10:,.1f} GB" if num_bytes > 999 * 10**6 else f"{ceil(num_bytes / 1e6)} MB"


# --- what is counted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Traces of a batch."""

    lengths: tuple[int, ...]
    shape: tuple[int, int]
    captured: bool

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class _Shapes:
    """What of a model counts.

    Attributes:
        width: C. inner: numbers per token that the widest point of a layer's MLP holds. queries, keys: H * D, K * D.
        chosen: how many layers are read. itemsize: of the dtype that the model runs in. heads: H.
        windows: of each layer that runs, how many tokens its cache holds at most; 0 where it is no softmax attention.
        log_sum: does the model's kernel give the log-sum-exp of rows? eager: does it hold all scores of a few queries?
        device: that of the model; the CPU where it has none. rough: why all of this is rough.
    """

    width: int
    inner: tuple[int, ...]
    heads: int
    queries: int
    keys: int
    chosen: int
    windows: tuple[int, ...]
    itemsize: int
    log_sum: bool
    eager: bool
    device: torch.device
    rough: str

    @property
    def accelerator(self) -> bool:
        """Is the device anything but a CPU?"""
        return self.device.type != "cpu"

    @classmethod
    def of(cls, model: Any, options: Options, device: torch.device | str | None) -> _Shapes:
        model = unwrap(model)
        config = model.config.get_text_config()
        parameter = next(model.parameters())
        place = torch.device(parameter.device if device is None else device)
        kind = place.type
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        named = [number for number, name in enumerate(kinds) if name.endswith("attention") and "linear" not in name]
        softmax = named if parameter.is_meta else softmax_layers_of(model, torch.zeros(1, 4).long())
        chosen = choose_layers(softmax, options.layers)
        heads, window = config.num_attention_heads, getattr(config, "sliding_window", None)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kernel = config._attn_implementation
        rough = ["eager attention"] if kernel in (None, "eager") else []
        if (nope := getattr(config, "qk_nope_head_dim", None)) is not None:
            size = nope + config.qk_rope_head_dim
            rough.append("latent attention")
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
        numbers = [inner if isinstance(inner, int) else max(inner)] * 3
        if experts := getattr(config, "num_experts_per_tok", None):
            per_expert = getattr(config, "moe_intermediate_size", None) or numbers[0]
            numbers = [experts * per_expert] * 3 + [experts * config.hidden_size] * 2
            rough.append("a mixture of experts")
        if len(softmax) < config.num_hidden_layers:
            rough.append("linear attention in other layers")
        if kind == "cpu" and platform.libc_ver()[0] != "glibc":
            rough.append("an allocator other than glibc's")
        if kind not in ("cpu", "meta"):
            rough.append(f"a device other than a CPU ({kind})")
        return cls(
            width=config.hidden_size,
            inner=tuple(numbers),
            heads=heads,
            queries=heads * size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
            chosen=len(chosen),
            windows=tuple(
                0 if layer not in softmax else window if kinds[layer] == "sliding_attention" and window else 1 << 40
                for layer in range(chosen[-1] + 1)
            ),
            itemsize=parameter.element_size(),
            log_sum=kernel == "sdpa",
            eager=kernel in (None, "eager"),
            device=torch.device("cpu") if kind == "meta" else place,
            rough=", ".join(rough),
        )

    def activations(self, batch: int, tokens: int, seen: int) -> list[int]:
        """Bytes of each tensor that is held at the widest point of a layer, in a pass of n tokens that see N."""
        mlp = [self.width] * 4 + list(self.inner)  # embeddings, the layer's input, the middle of the layer, its norm
        # Queries before and after rotary embedding, and its two products; by chunks, the parts for past and present.
        attention = [self.width] * 3 + [self.queries] * (6 if tokens < seen else 4) + [self.keys] * 2
        found = [[numbers * batch * tokens * self.itemsize for numbers in one] for one in (mlp, attention)]
        if (
            self.eager
        ):  # scores in float32, twice, and their mask, 256 queries at a time; keys and values per query head
            found[1] += [4 * batch * self.heads * min(256, tokens) * seen] * 3
            found[1] += [batch * seen * self.queries * self.itemsize] * 2
        return max(found, key=sum)

    def kept(self, tokens: int, layers: int, by_value: bool, key: bool = True, away: bool = False) -> int:
        """Bytes of queries, keys and sums of some layers; only of sums if the others are `away`."""
        per_token = 0 if away else (self.queries + self.keys * key) * self.itemsize
        return tokens * layers * (per_token + 4 * self.heads * (self.log_sum + by_value))

    def cache(self, batch: int, tokens: int) -> int:
        """Bytes of the keys and values of all layers that run."""
        return 2 * self.keys * self.itemsize * batch * sum(min(tokens, window) for window in self.windows)

    def grams(self) -> int:
        """Bytes of what value norms are worked out with, and of one output projection in float32."""
        return 4 * self.queries * (self.chosen * self.queries // self.heads + self.width)


def _expected_edges(rule: EdgeRule, num_tokens: int) -> int:
    """How many edges a rule leaves of N tokens; for thresholds and shares as real text has it (SmolLM2, 3 to 8K)."""
    most = num_tokens / 2
    if isinstance(rule, TopK):
        per_token: float = rule.k
    elif isinstance(rule, Threshold):
        per_token = most if rule.value == 0 else 0.28 * rule.value**-0.79  # 8, 22 and 67 at 1/64, 1/256 and 1/1024
        per_token = min(per_token, rule.cap or per_token)
    elif isinstance(rule, Mass):
        per_token = most if rule.share == 1 else 1.3 * (1 - rule.share) ** -2  # 58 hold 0.85, 265 hold 0.93
        per_token = min(per_token, rule.cap or per_token)
    else:
        per_token = most  # nothing is known of it
    return int(num_tokens * min(per_token, most))


@dataclass(frozen=True)
class _Graph:
    """What becomes of one trace."""

    mode: str
    edges: int
    links: int

    @classmethod
    def of(cls, mode: str, num_tokens: int, rule: EdgeRule | None) -> _Graph:
        links = num_tokens * (num_tokens - 1).bit_length() if mode == "sparse" else 0
        return cls(mode, _expected_edges(rule or cls.default_rule(mode, num_tokens), num_tokens), links)

    @staticmethod
    def default_rule(mode: str, num_tokens: int) -> EdgeRule:
        """What stands for None."""
        rules: dict[str, EdgeRule] = {"exact": TopK(32), "sparse": DEFAULT_RULE, "edges": default_rule(num_tokens)}
        return rules[mode]

    @property
    def bytes(self) -> int:
        return _GRAPH_BYTES * self.edges + _LINK_BYTES * self.links


def _predict(shapes: _Shapes, work: _Work, options: Options) -> Plan:
    """`options` with a chunk that isn't "auto"."""
    N, (B, T) = work.longest, work.shape
    modes = [options.mode_of(length) for length in work.lengths]
    chunk = options.chunk
    assert chunk != "auto"
    streams = chunk is not None and "exact" not in modes and not options.keep_attention and not work.captured
    if streams:  # one trace at a time
        B, T = 1, N
    n = min(chunk or T, T)
    by_value = options.weights == "value_norm"
    # What waits in CPU memory doesn't count.
    away = shapes.accelerator and options.offload and not work.captured
    graphs = [_Graph.of(mode, length, options.edges) for mode, length in zip(modes, work.lengths, strict=True)]
    widest = max(graphs, key=lambda graph: graph.edges + graph.links)
    done = sum(graph.bytes for graph in graphs) - widest.bytes

    mode = modes[work.lengths.index(N)]
    rule = options.edges or _Graph.default_rule(mode, N)
    rows, waiting = _reading(shapes, N, mode, rule, streams, options)
    band = _band(shapes, N, n if streams else N, options) if away else {}
    kernels = _of_kernels(shapes, N, mode, rule, n if streams else N, options)
    pools = _pool_numbers(N, streams) * 8 if "sparse" in modes else 0
    places = kernels.pop("places for edges", 0)
    found = {"edges": places or _FOUND_BYTES * widest.edges, "pools": pools, "other graphs": done}
    sparse = sum(length for length, mode in zip(work.lengths, modes, strict=True) if mode == "sparse")
    found["witnesses"] = 2 * 4 * options.witnesses * sparse  # float32 rows and columns
    making = max(0, _POOL_BYTES * widest.links + pools)
    held: dict[str, int] = {}
    phases: dict[str, dict[str, int]] = {}
    activations = shapes.activations(B, n, T)
    cache = shapes.cache(B, T) if n < T else 0
    if not work.captured:
        forward = {"activations": sum(activations), "value norms": shapes.grams() if by_value else 0}
        layer = 2 * shapes.keys * shapes.itemsize * B * T
        cached = layer if away and cache else cache
        forward["cache"] = cached + (layer // 2 if cache else 0)  # one tensor of it is copied as it grows
        if streams:
            forward["queries"] = shapes.kept(B * n, shapes.chosen - 1, by_value, key=n == T)
            forward |= found | {"rows": waiting}
            held = {"cache": 0 if away else cache}
            held["queries"] = shapes.kept(B * n, shapes.chosen, by_value, key=n == T)
        else:
            before = shapes.kept(B * T, shapes.chosen - 1, by_value, key=n == T, away=away)
            part = "sums of rows" if away else "queries and keys"
            forward[part] = before
            held = {part: shapes.kept(B * T, shapes.chosen, by_value, away=away)}
        phases["forward pass"] = forward
    phases["rows"] = held | {"rows": rows} | band | found | kernels
    if not streams:  # the rows stay until all is done
        held |= {"band": band.get("band", 0)}
    if mode == "exact":
        room = of_device(KEPT_BYTES, shapes.device) - band.get("band", 0)
        phases["rows"]["rows read once"] = max(0, min(room, 2 * N * N))
    joined = {"edges": _JOINED_BYTES[widest.mode] * widest.edges, "pools": pools + making, "other graphs": done}
    phases["graph"] = held | joined | {"places for edges": places}
    solving = [graph for graph in graphs if graph.mode != "exact"]
    if solving:
        size = sum(graph.edges + graph.links for graph in solving)
        kind = "sparse" if any(graph.links for graph in solving) else "edges"
        phases["solve"] = ({} if streams else held) | {
            "graphs, twice": 2 * sum(graph.bytes for graph in graphs),
            "solve": _SOLVE_BYTES[kind] * size,
        }
    if not shapes.accelerator:
        for parts in phases.values():
            parts["libraries"] = _LIBRARIES
    phases = {name: {part: size for part, size in parts.items() if size} for name, parts in phases.items()}
    return Plan(
        num_tokens=N,
        mode=mode,
        chunk=chunk,
        offload=options.offload,
        phases=phases,
        budget=options.memory,
        rough=shapes.rough,
        options=options,
    )


def _reading(
    shapes: _Shapes, num_tokens: int, mode: str, rule: EdgeRule, streams: bool, options: Options
) -> tuple[int, int]:
    """Bytes of a block of rows with all that is made of it, and what of that stays while the model runs on."""
    numbers = num_tokens * rows_of_a_block(num_tokens, shapes.device)
    if options.backend == "triton":
        tile = 0  # no score is ever stored
    else:
        tile = of_device(TILE_BYTES, shapes.device)
        if not shapes.log_sum:  # whole rows at a time
            tile = max(tile, 4 * shapes.heads * 16 * num_tokens)
        tile += 4 * numbers * (options.weights == "value_norm")
    kind = "streamed" if streams and mode == "sparse" else mode
    if options.backend == "triton":
        if _places(num_tokens, mode, rule):
            kind = "pooled" if mode == "sparse" else "kept"
        elif mode == "exact" and rule == TopK(0):
            kind = "sums"
    return numbers * _ROW_BYTES[kind] + tile, numbers * _WAITING_BYTES.get(kind, _WAITING_BYTES.get(mode, 0))


def _band(shapes: _Shapes, num_tokens: int, queries: int, options: Options) -> dict[str, int]:
    """Part -> bytes of the rows that are computed at once where queries and keys wait in CPU memory."""
    rows = min(rows_of_a_band(num_tokens, rows_of_a_block(num_tokens, shapes.device)), queries)
    by_value = options.weights == "value_norm" and options.backend != "triton"  # a layer is divided by its own sums
    # The keys of one layer come for it, and its queries.
    layer = shapes.itemsize * (shapes.keys * num_tokens + shapes.queries * rows)
    return {"band": 4 * num_tokens * rows, "layer of a band": layer + 4 * num_tokens * rows * by_value}


def _of_kernels(
    shapes: _Shapes, num_tokens: int, mode: str, rule: EdgeRule, queries: int, options: Options
) -> dict[str, int]:
    """Part -> bytes that the kernels of `flowgraph.triton_rows` hold beside a block; nothing for other backends."""
    if options.backend != "triton":
        return {}
    found = {"places for edges": _places(num_tokens, mode, rule)}
    if not shapes.log_sum or options.weights == "value_norm":  # worked out anew, of every layer
        found["log-sums"] = 4 * shapes.heads * shapes.chosen * queries
    if mode == "exact":  # one number for each row or column of a tile, of 64 rows and 128 columns
        rows = rows_of_a_block(num_tokens, shapes.device)
        found["sums of tiles"] = 8 * (ceil(rows / 64) * num_tokens + 2 * rows * ceil(num_tokens / 128))
    return found


def _places(num_tokens: int, mode: str, rule: EdgeRule) -> int:
    """Bytes of the places for what is above a threshold, a column and a weight each; 0 where no kernel cuts it out."""
    if mode == "exact" or not isinstance(rule, Threshold) or rule.cap is not None:
        return 0
    per_row = num_tokens if rule.value * num_tokens <= 1 else int(1 / rule.value) + 1
    return 8 * num_tokens * per_row


def _pool_numbers(num_tokens: int, streams: bool) -> int:
    """Of a `PoolBuilder`: three parts to collect from, and sinks as a kind of their own in a stream."""
    return num_tokens * (num_tokens - 1).bit_length() * (5 if streams else 4)
