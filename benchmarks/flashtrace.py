"""FlashTrace on the same tokens, in its own environment (`make bench-flashtrace`); imports nothing of FlowGraph.

`.venv-flashtrace/bin/python -m benchmarks.flashtrace CASE < request.json` prints one line of JSON. The request names
the folder of the model, the prompt and the target as text, and the ids that these must give. Used as its README does:
`FlashTrace(model, tokenizer, chunk_tokens=128, sink_chunk_tokens=32)`, then `trace(prompt=, target=, output_span=,
reasoning_span=, hops=1)` with the answer as output span and what comes before it as reasoning span.

    flashtrace             its method of that name, attention maps out of the model (eager attention): its default
    flashtrace:recompute   the same with `recompute_attention=True`, maps worked out anew layer by layer
    flashtrace:span        `method="ifr-span"`, one hop to the answer alone, maps worked out anew
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from flashtrace import FlashTrace, load_model_and_tokenizer

from benchmarks import measure

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "flashtrace": (False, {"method": "flashtrace", "hops": 1}),
    "flashtrace:recompute": (True, {"method": "flashtrace", "hops": 1}),
    "flashtrace:span": (True, {"method": "ifr-span"}),
}


def main() -> None:
    case, request = sys.argv[1], json.load(sys.stdin)
    recompute, how = CASES[case]
    kernel = "sdpa" if recompute else "eager"
    model, tokenizer = load_model_and_tokenizer(
        request["folder"], device_map=None, dtype="float32", attn_implementation=kernel
    )
    num_tokens, answer = len(request["ids"]), request["answer_tokens"]
    response = num_tokens - request["prompt_tokens"]
    result: dict[str, Any] = {"case": case, "tokens": num_tokens}
    if not recompute:
        config = model.config
        # All maps and all weights of a layer's softmax; hidden states and logits come on top.
        needed = (config.num_hidden_layers + 3) * config.num_attention_heads * num_tokens**2 * 4
        room = measure.available() - 3 * 10**9
        if needed > room:
            failed = f"NoRoom: needs {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are left"
            print(json.dumps(result | {"failed": failed, "needed_bytes": needed}))
            return
    tracer = FlashTrace(model, tokenizer, chunk_tokens=128, sink_chunk_tokens=32, recompute_attention=recompute)
    spans: dict[str, Any] = {"output_span": (response - answer, response - 1)}
    if how["method"] == "flashtrace":
        spans["reasoning_span"] = (0, response - answer - 1)
    ids = torch.tensor([request["ids"]])

    def forward() -> object:
        model.set_attn_implementation("sdpa")
        try:
            with torch.no_grad():
                return model(ids, logits_to_keep=1, use_cache=False)
        finally:
            model.set_attn_implementation(kernel)

    def attribute(**texts: str) -> Callable[[], object]:
        def work() -> None:
            found.append(tracer.trace(**texts, **spans, **how))

        return work

    found: list[Any] = []
    work = attribute(prompt=request["prompt"], target=request["target"])
    with torch.no_grad():  # whatever is set up only once
        model(ids[:, :64], logits_to_keep=1, use_cache=False)
    runs, forwards = [], []
    for _ in range(request["repeat"]):
        forwards.append(measure.run(forward))
        found.clear()
        runs.append(measure.run(work))
    trace = found[0]
    again = tokenizer(request["prompt"], add_special_tokens=False).input_ids
    again += tokenizer(request["target"], add_special_tokens=False).input_ids
    if again != request["ids"] or len(trace.prompt_tokens) + len(trace.generation_tokens) != num_tokens + 1:
        raise SystemExit("FlashTrace saw other tokens")  # + 1: it appends the end-of-sequence token
    if not sum(trace.scores) > 0:
        raise SystemExit("FlashTrace found nothing")
    plain = min(run.seconds for run in forwards)
    best = min(run.seconds for run in runs)
    result |= {
        "seconds": best,
        "seconds_each": [run.seconds for run in runs],
        "peak_bytes": max(run.peak_bytes for run in runs),
        "forward_seconds": plain,
        "forward_seconds_each": [run.seconds for run in forwards],
        "forward_peak_bytes": max(run.peak_bytes for run in forwards),
        "time_over_forward": best / plain,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
