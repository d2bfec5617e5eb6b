"""Which charts a comparison has, and what each one draws."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ptkit.comparison.drawing import Draw, as_files, say, short
from ptkit.comparison.summary import MethodSummary, best_of
from ptkit.evaluation.statistics import Interval
from ptkit.formats import atomic
from ptkit.formats.cell_record import ScoredPoint
from ptkit.metrics import metric_names
from ptkit.training.titles import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Lines of a chart beyond which each method keeps only its best one.
MOST_LINES = 8
#: A method is told by its colour and by the shape of its marks; of one method's lines by the dash.
MARKS = "osD^vPX*<>"
DASHES = ("-", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Chart:
    """A chart: what stands above it, and what draws it into a pair of axes."""

    title: str
    note: str
    draw: Draw


@dataclass(frozen=True)
class Line:
    """A named line over the values of a key, or over steps.

    points: x, and the y value there with its bounds where it has them
    dash: how manieth line of its method; None where the method does not vary along x
    """

    name: str
    colour: int
    points: tuple[tuple[float, Interval], ...]
    dash: int | None = 0


def charts_of(summaries: Sequence[MethodSummary]) -> list[Chart]:
    """Every chart there is data for: swept keys, score against size and forgetting, curves."""
    return [
        *_swept(summaries), *_scatters(summaries), *_curves(summaries), *_scored_curves(summaries)
    ]  # fmt: skip


def write_charts(charts: Sequence[Chart], folder: Path) -> None:
    """Write every chart to `folder` as `NAME.png` and `NAME.svg`."""
    for chart in charts:
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
        for form, written_out in as_files(chart.draw).items():
            atomic.write_bytes(folder / f"{name}.{form}", written_out)


def colours(summaries: Sequence[MethodSummary]) -> dict[str, int]:
    """Title -> colour; the values of a sweep share their family's."""
    families = list(dict.fromkeys(s.family for s in summaries))
    return {s.title: families.index(s.family) for s in summaries}


def best_of_families(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Of a sweep, the best of each method; without one, all."""
    families: dict[str, list[MethodSummary]] = {}
    for summary in summaries:
        families.setdefault(summary.family, []).append(summary)
    return [best_of(own) for own in families.values()]


def _scatters(summaries: Sequence[MethodSummary]) -> Iterator[Chart]:
    name, higher = summaries[0].score, summaries[0].higher_is_better
    better = "Higher" if higher else "Lower"
    shade = colours(summaries)
    trained = [s for s in summaries if s.trains]
    if trained:
        yield Chart(
            f"{name} against trained parameters",
            f"{better} and further left is better. The line joins the methods no other beats with "
            "fewer parameters; bars are 95 % intervals.",
            partial(
                _scatter,
                points=[(s, s.trainable_parameters, None) for s in trained],
                shade=shade,
                names=("trained parameters (log)", name),
                logarithmic=True,
                front=True,
            ),
        )
    measured = [(s, s.forgetting.mean, s.forgetting) for s in summaries if s.forgetting is not None]
    if len(measured) > 1:
        yield Chart(
            f"{name} against forgetting",
            f"{better} and further left is better: more of the task learnt, less of the base lost "
            "while the adapter is on.",
            partial(
                _scatter, points=measured, shade=shade, names=("forgetting (nats per token)", name)
            ),
        )


def pareto(points: Sequence[tuple[float, float]], *, higher: bool) -> list[tuple[float, float]]:
    """The points (x, y) that no other beats with no more x, in order of x."""
    sign = 1 if higher else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _scatter(
    axes: Axes,
    *,
    points: Sequence[tuple[MethodSummary, float, Interval | None]],
    shade: dict[str, int],
    names: tuple[str, str],
    logarithmic: bool = False,
    front: bool = False,
) -> None:
    """A mark per summary, at its x and its score, with the intervals of both."""
    from matplotlib import rcParams

    ends = [x + part for _, x, spread in points for part in _reach(spread)]
    _across(axes, ends, logarithmic=logarithmic)
    axes.set(xlabel=names[0], ylabel=names[1])
    if front:
        higher = points[0][0].higher_is_better
        best = pareto([(x, s.leading.mean) for s, x, _ in points], higher=higher)
        soft = rcParams["axes.labelcolor"]
        axes.plot(*zip(*best, strict=True), "--", color=soft, linewidth=1, zorder=1)
    named: set[str] = set()
    for summary, x, spread in points:
        score, colour = summary.leading, shade[summary.title]
        container = axes.errorbar(
            [x], [score.mean], yerr=_bars(score), xerr=_bars(spread), fmt=_mark(colour),
            color=f"C{colour % 10}", elinewidth=1.3,
            label=None if summary.family in named else short(summary.family),
        )  # fmt: skip
        named.add(summary.family)
        say(
            container.get_children(),
            f"{summary.title}: {score.written('.1f')}",
        )


def _swept(summaries: Sequence[MethodSummary]) -> Iterator[Chart]:
    """Score over every swept key whose values are numbers."""
    name = summaries[0].score
    for key in dict.fromkeys(k for s in summaries for k in s.sweep):
        values = sorted({s.sweep[key] for s in summaries if _is_number(s.sweep.get(key))})
        if len(values) < 2:
            continue
        own = list(summaries)
        others = ", ".join(dict.fromkeys(k for s in summaries for k in s.sweep if k != key))
        note = "Mean over seeds; bars are 95 % intervals."
        if any(key not in s.sweep for s in summaries):
            note += " Dashed: methods that do not depend on it."
        if others and len(list(_lines_over(key, values, own))) > MOST_LINES:
            best = [(s.family, _others(s, key)) for s in best_of_families(summaries)]
            own = [s for s in own if (s.family, _others(s, key)) in best]
            note += f" Each method at its best {others}."
        elif others:
            note += f" After a method's name: its {others}."
        yield Chart(
            f"{name} over {key}",
            note,
            partial(
                _plot,
                lines=list(_lines_over(key, values, own, colours(summaries))),
                names=(key, name),
                logarithmic=values[0] > 0 and values[-1] >= 20 * values[0],
                ticks=values,
            ),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _others(summary: MethodSummary, key: str) -> tuple[tuple[str, Any], ...]:
    """The values of the swept keys other than `key`."""
    return tuple((k, v) for k, v in summary.sweep.items() if k != key)


def _lines_over(
    key: str,
    values: Sequence[float],
    summaries: Sequence[MethodSummary],
    shade: dict[str, int] | None = None,
) -> Iterator[Line]:
    """One line per family and combination of the other swept values."""
    groups: dict[Any, list[MethodSummary]] = {}
    for summary in summaries:
        groups.setdefault((summary.family, _others(summary, key)), []).append(summary)
    count: dict[str, int] = {}
    for (family, others), own in groups.items():
        name = " ".join([family, *(written(value) for _, value in others)])
        colour = (shade or colours(summaries))[own[0].title]
        if key not in own[0].sweep:
            level = Interval(own[0].leading.mean, None, None, None, 1)
            yield Line(name, colour, ((values[0], level), (values[-1], level)), None)
            continue
        along = sorted(own, key=lambda s: s.sweep[key])
        dash = count[family] = count.get(family, -1) + 1
        yield Line(name, colour, tuple((s.sweep[key], s.leading) for s in along), dash)


def _curves(summaries: Sequence[MethodSummary]) -> Iterator[Chart]:
    """Validation loss by step, mean over seeds; one line per trained method."""
    trained = [s for s in best_of_families(summaries) if s.trains]
    if not trained or not all(record.curve for s in trained for record in s.records):
        return
    shade = colours(summaries)
    pairs = any(name in metric_names("pair") for name in trained[0].metrics)
    unit = "pair" if pairs else "token"
    lines = []
    for summary in trained:
        by_step: dict[int, list[float]] = {}
        for record in summary.records:
            for entry in record.curve:
                by_step.setdefault(entry.step, []).append(entry.validation_loss)
        points = [
            (step, Interval(sum(losses) / len(losses), None, None, None, len(losses)))
            for step, losses in sorted(by_step.items())
        ]
        lines.append(Line(summary.family, shade[summary.title], tuple(points)))
    yield Chart(
        "Learning curves",
        "Validation loss, mean over seeds."
        + (" Of a sweep, the best of each method." if any(s.sweep for s in summaries) else ""),
        partial(_plot, lines=lines, names=("optimiser step", f"validation loss (nats per {unit})")),
    )


def _scored_curves(summaries: Sequence[MethodSummary]) -> Iterator[Chart]:
    """The score on validation rows over what it took; one line per trained method."""
    trained = [s for s in best_of_families(summaries) if s.trains]
    if not trained or not all(record.scored for s in trained for record in s.records):
        return
    name, shade = trained[0].score, colours(summaries)
    note = (
        "On the first `evaluate.curve_rows` validation rows, mean over seeds. Seconds are those of "
        "training and validation losses. A run of fewer steps ends otherwise than a longer one is "
        "at its time, for the learning rate falls until the end."
    )
    for cost, axis in (
        ("seconds", "seconds of training (log)"),
        ("supervised_tokens", "target tokens read (log)"),
    ):
        lines = [Line(s.family, shade[s.title], tuple(_scored_over(s, cost))) for s in trained]
        yield Chart(
            f"{name} over {cost.replace('_', ' ')}",
            note,
            partial(_plot, lines=lines, names=(axis, f"{name} (validation)"), logarithmic=True),
        )


def _scored_over(summary: MethodSummary, cost: str) -> Iterator[tuple[float, Interval]]:
    """Mean `cost` and score of the seeds at every step that was scored."""
    by_step: dict[int, list[ScoredPoint]] = {}
    for record in summary.records:
        for point in record.scored:
            by_step.setdefault(point.step, []).append(point)
    for _, points in sorted(by_step.items()):
        scores = [point.score for point in points]
        mean = Interval(fmean(scores), None, None, None, len(scores))
        yield fmean(getattr(point, cost) for point in points), mean


def _plot(
    axes: Axes,
    *,
    lines: Sequence[Line],
    names: tuple[str, str],
    logarithmic: bool = False,
    ticks: Sequence[float] = (),
) -> None:
    """`lines` with marks where intervals are known. ticks: the x values to name"""
    _across(axes, [x for line in lines for x, _ in line.points], logarithmic=logarithmic)
    axes.set(xlabel=names[0], ylabel=names[1])
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for number, line in enumerate(lines):
        marked = line.dash is not None and (
            len(line.points) == 1 or any(y.low is not None for _, y in line.points)
        )
        container = axes.errorbar(
            [x for x, _ in line.points],
            [y.mean for _, y in line.points],
            yerr=_bars(*(y for _, y in line.points)),
            linestyle="--" if line.dash is None else DASHES[line.dash % len(DASHES)],
            marker=_mark(number) if marked else "",
            color=f"C{line.colour % 10}",
            elinewidth=1.3,
            label=short(line.name),
        )
        say(container.get_children(), line.name)


def _mark(number: int) -> str:
    """A shape that goes with colour `number`; the next ten have other pairs of both."""
    return MARKS[(number + number // len(MARKS)) % len(MARKS)]


def _bars(*intervals: Interval | None) -> list[list[float]] | None:
    """Lengths of error bars below and above, `[2, points]`; None where an interval is not known."""
    known = [i for i in intervals if i is not None and i.low is not None and i.high is not None]
    if len(known) < len(intervals):
        return None
    return [
        [max(0.0, i.mean - (i.low or 0.0)) for i in known],
        [max(0.0, (i.high or 0.0) - i.mean) for i in known],
    ]


def _reach(spread: Interval | None) -> tuple[float, ...]:
    """How far a mark with this interval reaches from its middle, below and above."""
    bars = _bars(spread)
    return (0.0,) if bars is None else (-bars[0][0], bars[1][0])


def _across(axes: Axes, values: Sequence[float], *, logarithmic: bool) -> None:
    """Axes with few ticks, and room around the `values` of x, which may all be the same."""
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        StrMethodFormatter,
    )

    low, high = min(values), max(values)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.8, high * 1.8)
        steps = (1.0,) if high >= 100 * low else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.08 * (high - low) or abs(high) * 0.08 or 1.0
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    thousands = EngFormatter(sep="") if high >= 1000 else StrMethodFormatter("{x:g}")
    axes.xaxis.set_major_formatter(thousands)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(which="both", length=0)
