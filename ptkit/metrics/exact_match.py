"""Equal texts."""

from __future__ import annotations

from collections.abc import Sequence

from ptkit.metrics.metric import MeanOverExamples

NAMES = {"text": ["exact_match"]}


class ExactMatch(MeanOverExamples):
    """Share of predictions equal to one of their references, spaces at the ends aside."""

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(prediction.strip() in {reference.strip() for reference in references})

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "equal to a reference, case and inner spaces included"


make = ExactMatch
