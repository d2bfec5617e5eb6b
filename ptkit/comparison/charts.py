"""Which charts a comparison has, as data; `svg` draws them for the page, `plots` for a paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ptkit.comparison.summary import MethodSummary, best_of
from ptkit.evaluation.statistics import Interval
from ptkit.training.titles import written

#: Lines of a chart beyond which each method keeps only its best one.
MOST_LINES = 8


@dataclass(frozen=True)
class Point:
    """A method in a scatter chart, with the interval of its y value and, if known, of its x.

    label: the whole name, for the tooltip; shown: what stands beside the point, "" for nothing
    """

    label: str
    shown: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    x_low: float | None = None
    x_high: float | None = None


@dataclass(frozen=True)
class Scatter:
    """One point per method; higher and further left is better, unless less y is.

    front: join the points that no other beats with no more x
    """

    title: str
    note: str
    x_name: str
    y_name: str
    points: tuple[Point, ...]
    logarithmic: bool = False
    front: bool = False
    higher_is_better: bool = True

    def pareto(self) -> list[Point]:
        """The points no other point beats with no more x, in order of x."""
        sign = 1 if self.higher_is_better else -1
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.x, -sign * p.y)):
            if not front or sign * point.y > sign * front[-1].y:
                front.append(point)
        return front


@dataclass(frozen=True)
class LinePoint:
    """A value of a line, with its interval if known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A named line.

    reference: of a method that does not vary along x; others: the values of the swept keys that
    do not vary along it
    """

    label: str
    colour: int
    points: tuple[LinePoint, ...]
    reference: bool = False
    family: str = ""
    others: tuple[tuple[str, object], ...] = ()

    def holds(self, summaries: Iterable[MethodSummary], key: str) -> bool:
        """Whether one of `summaries` is a point of this line over `key`."""
        return any(
            s.family == self.family
            and tuple((k, v) for k, v in s.sweep.items() if k != key) == self.others
            for s in summaries
        )


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis. ticks: the x values to label, None for round ones"""

    title: str
    note: str
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    logarithmic: bool = False
    from_zero: bool = False
    ticks: tuple[float, ...] | None = None


Chart = Scatter | Lines


def charts_of(summaries: Sequence[MethodSummary]) -> list[Chart]:
    """Every chart there is data for: swept keys, score against size and forgetting, curves."""
    return [*_swept(summaries), *_scatters(summaries), *_curves(summaries)]


def colours(summaries: Sequence[MethodSummary]) -> dict[str, int]:
    """Title -> colour; the values of a sweep share their family's."""
    families = list(dict.fromkeys(s.family for s in summaries))
    return {s.title: families.index(s.family) for s in summaries}


def _scatters(summaries: Sequence[MethodSummary]) -> Iterator[Scatter]:
    name, higher = summaries[0].score, summaries[0].higher_is_better
    better = "Higher" if higher else "Lower"
    trained = [s for s in summaries if s.trains]
    if trained:
        yield Scatter(
            f"{name} against trained parameters",
            f"{better} and further left is better. The line joins the methods no other beats with "
            "fewer parameters; bars are 95 % intervals.",
            "trained parameters (log)",
            name,
            tuple(_point(s, summaries, s.trainable_parameters) for s in trained),
            logarithmic=True,
            front=True,
            higher_is_better=higher,
        )
    measured = [s for s in summaries if s.forgetting is not None]
    if len(measured) > 1:
        yield Scatter(
            f"{name} against forgetting",
            f"{better} and further left is better: more of the task learnt, less of the base lost "
            "while the adapter is on.",
            "forgetting (nats per token)",
            name,
            tuple(
                _point(s, summaries, s.forgetting.mean, s.forgetting)
                for s in measured if s.forgetting
            ),
            higher_is_better=higher,
        )  # fmt: skip


def _point(
    summary: MethodSummary,
    summaries: Sequence[MethodSummary],
    x: float,
    spread: Interval | None = None,
) -> Point:
    low, high = _bounds(summary.leading)
    # Of a sweep only the best of each method is named; a label at every point hides them all.
    shown = summary.family if summary in best_of_families(summaries) else ""
    return Point(
        summary.title, shown, colours(summaries)[summary.title], x, summary.leading.mean, low, high,
        spread.low if spread else None, spread.high if spread else None,
    )  # fmt: skip


def _bounds(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def _swept(summaries: Sequence[MethodSummary]) -> Iterator[Lines]:
    """Score over every swept key whose values are numbers."""
    name = summaries[0].score
    for key in dict.fromkeys(k for s in summaries for k in s.sweep):
        values = sorted({s.sweep[key] for s in summaries if _is_number(s.sweep.get(key))})
        if len(values) < 2:
            continue
        lines = tuple(_lines_over(key, values, summaries))
        others = ", ".join(dict.fromkeys(k for s in summaries for k in s.sweep if k != key))
        note = "Mean over seeds; bars are 95 % intervals."
        if any(line.reference for line in lines):
            note += " Dashed: methods that do not depend on it."
        if others and len(lines) > MOST_LINES:
            best = {s.family: s for s in best_of_families(summaries)}
            lines = tuple(line for line in lines if line.holds(best.values(), key))
            note += f" Each method at its best {others}."
        elif others:
            note += f" After a method's name: its {others}."
        yield Lines(
            f"{name} over {key}",
            note,
            key,
            name,
            lines,
            logarithmic=values[0] > 0 and values[-1] >= 20 * values[0],
            ticks=tuple(values),
        )


def best_of_families(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Of a sweep, the best of each method; without one, all."""
    families: dict[str, list[MethodSummary]] = {}
    for summary in summaries:
        families.setdefault(summary.family, []).append(summary)
    return [best_of(own) for own in families.values()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines_over(
    key: str, values: Sequence[float], summaries: Sequence[MethodSummary]
) -> Iterator[Line]:
    """One line per family and combination of the other swept values."""
    groups: dict[Any, list[MethodSummary]] = {}
    for summary in summaries:
        others = tuple((k, v) for k, v in summary.sweep.items() if k != key)
        groups.setdefault((summary.family, others), []).append(summary)
    shade = colours(summaries)
    for (family, others), own in groups.items():
        label = " ".join([family, *(written(value) for _, value in others)])
        colour = shade[own[0].title]
        reference = key not in own[0].sweep
        if reference:
            mean = own[0].leading.mean
            points = [LinePoint(values[0], mean), LinePoint(values[-1], mean)]
        else:
            along = sorted(own, key=lambda s: s.sweep[key])
            points = [LinePoint(s.sweep[key], s.leading.mean, *_bounds(s.leading)) for s in along]
        yield Line(label, colour, tuple(points), reference, family, others)


def _curves(summaries: Sequence[MethodSummary]) -> Iterator[Lines]:
    """Validation loss by step, mean over seeds; one line per trained method."""
    trained = [s for s in best_of_families(summaries) if s.trains]
    if not trained or not all(record.curve for s in trained for record in s.records):
        return
    shade = colours(summaries)
    lines = []
    for summary in trained:
        by_step: dict[int, list[float]] = {}
        for record in summary.records:
            for entry in record.curve:
                by_step.setdefault(entry.step, []).append(entry.validation_loss)
        mean = (LinePoint(step, sum(v) / len(v)) for step, v in sorted(by_step.items()))
        lines.append(Line(summary.family, shade[summary.title], tuple(mean)))
    yield Lines(
        "Learning curves",
        "Validation loss, mean over seeds."
        + (" Of a sweep, the best of each method." if any(s.sweep for s in summaries) else ""),
        "optimiser step",
        "validation loss (nats per token)",
        tuple(lines),
        from_zero=True,
    )
