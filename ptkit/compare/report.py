"""`report.html`: the comparison as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ptkit.compare import figures
from ptkit.compare.charts import Point, learning_curves, scatter
from ptkit.compare.summary import MethodSummary
from ptkit.evaluate.metrics import metric
from ptkit.evaluate.statistics import Interval
from ptkit.recipe.schema import GenerationTask, Recipe

#: Test rows shown side by side.
SAMPLES = 6


def render_report(recipe: Recipe, summaries: Sequence[MethodSummary], recipe_text: str) -> str:
    """The page: no script or style from elsewhere, readable without a network.

    Predictions and recipe are untrusted text; the template escapes everything.
    """
    environment = Environment(
        loader=PackageLoader("ptkit.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = summaries[0].records[0]
    best = max(summaries, key=lambda s: s.leading.mean)
    generation = isinstance(recipe.task, GenerationTask)
    return environment.get_template("report.html.j2").render(
        recipe=recipe,
        recipe_text=recipe_text,
        highlights=_highlights(summaries),
        colours={s.title: i for i, s in enumerate(summaries)},
        columns=list(_cells(best)),
        rows=[_row(s, s is best) for s in summaries],
        charts=_charts(summaries),
        samples=_samples(summaries, generation=generation),
        n_seeds=max(len(s.records) for s in summaries),
        signatures=_signatures(summaries),
        first=first,
        together=max(s.trained_together for s in summaries),
        score=first.score,
        generation=generation,
        figures=figures,
        seconds=sum(r.train_seconds + r.eval_seconds for s in summaries for r in s.records),
    )


def _highlights(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """The few findings a reader should leave with, each with the method it belongs to.

    Differences that the intervals do not support are not claimed: a tile says which mean is
    the highest, not which method is the best.
    """
    best = max(summaries, key=lambda s: s.leading.mean)
    found = [_highlight(f"highest {best.score}", best, figures.score(best.leading), "")]
    trained = [s for s in summaries if s.trains]
    kept = [s for s in trained if s.forgetting is not None]
    if kept:
        least = min(kept, key=lambda s: s.forgetting.mean if s.forgetting else 0.0)
        shown = figures.forgetting(least.forgetting)
        note = f"nats per token, at {least.score} {figures.score(least.leading)}"
        found.append(_highlight("least forgetting of those trained", least, shown, note))
    if trained:
        small = min(trained, key=lambda s: (s.bytes_on_disk, -s.leading.mean))
        note = f"on disk, at {small.score} {figures.score(small.leading)}"
        shown = figures.size(small.bytes_on_disk)
        found.append(_highlight("smallest of those trained", small, shown, note))
    return found


def _highlight(name: str, summary: MethodSummary, value: str, note: str) -> dict[str, Any]:
    """One tile: what is said, of which method, the figure and what it stands beside."""
    main, _, interval = value.partition(" ")
    unit = interval if interval in ("B", "KB", "MB", "GB") else ""
    return {
        "name": name,
        "title": summary.title,
        "value": value if unit else main,
        "note": note if unit else f"{interval} {note}".strip(),
    }


def _signatures(summaries: Sequence[MethodSummary]) -> dict[str, str]:
    """Metric -> how its library computed it."""
    references = [row["references"] for row in summaries[0].samples]
    return {name: metric(name).signature(references) for name in summaries[0].metrics}


def _row(summary: MethodSummary, best: bool) -> dict[str, Any]:
    """One row of the summary table."""
    return {
        "title": summary.title,
        "best": best,
        "score": summary.leading,
        "cells": list(_cells(summary).values()),
    }


def _cells(summary: MethodSummary) -> dict[str, tuple[str, float | str]]:
    """Column -> what is shown and what it sorts by, for all columns after the score.

    A figure that does not exist sorts by the empty text: last, whichever way.
    """
    forgetting, retention = summary.forgetting, summary.retention
    off = figures.off(summary.off_exact)
    cells: dict[str, tuple[str, float | str]] = {
        f"{name} [95 %]": (figures.score(interval), interval.mean)
        for name, interval in summary.metrics.items()
        if name != summary.score
    }
    cells |= {
        "forgetting": (figures.forgetting(forgetting), forgetting.mean if forgetting else ""),
        "retention": (figures.retention(retention), retention.mean if retention else ""),
        "adapter off": (off, off),
        "trained": (
            figures.parameters(summary.trainable_parameters, summary.share),
            summary.trainable_parameters,
        ),
        "on disk": (figures.size(summary.bytes_on_disk), summary.bytes_on_disk),
        "time": (
            figures.seconds(summary.seconds, summary.trains),
            summary.seconds if summary.trains else "",
        ),
        "peak memory": (figures.size(summary.peak_memory_bytes), summary.peak_memory_bytes or ""),
        "seeds": (str(len(summary.records)), len(summary.records)),
    }
    return cells


def _charts(summaries: Sequence[MethodSummary]) -> list[tuple[str, str, Markup]]:
    """(heading, explanation, SVG) of every chart there is data for."""
    name = summaries[0].score

    def point(i: int, summary: MethodSummary, x: float, spread: Interval | None = None) -> Point:
        interval = summary.leading
        assert interval.low is not None
        assert interval.high is not None
        return Point(
            summary.title,
            i,
            x,
            interval.mean,
            interval.low,
            interval.high,
            spread.low if spread else None,
            spread.high if spread else None,
        )

    trained = [(i, s) for i, s in enumerate(summaries) if s.trains]
    charts = []
    if trained:
        points = [point(i, s, s.trainable_parameters) for i, s in trained]
        charts.append((
            f"{name} against trained parameters",
            "Higher and further left is better. The line joins the methods no other beats with "
            "fewer parameters; bars are 95 % intervals.",
            scatter(points, f"{name} against trained parameters", "trained parameters (log)",
                    name, logarithmic=True, front=True),
        ))  # fmt: skip
    measured = [(i, s) for i, s in enumerate(summaries) if s.forgetting is not None]
    if len(measured) > 1:
        points = [point(i, s, s.forgetting.mean, s.forgetting) for i, s in measured if s.forgetting]
        charts.append((
            f"{name} against forgetting",
            "Higher and further left is better: more of the task learnt, less of the base lost "
            "while the adapter is on.",
            scatter(points, f"{name} against forgetting", "forgetting (nats per token)", name),
        ))  # fmt: skip
    if trained and all(record.curve for _, s in trained for record in s.records):
        charts.append((
            "Learning curves",
            "Validation loss, mean over seeds.",
            learning_curves(trained, "Validation loss by step"),
        ))  # fmt: skip
    return charts


def _samples(summaries: Sequence[MethodSummary], *, generation: bool) -> list[dict[str, Any]]:
    """Test rows spread over the whole split, with every method's answer.

    correct: whether a predicted label is the gold one; None for texts, which are not so simple.
    """
    first = summaries[0].samples
    chosen = range(0, len(first), max(1, len(first) // SAMPLES))[:SAMPLES]
    samples = []
    for i in chosen:
        answers = []
        for summary in summaries:
            text = summary.samples[i]["prediction"]
            correct = None if generation else text == first[i]["references"][0]
            answers.append({"title": summary.title, "text": text, "correct": correct})
        samples.append({
            "input": first[i]["input"],
            "references": first[i]["references"],
            "answers": answers,
        })  # fmt: skip
    return samples
