"""Metrics of labels, of a whole input or of its words, as scikit-learn and seqeval have them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ptkit.evaluation.metric import Details, Metric, Statistics
from ptkit.evaluation.scope import UNREAD, entity_scheme
from ptkit.extras import extra


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
        return 100.0 * _macro_averaged(self.name, counts.reshape(labels, labels))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "as scikit-learn's, 0 where nothing is divided by nothing"


def _macro_averaged(name: str, counts: npt.NDArray[Any], classes: int | None = None) -> float:
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
        return 100.0 * _macro_averaged("macro_f1", counts, classes=labels - 1)

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


class RocAuc(Metric):
    """Area under the ROC curve, one label against the rest, averaged over labels.

    From the ranks (Mann & Whitney 1947): scikit-learn's area, for all labels at once.
    """

    needs: ClassVar[str | None] = "label_scores"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from scipy.stats import rankdata
        self._ranks: Any = rankdata

    def _detailed_rows(
        self, references: Sequence[Sequence[str]], details: Sequence[Details]
    ) -> Statistics:
        labels = sorted(details[0]["label_scores"])
        scores = np.array([[d["label_scores"][label] for label in labels] for d in details])
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        gold = np.array([[labels.index(r[0])] for r in references])
        return np.hstack([gold, shares]).astype(np.float64)

    def score(self, rows: Statistics) -> float:
        gold = rows[:, 0].astype(np.int64)
        # A resample may lack a label; its curve does not exist then.
        present = np.unique(gold)
        if len(present) < 2:
            return 50.0
        ranks = self._ranks(rows[:, 1 + present], axis=0)
        own = gold[:, None] == present
        count = own.sum(axis=0)
        above = (ranks * own).sum(axis=0) - count * (count + 1) / 2
        return 100.0 * float(np.mean(above / (count * (len(gold) - count))))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"one against the rest, macro; ranks by scipy {version('scipy')}"
