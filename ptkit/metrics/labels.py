"""Labels of whole inputs, as scikit-learn has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ptkit.metrics.metric import Metric, Statistics

NAMES = {"label": ["accuracy", "macro_f1", "macro_precision", "macro_recall"]}


class LabelMetric(Metric):
    """Accuracy, and macro-averaged F1, precision and recall of labels, as scikit-learn has them."""

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        gold = [r[0] for r in references]
        index = {label: i for i, label in enumerate(sorted({*gold, *predictions}))}
        pairs = [(index[g], index[p]) for g, p in zip(gold, predictions, strict=True)]
        return np.asarray(pairs, dtype=np.float64)

    def score(self, rows: Statistics) -> float:
        gold, predicted = rows.T.astype(np.int64)
        if self.name == "accuracy":
            return 100.0 * float((gold == predicted).mean())
        labels = int(rows.max()) + 1
        counts = np.bincount(gold * labels + predicted, minlength=labels**2)
        return 100.0 * macro_averaged(self.name, counts.reshape(labels, labels))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "as scikit-learn's, 0 where nothing is divided by nothing"


def macro_averaged(name: str, counts: npt.NDArray[Any], classes: int | None = None) -> float:
    """Mean over the labels seen of F1, precision or recall, from counts `[gold, predicted]`.

    classes: only the first so many are labels

    scikit-learn's figures without its checks of the input: a bootstrap asks thousands of times.
    """
    right, gold, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    over = {
        "macro_f1": (gold + predicted) / 2,
        "macro_precision": predicted,
        "macro_recall": gold,
    }[name]
    shares = np.divide(right, over, out=np.zeros(len(right)), where=over > 0)
    seen = (gold + predicted > 0)[:classes]
    return float(shares[:classes][seen].mean())


make = LabelMetric
