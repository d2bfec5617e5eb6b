"""What a metric is: rows of statistics, one per example, and the score of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Statistics = npt.NDArray[np.float64]


#: What a prediction carries beside its text, where a metric asks for it (see `Metric.needs`).
Details = Mapping[str, Any]


class Metric(ABC):
    """A score of predictions against references, in 0..100 unless its class says otherwise."""

    #: Whether more is better.
    higher_is_better: ClassVar[bool] = True
    #: The lowest and the highest value there is; what an interval holds beyond them is not shown.
    limits: ClassVar[tuple[float, float]] = (0.0, 100.0)
    #: The detail of a prediction it needs: `label_scores` (label -> log-probability) or `nats`
    #: (of the target, with `tokens`); None for those that read texts alone.
    needs: ClassVar[str | None] = None

    def __init__(self, name: str) -> None:
        self.name = name

    def statistics(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        details: Sequence[Details] = (),
    ) -> Statistics:
        """One row per example, `[examples, k]`; k depends on the metric.

        details: one per prediction, for metrics that need them

        Raises ValueError without predictions, when the lengths differ, and for an example
        without a reference. The libraries would score the rows that are left, or return NaN.
        """
        if not predictions or len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions and {len(references)} lists of references; "
                "expected equally many, at least one"
            )
        for number, row in enumerate(references, start=1):
            if isinstance(row, str) or not row:
                raise ValueError(f"example {number}: expected a list of references, found {row!r}")
        self.require(references)
        if self.needs is not None:
            if len(details) != len(predictions) or any(self.needs not in d for d in details):
                raise ValueError(f"`{self.name}` needs the `{self.needs}` of every prediction")
            return self._detailed_rows(references, details)
        return self._rows(predictions, references)

    def require(self, references: Sequence[Sequence[str]]) -> None:  # noqa: B027
        """Raise UserError for references that the metric cannot judge by, with what can.

        Needs no prediction, so that a run learns it before it trains.
        """

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        """`statistics` of checked texts."""
        raise NotImplementedError

    def _detailed_rows(
        self, references: Sequence[Sequence[str]], details: Sequence[Details]
    ) -> Statistics:
        """`statistics` of checked details."""
        raise NotImplementedError

    @abstractmethod
    def signature(self, references: Sequence[Sequence[str]]) -> str:
        """Library, version and settings behind the figure, so that another can repeat it."""

    @abstractmethod
    def score(self, rows: Statistics) -> float:
        """The corpus value of `rows` `[any number, k]`."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The corpus value of `predictions`."""
        return self.score(self.statistics(predictions, references))


class MeanOverExamples(Metric):
    """A metric whose corpus value is the mean of its values per example."""

    @abstractmethod
    def value(self, prediction: str, references: Sequence[str]) -> float:
        """The value of one example, in 0..1."""

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        values = [self.value(p, r) for p, r in zip(predictions, references, strict=True)]
        return np.asarray(values, dtype=np.float64)[:, None]

    def score(self, rows: Statistics) -> float:
        return 100.0 * float(rows.mean())
