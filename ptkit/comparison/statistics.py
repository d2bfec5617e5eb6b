"""Is one method better than another? Paired differences, and p values for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptkit.evaluation.statistics import Interval
from ptkit.metrics.metric import Metric, Statistics


@dataclass(frozen=True)
class Difference:
    """A method's mean score minus a baseline's, in points of the metric.

    interval: 95 %; its `n_seeds` is the smaller of the two sides, its `std` None
    p_value: two-sided; never below 1 / (resamples + 1). Correct several with `holm`.
    """

    interval: Interval
    p_value: float


def paired_difference(
    metric: Metric,
    method: Sequence[Statistics],
    baseline: Sequence[Statistics],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Paired bootstrap test of `method` against `baseline` on the same examples.

    method, baseline: one `[examples, k]` array per seed, the same examples in the same order; the
        sides may have different numbers of seeds. Each replicate draws examples once for all
        arrays, because all were tested on them. It draws seeds on each side separately, because
        seed 0 of one method has nothing in common with seed 0 of another. A side with one seed does
        not show how far its seeds differ. With two or three the interval is too narrow for it.

    The interval holds the percentiles of the replicates. The p value is the share of replicates
    that lie as far from their own mean as the observed difference lies from zero. (Koehn 2004;
    Efron & Tibshirani 1993, ch. 16.) Raises ValueError when the sides have different examples.
    """
    sizes = {len(rows) for rows in (*method, *baseline)}
    if len(sizes) != 1:
        raise ValueError(f"expected the same examples on both sides, found {sorted(sizes)} rows")
    examples = sizes.pop()
    observed = _mean(metric, method) - _mean(metric, baseline)
    generator = np.random.default_rng(seed)
    replicates = np.empty(resamples)
    for i in range(resamples):
        rows = generator.integers(examples, size=examples)
        replicates[i] = _redrawn(metric, method, rows, generator) - _redrawn(
            metric, baseline, rows, generator
        )
    low, high = np.percentile(replicates, [2.5, 97.5])
    # `>=`, up to rounding: two equal systems differ by zero everywhere, and their p is 1.
    beyond = np.abs(replicates - replicates.mean()) >= abs(observed) - 1e-9
    interval = Interval(
        mean=observed,
        low=min(float(low), observed),
        high=max(float(high), observed),
        std=None,
        n_seeds=min(len(method), len(baseline)),
        n_examples=examples,
    )
    return Difference(interval, (int(beyond.sum()) + 1) / (resamples + 1))


def share_of_way(
    metric: Metric,
    method: Sequence[Statistics],
    start: Sequence[Statistics],
    end: Sequence[Statistics],
    *,
    resamples: int,
    seed: int,
) -> Interval | None:
    """How far `method` gets from `start` to `end`: (method - start) / (end - start) of their mean
    scores, 1 being all the way. None where start and end are one.

    Arguments and replicates are those of `paired_difference`: examples are drawn once for all
    arrays, seeds on each side separately. The interval holds the percentiles of their ratios.
    """
    way = _mean(metric, end) - _mean(metric, start)
    if not way:
        return None
    examples = len(method[0])
    generator = np.random.default_rng(seed)
    replicates = []
    for _ in range(resamples):
        rows = generator.integers(examples, size=examples)
        own, low, high = (_redrawn(metric, side, rows, generator) for side in (method, start, end))
        if high != low:
            replicates.append((own - low) / (high - low))
    observed = (_mean(metric, method) - _mean(metric, start)) / way
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Interval(
        observed, min(float(low), observed), max(float(high), observed), None,
        min(map(len, (method, start, end))), examples,
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being looked at together, in the order given (Holm 1979).

    Calling those below 0.05 different errs anywhere in the family with at most 5 %.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        # A larger p value may not become the smaller one by having the smaller factor.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _mean(metric: Metric, per_seed: Sequence[Statistics]) -> float:
    return float(np.mean([metric.score(rows) for rows in per_seed]))


def _redrawn(
    metric: Metric,
    per_seed: Sequence[Statistics],
    rows: npt.NDArray[np.int64],
    generator: np.random.Generator,
) -> float:
    """Mean score on the examples `rows` of as many seeds, drawn with replacement."""
    draw = generator.integers(len(per_seed), size=len(per_seed))
    seeds, times = np.unique(draw, return_counts=True)
    scores = [metric.score(per_seed[s][rows]) for s in seeds]
    return float(np.average(scores, weights=times))
