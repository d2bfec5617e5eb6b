"""Areas under the ROC curve of labels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from ptkit.extras import extra
from ptkit.metrics.metric import Details, Metric, Statistics

NAMES = {"label": ["roc_auc"]}


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


make = RocAuc
