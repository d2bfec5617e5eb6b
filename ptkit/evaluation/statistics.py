"""Intervals and p values: no figure without its n, its seeds and how far it may be off.

A run with another seed and other test rows would have another score. Few seeds are trained, so what
seeds add to the error follows Student's t. Rows are many, so what they add is resampled (Efron &
Tibshirani 1993, ch. 8, 13). The two are put together as margins of independent sources are (Howe
1974; Zou & Donner 2008): the square root of the sum of their squares.

The same rows are tested with every seed. So the spread between seeds already holds what is due to
single rows under single seeds. That part is taken out of the spread over rows: it counts once.
One row says nothing of other rows: with one there is no interval, and no p value below 1.
`scripts/simulate_intervals.py` measures how often these intervals hold the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ptkit.extras import extra
from ptkit.formats.figures import RecordedScore, bracketed
from ptkit.metrics.metric import Statistics

Values = npt.NDArray[np.float64]

#: The share of cases in which an interval may miss the truth.
MISSES = 0.05


class Scores(Protocol):
    """What makes one figure of any set of rows: a metric, say."""

    def score(self, rows: Statistics) -> float:
        """The figure of `rows` `[any number, k]`."""
        ...


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval.

    low, high: None where nothing can be said (one row, a single value); std: over seeds, None for
        one
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    n_seeds: int
    n_examples: int | None = None

    @property
    def recorded(self) -> RecordedScore:
        """The figure as an adapter's record states it."""
        return RecordedScore(value=self.mean, low=self.low, high=self.high)

    def written(self, form: str) -> str:
        """The mean, and the interval where there is one."""
        return f"{self.mean:{form}}{bracketed(self.low, self.high, form)}"

    def within(self, low: float, high: float) -> Interval:
        """This interval without what lies outside the values that a figure can have."""
        below = None if self.low is None else max(low, self.low)
        above = None if self.high is None else min(high, self.high)
        return replace(self, low=below, high=above)


@dataclass(frozen=True)
class Resampled:
    """The scores of one method.

    observed: of every seed, on all rows, `[seeds]`
    replicates: of every seed, on rows drawn with replacement, `[resamples, seeds]`
    n_examples: how many rows there are
    """

    observed: Values
    replicates: Values
    n_examples: int

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len(self.observed)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.observed.mean())

    @property
    def std(self) -> float | None:
        """Over seeds; None for one."""
        return float(self.observed.std(ddof=1)) if self.seeds > 1 else None

    @cached_property
    def of_rows_under_seeds(self) -> float:
        """The variance of a score that is due to single rows under single seeds; 0 for one seed.

        It is how much seeds differ in what a draw of rows does to them.
        """
        if self.seeds == 1:
            return 0.0
        moved = self.replicates - self.replicates.mean(axis=0)
        return float(moved.var(axis=1, ddof=1).mean())


def resample(
    metric: Scores, per_seed: Sequence[Statistics], *, resamples: int, seed: int
) -> Resampled:
    """The scores of one method on all rows, and on rows drawn with replacement.

    per_seed: one `[examples, k]` array per seed, the same examples in the same order

    All seeds share a draw of rows, because they were tested on the same ones. So do all methods
    with as many examples and one `seed`: their differences are paired. Raises ValueError where the
    seeds have different numbers of examples.
    """
    sizes = {len(rows) for rows in per_seed}
    if len(sizes) != 1:
        raise ValueError(f"expected the same examples for all seeds, found {sorted(sizes)} rows")
    examples = sizes.pop()
    generator = np.random.default_rng(seed)
    replicates = np.empty((resamples, len(per_seed)))
    for i in range(resamples):
        drawn = generator.integers(examples, size=examples)
        replicates[i] = [metric.score(rows[drawn]) for rows in per_seed]
    observed = np.array([metric.score(rows) for rows in per_seed], dtype=np.float64)
    return Resampled(observed, replicates, examples)


class Contrast:
    """A weighted sum of methods' mean scores: one score, a difference, or what a ratio rests on.

    parts: (weight, method) pairs; methods were resampled with the same draws
    """

    def __init__(self, *parts: tuple[float, Resampled]) -> None:
        self.estimate = float(sum(weight * own.mean for weight, own in parts))
        self._rows: Values = np.sum([w * own.replicates.mean(axis=1) for w, own in parts], axis=0)
        self._one_row = any(own.n_examples < 2 for _, own in parts)
        several = [(w, own) for w, own in parts if own.seeds > 1]
        self._spread = [
            (w**2 * float(own.observed.var(ddof=1)) / own.seeds, own.seeds - 1)
            for w, own in several
        ]
        twice = sum(w**2 * own.of_rows_under_seeds / own.seeds for w, own in several)
        variance = float(self._rows.var())
        self._left = np.sqrt(max(0.0, 1 - twice / variance)) if variance > 0 else 0.0

    def bounds(self) -> tuple[float, float] | tuple[None, None]:
        """The 95 % interval, None for one row. With one seed it is the percentiles over rows."""
        if self._one_row:
            return None, None
        low, high = np.percentile(self._rows, [100 * MISSES / 2, 100 * (1 - MISSES / 2)])
        seeds = self._margin_of_seeds(np.array([MISSES]))[0]
        # A percentile interval of a skewed score can miss its own estimate by a hair.
        below, above = max(0.0, self.estimate - low), max(0.0, high - self.estimate)
        return (
            self.estimate - float(np.hypot(self._left * below, seeds)),
            self.estimate + float(np.hypot(self._left * above, seeds)),
        )

    def p_value(self) -> float:
        """Two-sided p value of "it is zero": (b + 1) / (resamples + 1).

        b counts the resamples whose distance from their mean reaches the estimate. Each distance is
        put together with what Student's t says of seeds at the same level. So it is never below
        what the resamples can tell. One row rules nothing out: 1.
        """
        if self._one_row:
            return 1.0
        count = len(self._rows)
        apart = self._left * np.sort(np.abs(self._rows - self._rows.mean()))[::-1]
        levels = np.arange(1, count + 1) / (count + 1)
        reach = np.hypot(apart, self._margin_of_seeds(levels))
        # `>=`, up to rounding: two equal systems differ by zero everywhere, and their p is 1.
        return (int((reach >= abs(self.estimate) - 1e-9).sum()) + 1) / (count + 1)

    def holds_zero(self) -> bool:
        """Whether zero is within the interval; for one row it may be."""
        low, high = self.bounds()
        return low is None or high is None or low <= 0 <= high

    def _margin_of_seeds(self, levels: Values) -> Values:
        """How far the seeds at hand may be from all seeds, at most, but for a share of `levels`.

        Methods with equally many seeds share Welch's degrees of freedom, rounded down. With unequal
        numbers Welch's are too many where the method with fewer seeds varies more; there each
        method's margin stands alone.
        """
        total = sum(variance for variance, _ in self._spread)
        if not total:
            return np.zeros(len(levels))
        spread = self._spread
        if len({freedom for _, freedom in spread}) == 1:
            welch = total**2 / sum(variance**2 / freedom for variance, freedom in spread)
            spread = [(total, max(1, int(welch + 1e-9)))]
        return np.sqrt(
            sum(_student_t(levels, freedom) ** 2 * variance for variance, freedom in spread)
        )


def mean_interval(found: Resampled) -> Interval:
    """The mean over seeds with its 95 % interval."""
    low, high = Contrast((1.0, found)).bounds()
    return Interval(found.mean, low, high, found.std, found.seeds, found.n_examples)


def bootstrap_interval(
    metric: Scores, per_seed: Sequence[Statistics], *, resamples: int, seed: int
) -> Interval:
    """95 % interval of the mean over seeds of the corpus score; the arguments of `resample`.

    With one seed it is a percentile bootstrap over rows alone.
    """
    return mean_interval(resample(metric, per_seed, resamples=resamples, seed=seed))


def seeds_interval(values: Sequence[float]) -> Interval:
    """95 % Student-t interval of the mean of one value per seed; no bounds for a single seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, None, count)
    std = float(np.std(values, ddof=1))
    half = float(_student_t(np.array([MISSES]), count - 1)[0] * std / np.sqrt(count))
    return Interval(mean, mean - half, mean + half, std, count)


def _student_t(levels: Values, freedom: int) -> Values:
    """What Student's t is beyond, one way or the other, with the probabilities `levels`."""
    with extra("report", "an interval over several seeds"):
        from scipy.special import stdtrit
    return np.asarray(-stdtrit(freedom, levels / 2), dtype=np.float64)
