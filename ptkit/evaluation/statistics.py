"""Intervals: no figure without its n, its seeds and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ptkit.extras import extra
from ptkit.metrics.metric import Statistics


class Scores(Protocol):
    """What makes one figure of any set of rows: a metric, say."""

    def score(self, rows: Statistics) -> float:
        """The figure of `rows` `[any number, k]`."""
        ...


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval.

    low, high: None where nothing can be said (a single value); std: over seeds, None for one.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    n_seeds: int
    n_examples: int | None = None


def bootstrap_interval(
    metric: Scores, per_seed: Sequence[Statistics], *, resamples: int, seed: int
) -> Interval:
    """95 % percentile bootstrap interval of the mean over seeds of the corpus score.

    per_seed: one `[examples, k]` array per seed, the same examples in the same order. Each
    replicate draws seeds and examples with replacement; all its seeds share the draw of
    examples, because they were tested on the same ones. (Efron & Tibshirani 1993, ch. 8, 13.)
    """
    scores = [metric.score(rows) for rows in per_seed]
    generator = np.random.default_rng(seed)
    count, examples = len(per_seed), len(per_seed[0])
    replicates = np.empty(resamples)
    for i in range(resamples):
        rows = generator.integers(examples, size=examples)
        seeds, times = np.unique(generator.integers(count, size=count), return_counts=True)
        drawn = [metric.score(per_seed[s][rows]) for s in seeds]
        replicates[i] = np.average(drawn, weights=times)
    low, high = np.percentile(replicates, [2.5, 97.5])
    mean = float(np.mean(scores))
    # A percentile interval of a skewed score can miss its own estimate by a hair.
    return Interval(
        mean, min(float(low), mean), max(float(high), mean), _std(scores), count, examples
    )


def seeds_interval(values: Sequence[float]) -> Interval:
    """95 % Student-t interval of the mean of one value per seed; no bounds for a single seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, None, count)
    with extra("report", "an interval over several seeds"):
        from scipy import stats
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half, _std(values), count)


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
