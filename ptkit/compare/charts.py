"""The report's charts as inline SVG: no library, no request, colours from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ptkit.compare.summary import MethodSummary

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 16, 48


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, drawn from pixel `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Pixel of `value`."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to label."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**e for e in range(first, last + 1)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Point:
    """A method in a scatter chart, with the interval of its y value."""

    label: str
    colour: int
    x: float
    y: float
    low: float
    high: float


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of `values` with room around it."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def scatter(
    points: Sequence[Point],
    title: str,
    x_name: str,
    y_name: str,
    *,
    logarithmic: bool = False,
    front: bool = False,
) -> Markup:
    """Points with error bars and labels; `front` joins the Pareto-optimal ones (less x, more y)."""
    xs = [p.x for p in points]
    x_low, x_high = (min(xs) / 2.5, max(xs) * 4) if logarithmic else padded(xs, 0.12)
    y_low, y_high = padded([v for p in points for v in (p.low, p.high)])
    x = Axis(x_low, x_high, LEFT, WIDTH - RIGHT, logarithmic)
    y = Axis(max(0.0, y_low), y_high, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, x_name, y_name)]
    if front:
        line = " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in pareto(points))
        parts.append(f'<polyline class="front" points="{line}"/>')
    for point in points:
        at_x, at_y = x.at(point.x), y.at(point.y)
        parts.append(
            f'<g class="s{point.colour}"><title>{escape(point.label)}: {point.y:.1f} '
            f"[{point.low:.1f}, {point.high:.1f}]</title>"
            f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y.at(point.low):.1f}" '
            f'y2="{y.at(point.high):.1f}" class="bar"/>'
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5.5"/></g>'
        )
    for point, at_y in _label_rows(points, y):
        at_x = x.at(point.x)
        # Labels stand to the right of their point, unless they would leave the chart there.
        shift, anchor = (-11, "end") if at_x > WIDTH - 130 else (11, "start")
        parts.append(
            f'<text class="label" x="{at_x + shift:.1f}" y="{at_y + 4:.1f}" '
            f'text-anchor="{anchor}">{escape(point.label)}</text>'
        )
    return _svg(title, parts)


def _label_rows(points: Sequence[Point], y: Axis) -> list[tuple[Point, float]]:
    """Label heights, pushed apart where points lie close together."""
    placed: list[tuple[Point, float]] = []
    for point in sorted(points, key=lambda p: y.at(p.y)):
        at_y = y.at(point.y)
        if placed:
            at_y = max(at_y, placed[-1][1] + 15)
        placed.append((point, at_y))
    overflow = max(0.0, placed[-1][1] - (HEIGHT - BOTTOM - 4)) if placed else 0.0
    return [(point, at_y - overflow) for point, at_y in placed]


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points no other point beats with no more x, in order of x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def learning_curves(summaries: Sequence[tuple[int, MethodSummary]], title: str) -> Markup:
    """Validation loss by step, mean over seeds; one line per trained method.

    summaries: (colour, summary) of the trained methods.
    """
    lines = []
    for colour, summary in summaries:
        by_step: dict[int, list[float]] = {}
        for record in summary.records:
            for entry in record.curve:
                by_step.setdefault(int(entry["step"]), []).append(entry["validation_loss"])
        mean = [(step, sum(v) / len(v)) for step, v in sorted(by_step.items())]
        lines.append((colour, summary.title, mean))
    values = [loss for _, _, line in lines for _, loss in line]
    steps = [step for _, _, line in lines for step, _ in line]
    x = Axis(0, max(steps) * 1.02, LEFT, WIDTH - RIGHT - 100)
    y = Axis(*padded(values), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, "optimiser step", "validation loss (nats per token)")]
    for colour, name, line in lines:
        path = " ".join(f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in line)
        parts.append(
            f'<g class="s{colour}"><title>{escape(name)}</title>'
            f'<polyline class="curve" points="{path}"/></g>'
        )
    ends = [
        Point(name, colour, *line[-1], line[-1][1], line[-1][1]) for colour, name, line in lines
    ]
    for point, at_y in _label_rows(ends, y):
        parts.append(
            f'<text class="label s{point.colour} named" x="{x.end + 6:.1f}" '
            f'y="{at_y + 4:.1f}">{escape(point.label)}</text>'
        )
    return _svg(title, parts)


def _frame(x: Axis, y: Axis, x_name: str, y_name: str) -> str:
    """Grid, tick labels and axis names."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )
    for value in x.ticks():
        at = x.at(value)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{y.start}"/>'
            f'<text class="tick" x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">'
            f"{_short(value)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{(x.start + x.end) / 2:.0f}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_name)}</text>'
        f'<text class="axis" transform="translate(14 {(y.start + y.end) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_name)}</text>'
    )
    return "".join(parts)


def _short(value: float) -> str:
    """10000 as 10k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
