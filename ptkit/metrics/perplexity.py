"""Perplexity of the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ptkit.metrics.metric import Details, Metric, Statistics

NAMES = {"text": ["perplexity"]}


class Perplexity(Metric):
    """exp of the cross-entropy per token of the target after the input; less is better."""

    higher_is_better: ClassVar[bool] = False
    limits: ClassVar[tuple[float, float]] = (1.0, math.inf)
    needs: ClassVar[str | None] = "nats"

    def _detailed_rows(
        self, references: Sequence[Sequence[str]], details: Sequence[Details]
    ) -> Statistics:
        return np.array([[d["nats"], d["tokens"]] for d in details], dtype=np.float64)

    def score(self, rows: Statistics) -> float:
        nats, tokens = rows.sum(axis=0)
        return float(np.exp(nats / tokens))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "of the target's tokens, end of text included, in this model's vocabulary"


make = Perplexity
