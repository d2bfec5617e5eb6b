"""`report.html`: the comparison as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ptkit.compare import figures
from ptkit.compare.charts import Point, learning_curves, scatter
from ptkit.compare.summary import MethodSummary
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
    return environment.get_template("report.html.j2").render(
        recipe=recipe,
        recipe_text=recipe_text,
        summaries=summaries,
        colours={s.title: i for i, s in enumerate(summaries)},
        best=best,
        columns=list(_cells(best)),
        rows=[_row(s, s is best) for s in summaries],
        charts=_charts(summaries),
        samples=_samples(summaries),
        first=first,
        score=first.score,
        generation=isinstance(recipe.task, GenerationTask),
        figures=figures,
        seconds=sum(r.train_seconds + r.eval_seconds for s in summaries for r in s.records),
    )


def _row(summary: MethodSummary, best: bool) -> dict[str, Any]:
    """One row of the summary table."""
    return {
        "title": summary.title,
        "best": best,
        "score": summary.leading,
        "cells": list(_cells(summary).values()),
    }


def _cells(summary: MethodSummary) -> dict[str, tuple[str, float | str]]:
    """Column -> what is shown and what it sorts by, for all columns after the score."""
    forgetting, retention = summary.forgetting, summary.retention
    off = figures.off(summary.off_exact)
    cells: dict[str, tuple[str, float | str]] = {
        "forgetting": (figures.forgetting(forgetting), forgetting.mean if forgetting else 0),
        "retention": (figures.retention(retention), retention.mean if retention else 0),
        "adapter off": (off, off),
        "trained": (
            figures.parameters(summary.trainable_parameters, summary.share),
            summary.trainable_parameters,
        ),
        "on disk": (figures.size(summary.bytes_on_disk), summary.bytes_on_disk),
        "time": (figures.seconds(summary.seconds, summary.trains), summary.seconds),
        "peak memory": (figures.size(summary.peak_memory_bytes), summary.peak_memory_bytes or 0),
    }
    for name, interval in summary.metrics.items():
        if name != summary.score:
            cells[f"{name} [95 %]"] = (figures.score(interval), interval.mean)
    cells["seeds"] = (str(len(summary.records)), len(summary.records))
    return cells


def _charts(summaries: Sequence[MethodSummary]) -> list[tuple[str, str, Markup]]:
    """(heading, explanation, SVG) of every chart there is data for."""
    name = summaries[0].score

    def point(i: int, summary: MethodSummary, x: float) -> Point:
        interval = summary.leading
        assert interval.low is not None
        assert interval.high is not None
        return Point(summary.title, i, x, interval.mean, interval.low, interval.high)

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
        points = [point(i, s, s.forgetting.mean) for i, s in measured if s.forgetting]
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


def _samples(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """Test rows spread over the whole split, with every method's answer."""
    count = len(summaries[0].samples)
    chosen = range(0, count, max(1, count // SAMPLES))[:SAMPLES]
    return [
        {
            "input": summaries[0].samples[i]["input"],
            "references": summaries[0].samples[i]["references"],
            "answers": [(s.title, s.samples[i]["prediction"]) for s in summaries],
        }
        for i in chosen
    ]
