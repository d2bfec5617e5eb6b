"""From predictions to scores."""

from __future__ import annotations

from collections.abc import Sequence

from ptkit.evaluation.prediction import Prediction, statistics_of
from ptkit.evaluation.statistics import Interval, bootstrap_interval
from ptkit.metrics.registry import metric


def require_metrics(metrics: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise UserError for a metric that is not there, or that cannot judge `references` (of each
    row the acceptable texts). Training for hours should not end in that."""
    for name in metrics:
        metric(name).require(references)


def corpus_score(predictions: Sequence[Prediction], name: str) -> float:
    """Corpus value of the metric `name`."""
    measure = metric(name)
    return measure.score(statistics_of(measure, predictions))


def score_intervals(
    predictions: Sequence[Prediction], metrics: Sequence[str], resamples: int
) -> dict[str, Interval]:
    """Corpus value of each metric with its 95 % bootstrap interval over the rows."""
    measured = ((name, metric(name)) for name in metrics)
    return {
        name: bootstrap_interval(
            measure, [statistics_of(measure, predictions)], resamples=resamples, seed=0
        )
        for name, measure in measured
    }
