"""`report.html`: the comparison as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ptkit.comparison import figures
from ptkit.comparison.advice import advice
from ptkit.comparison.answers import browsable
from ptkit.comparison.autotuned import autotuned, starts_tried
from ptkit.comparison.charts import charts_of, colours
from ptkit.comparison.drawing import on_page
from ptkit.comparison.scored import (
    count_scored,
    kind_scored,
    on_the_same_rows,
    retained,
    span,
)
from ptkit.comparison.summary import MethodSummary, baseline_of, basis, best_of
from ptkit.evaluation.statistics import Interval
from ptkit.metrics.registry import metric
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import ConversationTask, GenerationTask
from ptkit.training.failure import Failure
from ptkit.training.titles import written

#: Test rows shown side by side.
SAMPLES = 6


def render_report(
    recipe: Recipe,
    summaries: Sequence[MethodSummary],
    recipe_text: str,
    failed: Sequence[Failure] = (),
) -> str:
    """The page: no script or style from elsewhere, readable without a network.

    Predictions and recipe are untrusted text; the template escapes everything.
    """
    values = page_values(recipe, summaries, recipe_text, failed)
    return templates().get_template("report.html.j2").render(**values)


def templates() -> Environment:
    """The templates of the pages; whatever they show is escaped."""
    return Environment(
        loader=PackageLoader("ptkit.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_values(
    recipe: Recipe,
    summaries: Sequence[MethodSummary],
    recipe_text: str,
    failed: Sequence[Failure] = (),
    anchor: str = "",
    compared: int = 0,
) -> dict[str, Any]:
    """What `comparison.html.j2` shows of one comparison.

    anchor: before the ids of its elements; compared: differences that are shown together, where
    other comparisons stand beside this one
    """
    first = summaries[0].records[0]
    best = best_of(summaries)
    generation = isinstance(recipe.task, GenerationTask | ConversationTask)
    shade = colours(summaries)
    machines = {r.hardware: None for s in summaries for r in s.records}
    measured = retained(summaries)
    beside = on_the_same_rows(summaries)
    return {
        "anchor": anchor,
        "recipe": recipe,
        "recipe_text": recipe_text,
        "advice": advice(summaries),
        "highlights": _highlights(summaries),
        "colours": shade,
        "columns": [
            f"difference from {baseline_of(recipe)}" if name == "difference" else name
            for name in _cells(best, summaries)
        ],
        "failed": list(failed),
        "rows": [_row(s, summaries, shade, best=s is best) for s in summaries],
        "charts": [
            (chart.title, chart.note, on_page(chart.draw, chart.title))
            for chart in charts_of(summaries)
        ],
        "n": count_scored(summaries),
        "rows_scored": kind_scored(summaries),
        "samples": _samples(beside, generation=generation),
        "browsable": browsable(beside, generation=generation),
        "shown": beside[0].records[0],
        "tokens": span(r.tokens for r in measured) if measured else "",
        "drift_tokens": span(r.drift_tokens for r in measured) if measured else "",
        "n_seeds": max(len(s.records) for s in summaries),
        "signatures": _signatures(summaries),
        "searches": _searches(summaries),
        "found": {s.title: text for s in summaries if (text := autotuned(s.records)) is not None},
        "starts_tried": max(starts_tried(s.records) for s in summaries),
        "baseline": baseline_of(recipe),
        "basis": basis(summaries),
        "compared": compared or sum(s.against is not None for s in summaries),
        "best": best,
        "first": first,
        "machines": list(machines),
        "together": max(s.trained_together for s in summaries),
        "score": first.score,
        "generation": generation,
        "figures": figures,
        "seconds": sum(r.train_seconds + r.eval_seconds for s in summaries for r in s.records),
    }


def _searches(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """What was tried to find each method's settings, and what was chosen."""
    searches = []
    for summary in summaries:
        tuned = summary.records[0].tuned
        if tuned is not None:
            chosen = ", ".join(f"{k} = {written(v)}" for k, v in tuned.settings.items())
            searches.append({"title": summary.title, "chosen": chosen, "tuned": tuned})
    return searches


def _highlights(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """The few findings a reader should leave with, each with the method it belongs to.

    Differences that the intervals do not support are not claimed: a tile says which mean is
    the highest, not which method is the best.
    """
    best = best_of(summaries)
    most = "highest" if best.higher_is_better else "lowest"
    tiles = [_measured_tile(f"{most} {best.score}", best, figures.score(best.leading), "")]
    trained = [s for s in summaries if s.trains]
    kept = [s for s in trained if s.forgetting is not None]
    if kept:
        least = min(kept, key=lambda s: s.forgetting.mean if s.forgetting else 0.0)
        shown = figures.forgetting(least.forgetting)
        note = f"nats per token, at {least.score} {figures.score(least.leading)}"
        tiles.append(_measured_tile("least forgetting of those trained", least, shown, note))
    if trained:
        small = min(trained, key=lambda s: (s.bytes_on_disk, -s.goodness))
        note = f"on disk, at {small.score} {figures.score(small.leading)}"
        shown = figures.size(small.bytes_on_disk)
        tiles.append(_tile("smallest of those trained", small, shown, note))
    return tiles


def _measured_tile(name: str, summary: MethodSummary, shown: str, note: str) -> dict[str, Any]:
    """A tile of a figure that has an interval: the interval stands beside the figure."""
    value, _, interval = shown.partition(" ")
    return _tile(name, summary, value, f"{interval} {note}".strip())


def _tile(name: str, summary: MethodSummary, value: str, note: str) -> dict[str, Any]:
    """One tile: what is said, of which method, the figure and what stands beside it."""
    return {"name": name, "title": summary.title, "value": value, "note": note}


def _signatures(summaries: Sequence[MethodSummary]) -> dict[str, str]:
    """Metric -> how its library computed it."""
    references = [row.references for row in summaries[0].samples]
    return {name: metric(name).signature(references) for name in summaries[0].metrics}


def _row(
    summary: MethodSummary,
    summaries: Sequence[MethodSummary],
    shade: dict[str, int],
    *,
    best: bool,
) -> dict[str, Any]:
    """One row of the summary table."""
    return {
        "title": summary.family,
        "colour": shade[summary.title] % 10,
        "best": best,
        "cells": list(_cells(summary, summaries).values()),
    }


def _cells(
    summary: MethodSummary, summaries: Sequence[MethodSummary]
) -> dict[str, tuple[str, float | str]]:
    """Column -> what is shown and what it sorts by, for all columns after the method's.

    A figure that does not exist sorts by the empty text: last, whichever way.
    """
    cells: dict[str, tuple[str, float | str]] = {}
    for key in dict.fromkeys(k for s in summaries for k in s.sweep):
        value = summary.sweep.get(key, "")
        cells[key] = (written(value) or figures.NONE, value if _sorts(value) else str(value))
    cells[f"{summary.score} [95 %]"] = (figures.score(summary.leading), summary.leading.mean)
    if any(s.against is not None for s in summaries):
        against = summary.against
        cells["difference"] = (
            figures.difference(against), against.interval.mean if against else ""
        )  # fmt: skip
    cells |= {
        f"{name} [95 %]": (figures.score(interval), interval.mean)
        for name, interval in summary.metrics.items()
        if name != summary.score
    }
    if any(s.forgetting is not None for s in summaries):
        cells["forgetting"] = _measured(summary.forgetting, figures.forgetting)
        cells |= {
            f"forgetting: {name}": _measured(interval, figures.forgetting)
            for name, interval in summary.domains.items()
        }
        cells |= {
            "retention": _measured(summary.retention, figures.retention),
            "drift": _measured(summary.drift, figures.drift),
        }
    off, added = figures.off(summary.off_exact), summary.added_ms
    cells |= {
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
        "tokens/s": _speed(summary),
    }
    if any(s.added_ms is not None for s in summaries):  # classifiers write no tokens
        cells["added per token"] = (figures.added_time(added), "" if added is None else added)
    cells |= {
        "peak memory": (figures.size(summary.peak_memory_bytes), summary.peak_memory_bytes or ""),
        "seeds": (str(len(summary.records)), len(summary.records)),
    }
    return cells


def _sorts(value: object) -> bool:
    return isinstance(value, int | float)


def _measured(
    interval: Interval | None, shown: Callable[[Interval | None], str]
) -> tuple[str, float | str]:
    return shown(interval), "" if interval is None else interval.mean


def _speed(summary: MethodSummary) -> tuple[str, float | str]:
    """Tokens read per second of training, mean over seeds."""
    if not summary.trains:
        return figures.NONE, ""
    mean = sum(r.tokens_per_second for r in summary.records) / len(summary.records)
    return f"{mean:,.0f}", mean


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
            text = summary.samples[i].prediction
            correct = None if generation else text == first[i].references[0]
            answers.append({"title": summary.title, "text": text, "correct": correct})
        samples.append({
            "input": first[i].input,
            "references": first[i].references,
            "answers": answers,
        })  # fmt: skip
    return samples
