"""Metrics, computed by the field's libraries: sacrebleu, rouge-score, scikit-learn.

Each metric first turns every example into a row of statistics, then scores any set of rows.
Scoring all rows gives the library's own corpus value; a bootstrap re-scores resampled rows
without tokenising anything again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from ptkit.errors import UserError, did_you_mean

Statistics = npt.NDArray[np.float64]


class Metric(ABC):
    """A score of predictions against references, in 0..100, higher is better."""

    def __init__(self, name: str) -> None:
        self.name = name

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Statistics:
        """One row per example, `[examples, k]`; k depends on the metric.

        Raises ValueError without predictions, when the lengths differ, and for an example
        without a reference: the libraries would score the rows that are left, or return NaN.
        """
        if not predictions or len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions and {len(references)} lists of references; "
                "expected equally many, at least one"
            )
        for number, row in enumerate(references, start=1):
            if isinstance(row, str) or not row:
                raise ValueError(f"example {number}: expected a list of references, found {row!r}")
        return self._rows(predictions, references)

    @abstractmethod
    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        """`statistics` of checked input."""

    @abstractmethod
    def signature(self, references: Sequence[Sequence[str]]) -> str:
        """Library, version and settings behind the figure, so that another can repeat it."""

    @abstractmethod
    def score(self, rows: Statistics) -> float:
        """The corpus value of `rows` `[any number, k]`."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The corpus value of `predictions`."""
        return self.score(self.statistics(predictions, references))


class SacreBleu(Metric):
    """BLEU and chrF by sacrebleu, with its default settings and all references."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from sacrebleu.metrics import BLEU, CHRF

        self._library: Any = {"bleu": BLEU, "chrf": CHRF}[name]()

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        # sacrebleu wants one list per reference position; None where an example has fewer.
        most = max(map(len, references))
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
        rows = self._library._extract_corpus_statistics(predictions, streams)
        return np.asarray(rows, dtype=np.float64)

    def score(self, rows: Statistics) -> float:
        totals = rows.sum(axis=0).astype(np.int64).tolist()
        return float(self._library._compute_score_from_stats(totals).score)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        # sacrebleu notes the number of references while scoring: -1 where it varies.
        counts = {len(row) for row in references}
        self._library.num_refs = counts.pop() if len(counts) == 1 else -1
        return f"sacrebleu {self._library.get_signature()}"


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


class Rouge(MeanOverExamples):
    """ROUGE F1 by rouge-score (stemmed); the best reference counts."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from rouge_score.rouge_scorer import RougeScorer

        self._library = RougeScorer([name], use_stemmer=True)

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(self._library.score_multi(list(references), prediction)[self.name].fmeasure)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"rouge-score {version('rouge-score')}, F1, stemmed, best reference"


class ExactMatch(MeanOverExamples):
    """Share of predictions equal to one of their references, spaces at the ends aside."""

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(prediction.strip() in {reference.strip() for reference in references})

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "equal to a reference, case and inner spaces included"


class LabelMetric(Metric):
    """Accuracy and macro-averaged F1 of labels, by scikit-learn."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from sklearn.metrics import accuracy_score, f1_score

        self._accuracy, self._f1 = accuracy_score, f1_score

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        gold = [r[0] for r in references]
        index = {label: i for i, label in enumerate(sorted({*gold, *predictions}))}
        pairs = [(index[g], index[p]) for g, p in zip(gold, predictions, strict=True)]
        return np.asarray(pairs, dtype=np.float64)

    def score(self, rows: Statistics) -> float:
        gold, predicted = rows.T.astype(np.int64)
        if self.name == "accuracy":
            return 100.0 * float(self._accuracy(gold, predicted))
        return 100.0 * float(self._f1(gold, predicted, average="macro", zero_division=0))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"scikit-learn {version('scikit-learn')}"


METRICS: dict[str, type[Metric]] = {
    "bleu": SacreBleu,
    "chrf": SacreBleu,
    "rouge1": Rouge,
    "rouge2": Rouge,
    "rougeL": Rouge,
    "exact_match": ExactMatch,
    "accuracy": LabelMetric,
    "macro_f1": LabelMetric,
}


def metric(name: str) -> Metric:
    """The metric called `name`. Raises UserError for an unknown one."""
    if name not in METRICS:
        raise UserError(f"no metric `{name}`; {did_you_mean(name, METRICS)}")
    return METRICS[name](name)
