"""Timing candidates against each other: interleaved rounds, medians, quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round."""
        return float(np.median(self.seconds))

    def quantile(self, share: float) -> float:
        """The value that `share` of the rounds do not exceed."""
        return float(np.quantile(self.seconds, share))


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C ..., so that a change of the machine's speed
    meets all of them alike.

    warm_up: rounds run first and not counted
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, run in candidates.items():
            elapsed = timed(run)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, work on an accelerator included.

    The garbage collector waits meanwhile, as in the standard library's timeit: it would charge
    one candidate for what another left behind.
    """
    _finish()
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        run()
        _finish()
        return time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slower: Timing, faster: Timing) -> tuple[float, float, float]:
    """How many times `faster` is faster: the median, and quartiles, of the rounds' own ratios."""
    each = np.array(slower.seconds) / np.array(faster.seconds)
    return float(np.median(each)), float(np.quantile(each, 0.25)), float(np.quantile(each, 0.75))
