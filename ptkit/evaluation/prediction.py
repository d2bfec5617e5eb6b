"""A test row with what the model made of it, as files keep it and metrics read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptkit.metrics.metric import Metric, Statistics


@dataclass(frozen=True)
class Prediction:
    """One test row and what the model made of it.

    prediction, references: generated text and the acceptable texts; for classification, labels;
        for token classification the labels of all words, with spaces between. For pairs they are
        the answer that the adapter prefers, and the chosen one
    details: what metrics ask for beside the text (`Metric.needs`)
    """

    input: str
    prediction: str
    references: tuple[str, ...]
    label: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as written to `predictions.jsonl`."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Prediction:
        """The row as read from `predictions.jsonl`."""
        return cls(**{**row, "references": tuple(row["references"])})


def statistics_of(measure: Metric, rows: Sequence[Prediction]) -> Statistics:
    """What `measure` makes of predictions, one row per example (see `Metric.statistics`)."""
    return measure.statistics(
        [r.prediction for r in rows], [r.references for r in rows], [r.details for r in rows]
    )
