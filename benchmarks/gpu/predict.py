"""What an H100 should take, worked out from operations and bytes before anybody has measured it.

Work is counted by what it needs (`Work`), and each resource has a rate (`H100`: the data sheet of the SXM card; where
that says nothing, from descriptions of the chip) and a share of it that good kernels reach (`REACHED`). What
the resources of one piece of work do at the same time overlaps in part: its seconds are the root of the sum of their
squares. Chains in which each step waits for the one before come on top, and pieces follow one another. Numbers of
launches were counted on the CPU (`LAUNCHES`).

These are expectations, to be wrong in a way that teaches something: the table of docs/gpu.md has them beside what was
measured.

Shapes: N tokens, H query heads, K key heads, D head size, S scores: a number per pair of tokens, head and chosen layer.
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

from benchmarks.gpu.shapes import Shape


class Work(NamedTuple):
    """Amounts of what is limited.

    Attributes:
        matrix: FLOP of large products on tensor cores. attention: the same inside attention kernels, where they wait
            for powers. vector: float32 FLOP outside of tensor cores. powers: of 2. memory, cache: bytes, of the card's
            memory and of its L2. link: bytes between the host's memory, pinned, and the card. launches: of kernels, one
            after the other. chain: steps that wait for each other.
    """

    matrix: float = 0.0
    attention: float = 0.0
    vector: float = 0.0
    powers: float = 0.0
    memory: float = 0.0
    cache: float = 0.0
    link: float = 0.0
    launches: float = 0.0
    chain: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


H100 = Work(
    matrix=989e12,  # data sheet, bfloat16, dense
    attention=989e12,
    vector=67e12,  # data sheet; a multiply-add is two
    powers=132 * 16 * 1.755e9,  # multiprocessors, per clock, clock
    memory=3.35e12,  # data sheet
    cache=5.5e12,
    link=64e9,  # PCIe 5, 16 lanes, each way
    launches=1 / 5e-6,
    chain=1 / 0.7e-6,
)
"""Per second."""

REACHED = Work(0.65, 0.45, 0.5, 0.8, 0.85, 1.0, 0.86, 1.0, 1.0)
"""The shares of these rates that are expected of kernels; of the link, of large copies: 55 GB/s."""

LAUNCHES = {
    "torch rows": 13,
    "sparse torch": 270,
    "sparse triton": 13,
    "exact torch": 76,
    "exact triton": 68,
    "exact triton no edges": 49,
    "hop": 114,
    "round": 70,
    "trace": 500,
}
"""Per tile and layer; per block of rows, kernels among them; per hop, or round over blocks, there and back; per trace
(roles, graph, checks, credit)."""

PLACES = 257
"""For edges, per token, that the kernel of edges over 1/256 holds."""

HOPS, ROUNDS = 16, 6
"""Of message passing, and of block-Jacobi, until they stop, on raw attention rows."""

EDGES, LINKS = 25, 15
"""Per token, of a sparse graph and of its pools."""

TILE_ROWS, TILE_COLUMNS = 64, 128
"""Of the kernels for bfloat16 (`flowgraph.triton_rows.tile_for`)."""


def seconds(*pieces: Work) -> float:
    """What is expected of pieces of work, one after the other."""
    total = 0.0
    for work in pieces:
        parts = (amount / (rate * share) for amount, rate, share in zip(work[:-1], H100, REACHED, strict=False))
        total += sum(part**2 for part in parts) ** 0.5 + work.chain / H100.chain
    return float(total)


def least(work: Work, rates: Work = H100) -> tuple[str, float]:
    """The resource that binds, and the seconds below which no kernel gets at these rates."""
    times = {name: getattr(work, name) / getattr(rates, name) for name in Work._fields if getattr(work, name)}
    name = max(times, key=lambda one: times[one])
    return name, times[name]


# --- pieces of work ---------------------------------------------------------------------------------------------------


def block_rows(num_tokens: int) -> int:
    """Rows of a block on a GPU: up to 1,024 in 64 MiB (`flowgraph.rows.rows_of_a_block`)."""
    return max(16, min(1024, 64 * 2**20 // (4 * num_tokens)))


def band_rows(num_tokens: int) -> int:
    """Rows that keys are sent for at a time: 1,024 in 512 MiB, in whole blocks (`flowgraph.rows.rows_of_a_band`)."""
    block = block_rows(num_tokens)
    return block * max(1, min(1024, 512 * 2**20 // (4 * num_tokens)) // block)


def is_kept(num_tokens: int) -> bool:
    """Are all rows of a trace kept from the first sweep to the second? Within 512 MiB (`flowgraph.rows.KeptRows`)."""
    return 2 * num_tokens**2 <= 512 * 2**20


def scores(shape: Shape, num_tokens: int) -> float:
    """S"""
    return shape.chosen * shape.heads * num_tokens * (num_tokens + 1) / 2


def rows(shape: Shape, num_tokens: int, backend: str) -> Work:
    """All rows of a trace, read once."""
    S, D, N = scores(shape, num_tokens), shape.head_size, num_tokens
    blocks = -(-N // block_rows(N))
    written = 4 * N * N / 2
    if backend == "torch":
        tiles = shape.chosen * blocks * max(1.0, block_rows(N) / 128)
        # The product is float32 (TF32 would break the agreement); scores are written, raised, and added up over heads.
        return Work(vector=2 * D * S, powers=S, memory=16 * S + written, launches=LAUNCHES["torch rows"] * tiles)
    tile = 2 * D * (TILE_ROWS + TILE_COLUMNS * shape.key_heads / shape.heads)
    keys = shape.chosen * shape.key_heads * N * D * 2 / 2 * blocks
    return Work(
        attention=2 * D * S,
        vector=6 * S,
        powers=S,
        memory=keys + written,
        cache=S / (TILE_ROWS * TILE_COLUMNS) * tile,
        launches=blocks,
    )


def keep(num_tokens: int) -> Work:
    """Edges out of rows, by the kernel."""
    return Work(cache=4 * num_tokens**2 / 2, launches=num_tokens / block_rows(num_tokens))


def log_sums(shape: Shape, num_tokens: int) -> Work:
    """Of all chosen layers, by the kernel, where the model's own gave none."""
    S, D = scores(shape, num_tokens), shape.head_size
    keys = S / TILE_ROWS * 2 * D
    return Work(attention=2 * D * S, vector=8 * S, powers=S, cache=keys, launches=shape.chosen)


def forward(shape: Shape, num_tokens: int, layers: int | None = None) -> tuple[Work, ...]:
    """A pass of the model (default: all of its layers)."""
    layers = shape.layers if layers is None else layers
    N, pairs = num_tokens, num_tokens * (num_tokens + 1) / 2
    streams = 2 * N * (20 * shape.hidden + 8 * shape.intermediate)  # norms, residuals, activations: bytes of a layer
    scored = shape.heads * pairs * layers
    return (
        Work(matrix=2 * shape.numbers_per_layer * N * layers, launches=10 * layers),
        Work(attention=4 * shape.head_size * scored, powers=scored, launches=layers),
        Work(memory=layers * (streams + 2 * shape.numbers_per_layer), launches=15 * layers),
    )


def sent_rows(shape: Shape, num_tokens: int) -> Work:
    """What comes from the host for one reading: queries once, and keys once for each band. Nothing runs meanwhile."""
    bands, head = num_tokens / band_rows(num_tokens), 2 * shape.head_size * num_tokens
    link = shape.chosen * head * (shape.heads + shape.key_heads * (bands + 1) / 2)
    return Work(link=link, launches=shape.chosen * (shape.heads + shape.key_heads) * bands)


def sent_cache(shape: Shape, num_tokens: int) -> Work:
    """Keys and values of all layers up to the last that is read: to the host once, and back for each later chunk."""
    chunks = num_tokens / CHUNK
    per_token = shape.deepest * 2 * shape.key_heads * shape.head_size * 2
    copies = 4 * shape.key_heads * shape.deepest * chunks
    return Work(link=per_token * num_tokens * (1 + max(0.0, chunks - 1) / 2), launches=copies)


def solve(num_tokens: int, num_edges: float, solver: str, graphs: int = 1) -> Work:
    """Reach and flow of some graphs of N tokens each, with so many edges together."""
    E, nodes = num_edges, num_tokens * graphs
    sort, settle = 8 * 12 * E, 300 * E  # edges by source; what is made of reach, edge by edge
    if solver == "scatter":
        return Work(memory=sort + settle + HOPS * (150 + 40) * E, launches=300 + HOPS * LAUNCHES["hop"])
    if solver == "blocks":
        dense = 8 * 128 * nodes  # squares of 128 tokens, built, inverted, and read in every round
        memory = sort + settle + 6 * dense + 2 * ROUNDS * (dense + 30 * E)
        return Work(memory=memory, launches=300 + ROUNDS * LAUNCHES["round"])
    # One program per graph: for each 32 tokens it waits for memory four times, and for 32 sums in registers.
    return Work(memory=sort + settle + 2 * 20 * E, launches=150, chain=2 * 8.6 * num_tokens / 32)


def systems(num_tokens: int, backend: str) -> float:
    """Steps of the chain through the systems within all blocks, one way."""
    N = num_tokens
    # All tiles of 64 tokens of a block are inverted at once, then taken one after the other; a dense triangular solve
    # of torch takes several tokens at a step.
    return N / 64 + 64 * N / block_rows(N) if backend == "triton" else N / 3


def pools(num_tokens: int) -> Work:
    """Edges over a threshold, pools and what arrives from a block, by kernels: each reads all rows once."""
    N, r = num_tokens, block_rows(num_tokens)
    bits = log2(N)
    # Of one program of each of the four: 1,024 or 256 columns at a time, of half of all on average; 64 rows at a time;
    # and for each size of pool.
    steps = N / 2 / 1024 + bits + N / 2 / 256 + 2 * r / 64 + bits
    return Work(cache=4 * 4 * N**2 / 2, launches=LAUNCHES["sparse triton"] * N / r, chain=steps * N / r)


def credits_of(shape: Shape, num_tokens: int, way: str, streams: bool = False) -> dict[str, Work]:
    """From queries and keys to credits, piece by piece.

    Args:
        way: mode and backend, as "sparse triton"; "exact triton no edges": without a list of edges; and "offload" at
            the end: queries and keys lie in the host's memory.
        streams: rows come from first to last, while the model runs; sparse mode then solves no systems within blocks.
    """
    N, pairs = num_tokens, num_tokens**2 / 2
    if way.endswith(" offload"):
        pieces = credits_of(shape, N, way.removesuffix(" offload"), streams)
        sent = sent_rows(shape, N)
        if way.startswith("sparse") and streams:  # the queries of a chunk are there already
            sent = sent._replace(link=sent.link - shape.chosen * shape.heads * shape.head_size * 2 * N)
        if "no edges" in way and not is_kept(N):  # summed up from rows that were written, as those that are kept
            pieces["sweeps"] = pieces["sweeps"].plus(Work(memory=41 * pairs))
        return pieces | {f"{name}, sent": sent for name in ("rows", "rows again") if name in pieces}
    mode, backend, *rest = way.split(" ")
    blocks = N / block_rows(N)
    trace = Work(launches=LAUNCHES["trace"])
    once, chain = rows(shape, N, backend), systems(N, backend)
    if mode == "sparse":
        if backend == "triton":
            built = pools(N).plus(Work(chain=0 if streams else chain))
        else:
            launches = LAUNCHES["sparse torch"] * blocks
            built = Work(memory=100 * pairs, launches=launches, chain=0 if streams else chain)
        solver = "sweep" if backend == "triton" else "scatter"
        solved = solve(N, (EDGES + LINKS) * N, solver)  # links of pools are edges too
        return {"rows": once, "edges and pools": built, "solve": solved, "the rest": trace}
    moved = 150.0 if not rest else 45.0 if is_kept(N) else 4.0  # what isn't kept is summed up where it is made
    sweeps = Work(memory=moved * pairs, launches=LAUNCHES[way] * blocks, chain=2 * chain)
    read = {"rows": once} if is_kept(N) else {"rows": once, "rows again": once}
    return read | {"sweeps": sweeps, "the rest": trace}


def kept_bytes(shape: Shape, num_tokens: int) -> float:
    """Queries, keys and log-sum-exp of the chosen layers."""
    numbers = 2 * (shape.heads + shape.key_heads) * shape.head_size + 4 * shape.heads
    return float(shape.chosen * numbers * num_tokens)


def activation_bytes(shape: Shape, num_tokens: int) -> float:
    """At the highest point of a pass, in the wide part of a layer."""
    return float(2 * num_tokens * (3 * shape.hidden + 3 * shape.intermediate))


def credits_bytes(num_tokens: int, way: str, per_edge: int = 100) -> float:
    """Of a block and its copies, and of what is made of edges (28 bytes each, while they are but listed)."""
    N, (mode, backend, *rest) = num_tokens, way.split(" ")
    rest = [word for word in rest if word != "offload"]
    per_number, edges, places = (42, EDGES + LINKS, 0) if mode == "sparse" else (54, 0 if rest else 32, 0)
    if mode == "sparse" and backend == "triton":
        per_number, places = 8, PLACES  # a block, and the one before
    elif rest:
        per_number = 16 if is_kept(N) else 8
    band = 4 * N * band_rows(N) if way.endswith(" offload") else 0
    # Blocks that are kept, and the band that is held beside them, have 512 MiB.
    kept = max(band, min(2 * N**2, 512 * 2**20)) if mode == "exact" else band
    return float(per_number * N * block_rows(N) + (per_edge * edges + 8 * places) * N + kept)


def long_bytes(shape: Shape, num_tokens: int, way: str) -> float:
    """Of a trace by chunks: the model with its cache, or rows and what is made of them, whichever takes more."""
    N, queries = num_tokens, 2 * shape.heads * shape.head_size
    layer = 2 * 2 * shape.key_heads * shape.head_size * N  # keys and values
    exact, offload = way.startswith("exact"), way.endswith(" offload")
    # While the model runs on, a stream has its edges, a block that waits, and queries of a chunk.
    chunk = min(N, CHUNK) * shape.chosen * (queries + 4 * shape.heads)
    waiting = 0.0 if exact else chunk + 4 * N * block_rows(N) + 8 * PLACES * N * way.startswith("sparse triton")
    runs = activation_bytes(shape, CHUNK) + waiting
    reads = credits_bytes(N, way, per_edge=28) + (0 if exact else chunk)
    if offload:  # the keys and values of one layer, of which one is copied; the keys of one
        sums = 4 * shape.chosen * shape.heads * N if exact else 0
        return sums + max(runs + 1.5 * layer, reads + layer / 2)
    held = shape.deepest * layer + (shape.chosen * (queries + 4 * shape.heads) * N if exact else 0)
    return held + max(runs + layer / 2, reads)


# --- what is expected of a case ---------------------------------------------------------------------------------------


def predict(stage: str, what: str, shape: Shape | None, num_tokens: int) -> dict[str, float]:
    """The numbers of a case (see `benchmarks.gpu.stages`), under the names that measured ones have.

    What nothing is known about before is left out.
    """
    N = num_tokens
    if stage == "machine":
        rates = ("matrix", "memory", "powers")
        return {f"{name}_per_second": getattr(H100, name) for name in rates} | {"launch_seconds": 1 / H100.launches}
    if shape is None:
        return {}
    if stage == "kernels":
        found = {"rows_seconds": seconds(rows(shape, N, what))}
        if what == "triton":
            found["edges_seconds"] = seconds(rows(shape, N, what), keep(N))
            found["own_seconds"] = seconds(rows(shape, N, what), log_sums(shape, N))
        return found
    if stage == "credits":
        plain, ours = seconds(*forward(shape, N)), seconds(*credits_of(shape, N, what).values())
        above = kept_bytes(shape, N) + max(0.0, credits_bytes(N, what) - activation_bytes(shape, N))
        return {
            "forward_seconds": plain,
            "credits_seconds": ours,
            "credits_over_forward": ours / plain,
            "peak_bytes_above_forward": above,
        }
    if stage == "long":
        plain, offload = seconds(*forward(shape, N)), what.endswith(" offload")
        pieces = [*forward(shape, N, shape.deepest), *credits_of(shape, N, what, streams=True).values()]
        ours = seconds(*pieces, *([sent_cache(shape, N)] if offload else []))
        return {
            "forward_seconds": plain,
            "seconds": ours,
            "time_over_forward": ours / plain,
            "peak_bytes": long_bytes(shape, N, what),
        }
    if stage == "solves":
        solver = what.split(" ")[0]
        graphs, per_token = SOLVED
        return {"seconds": seconds(solve(N, graphs * per_token * N, solver, graphs))}
    if stage == "scorer":
        ours = seconds(*forward(shape, N, shape.deepest), *credits_of(shape, N, what).values())
        step = 4 * seconds(*forward(shape, N))  # forward, again for checkpoints, backward twice as much
        return {"seconds_per_rollout": ours, "step_seconds_per_rollout": step, "share_of_step": ours / step}
    return {}


CHUNK = 4096
"""Tokens per pass of long traces."""

SOLVED = (64, 32)
"""Graphs of a batch, and edges into each token."""
