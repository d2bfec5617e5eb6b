"""Labels of words, as scikit-learn and seqeval have them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from ptkit.extras import extra
from ptkit.metrics.labels import macro_averaged
from ptkit.metrics.metric import Metric, Statistics
from ptkit.metrics.scope import UNREAD, entity_scheme

NAMES = {"words": ["word_accuracy", "word_macro_f1", "entity_f1"]}


class WordLabels(Metric):
    """Accuracy and macro-averaged F1 over all words, as scikit-learn has them.

    Predictions and references are labels of all words of an example with spaces between. A word
    the model has not read (`UNREAD`) is wrong, and is no class of its own.
    """

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        pairs = [(p.split(), r[0].split()) for p, r in zip(predictions, references, strict=True)]
        labels = {w for p, g in pairs for w in p + g} - {UNREAD}
        index = {label: i for i, label in enumerate([*sorted(labels), UNREAD])}
        counts = np.zeros((len(pairs), len(index), len(index)))  # [example, gold, predicted]
        for row, (predicted, gold) in enumerate(pairs):
            if len(predicted) != len(gold):
                raise ValueError(
                    f"example {row + 1}: {len(predicted)} labels for {len(gold)} words"
                )
            for p, g in zip(predicted, gold, strict=True):
                counts[row, index[g], index[p]] += 1
        return counts.reshape(len(pairs), -1)

    def score(self, rows: Statistics) -> float:
        labels = round(rows.shape[1] ** 0.5)
        counts = rows.sum(axis=0).reshape(labels, labels)
        if self.name == "word_accuracy":
            return 100.0 * float(counts.trace() / counts.sum())
        return 100.0 * macro_averaged("macro_f1", counts, classes=labels - 1)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "as scikit-learn's, over words"


class EntityF1(Metric):
    """F1 over entities, whole spans of one type, by seqeval.

    The scheme is that of the references. `B-`, `I-`, `O`: as CoNLL's own script reads them, which
    takes an `I-` after another type for a beginning. With `E-`, `S-` (IOBES) or `L-`, `U-` (BILOU)
    strictly: a span that is not closed is no entity.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from seqeval.metrics.sequence_labeling import get_entities
            from seqeval.scheme import BILOU, IOBES, Entities
        self._lenient, self._strict = get_entities, Entities
        self._schemes = {"IOBES": IOBES, "BILOU": BILOU}

    def require(self, references: Sequence[Sequence[str]]) -> None:
        entity_scheme(label for row in references for label in row[0].split())

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        scheme = entity_scheme(label for row in references for label in row[0].split())

        def spans(labels: str) -> set[Any]:
            known = ["O" if label == UNREAD else label for label in labels.split()]
            if scheme == "IOB":
                return set(self._lenient(known))
            strict = self._strict([known], self._schemes[scheme])
            return {entity.to_tuple() for entity in strict.entities[0]}

        rows = []
        for prediction, reference in zip(predictions, references, strict=True):
            found, gold = spans(prediction), spans(reference[0])
            rows.append((len(found & gold), len(found), len(gold)))
        return np.asarray(rows, dtype=np.float64)

    def score(self, rows: Statistics) -> float:
        right, found, gold = rows.sum(axis=0)
        return 100.0 * float(2 * right / (found + gold)) if found + gold else 0.0

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        scheme = entity_scheme(label for row in references for label in row[0].split())
        how = "as seqeval reads them by default" if scheme == "IOB" else f"strict {scheme}"
        return f"seqeval {version('seqeval')}, micro, entities {how}"


def make(name: str) -> Metric:
    """The metric of that name."""
    return EntityF1(name) if name == "entity_f1" else WordLabels(name)
