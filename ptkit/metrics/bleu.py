"""BLEU, chrF and TER, by sacrebleu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ptkit.extras import extra
from ptkit.metrics.metric import Metric, Statistics
from ptkit.metrics.scope import require_words_at_spaces
from ptkit.metrics.tokenizers import needs_a_tokenizer

NAMES = {"text": ["bleu", "chrf", "ter", "bleu-TOKENIZER"]}


class SacreBleu(Metric):
    """BLEU, chrF and TER by sacrebleu, with its default settings and all references.

    `bleu-zh`, `bleu-char`, ...: BLEU with another of sacrebleu's tokenisers.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from sacrebleu.metrics import BLEU, CHRF, TER

        kind, _, self._tokenizer = name.partition("-")
        options = {"tokenize": self._tokenizer} if self._tokenizer else {}
        with needs_a_tokenizer(name):
            self._library: Any = {"bleu": BLEU, "chrf": CHRF, "ter": TER}[kind](**options)

    def require(self, references: Sequence[Sequence[str]]) -> None:
        if self.name in ("bleu", "ter"):  # words are found at spaces; chrF reads characters
            require_words_at_spaces(self.name, references)

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


class TranslationEditRate(SacreBleu):
    """TER by sacrebleu: edits per 100 words of the reference, so less is better."""

    higher_is_better: ClassVar[bool] = False
    limits: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def score(self, rows: Statistics) -> float:
        # Reference lengths are means over several references, hence not whole.
        return float(self._library._compute_score_from_stats(rows.sum(axis=0).tolist()).score)


def make(name: str) -> Metric:
    """The metric of that name."""
    return TranslationEditRate(name) if name == "ter" else SacreBleu(name)
