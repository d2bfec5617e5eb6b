"""The charts for a paper: PNG and SVG files, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptkit.comparison.charts import Chart, Lines, Scatter
from ptkit.formats import atomic

#: Width and height in inches: one column of a two-column paper, at a size that stays readable.
SIZE = (4.6, 3.2)


def write_plots(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write every chart to `folder` as `NAME.png` (200 dots per inch) and `NAME.svg`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    written = []
    with pyplot.rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "ptkit"}):
        for chart in charts:
            figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
            if isinstance(chart, Scatter):
                _scatter(chart, axes)
            else:
                _lines(chart, axes)
            axes.set(xlabel=chart.x_name, ylabel=chart.y_name)
            axes.grid(alpha=0.25, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
            for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{name}{suffix}"
                drawn = io.BytesIO()
                figure.savefig(drawn, format=suffix[1:], **options)
                atomic.write_bytes(path, drawn.getvalue())
                written.append(path)
            pyplot.close(figure)
    return written


def _scatter(chart: Scatter, axes: Any) -> None:
    _limits(axes, [p.x for p in chart.points], logarithmic=chart.logarithmic)
    if chart.front:
        front = chart.pareto()
        axes.plot([p.x for p in front], [p.y for p in front], "--", color="0.6", linewidth=0.8)
    for point in chart.points:
        sides = [[point.y - point.low], [point.high - point.y]]
        across = None
        if point.x_low is not None and point.x_high is not None:
            across = [[point.x - point.x_low], [point.x_high - point.x]]
        axes.errorbar(
            [point.x], [point.y], yerr=sides, xerr=across, fmt="o", markersize=4,
            linewidth=1, color=f"C{point.colour % 10}",
        )  # fmt: skip
        axes.annotate(
            point.shown, (point.x, point.y), textcoords="offset points", xytext=(5, 4), fontsize=7
        )


def _lines(chart: Lines, axes: Any) -> None:
    _limits(axes, [p.x for li in chart.lines for p in li.points], logarithmic=chart.logarithmic)
    if chart.ticks is not None:
        axes.set_xticks(chart.ticks, [f"{tick:g}" for tick in chart.ticks], minor=False)
        axes.minorticks_off()
    for line in chart.lines:
        x, y = [p.x for p in line.points], [p.y for p in line.points]
        style = "--" if line.reference else "-"
        colour = f"C{line.colour % 10}"
        axes.plot(x, y, style, color=colour, linewidth=1.2, label=line.label)
        bars = [p for p in line.points if p.low is not None and p.high is not None]
        if bars:
            below = [p.y - (p.low or 0.0) for p in bars]
            above = [(p.high or 0.0) - p.y for p in bars]
            axes.errorbar(
                [p.x for p in bars], [p.y for p in bars], yerr=[below, above], fmt="o",
                markersize=3, linewidth=1, color=colour,
            )  # fmt: skip
    axes.legend(frameon=False, fontsize=7)


def _limits(axes: Any, values: Sequence[float], *, logarithmic: bool) -> None:
    """Room around `values`, which may all be the same."""
    low, high = min(values), max(values)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 2)
    else:
        room = 0.08 * (high - low) or abs(high) * 0.08 or 1.0
        axes.set_xlim(low - room, high + room)
