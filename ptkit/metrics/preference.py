"""Which of two answers an adapter prefers, and by how much.

The reward of an answer is `beta` times what the adapter adds to its log-probability (Rafailov et
al. 2023, "Direct Preference Optimization", section 4, https://arxiv.org/abs/2305.18290).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ptkit.metrics.metric import Details, Metric, Statistics

NAMES = {"pair": ["preference_accuracy", "reward_margin", "ranking_accuracy"]}


class PairMetric(Metric):
    """A mean over pairs of a margin: the chosen answer's figure minus the rejected one's."""

    #: What the margin is of.
    what: ClassVar[str]

    def _detailed_rows(
        self, references: Sequence[Sequence[str]], details: Sequence[Details]
    ) -> Statistics:
        margins = np.array([float(d[str(self.needs)]) for d in details], dtype=np.float64)
        return self._values(margins)[:, None]

    def _values(self, margins: Statistics) -> Statistics:
        """What is averaged, for `margins` `[pairs]`."""
        return margins

    def score(self, rows: Statistics) -> float:
        return float(rows.mean())

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"of {self.what}"


class RewardMargin(PairMetric):
    """Mean reward of the chosen answers minus that of the rejected ones; TRL's `rewards/margins`.
    0 for the base."""

    needs: ClassVar[str | None] = "reward_margin"
    limits: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    what = "rewards: beta times the log-probability that the adapter adds to an answer"


class _Accuracy(PairMetric):
    """Share of pairs with a margin above zero, in 0..100. A margin of zero counts half: it is a
    toss-up."""

    def _values(self, margins: Statistics) -> Statistics:
        return 50.0 * (1.0 + np.sign(margins))


class PreferenceAccuracy(_Accuracy):
    """Share of pairs whose chosen answer has the higher reward; TRL's `rewards/accuracies`. 50 for
    the base."""

    needs: ClassVar[str | None] = "reward_margin"
    what = "rewards: what the adapter adds to an answer's log-probability; ties count half"


class RankingAccuracy(_Accuracy):
    """Share of pairs whose chosen answer is the likelier one, the base left out of account."""

    needs: ClassVar[str | None] = "log_probability_margin"
    what = "log-probabilities of whole answers, end of text included; ties count half"


_CLASSES: dict[str, type[PairMetric]] = {
    "preference_accuracy": PreferenceAccuracy,
    "reward_margin": RewardMargin,
    "ranking_accuracy": RankingAccuracy,
}


def make(name: str) -> PairMetric:
    """The metric called `name`, one of `NAMES`."""
    return _CLASSES[name](name)
