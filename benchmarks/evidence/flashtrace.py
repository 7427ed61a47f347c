"""FlashTrace's scores for given tokens, in its own environment (`make bench-flashtrace`); imports nothing of FlowGraph.

    .venv-flashtrace/bin/python -m benchmarks.evidence.flashtrace FOLDER

FOLDER holds the model. A line of JSON in, {"name": .., "ids": [N], "prompt": P, "answer": [start, stop]}, gives a line
out: a list [stop] of scores, of which there are

    flashtrace              its method of that name with its defaults: one hop, from reasoning and answer together, then
                            weighted by what it found; what is observed are all tokens before the answer (by itself it
                            observes the prompt alone, and the tokens that may be chosen here are of the response)
    flashtrace/span         `method="ifr-span"`, from the tokens of the answer alone
    flashtrace/predicting   the same from the positions that predict these tokens

The first of them gives nothing to commas, full stops and white space.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from flashtrace import load_model_and_tokenizer
from flashtrace.attribution import LLMIFRAttribution
from flashtrace.improved import LLMIFRAttributionBoth


class _Given:
    """Takes these ids where FlashTrace would tokenise texts; and, as there, an end-of-sequence token follows."""

    ids: list[int]
    prompt_length: int

    def target_response(self: Any, prompt: Any, target: Any) -> str:
        everything = torch.tensor([[*self.ids, self.tokenizer.eos_token_id]], device=self.device)
        self.prompt_ids = self.user_prompt_ids = everything[:, : self.prompt_length]
        self.generation_ids = everything[:, self.prompt_length :]
        self.user_prompt_indices = list(range(self.prompt_length))
        self.chat_prompt_indices: list[int] = []
        said = [self.tokenizer.decode([token], skip_special_tokens=False) for token in everything[0].tolist()]
        self.prompt_tokens = self.user_prompt_tokens = said[: self.prompt_length]
        self.generation_tokens = said[self.prompt_length :]
        self.prompt = self.user_prompt = "".join(self.prompt_tokens)
        self.generation = "".join(self.generation_tokens)
        return self.generation


class _Both(_Given, LLMIFRAttributionBoth):
    pass


class _Span(_Given, LLMIFRAttribution):
    pass


def scores(model: Any, tokenizer: Any, asked: dict[str, Any]) -> list[float]:
    """What is asked for one trace."""
    (start, stop), prompt, name = asked["answer"], asked["prompt"], asked["name"]
    engine = (_Both if name == "flashtrace" else _Span)(model, tokenizer, chunk_tokens=128, sink_chunk_tokens=32)
    engine.ids, engine.prompt_length = asked["ids"][:stop], prompt
    first, last = start - prompt, stop - 1 - prompt
    if name == "flashtrace":
        observed = torch.zeros(stop + 1)  # and the end of the sequence
        observed[:start] = 1
        raw = engine.calculate_ifr_multi_hop_both(
            "", "given", sink_span=(first, last), thinking_span=(0, first - 1), n_hops=1, observation_mask=observed
        )
        vector = raw.metadata["ifr"]["raw"].observation["sum"]
    else:
        back = int(name == "flashtrace/predicting")
        raw = engine.calculate_ifr_span("", "given", span=(first - back, last - back))
        vector = raw.metadata["ifr"]["aggregate"].token_importance_total
    return torch.nan_to_num(vector.float()).clamp(min=0)[:stop].tolist()


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model_and_tokenizer(
        sys.argv[1], device_map=None, dtype="float32", attn_implementation="eager"
    )
    model.eval()
    for line in sys.stdin:
        print(json.dumps(scores(model, tokenizer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
