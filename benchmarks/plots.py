"""Pictures of a run for docs/long-contexts.md: time over a forward pass and peak memory, by length of the trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import Results

FOLDER = Path("docs/img")
COLOURS = {"forward": "#777777", "exact": "#1d5c99", "sparse": "#2a8c4a", "edges": "#c98a1b", "eager": "#b5460f"}
NAMES = {"eager": "eager maps", "captured:sparse": "sparse, captured already"}


def draw(content: dict[str, Any], folder: Path = FOLDER) -> list[Path]:
    """Write both pictures; returns their paths."""
    import matplotlib

    matplotlib.use("agg")
    results = Results(content)
    folder.mkdir(parents=True, exist_ok=True)
    return [_time(results, folder / "long-contexts-time.png"), _memory(results, folder / "long-contexts-memory.png")]


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel(title, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Any, axes: Any, results: Results, path: Path) -> Path:
    from matplotlib import pyplot

    lengths = results.lengths()
    axes.set_xticks(lengths, [f"{tokens // 1024}K" if tokens >= 1024 else str(tokens) for tokens in lengths])
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _time(results: Results, path: Path) -> Path:
    figure, axes = _axes("time / plain forward pass")
    for case in ("eager", "exact", "sparse", "edges", "captured:sparse"):
        points = results.series(case, "time_over_forward")
        style = "--" if case.startswith("captured") else "-"
        colour = COLOURS[case.rpartition(":")[2]]
        if points:
            axes.plot(*zip(*points, strict=True), "o" + style, color=colour, markersize=4, label=NAMES.get(case, case))
    axes.axhline(1, color=COLOURS["forward"], linewidth=0.8)
    axes.set_yscale("log")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return _finish(figure, axes, results, path)


def _memory(results: Results, path: Path) -> Path:
    figure, axes = _axes("peak memory above the model, MB")
    axes.set_yscale("log")
    for case, colour in COLOURS.items():
        points = [(tokens, peak / 1e6) for tokens, peak in results.series(case, "peak_bytes")]
        name = "plain forward" if case == "forward" else NAMES.get(case, case)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
    for tokens in results.lengths():
        failed = results.failed("eager", tokens)
        if failed and failed.get("needed_bytes"):
            needed = failed["needed_bytes"] / 1e6
            axes.plot(tokens, needed, "x", color=COLOURS["eager"], markersize=8)
            axes.annotate(f"eager ends: {needed / 1e3:,.0f} GB", (tokens, needed), fontsize=8, xytext=(6, -3),
                          textcoords="offset points")  # fmt: skip
            break
    return _finish(figure, axes, results, path)
