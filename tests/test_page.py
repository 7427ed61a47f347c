"""The page: what is in the file, and what it does in a real browser."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return {key: rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else value


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
    trace = make_trace(
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
    text = trace["tokens"]["text"]
    text[:6] = [HOSTILE, "<!--<script>", "مرحبا", " 🦆👩‍👩‍👧", "\u2028", "\u202eevil"]
    text[30] = HOSTILE
    return trace


# ------------------------------------------------------------------------------------------------ the file


def test_the_data_comes_back_as_it_went_in_but_rounded() -> None:
    traces = [make_trace(0), make_trace(1, title=None), make_trace(2, answer=None, flags=["no_answer"])]
    expected = [rounded(trace) for trace in traces]
    del expected[1]["title"]
    assert data_of(page.render(traces)) == expected
    assert expected[0]["edges"]["share"] == 0.831235


def test_render_leaves_its_input_alone() -> None:
    trace = make_trace()
    before = copy.deepcopy(trace)
    page.render([trace])
    assert trace == before


def test_hostile_strings_stay_inside_the_data() -> None:
    trace = hostile_trace()
    html = page.render([trace], title=HOSTILE)
    assert data_of(html) == [rounded(trace)]
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
    assert not re.search(r"https?://|url\(|@import|\bfetch\b|\bimport\b", html)
    assert "default-src 'none'" in html


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
    [(part, key) for part in ("tokens", "edges", "answer") for key in make_trace()[part]],
)
def test_a_missing_column_is_named(part: str, key: str) -> None:
    bad = make_trace()
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
    ],
)
def test_a_bad_value_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    bad = make_trace()
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


def token(view: Any, i: int) -> Any:
    return view.locator(f".token[data-i='{i}']")


def position(view: Any) -> int:
    return int(view.locator("#token dt:text-is('Position') + dd").inner_text())


def levels(view: Any) -> list[str | None]:
    result: list[str | None] = view.evaluate(
        "[...document.querySelectorAll('.token')].map((s) => s.dataset.level ?? null)"
    )
    return result


def test_the_text_is_the_trace(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    shown = view.evaluate("[...document.querySelectorAll('.token')].map((s) => s.textContent)")
    assert shown == trace["tokens"]["text"]
    assert view.locator(".answer .token").all_inner_texts() == ["10"]
    assert view.locator("[role=group]").count() == 2
    assert view.locator("#tabs").is_hidden()
    facts = view.locator("#facts").inner_text()
    for part in ("10 found by A:", "SmolLM2-135M-Instruct", "10–12, 15", "flowgraph", "all edges"):
        assert part in re.sub(r"\s+", " ", facts)


def test_hover_shows_the_token_and_its_edges(show: Opener) -> None:
    trace = make_trace()
    view = show([trace])
    edges, tokens = trace["edges"], trace["tokens"]
    for i in (20, 40):
        token(view, i).hover()
        assert position(view) == i
        facts = view.locator("#token dl").inner_text()
        assert str(tokens["id"][i]) in facts and tokens["role"][i] in facts
        share = float(view.locator("#token dt:text-is('Throughput') + dd").inner_text().split()[0])
        assert share == pytest.approx(50 * tokens["throughput"][i], rel=0.06)
        for end, other, kind in (("target", "source", "from"), ("source", "target", "to")):
            rows = [e for e in range(len(edges["flow"])) if edges[end][e] == i]
            best = [edges[other][e] for e in sorted(rows, key=lambda e: -edges["flow"][e])[:6]]
            listed = view.locator(f".links.{kind} .at").all_inner_texts()
            marked = view.locator(f"#text .{kind}").evaluate_all("(all) => all.map((s) => Number(s.dataset.i))")
            assert [int(text) for text in listed] == best and marked == sorted(best)


def test_the_keyboard_moves_holds_and_lets_go(show: Opener) -> None:
    view = show([make_trace()])
    size = view.locator(".token").count()
    token(view, 0).focus()
    assert position(view) == 0
    for key, expected in (
        ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", size - 1), ("ArrowRight", size - 1),
        ("Home", 0), ("ArrowLeft", 0),
    ):  # fmt: skip
        view.keyboard.press(key)
        assert position(view) == expected
        assert view.evaluate("Number(document.activeElement.dataset.i)") == expected
        assert view.locator(".token[tabindex='0']").count() == 1
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
    assert view.locator("[role=option][aria-selected=true]").count() == 0
    token(view, 31).hover()
    assert position(view) == 31
    assert "of the flow" in view.locator("[role=status]").inner_text()


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
    view.locator("label", has_text="Reach").click()
    assert view.locator("[role=tab]").all_inner_texts()[0].startswith("Apples 0")
    before = levels(view)
    view.locator("[role=tab]").nth(1).click()
    assert view.locator("#flags li").all_inner_texts() == [
        "More than one answer was found; the last one is used.", "our own flag",
    ]  # fmt: skip
    assert levels(view) != before
    view.keyboard.press("ArrowRight")
    assert view.locator("[role=tab][aria-selected=true]").inner_text().startswith("Trace 3")
    assert "none found" in view.locator("#facts").inner_text()
    assert view.locator(".answer .token").count() == 0
    assert set(levels(view)) == {None}
    token(view, 40).hover()
    assert view.locator(".links").all_inner_texts() == [
        "Flows in from\n\nno edge among those kept", "Flows out to\n\nno edge among those kept",
    ]  # fmt: skip
    view.locator("label", has_text="Credit").click()
    assert "All weights are equal" in view.locator("#means").inner_text()
    view.locator("label", has_text="Reach").click()
    view.locator("[role=tab]").nth(2).focus()
    view.keyboard.press("ArrowRight")
    assert levels(view) == before


def test_the_table_lists_the_highest_credit_and_leads_to_the_token(show: Opener) -> None:
    trace = make_trace()
    tokens = trace["tokens"]
    credited = [i for i in range(len(tokens["text"])) if tokens["credited"][i]]
    best = sorted(credited, key=lambda i: (-tokens["weight"][i], -tokens["throughput"][i], i))[:15]
    view = show([trace])
    rows = view.locator("#top tr")
    assert rows.evaluate_all("(all) => all.map((row) => Number(row.children[2].textContent))") == best
    rows.nth(4).locator("button").click()
    assert position(view) == best[4]
    assert token(view, best[4]).get_attribute("aria-selected") == "true"


def test_hostile_text_is_shown_and_never_runs(show: Opener) -> None:
    trace = hostile_trace()
    view = show([trace, make_trace(1)], title=HOSTILE)
    for i in (*range(6), 30):
        token(view, i).hover()
    for score in ("Reach", "Credit"):
        view.locator("label", has_text=score).click()
    view.locator("#view > details > summary").click()
    view.wait_for_timeout(100)
    assert view.evaluate("window.__pwned") is None
    assert view.locator("img").count() == 0 and view.locator("script").count() == 2
    assert view.title() == HOSTILE and view.locator("h1").inner_text() == HOSTILE
    assert token(view, 0).text_content() == HOSTILE
    assert token(view, 3).text_content() == " 🦆👩‍👩‍👧"
    for place in ("[role=tab] >> nth=0", "#facts", "#flags", "#top", "#summary", "#token .shown"):
        assert HOSTILE in view.locator(place).text_content(), place
    assert token(view, 5).text_content() == "evil"  # an override of the writing direction is drawn, not obeyed
    assert token(view, 5).locator("i").get_attribute("data-mark") == "U+202E"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_colour(show: Opener, scheme: str) -> None:
    view = show([make_trace(), make_trace(1)], color_scheme=scheme, reduced_motion="reduce")
    view.locator("label", has_text="Rank").click()  # so that every level is there
    measured = view.evaluate(
        """() => {
          const parse = (c) => c.match(/[\\d.]+/g).map(Number);
          const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
          const light = (c) => [.2126, .7152, .0722].reduce((sum, k, i) => sum + k * linear(c[i] / 255), 0);
          const behind = (node) => { for (; node; node = node.parentElement) {
            const c = parse(getComputedStyle(node).backgroundColor); if (c[3] !== 0) return c; } };
          const out = {};
          document.querySelectorAll('.token, .quiet, small, dt, h3, button, td, label').forEach((node) => {
            if (node.closest('fieldset:disabled')) return;
            const a = light(parse(getComputedStyle(node).color)), b = light(behind(node));
            const key = node.tagName + (node.dataset.level ?? '');
            out[key] = Math.min(out[key] ?? 99, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
          });
          return out;
        }"""
    )
    assert {f"SPAN{level}" for level in range(9)} <= set(measured)
    assert {key: ratio for key, ratio in measured.items() if ratio < 4.5} == {}
    assert view.evaluate("getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"


def test_on_a_phone_a_tap_opens_the_sheet_and_nothing_scrolls_sideways(show: Opener) -> None:
    view = show([make_trace(0), make_trace(1)], width=390, has_touch=True, is_mobile=True)
    panel = view.locator("#panel")
    assert panel.is_hidden()
    token(view, 55).tap()
    assert panel.is_visible() and position(view) == 55
    box, sheet = token(view, 55).bounding_box(), panel.bounding_box()
    assert box["y"] + box["height"] <= sheet["y"]  # the tapped token isn't covered
    assert view.evaluate("document.documentElement.scrollWidth") == 390
    view.locator("#close").tap()
    assert panel.is_hidden()
