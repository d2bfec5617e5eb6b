"""Charts as inline SVG for the report: no library, no request, colours from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ptkit.comparison.charts import Chart, Line, LinePoint, Lines, Point, Scatter

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 16, 54
#: Room a label takes per character and line, at the size phones show (15 of the units above).
CHARACTER, LINE = 7.6, 16.0
#: Longer labels are cut; the whole name is in the point's tooltip and in the table.
LONGEST = 20


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


def draw(chart: Chart) -> Markup:
    """`chart` as an `<svg>` element."""
    return _scatter(chart) if isinstance(chart, Scatter) else _lines(chart)


def _cut(label: str) -> str:
    """The label as the chart has room for it."""
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of `values` with room around it."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def _scatter(chart: Scatter) -> Markup:
    """Points with error bars and labels; the front joins the Pareto-optimal ones."""
    points = chart.points
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    x_low, x_high = (min(xs) / 2.5, max(xs) * 4) if chart.logarithmic else padded(xs, 0.12)
    y_low, y_high = padded([v for p in points for v in (p.low, p.high)])
    x = Axis(x_low, x_high, LEFT, WIDTH - RIGHT, chart.logarithmic)
    y = Axis(max(0.0, y_low), y_high, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, chart.x_name, chart.y_name)]
    if chart.front:
        line = " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in chart.pareto())
        parts.append(f'<polyline class="front" points="{line}"/>')
    for point in points:
        at_x, at_y = x.at(point.x), y.at(point.y)
        parts.append(
            f'<g class="s{point.colour % 10}"><title>{escape(point.label)}: {point.y:.1f} '
            f"[{point.low:.1f}, {point.high:.1f}]</title>"
            f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y.at(point.low):.1f}" '
            f'y2="{y.at(point.high):.1f}" class="bar"/>'
            f"{_across(point, x, at_y)}"
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5.5"/></g>'
        )
    for point, (at_x, at_y, anchor) in _placed_labels(points, x, y):
        parts.append(
            f'<text class="label" x="{at_x:.1f}" y="{at_y + 4:.1f}" '
            f'text-anchor="{anchor}">{escape(_cut(point.shown))}</text>'
        )
    return _svg(chart.title, parts)


def _across(point: Point, x: Axis, at_y: float) -> str:
    """The bar of the point's x interval, where it has one."""
    if point.x_low is None or point.x_high is None:
        return ""
    return (
        f'<line x1="{x.at(point.x_low):.1f}" x2="{x.at(point.x_high):.1f}" y1="{at_y:.1f}" '
        f'y2="{at_y:.1f}" class="bar"/>'
    )


Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> float:
    """Area two boxes (left, top, right, bottom) share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def _placed_labels(
    points: Sequence[Point], x: Axis, y: Axis
) -> list[tuple[Point, tuple[float, float, str]]]:
    """Where each label stands (x, middle, anchor): beside its point, hiding no point or label."""
    taken: list[Box] = []
    for point in points:
        at_x, at_y = x.at(point.x), y.at(point.y)
        left = at_x - 8 if point.x_low is None else min(at_x - 8, x.at(point.x_low))
        right = at_x + 8 if point.x_high is None else max(at_x + 8, x.at(point.x_high))
        taken += [(at_x - 8, at_y - 8, at_x + 8, at_y + 8), (left, at_y - 2, right, at_y + 2)]
    placed = []
    for point in sorted((p for p in points if p.shown), key=lambda p: -p.y):
        at_x, at_y = x.at(point.x), y.at(point.y)
        wide = CHARACTER * len(_cut(point.shown))
        # Nearest first: right, left, then ever further above and below.
        rises = (0.0, *(sign * step * 0.5 * LINE for step in range(2, 12) for sign in (-1, 1)))
        options: list[tuple[float, Box, tuple[float, float, str]]] = []
        for rise in rises:
            for left, anchor in ((at_x + 11, "start"), (at_x - 11 - wide, "end")):
                middle = at_y + rise
                box = (left, middle - LINE / 2, left + wide, middle + LINE / 2)
                if box[0] < x.start or box[2] > WIDTH or box[1] < 0 or box[3] > y.start + 8:
                    continue
                hidden = sum(_overlap(box, other) for other in taken)
                foot = left if anchor == "start" else left + wide
                options.append((hidden, box, (foot, middle, anchor)))
        if not options:  # wider than the chart: keep it beside its point
            options = [(0.0, (at_x, at_y, at_x, at_y), (at_x + 11, at_y, "start"))]
        _, box, where = min(options, key=lambda option: option[0])
        taken.append(box)
        placed.append((point, where))
    return placed


def _lines(chart: Lines) -> Markup:
    """Lines with their names at the right end, and bars where intervals are known."""
    values = [v for line in chart.lines for p in line.points for v in (p.y, p.low, p.high)
              if v is not None]  # fmt: skip
    across = [p.x for line in chart.lines for p in line.points]
    longest = min(LONGEST, max(len(line.label) for line in chart.lines))
    room = 1.12 * CHARACTER * longest + 6  # bold
    right = WIDTH - max(RIGHT, room)
    if chart.logarithmic:
        x = Axis(min(across) / 1.15, max(across) * 1.15, LEFT, right, True)
    else:
        low = min(0.0, *across) if chart.from_zero else min(across)
        x = Axis(low, max(across) + 0.02 * (max(across) - low), LEFT, right)
    y = Axis(*padded(values), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, chart.x_name, chart.y_name, chart.ticks)]
    for line in chart.lines:
        path = " ".join(f"{x.at(p.x):.1f},{y.at(p.y):.1f}" for p in line.points)
        style = "curve reference" if line.reference else "curve"
        parts.append(
            f'<g class="s{line.colour % 10}"><title>{escape(line.label)}</title>'
            f'<polyline class="{style}" points="{path}"/>'
            f"{''.join(_bar_and_dot(p, x, y) for p in _dotted(line))}</g>"
        )
    for line, at_y in _label_rows(chart.lines, y):
        parts.append(
            f'<text class="label s{line.colour % 10} named" x="{x.end + 6:.1f}" '
            f'y="{at_y + 4:.1f}">{escape(_cut(line.label))}</text>'
        )
    return _svg(chart.title, parts)


def _dotted(line: Line) -> list[LinePoint]:
    """The points that are drawn as such: those with an interval, and one that makes no line."""
    return [p for p in line.points if p.low is not None or len(line.points) == 1]


def _bar_and_dot(point: LinePoint, x: Axis, y: Axis) -> str:
    at, bar = f"{x.at(point.x):.1f}", ""
    if point.low is not None and point.high is not None:
        bar = (
            f'<line x1="{at}" x2="{at}" y1="{y.at(point.low):.1f}" y2="{y.at(point.high):.1f}" '
            f'class="bar"/>'
        )
    return f'{bar}<circle cx="{at}" cy="{y.at(point.y):.1f}" r="4"/>'


def _label_rows(lines: Sequence[Line], y: Axis) -> list[tuple[Line, float]]:
    """Heights of the lines' names, pushed apart where they end close together."""
    placed: list[tuple[Line, float]] = []
    for line in sorted(lines, key=lambda each: y.at(each.points[-1].y)):
        at_y = y.at(line.points[-1].y)
        if placed:
            at_y = max(at_y, placed[-1][1] + LINE)
        placed.append((line, at_y))
    overflow = max(0.0, placed[-1][1] - (HEIGHT - BOTTOM - 4)) if placed else 0.0
    return [(line, at_y - overflow) for line, at_y in placed]


def _frame(x: Axis, y: Axis, x_name: str, y_name: str, ticks: Sequence[float] | None = None) -> str:
    """Grid, tick labels and axis names. ticks: of the x axis, where round values would not do"""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )
    for value in x.ticks() if ticks is None else ticks:
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
