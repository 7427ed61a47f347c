"""`python -m benchmarks.fidelity`: how near the credits of sparse mode come to exact ones, on traces of real text.

SmolLM2 in float32. Per text: its attention once, as a matrix; from that exact flow, edges over 1/256 alone, sparse mode
from the last row to the first, and as it is streamed. Compared on the tokens that may get credit: Spearman's rank
correlation of throughput, and the overlap of the top 40 %; for sparse mode also what its certificate estimates.

Everything goes to benchmarks/results/fidelity.json, with machine and commit. Takes two minutes and 2 GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.run import RESULTS, machine
from benchmarks.text import python_help, source, tokens
from flowgraph import DenseRows, Flow, Threshold, TokenGraph, Witnesses, certify, exact_flow, sparse_graph, trace_flow
from flowgraph.capture import capture
from flowgraph.options import Options
from flowgraph.rows import RowBlock
from flowgraph.smollm2 import load

TRACES = ((3000, 300), (6000, 400))
"""(tokens, tokens of the prompt)"""
TOP, SINKS = 0.4, 4


class Streamed:
    """Rows as a stream gives them: once, the first ones first."""

    once = True

    def __init__(self, rows: DenseRows) -> None:
        self.num_tokens, self._rows = rows.num_tokens, rows

    def blocks(self, last_first: bool = False) -> Iterator[RowBlock]:
        return self._rows.blocks()


def compare(ours: Flow, exact: Flow, credit: Tensor) -> dict[str, float]:
    """Of the throughput of the tokens in `credit` [N]."""
    a, b = ours.throughput[credit], exact.throughput[credit]
    count = int(TOP * len(a))
    best, found = (set(values.topk(count).indices.tolist()) for values in (b, a))
    graph = ours.graph
    return {
        "spearman": float(spearmanr(a, b).statistic),
        "top_overlap": len(best & found) / count,
        "edges_per_token": graph.num_edges / len(credit),
        "links_per_token": graph.pool_index.shape[1] / len(credit),
    }


def measure(model: Any, ids: Tensor, num_prompt: int) -> dict[str, Any]:
    """All ways for one trace; its last tokens but one are the sinks."""
    N = ids.shape[1]
    place = torch.arange(N)
    blocks = capture(model, ids).rows(0, place).blocks()
    rows = DenseRows(torch.cat([torch.nn.functional.pad(block, (0, N - block.shape[1])) for _, block in blocks]), 256)
    roles: dict[str, Any] = {
        "prompt_mask": place < num_prompt,
        "answer_mask": (place >= N - SINKS - 1) & (place < N - 1),
    }
    credit = (place >= num_prompt) & (place < N - SINKS - 1)
    exact = exact_flow(rows, **roles)
    alone = TokenGraph.from_dense(rows.W, threshold=1 / 256, **roles)
    found: dict[str, Any] = {"edges alone": compare(trace_flow(alone), exact, credit)}
    for name, read in (("sparse", rows), ("streamed", Streamed(rows))):
        witnesses = Witnesses.up_to_the_answer(roles["answer_mask"], Options().witnesses)
        flow = trace_flow(sparse_graph(read, edges=Threshold(1 / 256), witnesses=witnesses, **roles))
        found[name] = compare(flow, exact, credit) | {"top_overlap_estimated": certify(flow, witnesses).top_overlap}
    return found


def main() -> None:
    model, tokenizer = load(torch.float32)
    results = []
    for text in dict.fromkeys((source(), python_help())):
        for num_tokens, num_prompt in TRACES:
            ids = torch.tensor(tokens(tokenizer, num_tokens, num_prompt, text)[0])[None]
            trace = {"text": text[0], "tokens": num_tokens, "prompt": num_prompt}
            results.append(trace | measure(model, ids, num_prompt))
            print(json.dumps(results[-1]), flush=True)
    (RESULTS / "fidelity.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
