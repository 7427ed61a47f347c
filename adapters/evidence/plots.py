"""Pictures of `flowgraph faithful`: for every table the drop per signal with its interval, and the curves.

Needs matplotlib, which is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowgraph.adapters.evidence.summary import ranked, title

COLOURS = {"better": "#2a8c4a", "worse": "#b5460f", "flow": "#1d5c99", "": "#777777"}
"""By what a signal is against flow; grey where there is no difference."""

SHOWN_CURVES = 6


def possible() -> bool:
    """Is matplotlib there?"""
    return find_spec("matplotlib") is not None


def check() -> None:
    """
    Raises:
        ImportError: it isn't; says how to get it.
    """
    if not possible():
        raise ImportError('a picture needs matplotlib: pip install "flowgraph-llm[evidence]"')


def draw(summary: Mapping[str, Any], path: str | Path) -> Path:
    """Write the picture of a summary; returns its path."""
    check()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tables, curves = summary["tables"], summary["curves"]
    rows = len(tables) + len(curves)
    names = max(len(table["metrics"]["drop"]) for table in tables)
    heights = [0.6 + 0.17 * names] * len(tables) + [3.2] * len(curves)
    figure = pyplot.figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows, 2, height_ratios=heights)
    for row, table in enumerate(tables):
        _drops(figure.add_subplot(grid[row, :]), table)
    for row, table in enumerate(curves, len(tables)):
        for column, kind in enumerate(("deletion", "insertion")):
            _curves(figure.add_subplot(grid[row, column]), table, kind)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return Path(path)


def _drops(axes: Any, table: Mapping[str, Any]) -> None:
    cells = table["metrics"]["drop"]
    names = ranked(cells, least_first=table["end"] == "bottom")[::-1]
    for place, name in enumerate(names):
        cell = cells[name]
        word = "flow" if name == "flow" else cell.get("minus_flow", {}).get("verdict", "")
        colour = COLOURS.get(word, COLOURS[""])
        if cell["low"] is not None:
            axes.plot([cell["low"], cell["high"]], [place, place], color=colour, linewidth=1.5)
        axes.plot([cell["mean"]], [place], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlabel("drop of log p(answer); green: better than flow, red: worse", fontsize=8)
    axes.set_title(title(table), fontsize=8, loc="left")
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, table: Mapping[str, Any], kind: str) -> None:
    cells = table["metrics"][kind]
    chosen = [name for name in ("flow", "random") if name in cells]
    for name in ranked(cells, least_first=kind == "deletion"):
        if len(chosen) < SHOWN_CURVES and name not in chosen:
            chosen.append(name)
    styles: dict[str, dict[str, Any]] = {
        "flow": {"color": COLOURS["flow"], "linewidth": 2},
        "random": {"color": "black", "linestyle": "--"},
    }
    for name in chosen:
        values = cells[name]["curve"]
        axes.plot([k / (len(values) - 1) for k in range(len(values))], values, label=name, **styles.get(name, {}))
    hidden = "hidden" if kind == "deletion" else "shown"
    axes.set_xlabel(f"share of tokens {hidden}, the highest scores first", fontsize=8)
    axes.set_ylabel("log p(answer)", fontsize=8)
    axes.set_title(f"{kind}, {table['traces']} traces, {table['restated']}d restatements", fontsize=8, loc="left")
    axes.legend(fontsize=6, frameon=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
