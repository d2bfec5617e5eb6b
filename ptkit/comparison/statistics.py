"""Is one method better than another? Paired differences, and p values for several at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ptkit.evaluation.statistics import Contrast, Interval, Resampled


@dataclass(frozen=True)
class Difference:
    """A method's mean score minus a baseline's, in points of the metric.

    interval: 95 %, of this difference alone; its `n_seeds` is the smaller of the two sides, its
        `std` None
    p_value: two-sided, of this difference alone; 1 with one row, which has no interval either
    corrected: the same, corrected for all differences that are shown together (see `in_family`)
    """

    interval: Interval
    p_value: float
    corrected: float


def paired_difference(method: Resampled, baseline: Resampled) -> Difference:
    """`method` minus `baseline`, on the same examples and draws of them, with a p value.

    The sides may have different numbers of seeds. Seed 0 of one method has nothing in common with
    seed 0 of another. A side with one seed does not show how far its seeds differ. (Koehn 2004;
    Welch 1947.) Raises ValueError when the sides have different examples.
    """
    if method.n_examples != baseline.n_examples:
        sizes = sorted((method.n_examples, baseline.n_examples))
        raise ValueError(f"expected the same examples on both sides, found {sizes} rows")
    contrast = Contrast((1.0, method), (-1.0, baseline))
    seeds = min(method.seeds, baseline.seeds)
    low, high = contrast.bounds()
    interval = Interval(contrast.estimate, low, high, None, seeds, method.n_examples)
    p_value = contrast.p_value()
    return Difference(interval, p_value, p_value)


def in_family(differences: Iterable[Difference]) -> list[Difference]:
    """`differences` with p values corrected for each other: they are shown together."""
    own = list(differences)
    adjusted = holm([difference.p_value for difference in own])
    return [replace(d, corrected=p) for d, p in zip(own, adjusted, strict=True)]


def share_of_way(method: Resampled, start: Resampled, end: Resampled) -> Interval | None:
    """How far `method` gets from `start` to `end`: (method - start) / (end - start) of their mean
    scores, 1 being all the way. None where start and end are one.

    The interval holds every share that the scores do not rule out (Fieller 1954). It is unbounded
    where the two ends do not differ by more than chance. With one row there is none.
    """
    way = Contrast((1.0, end), (-1.0, start))
    if not way.estimate:
        return None

    def possible(share: float) -> bool:
        return Contrast((1.0, method), (share - 1, start), (-share, end)).holds_zero()

    observed = (method.mean - start.mean) / way.estimate
    seeds = min(own.seeds for own in (method, start, end))
    if method.n_examples < 2:
        return Interval(observed, None, None, None, seeds, method.n_examples)
    low, high = -math.inf, math.inf
    if not way.holds_zero():
        low, high = _edge(possible, observed, -1.0), _edge(possible, observed, 1.0)
    return Interval(observed, low, high, None, seeds, method.n_examples)


def _edge(possible: Callable[[float], bool], inside: float, towards: float) -> float:
    """The end of the values for which `possible` holds, from `inside` on in one direction."""
    step = 1 / 16
    while possible(inside + step * towards):
        step *= 2
        if step > 1e6:
            return math.inf * towards
    near, far = 0.0, step
    while far - near > 1e-4:
        middle = (near + far) / 2
        near, far = (middle, far) if possible(inside + middle * towards) else (near, middle)
    return inside + near * towards


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
