"""Every measure against its definition in plain loops, on small graphs; batches; text; PyG."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from flowgraph import Flow, TokenGraph, TopK, exact_flow, trace_flow
from flowgraph.measures import ABOUT, MEASURES, AddMeasures, frame, measures, rows, token_class
from flowgraph.rows import DenseRows
from tests.graphs import attention, graphs, layered, mask_of, random_graph


def plain(flow: Flow) -> dict[str, float]:
    """The table of the module, one token and one edge at a time; what is missing is NaN."""
    graph = flow.graph
    N = int(graph.num_nodes)
    f, injection = flow.flow.tolist(), flow.injection.tolist()
    edges = list(zip(*graph.edge_index.tolist(), flow.edge_flow.tolist(), flow.transition.tolist(), strict=True))
    answer, credit = graph.answer_mask.tolist(), graph.credit_mask.tolist()
    response, prompt = graph.response_mask.nonzero().flatten().tolist(), graph.prompt_mask.tolist()
    out: dict[str, float] = {}
    if sum(injection) == 0:
        return out

    leaving = defaultdict(list)
    for source, target, _, share in edges:
        leaving[source].append((target, share))
    lengths: dict[int, float] = defaultdict(float)

    def walk(token: int, hops: int, share: float) -> None:
        if answer[token]:
            lengths[hops] += share
        else:
            for target, part in leaving[token]:
                if part > 0:
                    walk(target, hops + 1, share * part)

    for token in range(N):
        if injection[token] > 0:
            walk(token, 0, injection[token])
    out["path_length_mean"] = sum(hops * share for hops, share in lengths.items())
    for name, part in (("p90", 0.9), ("max", 0.999)):
        out[f"path_length_{name}"] = min(n for n in range(N) if sum(lengths[m] for m in range(n + 1)) >= part - 1e-9)
    out["direct_share"] = lengths[1]

    mine = sorted(f[t] for t in range(N) if credit[t])
    n, total = len(mine), sum(mine)
    if total > 0:
        p = [value / total for value in mine]
        out["effective_tokens"] = 1 / sum(x * x for x in p)
        out["effective_share"] = out["effective_tokens"] / n
        if n > 1:
            out["entropy"] = -sum(x * math.log(x) for x in p if x > 0) / math.log(n)
        out["gini"] = sum(abs(a - b) for a in mine for b in mine) / (2 * n * total)
        out["top_tenth"] = sum(mine[-math.ceil(n / 10) :]) / total

    moved = sum(phi for *_, phi, _ in edges)
    if moved > 0:
        out["distance_mean"] = sum(phi * (t - s) for s, t, phi, _ in edges) / moved
        out["distance_relative"] = out["distance_mean"] / N
        out["local_share"] = sum(phi for s, t, phi, _ in edges if t - s <= 10) / moved
        out["unlisted_share"] = 0.0

    place = {t: rank / max(len(response) - 1, 1) for rank, t in enumerate(response)}
    last = max((t for t in range(N) if answer[t] and f[t] > 0), default=0)
    widths = {}
    for t in response:
        crossing = [phi for s, k, phi, _ in edges if s <= t < k]
        if t < last and sum(crossing) > 1e-3:
            widths[t] = sum(crossing) ** 2 / sum(phi * phi for phi in crossing)
    if widths:
        out["width_mean"] = sum(widths.values()) / len(widths)
        out["width_min"] = min(widths.values())
        for q in range(4):
            if inside := [width for t, width in widths.items() if min(int(place[t] * 4), 3) == q]:
                out[f"width_quarter_{q + 1}"] = sum(inside) / len(inside)

    held = sum(f[t] for t in response)
    if held > 0:
        out["place_mean"] = sum(f[t] * place[t] for t in response) / held
        for q in range(4):
            out[f"quarter_{q + 1}"] = sum(f[t] for t in response if min(int(place[t] * 4), 3) == q) / held
    first = answer.index(True)
    if total > 0:
        for near in (8, 32, 128, 512):
            inside = [f[t] for t in range(N) if credit[t] and first - near <= t < first]
            out[f"near_{near}"] = sum(inside) / total
    reach = [h for h, asked in zip(flow.reach.tolist(), graph.question_mask.tolist(), strict=True) if asked]
    out["question_share"] = sum(reach) ** 2 / sum(h * h for h in reach) / len(reach)
    out["prompt_share"] = sum(f[t] for t in range(N) if prompt[t]) / sum(f)
    out["response_share"] = held / sum(f)
    out["sink_share"] = sum(f[t] for t in range(N) if answer[t]) / sum(f)
    return out


@given(graphs(max_tokens=10))
def test_measures_are_their_definitions(graph: TokenGraph) -> None:
    flow = trace_flow(graph, "reference")
    found, wanted = measures(flow), plain(flow)
    assert tuple(found) == MEASURES
    for name, value in found.items():
        if name in ("width_min_place",) or name.endswith("_lift"):
            continue
        assert float(value) == pytest.approx(wanted.get(name, math.nan), rel=1e-6, abs=1e-9, nan_ok=True), name


def test_a_layered_graph_by_hand() -> None:
    """Depth 4, width 3, all to all: every path has 3 edges, and every token of a layer carries a third."""
    found = {name: float(value) for name, value in measures(trace_flow(layered(4, 3))).items()}
    assert [found[f"path_length_{name}"] for name in ("mean", "p90", "max")] == pytest.approx([3, 3, 3])
    assert found["direct_share"] == 0 and found["effective_tokens"] == pytest.approx(6)
    assert [found["effective_share"], found["entropy"], found["gini"]] == pytest.approx([1, 1, 0])
    assert [found["distance_mean"], found["local_share"]] == pytest.approx([3, 1])
    assert found["question_share"] == pytest.approx(1)
    assert [found["prompt_share"], found["sink_share"]] == pytest.approx([0.25, 0.25])


def test_the_narrowest_place() -> None:
    """All flow passes one token in the middle of the response."""
    W = torch.zeros(8, 8, dtype=torch.float64)
    W[2, 0] = W[3, 0] = W[4, 2] = W[4, 3] = W[5, 4] = 1
    W[6, 5] = W[7, 5] = 0.5
    W[7, 6] = 0.5
    graph = TokenGraph.from_dense(W, prompt_mask=mask_of(8, 0, 1), answer_mask=mask_of(8, 7))
    found = measures(trace_flow(graph))
    assert float(found["width_min"]) == pytest.approx(1)
    assert float(found["width_min_place"]) == pytest.approx(2 / 5)  # after token 4, the third of six


def test_batches_as_one_by_one() -> None:
    several = [random_graph(30, seed=1), layered(4, 3), random_graph(50, seed=2), random_graph(20, threshold=0.05)]
    together = measures(trace_flow(Batch.from_data_list(several), "reference"))
    for number, graph in enumerate(several):
        alone = measures(trace_flow(graph, "reference"))
        for name in MEASURES:
            torch.testing.assert_close(together[name][number], alone[name][0], equal_nan=True, msg=name)


def test_a_trace_without_flow_has_no_measures() -> None:
    graph = random_graph(20)
    graph.answer_mask = torch.zeros(20, dtype=torch.bool)
    found = measures(trace_flow(Batch.from_data_list([graph, random_graph(20)])))
    assert all(math.isnan(values[0]) for values in found.values())
    assert next(iter(rows(found))) == {} and len(list(rows(found))[1]) > 20


def test_exact_mode_measures_as_edges_do_where_it_can() -> None:
    W = attention(60, seed=4)
    masks: dict[str, Any] = {"prompt_mask": torch.arange(60) < 20, "answer_mask": mask_of(60, 58)}
    full = measures(trace_flow(TokenGraph.from_dense(W, **masks), "reference"))
    some = measures(exact_flow(DenseRows(W), edges=TopK(4), **masks))
    for name in ("path_length_mean", "effective_tokens", "gini", "quarter_2", "near_8", "question_share"):
        torch.testing.assert_close(some[name], full[name], msg=name)
    assert some["unlisted_share"] > 0.1 and full["unlisted_share"] == 0
    assert math.isnan(some["path_length_p90"]) and math.isnan(some["direct_share"])


@pytest.mark.parametrize(
    ("piece", "wanted"),
    [
        (" 42", "digit"), ("3.14", "digit"), ("1,000", "digit"), ("+", "operator"), (" ** ", "operator"),
        ("×", "operator"), (".", "delimiter"), ("\n\n", "delimiter"), (" (", "delimiter"), (" the", "word"),
        ("x2", "word"), ("你", "word"), ("", "other"), ("\N{ROCKET}", "other"), (",", "delimiter"),
    ],
)  # fmt: skip
def test_token_classes(piece: str, wanted: str) -> None:
    assert token_class(piece) == wanted


def test_shares_of_token_classes() -> None:
    flow = trace_flow(random_graph(30, seed=5))
    text = [["7", "+", ".", " so", "", "x"][n % 6] for n in range(30)]
    found = measures(flow, [text])
    credit, f = flow.graph.credit_mask, flow.flow.double()
    for name in ("digit", "operator", "delimiter", "word"):
        mask = torch.tensor([token_class(piece) == name for piece in text]) & credit
        share = f[mask].sum() / f[credit].sum()
        torch.testing.assert_close(found[f"{name}_share"][0], share)
        torch.testing.assert_close(found[f"{name}_lift"][0], share / (mask.sum() / credit.sum()))
    both = trace_flow(Batch.from_data_list([flow.graph, flow.graph]))
    mixed = measures(both, [None, text])
    assert math.isnan(mixed["word_share"][0]) and mixed["word_share"][1] == pytest.approx(float(found["word_share"]))
    with pytest.raises(ValueError, match="text must have one entry per graph, 2, got 1"):
        measures(both, [text])
    with pytest.raises(ValueError, match=r"text\[1\] has 1 pieces, graph 1 has 30 tokens"):
        measures(both, [text, ["a"]])


def test_as_features_of_a_pyg_dataset() -> None:
    names = ("gini", "path_length_mean")
    several: list[Any] = [AddMeasures(names)(random_graph(20, seed=seed)) for seed in range(4)]
    (batch,) = DataLoader(several, batch_size=4)
    assert batch.measures.shape == (4, 2)
    wanted = measures(trace_flow(random_graph(20, seed=2)))
    torch.testing.assert_close(
        batch.measures[2].double(), torch.cat([wanted[name] for name in names]), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="names holds 'size'; measures are"):
        AddMeasures(["size"])


def test_what_a_measure_is_is_said_in_words() -> None:
    assert list(ABOUT) == list(MEASURES)
    for name, about in ABOUT.items():
        assert not re.search(r"\b(C|R|Q|N|f|p|phi)\b", about), f"{name}: {about}"


def test_as_a_data_frame() -> None:
    pytest.importorskip("pandas")
    table = frame(trace_flow(Batch.from_data_list([random_graph(20), random_graph(30)])))
    assert tuple(table.columns) == MEASURES and len(table) == 2
