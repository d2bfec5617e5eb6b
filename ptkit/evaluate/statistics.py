"""Intervals: no figure without its n, its seeds and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ptkit.evaluate.metrics import Metric, Statistics


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
    metric: Metric, per_seed: Sequence[Statistics], *, resamples: int, seed: int
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
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half, _std(values), count)


@dataclass(frozen=True)
class Difference:
    """How much a method differs from a baseline on the same examples.

    p_value: two-sided, by paired bootstrap; `adjusted`: after Holm's correction.
    """

    mean: float
    low: float
    high: float
    p_value: float
    adjusted: float | None = None


def paired_difference(
    metric: Metric,
    method: Sequence[Statistics],
    baseline: Sequence[Statistics],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Paired bootstrap of the difference of mean scores (Koehn 2004, section 4).

    Both were tested on the same examples; each replicate draws the same ones for both, and
    seeds of each separately.
    """
    generator = np.random.default_rng(seed)
    examples = len(method[0])
    differences = np.empty(resamples)
    for i in range(resamples):
        rows = generator.integers(examples, size=examples)
        means = []
        for runs in (method, baseline):
            drawn = generator.integers(len(runs), size=len(runs))
            means.append(np.mean([metric.score(runs[s][rows]) for s in drawn]))
        differences[i] = means[0] - means[1]
    low, high = np.percentile(differences, [2.5, 97.5])
    mean = np.mean([metric.score(r) for r in method]) - np.mean(
        [metric.score(r) for r in baseline]
    )
    # The share of replicates on the other side of zero, never reported as exactly 0.
    other_side = min((differences <= 0).mean(), (differences >= 0).mean())
    p_value = min(1.0, 2 * max(float(other_side), 1 / resamples))
    return Difference(float(mean), float(low), float(high), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several comparisons (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
