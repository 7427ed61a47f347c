"""The report of a trace: everything in it agrees with the functions that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph import Trace, Tracer, backbone, page, report
from flowgraph.checkpoints import checkpoints, removal
from flowgraph.measures import ABOUT, measures
from tests.written import ANSWERS, TOKENIZER, ids, marked, policy, written_by_hand


def trace(model: Any = None, text: str | None = None, **options: Any) -> Trace:
    prompt = ids("?;?", end=False)
    response = marked(3, 2) if text is None else ids(text)
    token_ids = torch.tensor([prompt + response])
    tracer = Tracer(model or policy(), TOKENIZER, answer=ANSWERS, **options)
    return tracer.from_ids(token_ids, prompt_mask=torch.arange(token_ids.shape[1])[None] < len(prompt))[0]


SOLUTION = "First, 3 + 4.\nThat is 7. So it is =7"


@pytest.mark.parametrize("keep", [False, True])
def test_a_report_is_plain_data_that_a_page_can_show(keep: bool, tmp_path: Path) -> None:
    one = trace(text=SOLUTION, keep_attention=keep)
    found = report(one, share=0.4)
    json.dumps(found, allow_nan=False)
    segments = one.segments("sentences")
    coarse = one.contract(segments)
    assert list(zip(found["segments"]["start"], found["segments"]["stop"], strict=True)) == segments.spans()
    assert found["segments"]["flow"] == coarse.flow.tolist()
    wanted = removal(one.flow, [[n] for n in range(len(segments))], segments=segments).lost
    torch.testing.assert_close(torch.tensor(found["segments"]["lost"]).double(), wanted, rtol=1e-4, atol=1e-6)
    strongest = max(zip(*found["segments"]["edges"].values(), strict=True), key=lambda edge: edge[2])
    assert strongest[2] == pytest.approx(float(coarse.edge_flow.max()))
    assert found["backbone"]["delivered"] == backbone(one.flow, 0.4).delivered >= 0.4
    cuts = checkpoints(coarse, backbone(coarse, 0.4), max_cut=1, fine=(one.flow, segments))
    assert len(found["checkpoints"]) == sum(not cut.trivial for cut in cuts)
    assert set(found["measures"]) == set(ABOUT)
    assert found["measures"]["gini"]["value"] == float(measures(one.flow)["gini"])
    assert page.write(tmp_path / "page.html", [found]).stat().st_size > 1000
    assert one.to_html(tmp_path / "same.html").stat().st_size > 1000


def test_a_checkpoint_that_all_flow_passes() -> None:
    """The word with "@" joins question and answer: without it nothing arrives."""
    one = trace(written_by_hand(), preset="paper", text="aa @ bb =7")
    found = report(one, "words")
    (only,) = found["checkpoints"]
    assert one.text is not None and "".join(one.text[only["start"] : only["stop"]]).strip() == "@"
    assert only["lost"] == pytest.approx(1)


def test_the_strongest_edges_of_each_segment() -> None:
    found = report(trace(text=SOLUTION), "words", edges_per_token=1)
    edges = found["segments"]["edges"]
    for end in ("source", "target"):
        for node in set(report(trace(text=SOLUTION), "words")["segments"]["edges"][end]):
            assert node in edges[end]
    assert len(edges["flow"]) < len(report(trace(text=SOLUTION), "words")["segments"]["edges"]["flow"])


def test_without_flow_or_text(tmp_path: Path) -> None:
    nothing = report(trace(text="no answer"))
    assert "segments" not in nothing and nothing["measures"]["gini"]["value"] is None
    token_ids = torch.tensor([ids("?;", end=False) + marked(3, 2)])
    prompt, sinks = torch.arange(token_ids.shape[1])[None] < 2, token_ids == token_ids[0, -2]
    (bare,) = Tracer(policy()).from_ids(token_ids, prompt_mask=prompt, sink_mask=sinks)
    assert "backbone" not in report(bare, None)
    with pytest.raises(ValueError, match="has no text to divide"):
        report(bare)
    bare.to_html(tmp_path / "bare.html")
