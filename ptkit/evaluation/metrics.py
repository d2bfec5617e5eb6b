"""Metrics as the field's libraries have them: sacrebleu, rouge-score, scikit-learn; or your own.

Each metric first turns every example into a row of statistics, then scores any set of rows.
Scoring all rows gives the library's own corpus value; a bootstrap re-scores resampled rows
without tokenising anything again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np

from ptkit.errors import UserError, did_you_mean
from ptkit.evaluation.label_metrics import EntityF1, LabelMetric, RocAuc, WordLabels
from ptkit.evaluation.metric import Details, MeanOverExamples, Metric, Statistics
from ptkit.evaluation.text_metrics import ExactMatch, Meteor, Rouge, SacreBleu, TranslationEditRate
from ptkit.plugins import brought, loaded, origin
from ptkit.recipe.tasks import TOKENIZED, TOKENIZERS


class OwnMetric(MeanOverExamples):
    """A function of yours, `module:function`: (prediction, references) -> a number, more is better.

    The score is the mean over examples, as it comes: it is not multiplied by 100.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        module, _, function = name.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules of the current folder, as `python -m` finds them
        try:
            self._function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"the metric `{name}` cannot be imported: {error}") from error

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(self._function(prediction, list(references)))

    def score(self, rows: Statistics) -> float:
        return float(rows.mean())

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"mean of {self.name}"


class BroughtMetric(OwnMetric):
    """Such a function that another package brings under a name (see `ptkit.plugins`)."""

    def __init__(self, name: str, entry: EntryPoint) -> None:
        MeanOverExamples.__init__(self, name)
        self._function, self._origin = loaded(entry), origin(entry)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"mean of {self.name}, {self._origin}"


class Perplexity(Metric):
    """exp of the cross-entropy per token of the target after the input; less is better."""

    higher_is_better: ClassVar[bool] = False
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


METRICS: dict[str, type[Metric]] = {
    "bleu": SacreBleu,
    "chrf": SacreBleu,
    "ter": TranslationEditRate,
    "rouge1": Rouge,
    "rouge2": Rouge,
    "rougeL": Rouge,
    "rougeLsum": Rouge,
    "meteor": Meteor,
    "exact_match": ExactMatch,
    "accuracy": LabelMetric,
    "macro_f1": LabelMetric,
    "macro_precision": LabelMetric,
    "macro_recall": LabelMetric,
    "roc_auc": RocAuc,
    "word_accuracy": WordLabels,
    "word_macro_f1": WordLabels,
    "entity_f1": EntityF1,
    "perplexity": Perplexity,
}
METRICS |= {f"{name}-{tokenizer}": METRICS[name] for name in TOKENIZED for tokenizer in TOKENIZERS}


def metric(name: str) -> Metric:
    """The metric called `name`, of ptkit's own or brought by another package, or your own,
    `module:function`. Raises UserError for none of them."""
    if ":" in name:
        return OwnMetric(name)
    if name in METRICS:
        return METRICS[name](name)
    others = brought("ptkit.metrics")
    if name not in others:
        raise UserError(f"no metric `{name}`; {did_you_mean(name, (*METRICS, *others))}")
    return BroughtMetric(name, others[name])
