"""The page: what is in the file, and what it does in a real browser."""

from __future__ import annotations

import base64
import copy
import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowgraph import page

HOSTILE = '</script><img src=x onerror="window.__pwned=1"><script>window.__pwned=2</script>{{ 7*7 }}'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

TEXT = "¦".join((
    "Q¦:¦ Tom¦ has¦ ¦3¦ bags¦ of¦ ¦4¦ red¦ apples¦.¦ He¦ eats¦ ¦2¦ of¦ them¦.¦ How¦ many¦ are¦ left¦?¦\n",
    "Tom¦ starts¦ with¦ ¦3¦ *¦ ¦4¦ =¦ ¦12¦ apples¦.\n¦He¦ eats¦ ¦2¦,¦ so¦ ¦12¦ -¦ ¦2¦ =¦ ¦10¦.¦\n\n",
    "\t¦¦A¦:¦ ¦10¦<|im_end|>",
)).split("¦")  # fmt: skip
FIRST, ANSWER = TEXT.index("Tom"), len(TEXT) - 2


def make_trace(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A question, a worked solution, the answer and an end token, with random scores and edges."""
    rng = random.Random(seed)
    text = list(TEXT)
    size, first, answer = len(text), FIRST, ANSWER
    role = ["prompt"] * first + ["response"] * (size - first)
    role[answer], role[size - 1] = "answer", "other"
    credited = [r == "response" for r in role]
    throughput = [rng.uniform(0.1, 1.0) ** 3 for _ in range(size)]
    throughput[-2:] = [0.0, 0.0]
    ranked = sorted((i for i in range(size) if credited[i]), key=lambda i: -throughput[i])
    top = set(ranked[: round(0.4 * len(ranked))])
    pairs = sorted({tuple(sorted(rng.sample(range(size), 2))) for _ in range(400)})
    flow = [rng.random() / 30 for _ in pairs]
    trace: dict[str, Any] = {
        "version": "0.1.0", "title": f"Apples {seed}", "model": "SmolLM2-135M-Instruct",
        "layers": [10, 11, 12, 15], "rule": "all edges", "preset": "flowgraph", "solver": "scipy",
        "score": "throughput", "flags": [],
        "answer": {"text": "10", "start": answer, "stop": answer + 1, "finder": "A:"},
        "tokens": {
            "text": text, "id": [rng.randrange(49152) for _ in text], "role": role,
            "source": [r == "prompt" for r in role], "sink": [i == answer - 1 for i in range(size)],
            "credited": credited, "reach": [rng.random() / 7 for _ in text], "throughput": throughput,
            "weight": [1.5 if i in top else 1.0 for i in range(size)],
        },
        "edges": {
            "source": [a for a, _ in pairs], "target": [b for _, b in pairs],
            "weight": [rng.random() / 3 for _ in pairs], "flow": flow, "share": 0.8312345678,
        },
        "summary": {"tokens": size, "edges": 1770, "injected": 1.0, "prompt_share": 1 / 3, "iterations": 1},
    }  # fmt: skip
    trace.update(changes)
    return trace


def full_trace(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A trace with everything that a page can show beside what every trace has."""
    rng = random.Random(seed + 100)
    start = [0, FIRST, 35, 48, ANSWER - 3]
    pairs = [(a, b) for b in range(len(start)) for a in range(b)]
    strong = sorted(rng.sample([(a, b) for b in range(len(TEXT)) for a in range(b)], 30))
    return make_trace(seed) | {
        "segments": {
            "by": "sentences", "start": start, "stop": [*start[1:], len(TEXT)],
            "kind": ["prompt", "step", "step", "step", "answer"], "flow": [0.5, 0.125, 0.25, 0.0625, 0.875],
            "edges": {
                "source": [a for a, _ in pairs], "target": [b for _, b in pairs], "flow": [rng.random() for _ in pairs],
            },
        },
        "backbone": {
            "delivered": 0.5,
            "edges": {
                "source": [a for a, _ in strong], "target": [b for _, b in strong],
                "flow": [rng.random() for _ in strong],
            },
        },
        "checkpoints": [{"start": 30, "stop": 31, "lost": 0.125}, {"start": 44, "stop": 46, "lost": 0.34}],
        "measures": {
            "effective_tokens": {"value": 41.2871 + seed, "about": "Tokens that carry the flow."},
            "depth": {"value": None, "about": "Mean number of edges on a path."},
        },
    } | changes  # fmt: skip


def long_trace(size: int = 32_768, per_token: int = 16) -> dict[str, Any]:
    """A trace of `size` tokens, `per_token` edges into each, in lines and in one long paragraph."""
    rng = np.random.default_rng(0)
    text = [f" {word}" for word in rng.choice(["then", "so", "12", "apples", "left", "therefore", "="], size)]
    for i in [*range(40, size // 2, 23), *range(size // 2 + 2000, size, 41)]:
        text[i] = ".\n"
    text[-1] = " farewell"
    target = np.repeat(np.arange(1, size), per_token)
    source = target - np.minimum(1 + rng.pareto(0.7, len(target)).astype(int), target)
    source, target = np.unique(np.stack([source, target]), axis=1)
    role = ["prompt"] * 300 + ["response"] * (size - 300)
    return make_trace(
        answer=None,
        tokens={
            "text": text, "id": rng.integers(0, 49152, size).tolist(), "role": role,
            "source": [r == "prompt" for r in role], "sink": [i == size - 2 for i in range(size)],
            "credited": [r == "response" for r in role], "reach": rng.random(size).tolist(),
            "throughput": (rng.random(size) ** 4).tolist(),
            "weight": np.where(rng.random(size) < 0.4, 1.5, 1.0).tolist(),
        },
        edges={
            "source": source.tolist(), "target": target.tolist(), "weight": rng.random(len(target)).tolist(),
            "flow": rng.pareto(1.5, len(target)).tolist(), "share": 0.75,
        },
    )  # fmt: skip


def unpacked(value: Any) -> Any:
    """`value` with packed columns as lists again."""
    if isinstance(value, list):
        return [unpacked(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))) in ("u1", "i4", "f4"):
        return np.frombuffer(base64.b64decode(value[kind]), dtype=f"<{kind}").tolist()
    return {key: unpacked(entry) for key, entry in value.items()}


def as_packed(value: Any) -> Any:
    """What a trace is once it has been packed and unpacked: floats in columns are float32, others have 6 digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list) and value and isinstance(value[0], float):
        return np.array(value, np.float32).tolist()
    if isinstance(value, list):
        return [int(entry) if isinstance(entry, bool) else as_packed(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    packed = {key: as_packed(entry) for key, entry in value.items()}
    if "target" in packed:  # edges, sorted by target: how many lead into each token stands for the targets
        order = np.argsort(packed.pop("target"), kind="stable")
        packed |= {key: np.array(packed[key])[order].tolist() for key in ("source", "flow", "weight") if key in packed}
    if "role" in packed:
        packed["role"] = [("prompt", "response", "answer", "other").index(role) for role in packed["role"]]
    return packed


def without_into(value: Any) -> Any:
    if isinstance(value, list):
        return [without_into(entry) for entry in value]
    return {k: without_into(v) for k, v in value.items() if k != "into"} if isinstance(value, dict) else value


class Elements(HTMLParser):
    """The start tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def data_of(html: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def hostile_trace() -> dict[str, Any]:
    trace = full_trace(
        title=HOSTILE,
        model=HOSTILE,
        rule=HOSTILE,
        preset=HOSTILE,
        solver=HOSTILE,
        version=HOSTILE,
        flags=[HOSTILE],
    )
    trace["answer"].update(text=HOSTILE, finder=HOSTILE)
    trace["summary"][HOSTILE] = HOSTILE
    trace["segments"].update(by=HOSTILE, kind=[HOSTILE] * 5)
    trace["measures"][HOSTILE] = {"value": 1.0, "about": HOSTILE}
    text = trace["tokens"]["text"]
    text[:6] = [HOSTILE, "<!--<script>", "مرحبا", " 🦆👩‍👩‍👧", "\u2028", "\u202eevil"]
    text[30] = HOSTILE
    return trace


# ------------------------------------------------------------------------------------------------ the file


def test_the_data_comes_back_as_it_went_in() -> None:
    traces = [full_trace(0), make_trace(1, title=None), make_trace(2, answer=None, flags=["no_answer"])]
    expected = [as_packed(trace) for trace in traces]
    del expected[1]["title"]
    found = unpacked(data_of(page.render(traces)))
    assert without_into(found) == expected
    assert expected[0]["edges"]["share"] == 0.831235
    for key in ("edges", "backbone"):
        edges = traces[0][key] if key == "edges" else traces[0][key]["edges"]
        into = (found[0][key] if key == "edges" else found[0][key]["edges"])["into"]
        assert np.diff(into).tolist() == [edges["target"].count(i) for i in range(len(TEXT))]


def test_a_score_too_small_for_float32_is_not_zero() -> None:
    trace = make_trace()
    trace["tokens"]["reach"][:2] = [1e-200, 0.0]
    reach = unpacked(data_of(page.render([trace])))[0]["tokens"]["reach"]
    assert 0 < reach[0] < 1e-40 and reach[1] == 0


def test_a_long_trace_is_packed_small() -> None:
    html = page.render([long_trace(4096)])
    assert len(html) < 4096 * (16 * 16.2 + 45) + 80_000  # 12 bytes per edge in base64, the tokens, the page itself


def test_render_leaves_its_input_alone() -> None:
    trace = full_trace()
    before = copy.deepcopy(trace)
    page.render([trace])
    assert trace == before


def test_hostile_strings_stay_inside_the_data() -> None:
    trace = hostile_trace()
    html = page.render([trace], title=HOSTILE)
    assert without_into(unpacked(data_of(html))) == [as_packed(trace)]
    found = Elements(html)
    tags = [tag for tag, _ in found.tags]
    clean = [tag for tag, _ in Elements(page.render([make_trace()])).tags]
    assert tags == clean and "img" not in tags and tags.count("script") == 2
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None and not re.search("[<>&\u2028\u2029]", data[1])
    assert "\\u003c/script\\u003e" in data[1] and "\\u2028" in data[1]


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    trace = make_trace()
    trace["tokens"]["text"][3] = "\ud83e"
    path = page.write(tmp_path / "page.html", [trace])
    assert data_of(path.read_text("utf-8"))[0]["tokens"]["text"][3] == "\ud83e"


def test_the_page_loads_nothing() -> None:
    html = page.render([make_trace()])
    for tag, attributes in Elements(html).tags:
        for name in ("src", "srcset", "action", "xlink:href"):
            assert name not in attributes, (tag, attributes)
        assert (attributes.get("href") or "data:").startswith("data:")
    bare = html.replace('"http://www.w3.org/2000/svg"', "")  # a name, never loaded
    assert not re.search(r"https?://|url\(|@import|\bfetch\b|\bimport\b", bare)
    assert "default-src 'none'" in html and "unsafe" not in html


def test_a_title_is_shown_as_text() -> None:
    html = page.render([make_trace()], title="a < b & c")
    assert "<title>a &lt; b &amp; c</title>" in html


def test_write_makes_the_folder_and_returns_the_path(tmp_path: Path) -> None:
    path = page.write(str(tmp_path / "new" / "page.html"), [make_trace()], title="Ducks")
    assert path == tmp_path / "new" / "page.html"
    assert path.read_text("utf-8") == page.render([make_trace()], title="Ducks")


@pytest.mark.parametrize("key", sorted(set(make_trace()) - {"title"}))
def test_a_missing_key_is_named(key: str) -> None:
    bad = make_trace()
    del bad[key]
    with pytest.raises(ValueError, match=rf"traces\[1\].*'{key}'"):
        page.render([make_trace(), bad])


@pytest.mark.parametrize(
    ("part", "key"),
    [(p, key) for p in ("tokens", "edges", "answer", "segments", "backbone") for key in full_trace()[p]],
)
def test_a_missing_column_is_named(part: str, key: str) -> None:
    bad = full_trace()
    del bad[part][key]
    with pytest.raises(ValueError, match=rf"traces\[0\]\['{part}'\].*'{key}'"):
        page.render([bad])


@pytest.mark.parametrize(
    ("part", "key"),
    [(part, key) for part in ("tokens", "edges") for key in make_trace()[part] if key != "share"],
)
def test_a_short_column_is_named(part: str, key: str) -> None:
    bad = make_trace()
    bad[part][key].pop()
    with pytest.raises(ValueError, match=rf"traces\[2\]\['{part}'\]\['\w+'\] has \d+ entries, but '\w+' has \d+"):
        page.render([make_trace(), make_trace(), bad])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tokens", "reach", 4), float("nan"), r"\['tokens'\]\['reach'\]\[4\] is nan"),
        (("edges", "flow", 0), float("inf"), r"\['edges'\]\['flow'\]\[0\] is inf"),
        (("edges", "share"), "most", r"\['edges'\]\['share'\] must be float, got str"),
        (("summary", "injected"), float("nan"), r"\['summary'\]\['injected'\] is nan"),
        (("summary", "prompt_share"), {1}, r"\['summary'\]\['prompt_share'\] must be float, got set"),
        (("tokens", "role", 2), "user", r"\['tokens'\]\['role'\] holds 'user'"),
        (("tokens", "sink", 2), 1, r"\['tokens'\]\['sink'\]\[2\] must be bool, got int"),
        (("tokens", "id", 2), True, r"\['tokens'\]\['id'\]\[2\] must be int, got bool"),
        (("tokens", "text"), "text", r"\['tokens'\]\['text'\] must be a list, got str"),
        (("edges", "target", 0), len(TEXT), r"\['edges'\] holds \d+ -> 62"),
        (("edges", "source", 0), -1, r"\['edges'\] holds -1 -> \d+"),
        (("edges", "target", 5), 0, r"\['edges'\] holds \d+ -> 0;"),
        (("answer", "stop"), 63, r"\['answer'\] has start 60 and stop 63"),
        (("answer", "stop"), 60, r"\['answer'\] has start 60 and stop 60"),
        (("score",), "entropy", r"\['score'\] must be one of"),
        (("flags",), "no_answer", r"\['flags'\] must be a list, got str"),
        (("tokens",), [], r"\['tokens'\] must be a mapping, got list"),
        (("tokens", "id", 5), 2**31, r"\['tokens'\]\['id'\]\[5\] is 2147483648; it must fit 32 bits"),
        (("edges", "weight", 1), 1e39, r"\['edges'\]\['weight'\]\[1\] is 1e\+39; it must be finite and fit"),
        (("segments", "start", 2), 30, r"\['segments'\] has start 30 and stop 48 at 2; segments follow one another"),
        (("segments", "stop", 4), 99, r"\['segments'\] has start 57 and stop 99 at 4;.*stop <= 62"),
        (("segments", "kind", 0), 7, r"\['segments'\]\['kind'\]\[0\] must be str, got int"),
        (("segments", "edges", "target", 3), 5, r"\['segments'\]\['edges'\] holds \d -> 5;.*in 0..4"),
        (("backbone", "delivered"), float("nan"), r"\['backbone'\]\['delivered'\] is nan"),
        (("backbone", "edges", "source", 0), 61, r"\['backbone'\]\['edges'\] holds 61 -> "),
        (("checkpoints",), {}, r"\['checkpoints'\] must be a list, got dict"),
        (("checkpoints", 1, "stop"), 63, r"\['checkpoints'\]\[1\] has start 44 and stop 63"),
        (("checkpoints", 0), {"start": 1, "stop": 2}, r"\['checkpoints'\]\[0\] has no key 'lost'"),
        (("measures", "depth"), {"about": ""}, r"\['measures'\]\['depth'\] has no key 'value'"),
        (("measures", "depth", "value"), "3", r"\['measures'\]\['depth'\]\['value'\] must be float, got str"),
        (("measures",), [], r"\['measures'\] must be a mapping, got list"),
    ],
)
def test_a_bad_value_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    bad = full_trace()
    place: Any = bad
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"traces\[0\]" + message):
        page.render([bad])


def test_no_traces_and_no_tokens_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one trace"):
        page.render([])
    empty = make_trace(answer=None)
    empty["tokens"] = {key: [] for key in empty["tokens"]}
    empty["edges"] = {key: [] for key in empty["edges"]} | {"share": 0.0}
    with pytest.raises(ValueError, match=r"traces\[0\]\['tokens'\] is empty"):
        page.render([empty])
    with pytest.raises(TypeError, match="put one trace in a list"):
        page.render(make_trace())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="title must be a str"):
        page.render([make_trace()], title=None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


class Opener:
    """Opens pages and remembers what went wrong in them: console errors, exceptions, requests."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser, self.folder = browser, folder
        self.troubles: list[str] = []
        self.contexts: list[Any] = []

    def __call__(self, traces: list[dict[str, Any]], *, width: int = 1300, **options: Any) -> Any:
        path = page.write(self.folder / "page.html", traces, title=options.pop("title", "FlowGraph"))
        context = self.browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.contexts.append(context)
        view = context.new_page()
        view.on("console", lambda m: self.troubles.append(m.text) if m.type in ("error", "warning") else None)
        view.on("pageerror", lambda error: self.troubles.append(str(error)))
        view.on("dialog", lambda dialog: self.troubles.append(dialog.message))
        view.on(
            "request",
            lambda r: None if r.url == path.as_uri() or r.url.startswith("data:") else self.troubles.append(r.url),
        )
        view.goto(path.as_uri())
        return view


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(chromium, tmp_path)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.troubles == []


def token(view: Any, i: int, column: int = 0) -> Any:
    return view.locator(f"#text{column} .token[data-i='{i}']")


def position(view: Any) -> int:
    return int(view.locator("#sheet dt:text-is('Position') + dd").inner_text())


def numbers(found: Any) -> list[int]:
    return [int(text) for text in found.all_inner_texts()]


def levels(view: Any) -> list[str | None]:
    result: list[str | None] = view.evaluate(
        "[...document.querySelectorAll('.token')].map((s) => s.dataset.level ?? null)"
    )
    return result


def drawn(view: Any, arcs: str) -> set[tuple[int, int]]:
    ends = view.locator(arcs).evaluate_all("(all) => all.map((p) => [+p.dataset.source, +p.dataset.target])")
    return {(source, target) for source, target in ends}


def frames(view: Any, count: int = 2) -> None:
    view.evaluate(f"(async () => {{ for (let k = 0; k < {count}; k++) await new Promise(requestAnimationFrame); }})()")


def best_edges(trace: dict[str, Any], end: str, i: int, count: int = 8) -> list[int]:
    edges = trace["edges"]
    rows = [e for e in range(len(edges["flow"])) if edges[end][e] == i]
    return sorted(rows, key=lambda e: -edges["flow"][e])[:count]


def test_the_text_is_the_trace(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    shown = view.evaluate("[...document.querySelectorAll('.token')].map((s) => s.textContent)")
    assert shown == trace["tokens"]["text"]
    assert view.locator(".token.answer").all_inner_texts() == ["10"]
    assert view.locator(".label").all_inner_texts() == ["Prompt", "Response"]
    assert view.locator("#tabs").is_hidden() and view.locator("#beside").is_hidden()
    facts = view.locator(".facts").inner_text()
    for part in ("answer 10 found by A:", "SmolLM2-135M-Instruct", "10–12, 15", "flowgraph", "all edges"):
        assert part in re.sub(r"\s+", " ", facts)


def test_what_a_trace_does_not_have_is_not_shown(show: Opener) -> None:
    view = show([make_trace()])
    assert view.locator(".outline").count() == 0
    assert view.locator("#spine").is_hidden() and view.locator("#waypoint").is_hidden()
    assert view.locator("#sheets [role=tab]").all_inner_texts() == ["Token", "Top credit", "Measures"]
    view = show([full_trace()])
    assert view.locator(".outline").count() == 1
    assert view.locator("#spine").is_visible() and view.locator("#waypoint").is_visible()
    assert view.locator("#sheets [role=tab]").all_inner_texts() == ["Token", "Top credit", "Checkpoints", "Measures"]


def test_hover_shows_the_token_and_its_edges(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    edges, tokens = trace["edges"], trace["tokens"]
    for i in (20, 40):
        token(view, i).hover()
        assert position(view) == i
        facts = view.locator("#sheet dl").inner_text()
        assert str(tokens["id"][i]) in facts and tokens["role"][i] in facts
        share = float(view.locator("#sheet dt:text-is('Throughput') + dd").inner_text().split()[0])
        assert share == pytest.approx(50 * tokens["throughput"][i], rel=0.06)
        for end, other, kind in (("target", "source", "from"), ("source", "target", "to")):
            best = best_edges(trace, end, i)
            ends = [edges[other][e] for e in best]
            assert numbers(view.locator(f".links.{kind} .at")) == ends
            marked = view.locator(f".token.{kind}").evaluate_all("(all) => all.map((s) => Number(s.dataset.i))")
            assert marked == sorted(ends)
            assert drawn(view, f".own path.{kind}") == {(edges["source"][e], edges["target"][e]) for e in best}
            listed = view.locator(f".links.{kind} .flow").all_inner_texts()
            assert [float(text.split()[0]) for text in listed] == pytest.approx(
                [100 * edges["flow"][e] for e in best], rel=0.06
            )
            labels = view.locator(f".own text.{kind}").all_text_contents()
            assert labels and set(labels) <= set(listed)


def test_an_arc_runs_from_token_to_token(show: Opener) -> None:
    view = show([make_trace()])
    token(view, 40).hover()
    ends = view.locator(".own path").evaluate_all(
        """(all) => all.flatMap((path) => {
          const shift = document.querySelector('.lines').getBoundingClientRect();
          return [[path.dataset.source, 0], [path.dataset.target, path.getTotalLength()]].map(([i, length]) => {
            const p = path.getPointAtLength(length), x = p.x + shift.left, y = p.y + shift.top;
            const rects = [...document.querySelector(`.token[data-i='${i}']`).getClientRects()];
            return rects.some((r) => x > r.left - 1 && x < r.right + 1 && y > r.top - 1 && y < r.bottom + 1);
          });
        })"""
    )
    assert len(ends) > 8 and all(ends)


def test_a_click_in_the_list_jumps_to_the_token(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    token(view, 40).hover()
    goal = trace["edges"]["source"][best_edges(trace, "target", 40)[1]]
    view.locator(".links.from button").nth(1).click()
    assert position(view) == goal
    token(view, 20).hover()
    assert position(view) == goal  # it is held
    assert view.evaluate("document.activeElement.id") == "text0"


def test_the_keyboard_moves_holds_and_lets_go(show: Opener) -> None:
    view = show([make_trace()])
    size = view.locator(".token").count()
    view.locator("#text0").focus()
    for key, expected in (
        ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", size - 1),
        ("ArrowRight", size - 1), ("Home", 0), ("ArrowLeft", 0),
    ):  # fmt: skip
        view.keyboard.press(key)
        assert position(view) == expected
        held = view.locator("#text0").get_attribute("aria-activedescendant")
        assert view.locator(f"#{held}").get_attribute("data-i") == str(expected)
        assert view.locator(".token.here").count() == 1
    assert "of the flow" in view.locator("#status").inner_text()
    outline = "getComputedStyle(document.querySelector('.here')).outlineWidth"
    assert view.evaluate(outline) == "4px"
    view.keyboard.press("ArrowDown")
    below = position(view)
    assert below > 0
    assert token(view, below).bounding_box()["y"] > token(view, 0).bounding_box()["y"]
    view.keyboard.press("ArrowUp")
    assert position(view) == 0
    view.keyboard.press("Enter")
    assert token(view, 0).get_attribute("aria-selected") == "true"
    token(view, 30).hover()
    assert position(view) == 0
    view.keyboard.press("Escape")
    assert view.locator(".token.here").count() == 0 and view.locator(".own path").count() == 0
    token(view, 31).hover()
    assert position(view) == 31


def test_the_score_switch_recolours(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    tokens = trace["tokens"]
    seen = {}
    for score in ("Throughput", "Reach", "Credit"):
        view.locator("label", has_text=score).click()
        seen[score] = levels(view)
    assert len({tuple(value) for value in seen.values()}) == 3
    assert seen["Credit"] == [
        None if not c else "5" if w > 1 else "0" for c, w in zip(tokens["credited"], tokens["weight"], strict=True)
    ]
    assert [level is None for level in seen["Throughput"]] == [value == 0 for value in tokens["throughput"]]
    view.locator("label", has_text="Throughput").click()
    view.locator("label", has_text="Rank").click()
    ranked = levels(view)
    assert ranked != seen["Throughput"]
    for side in ({"prompt"}, {"response", "answer", "other"}):  # stronger tokens never get a paler colour
        for found in (ranked, seen["Throughput"]):
            rows = zip(tokens["throughput"], found, tokens["role"], strict=True)
            pairs = sorted((value, int(level)) for value, level, role in rows if role in side and level)
            assert [level for _, level in pairs] == sorted(level for _, level in pairs)
            assert {0, 8} <= {level for _, level in pairs}
    assert "Rank" in view.locator("#means").inner_text()


@pytest.mark.parametrize("share", [0, 5, 40, 83])
def test_the_slider_draws_the_strongest_edges_until_their_share(show: Opener, share: int) -> None:
    trace = make_trace()
    keep = sorted(range(len(trace["edges"]["flow"])), key=lambda e: -trace["edges"]["flow"][e])[:200]
    trace["edges"] = {key: [trace["edges"][key][e] for e in keep] for key in ("source", "target", "weight", "flow")}
    trace["edges"]["share"] = 0.8312
    edges = trace["edges"]
    goal = share / 100 * sum(edges["flow"]) / edges["share"]  # of all flow, listed or not
    strongest: set[tuple[int, int]] = set()
    carried = 0.0
    for flow, source, target in zip(edges["flow"], edges["source"], edges["target"], strict=True):
        if carried >= goal:
            break
        strongest.add((source, target))
        carried += flow
    view = show([trace])
    assert view.locator("#share").get_attribute("max") == "83"
    view.locator("#share").fill(str(share))
    assert view.locator("#shown").inner_text() == f"{share} %: {len(strongest)} edges"
    assert drawn(view, ".all path") == strongest


def test_the_backbone_toggle(show: Opener) -> None:
    trace = full_trace()
    view = show([trace])
    edges = trace["backbone"]["edges"]
    members = set(edges["source"]) | set(edges["target"])
    view.locator("#share").fill("10")
    before = drawn(view, ".all path")
    view.locator("#backbone").check()
    assert drawn(view, ".all path") == set(zip(edges["source"], edges["target"], strict=True))
    off = view.locator(".token.off").evaluate_all("(all) => all.map((s) => Number(s.dataset.i))")
    assert off == [i for i in range(len(TEXT)) if i not in members]
    assert view.locator("#shown").inner_text() == "30 edges deliver 50 %"
    assert view.locator("#share").is_disabled()
    view.locator("#backbone").uncheck()
    assert drawn(view, ".all path") == before and view.locator(".token.off").count() == 0


def test_the_outline_shows_the_sentences_and_leads_to_them(show: Opener) -> None:
    trace = full_trace()
    segments = trace["segments"]
    view = show([trace], width=1500)
    assert view.locator(".fold").inner_text() == "5 sentences"
    assert view.locator(".row .kind").all_inner_texts() == segments["kind"]
    assert view.locator(".row .at").all_inner_texts() == ["50 %", "12.5 %", "25 %", "6.3 %", "87.5 %"]
    assert view.locator(".row .words").nth(1).inner_text().startswith("Tom starts with 3")
    pairs = set(zip(segments["edges"]["source"], segments["edges"]["target"], strict=True))
    assert drawn(view, ".links-drawn path") == pairs
    view.locator(".row").nth(2).click()
    assert position(view) == segments["start"][2]
    assert view.locator(".row[aria-selected=true]").get_attribute("data-segment") == "2"
    assert drawn(view, ".links-drawn path.from") == {(0, 2), (1, 2)}
    assert drawn(view, ".links-drawn path.to") == {(2, 3), (2, 4)}
    view.locator("#outline0").focus()
    view.keyboard.press("ArrowDown")
    assert position(view) == segments["start"][3]
    token(view, 3).hover()
    assert position(view) == segments["start"][3]  # held
    view.keyboard.press("Escape")
    token(view, 3).hover()
    assert view.locator(".row[aria-selected=true]").get_attribute("data-segment") == "0"
    view.locator(".fold").click()
    assert view.locator(".row").first.is_hidden()


def test_checkpoints_are_marked_and_listed(show: Opener) -> None:
    view = show([full_trace()])
    marked = view.locator(".token.checkpoint").evaluate_all("(all) => all.map((s) => Number(s.dataset.i))")
    assert marked == [30, 44, 45]
    sign = "(all) => all.map((s) => getComputedStyle(s, '::before').content)"
    assert view.locator(".token.checkpoint").evaluate_all(sign) == ['"◆"', '"◆"', "none"]
    view.locator("[data-sheet=checkpoints]").click()
    rows = view.locator("#sheet tbody tr")
    cells = rows.evaluate_all("(all) => all.map((r) => [r.children[1].textContent, r.children[2].textContent])")
    assert cells == [["44–45", "34 %"], ["30", "12.5 %"]]
    rows.nth(1).locator("button").click()
    assert view.locator(".token.here").get_attribute("data-i") == "30"
    view.locator("[data-sheet=token]").click()
    assert "checkpoint" in view.locator("#sheet dl").inner_text()


def test_measures_stand_side_by_side(show: Opener) -> None:
    view = show([full_trace(0), full_trace(1), make_trace(2)], width=1700)
    view.locator("[data-sheet=numbers]").click()
    table = view.locator("#sheet table").first
    assert table.locator("th").all_inner_texts() == ["Measure", "Apples 0", "Apples 1", "Apples 2"]
    rows = table.locator("tbody tr").evaluate_all("(all) => all.map((r) => [...r.children].map((c) => c.innerText))")
    assert rows[0] == ["effective tokens\nTokens that carry the flow.", "41.3", "42.3", "–"]
    assert rows[1][1:] == ["–", "–", "–"]
    numbers_of = view.locator("#sheet table").nth(1).inner_text()
    assert "prompt share" in numbers_of and "0.333" in numbers_of
    how = view.locator("#sheet table").nth(2).locator("tbody tr").nth(2).locator("td").all_inner_texts()
    assert how == ["layers", "10–12, 15", "10–12, 15", "10–12, 15"]


def test_search_finds_counts_and_goes_round(show: Opener) -> None:
    trace = make_trace()
    trace["tokens"]["text"][30] = "a+b*(c)"
    view = show([trace])
    view.locator("#text0").focus()
    view.keyboard.press("/")
    assert view.evaluate("document.activeElement.id") == "query"
    hits = "(all) => all.map((s) => Number(s.dataset.i))"

    def found(query: str) -> tuple[str, list[int], list[int]]:
        view.locator("#query").fill(query)
        marked = view.locator(".token.hit").evaluate_all(hits)
        return view.locator("#count").inner_text(), marked, view.locator(".token.now").evaluate_all(hits)

    apples = [i for i, piece in enumerate(TEXT) if "apples" in piece]
    assert found("APPLES") == (f"1 of {len(apples)}", apples, apples[:1])
    for key, number in (("Enter", 2), ("Enter", 1), ("Shift+Enter", 2)):
        view.keyboard.press(key)
        assert view.locator("#count").inner_text() == f"{number} of 2"
        assert view.locator(".token.now").evaluate_all(hits) == [apples[number - 1]]
    view.locator("#previous").click()
    assert view.locator("#count").inner_text() == "1 of 2"
    start = TEXT.index("Tom", FIRST)
    assert found("Tom starts wi") == ("1 of 1", [start, start + 1, start + 2], [start, start + 1, start + 2])
    assert found("+b*(") == ("1 of 1", [30], [30])
    assert found(".*") == ("no match", [], []) and view.locator("#next").is_disabled()
    view.locator("#query").focus()
    view.keyboard.press("Escape")
    assert view.locator("#query").input_value() == "" and view.locator(".token.hit").count() == 0
    assert view.evaluate("document.activeElement.id") == "text0"


def test_tabs_change_the_trace(show: Opener) -> None:
    second = make_trace(1, flags=["several_answers", "our own flag"], score="reach")
    third = make_trace(2, title=None, answer=None, flags=["no_answer"])  # nothing flows
    third["tokens"] |= {
        "throughput": [0.0] * len(TEXT),
        "reach": [0.0] * len(TEXT),
        "weight": [1.0] * len(TEXT),
    }
    third["edges"] = {"source": [], "target": [], "weight": [], "flow": [], "share": 0.0}
    view = show([make_trace(0), second, third])
    view.locator("#beside").click()
    view.locator("label", has_text="Reach").click()
    tabs = view.locator("#tabs [role=tab]")
    assert tabs.all_inner_texts()[0].startswith("Apples 0")
    before = levels(view)
    tabs.nth(1).click()
    assert view.locator(".flags li").all_inner_texts() == [
        "More than one answer was found; the last one is used.", "our own flag",
    ]  # fmt: skip
    assert levels(view) != before
    tabs.nth(1).focus()
    view.keyboard.press("ArrowRight")
    assert view.locator("#tabs [aria-selected=true]").inner_text().startswith("Trace 3")
    assert "no answer found" in view.locator(".facts").inner_text()
    assert view.locator(".token.answer").count() == 0
    assert set(levels(view)) == {None}
    token(view, 40).hover()
    assert view.locator(".links h3").all_inner_texts() == ["Flows in from", "Flows out to"]
    assert view.locator(".links p").all_inner_texts() == ["no edge among those kept"] * 2
    view.locator("label", has_text="Credit").click()
    assert "All weights are equal" in view.locator("#means").inner_text()
    view.locator("label", has_text="Reach").click()
    tabs.nth(2).focus()
    view.keyboard.press("ArrowRight")
    assert levels(view) == before


def test_traces_stand_side_by_side_where_there_is_room(show: Opener) -> None:
    view = show([make_trace(0), make_trace(1)])
    assert view.locator(".view h2").all_inner_texts() == ["Apples 0", "Apples 1"]
    left, right = (view.locator(".view").nth(k).bounding_box() for k in (0, 1))
    assert left["x"] + left["width"] <= right["x"] + 1 and left["y"] == right["y"]
    token(view, 20, 1).hover()
    assert view.locator(".whose").inner_text() == "Apples 1" and position(view) == 20
    token(view, 30, 0).hover()
    assert view.locator(".whose").inner_text() == "Apples 0" and position(view) == 30
    view.locator("#query").fill("apples")
    assert view.locator("#count").inner_text() == "1 of 4"
    view.locator("#next").click()
    view.locator("#next").click()
    assert view.locator("#text1 .token.now").count() == 1 and view.locator("#text0 .token.now").count() == 0
    view.locator("#query").fill("")
    view.locator("#beside").click()
    assert view.locator(".view h2").all_inner_texts() == ["Apples 0"]
    view.locator("#beside").click()
    number = "(n) => document.querySelectorAll('.view').length === n"
    view.set_viewport_size({"width": 800, "height": 900})
    view.wait_for_function(number, arg=1)  # the page hears of its new size a little later
    assert view.locator("#beside").is_hidden()
    view.set_viewport_size({"width": 1300, "height": 900})
    view.wait_for_function(number, arg=2)


def test_the_table_lists_the_highest_credit_and_leads_to_the_token(show: Opener) -> None:
    trace = make_trace()
    tokens = trace["tokens"]
    credited = [i for i in range(len(tokens["text"])) if tokens["credited"][i]]
    best = sorted(credited, key=lambda i: (-tokens["weight"][i], -tokens["throughput"][i], i))[:15]
    view = show([trace])
    view.locator("[data-sheet=top]").click()
    rows = view.locator("#sheet tbody tr")
    assert rows.evaluate_all("(all) => all.map((row) => Number(row.children[1].textContent))") == best
    rows.nth(4).locator("button").click()
    assert token(view, best[4]).get_attribute("aria-selected") == "true"
    view.locator("[data-sheet=token]").click()
    assert position(view) == best[4]


def test_hostile_text_is_shown_and_never_runs(show: Opener) -> None:
    trace = hostile_trace()
    view = show([trace, make_trace(1)], title=HOSTILE, width=1500)
    for i in (*range(6), 30):
        token(view, i).hover()
    for score in ("Reach", "Credit"):
        view.locator("label", has_text=score).click()
    view.locator("#query").fill(HOSTILE)
    assert view.locator("#count").inner_text() == "1 of 2"
    view.locator(".fold").click()
    view.wait_for_timeout(100)
    assert view.evaluate("window.__pwned") is None
    assert view.locator("img").count() == 0 and view.locator("script").count() == 2
    assert view.title() == HOSTILE and view.locator("h1").inner_text() == HOSTILE
    assert token(view, 0).text_content() == HOSTILE
    assert token(view, 2).text_content() == "مرحبا"
    assert token(view, 3).text_content() == " 🦆👩‍👩‍👧"
    token(view, 30).hover()
    places = {
        "token": ".shown", "top": "tbody", "numbers": "tbody >> nth=0", "checkpoints": ".context >> nth=1",
    }  # fmt: skip
    for sheet, place in places.items():
        view.locator(f"[data-sheet={sheet}]").click()
        assert HOSTILE in view.locator(f"#sheet {place}").text_content(), sheet
    view.locator("[data-sheet=numbers]").click()
    assert HOSTILE in view.locator("#sheet tbody").nth(1).text_content()
    for place in ("#tabs", ".facts", ".flags", ".fold", ".row .kind", ".row .words"):
        assert HOSTILE in view.locator(place).first.text_content(), place
    assert token(view, 5).text_content() == "evil"  # an override of the writing direction is drawn, not obeyed
    assert token(view, 5).locator("i").get_attribute("data-mark") == "U+202E"


def test_text_from_right_to_left_starts_at_the_right(show: Opener) -> None:
    trace = make_trace()
    words = ["מכאן ", "ולשם ", "שלוש ", "תפוחים\n"]
    trace["tokens"]["text"][:4] = words
    view = show([trace])
    boxes = [token(view, i).bounding_box() for i in range(5)]
    lines = view.locator(".block").first.bounding_box()
    assert boxes[0]["x"] > boxes[1]["x"] > boxes[2]["x"]
    assert boxes[0]["x"] + boxes[0]["width"] > lines["x"] + lines["width"] - 40
    assert boxes[4]["x"] < lines["x"] + 40  # and the next line, from left to right, at the left
    assert token(view, 3).text_content() == words[3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_colour(show: Opener, scheme: str) -> None:
    view = show([full_trace(), full_trace(1)], color_scheme=scheme, reduced_motion="reduce")
    view.locator("label", has_text="Rank").click()  # so that every level is there
    view.locator("#query").fill("tom")
    contrast = """() => {
          const parse = (c) => c.match(/[\\d.]+/g).map(Number);
          const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
          const light = (c) => [.2126, .7152, .0722].reduce((sum, k, i) => sum + k * linear(c[i] / 255), 0);
          const behind = (node) => { for (; node; node = node.parentElement) {
            const c = parse(getComputedStyle(node).backgroundColor); if (c[3] !== 0) return c; } };
          const out = {};
          document.querySelectorAll('.token, .quiet, small, dt, h3, button, td, th, label, .row *').forEach((node) => {
            if (node.closest('fieldset:disabled, :disabled')) return;
            const a = light(parse(getComputedStyle(node).color)), b = light(behind(node));
            const key = node.tagName + (node.dataset.level ?? '');
            out[key] = Math.min(out[key] ?? 99, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
          });
          return out;
        }"""
    for sheet in ("token", "checkpoints", "numbers", "spine"):
        view.locator("#backbone" if sheet == "spine" else f"[data-sheet={sheet}]").click()
        measured = view.evaluate(contrast)
        assert {f"SPAN{level}" for level in range(9)} <= set(measured)
        assert {key: ratio for key, ratio in measured.items() if ratio < 4.5} == {}
    assert view.evaluate("getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_toggle(show: Opener, scheme: str) -> None:
    view = show([make_trace()], color_scheme=scheme)

    def light() -> bool:
        colour: str = view.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) > 380

    assert light() == (scheme == "light")
    toggle = view.locator("#theme")
    assert toggle.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    toggle.click()
    assert light() == (scheme == "dark")
    toggle.click()
    assert light() == (scheme == "light")


def test_roles_differ_by_more_than_colour(show: Opener) -> None:
    view = show([full_trace()])
    style = """(selector) => { const s = getComputedStyle(document.querySelector(selector));
      return [s.borderInlineStartStyle, s.borderTopStyle, s.borderBottomStyle, s.textDecorationStyle]; }"""
    assert view.evaluate(style, ".block.prompt")[0] == "double"
    assert view.evaluate(style, ".block.response")[0] == "solid"
    plain = view.evaluate(style, ".token:not(.sink, .answer, .checkpoint)")
    looks = [view.evaluate(style, f".token.{kind}") for kind in ("answer", "sink", "checkpoint")]
    assert len({tuple(look) for look in [plain, *looks]}) == 4


# ------------------------------------------------------------------------------------------------ long traces

IN_VIEW = """() => { const box = document.querySelector('#text0').getBoundingClientRect();
  return [...document.querySelectorAll('.token')].filter((s) => { const r = s.getBoundingClientRect();
    return r.top >= box.top && r.bottom <= box.bottom; }).map((s) => Number(s.dataset.i)); }"""


@pytest.fixture(scope="module")
def long() -> dict[str, Any]:
    return long_trace()


def test_a_long_trace_has_only_what_is_in_view_in_the_document(show: Opener, long: dict[str, Any]) -> None:
    view = show([long])
    size = len(long["tokens"]["text"])
    assert 100 < view.locator(".token").count() < 3000
    assert view.evaluate(IN_VIEW)[0] == 0
    for height in (640, 733, 900):
        view.set_viewport_size({"width": 1300, "height": height})
        for place in (0, 1e9):
            view.evaluate(f"document.querySelector('#text0').scrollTop = {place}")
            frames(view, 4)
        assert size - 1 in view.evaluate(IN_VIEW)
    assert token(view, size - 1).text_content() == " farewell"
    assert 100 < view.locator(".token").count() < 3000
    view.locator("#text0").focus()
    view.keyboard.press("Home")
    assert position(view) == 0 and view.evaluate(IN_VIEW)[0] == 0
    view.keyboard.press("End")
    assert position(view) == size - 1 and view.evaluate(IN_VIEW)[-1] == size - 1
    view.locator("#query").fill("farewell")
    assert view.locator("#count").inner_text() == "1 of 1"


def test_a_long_trace_scrolls_without_jumps_or_gaps(show: Opener, long: dict[str, Any]) -> None:
    view = show([long])
    moves = view.evaluate(
        """async () => {
          const box = document.querySelector('#text0'), frame = () => new Promise(requestAnimationFrame), out = [];
          box.scrollTop = box.scrollHeight * .6;  // in the long paragraph, all of it new
          await frame(); await frame();
          for (let k = 0; k < 60; k++) {
            const mid = box.getBoundingClientRect(), y = mid.top + mid.height / 2;
            const span = [...document.querySelectorAll('.token')].find((s) => s.getBoundingClientRect().top > y);
            const before = span.getBoundingClientRect().top;
            box.scrollTop -= 170;
            await frame(); await frame();
            const shown = [...document.querySelectorAll('.block')].map((b) => b.getBoundingClientRect());
            const top = Math.min(...shown.map((r) => r.top)), bottom = Math.max(...shown.map((r) => r.bottom));
            out.push([span.getBoundingClientRect().top - before, top <= mid.top && bottom >= mid.bottom]);
          }
          return out;
        }"""
    )
    assert all(full for _, full in moves)
    assert [round(move) for move, _ in moves] == [170] * 60


def test_a_jump_in_a_long_trace_shows_the_token_and_its_arcs(show: Opener, long: dict[str, Any]) -> None:
    view = show([long])
    text = list(long["tokens"]["text"])
    goal = 20_000
    text[goal] = " needle"
    view = show([long | {"tokens": long["tokens"] | {"text": text}}])
    view.locator("#query").fill("needle")
    assert goal in view.evaluate(IN_VIEW)
    token(view, goal).click()
    assert position(view) == goal
    edges = long["edges"]
    best = best_edges(long, "target", goal)
    assert drawn(view, ".own path.from") == {(edges["source"][e], goal) for e in best}
    order = sorted(edges["flow"], reverse=True)
    view.locator("#share").fill("30")
    wanted = 0.3 * sum(order) / edges["share"]
    count, carried = 0, 0.0
    while carried < wanted:
        carried += order[count]
        count += 1
    assert view.locator("#shown").inner_text() == f"30 %: {count:,} edges"
    rendered = view.locator(".token").evaluate_all("(all) => all.map((s) => Number(s.dataset.i))")
    pairs = drawn(view, ".all path")
    assert 20 < len(pairs) < 250 and view.locator("#drawn").is_hidden()
    flow = {(s, t): f for s, t, f in zip(edges["source"], edges["target"], edges["flow"], strict=True)}
    inside = range(min(rendered), max(rendered) + 1)
    assert all((s in inside or t in inside) and flow[s, t] >= order[count - 1] * 0.999 for s, t in pairs)
    view.locator("#share").fill("70")
    assert len(drawn(view, ".all path")) == 250  # the most that are drawn at a time, and the page says so
    assert view.locator("#drawn").inner_text() == "(250 drawn)"


def test_a_long_outline_has_only_rows_in_view(show: Opener) -> None:
    trace = full_trace()
    size = 4000
    long = long_trace(size, 2)
    start = list(range(0, size, 2))
    last = len(start) - 1
    long["segments"] = trace["segments"] | {
        "start": start, "stop": [*start[1:], size], "kind": ["step"] * (last + 1), "flow": [0.1] * (last + 1),
        "edges": {"source": list(range(last)), "target": list(range(1, last + 1)), "flow": [0.5] * last},
    }  # fmt: skip
    view = show([long], width=1500)
    view.locator("#text0").focus()
    view.keyboard.press("Home")
    assert view.locator(".row[data-segment='0']").is_visible() and view.locator(".row").count() < 60
    view.keyboard.press("End")
    assert view.locator(".row[aria-selected=true]").get_attribute("data-segment") == str(last)
    rows = view.locator(".row").evaluate_all("(all) => all.map((row) => Number(row.dataset.segment))")
    assert len(rows) < 60 and min(rows) > last - 60
    assert drawn(view, ".links-drawn path.from") == {(last - 1, last)}


# ------------------------------------------------------------------------------------------------ phones


@pytest.mark.parametrize("width", [360, 390])
def test_on_a_phone_nothing_scrolls_sideways(show: Opener, width: int) -> None:
    trace = full_trace(0)
    trace["tokens"]["text"][4] = "unbroken" * 30
    view = show([trace, hostile_trace()], width=width, has_touch=True, is_mobile=True)

    def fits() -> bool:
        all_of_it, body, text = view.evaluate(
            "['html', 'body', '#text0'].map((name) => document.querySelector(name).scrollWidth)"
        )
        cut = view.evaluate(
            """['#options', '#sheet', '.head', '.list', '#finder', '#help'].filter((name) => {
              const box = document.querySelector(name); return box && box.scrollWidth > box.clientWidth; })"""
        )
        return bool(all_of_it == body == width and text <= width and cut == [])

    assert fits() and view.locator(".view").count() == 1
    view.locator("#more").tap()
    view.locator(".fold").tap()
    assert fits()
    view.locator("#more").tap()
    view.locator(".fold").tap()
    view.locator("#tabs [role=tab]").nth(1).tap()
    assert fits()
    for sheet in ("top", "checkpoints", "numbers", "token"):
        view.locator(f"[data-sheet={sheet}]").tap()
        assert view.locator("#sheet").is_visible() and fits()
    view.locator("#close").tap()
    view.locator("#ask").tap()
    assert view.locator("#help").is_visible() and fits()


def test_on_a_phone_a_tap_opens_the_sheet_below_the_token(show: Opener) -> None:
    view = show([make_trace(0), make_trace(1)], width=390, has_touch=True, is_mobile=True)
    sheet = view.locator("#sheet")
    assert sheet.is_hidden()
    token(view, 55).tap()
    assert sheet.is_visible() and position(view) == 55
    box, panel = token(view, 55).bounding_box(), view.locator("#panel").bounding_box()
    assert box["y"] + box["height"] <= panel["y"]  # the tapped token isn't covered
    view.locator("#close").tap()
    assert sheet.is_hidden() and view.locator(".token.here").count() == 0
    view.locator("[data-sheet=top]").tap()
    assert sheet.is_visible()
    view.locator("#sheet [data-go]").nth(3).tap()
    assert view.locator(".token.here").is_visible() and view.locator(".links.from").is_visible()
    view.locator("[data-sheet=token]").tap()
    assert sheet.is_hidden()
