"""The report's charts as inline SVG: no library, no request, colours from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ptkit.compare.summary import MethodSummary

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


@dataclass(frozen=True)
class Point:
    """A method in a scatter chart, with the interval of its y value and, if known, of its x."""

    label: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    x_low: float | None = None
    x_high: float | None = None

    @property
    def short(self) -> str:
        """The label as the chart has room for it."""
        return self.label if len(self.label) <= LONGEST else self.label[: LONGEST - 1] + "…"


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
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
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
            f"{_across(point, x, at_y)}"
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5.5"/></g>'
        )
    for point, (at_x, at_y, anchor) in _placed_labels(points, x, y):
        parts.append(
            f'<text class="label" x="{at_x:.1f}" y="{at_y + 4:.1f}" '
            f'text-anchor="{anchor}">{escape(point.short)}</text>'
        )
    return _svg(title, parts)


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
    for point in sorted(points, key=lambda p: -p.y):
        at_x, at_y = x.at(point.x), y.at(point.y)
        wide = CHARACTER * len(point.short)
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


def _label_rows(points: Sequence[Point], y: Axis) -> list[tuple[Point, float]]:
    """Label heights, pushed apart where points lie close together."""
    placed: list[tuple[Point, float]] = []
    for point in sorted(points, key=lambda p: y.at(p.y)):
        at_y = y.at(point.y)
        if placed:
            at_y = max(at_y, placed[-1][1] + LINE)
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
    longest = min(LONGEST, max(len(name) for _, name, _ in lines))
    room = 1.12 * CHARACTER * longest + 6  # bold
    x = Axis(0, max(steps) * 1.02, LEFT, WIDTH - max(RIGHT, room))
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
            f'y="{at_y + 4:.1f}">{escape(point.short)}</text>'
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
