"""FlowConfig out of what YAML, JSON and command lines can say; what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from flowgraph import Mass, Threshold, TopK
from flowgraph.rl import FlowConfig
from flowgraph.rl.baselines import HeadGroups


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, {}),
        ({"gain": "1.2", "top": 0.2, "warmup_steps": "10"}, {"gain": 1.2, "top": 0.2, "warmup_steps": 10}),
        ({"normalize": "true", "absorb_at_prompt": "False"}, {"normalize": True, "absorb_at_prompt": False}),
        ({"anneal_after": "null", "max_tokens": "4096"}, {"anneal_after": None, "max_tokens": 4096}),
        ({"answer": r"re:=(\d)"}, {"answer": re.compile(r"=(\d)")}),
        ({"answer": "boxed", "signs": "positive"}, {"answer": "boxed", "signs": "positive"}),
        ({"layers": "[3, 4]"}, {"layers": [3, 4]}),
        ({"layers": (3, 4)}, {"layers": [3, 4]}),
        ({"layers": "all"}, {"layers": "all"}),
        ({"edges": {"top_k": "32"}}, {"edges": TopK(32)}),
        ({"edges": {"threshold": 0.01}}, {"edges": Threshold(0.01)}),
        ({"edges": {"mass": 0.9}}, {"edges": Mass(0.9)}),
        ({"score": "entropy"}, {"score": "entropy"}),
        (
            {"heads": {"local_heads": [[1, 0]], "global_heads": [[2, 3]]}},
            {"heads": HeadGroups(((1, 0),), ((2, 3),))},
        ),
    ],
)
def test_plain_values(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert FlowConfig.from_dict(values) == FlowConfig(**wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gian": 1.5}, "gian is no option of credits; there are: .*gain"),
        ({"scorer": "Qwen"}, "scorer is no option"),
        ({"gain": "much"}, "gain must be float, got 'much'"),
        ({"normalize": "perhaps"}, "normalize must be bool, got 'perhaps'"),
        ({"answer": "re:("}, "answer is no regular expression"),
        ({"edges": {"best": 3}}, "edges must be one of threshold, top_k, mass"),
        ({"layers": "upper"}, 'layers must be "middle", "all" or layer numbers'),
    ],
)
def test_plain_values_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule must be one of"),
        ({"top": 0}, "top must be in"),
        ({"gain": -1}, "gain must be finite"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"score": "luck"}, r"score must be one of \['auto', 'throughput', 'reach', .*'random'"),
        ({"preset": "mine"}, "preset must be one of"),
        ({"no_answer": "drop"}, "no_answer must be one of"),
        ({"answer": "latex"}, "unknown finder 'latex'"),
        ({"question": "user"}, "a trainer keeps ids"),
        ({"mode": "fast"}, "mode must be"),
        ({"signs": "plus"}, "signs must be one of"),
        ({"per": "token"}, "per must be"),
        ({"tail_tokens": 0}, "tail_tokens must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"anneal_steps": 3}, "anneal_after None"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
        ({"refresh_steps": 3}, "no scorer to refresh"),
        ({"refresh_steps": -3, "scorer": nn.Identity()}, "refresh_steps must be at least 0"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**changes)
