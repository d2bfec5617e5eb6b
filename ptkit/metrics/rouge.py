"""ROUGE, by rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ptkit.extras import extra
from ptkit.metrics.metric import MeanOverExamples
from ptkit.metrics.scope import require_english_letters
from ptkit.metrics.tokenizers import needs_a_tokenizer

NAMES = {
    "text": [
        "rouge1", "rouge2", "rougeL", "rougeLsum",
        "rouge1-TOKENIZER", "rouge2-TOKENIZER", "rougeL-TOKENIZER", "rougeLsum-TOKENIZER",
    ]
}  # fmt: skip


class Rouge(MeanOverExamples):
    """ROUGE F1 by rouge-score; the best reference counts.

    By default words are runs of `a-z` and `0-9`, stemmed: English. `rougeL-char`, `rouge1-zh`, ...
    read the tokens of sacrebleu's tokeniser of that name, in lower case.

    `rougeL` takes a text as one sequence. `rougeLsum` takes each line for a sentence and joins
    what is common to them. Papers report it of summaries of several sentences.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from rouge_score.rouge_scorer import RougeScorer

        self._kind, _, self._tokenizer = name.partition("-")
        with needs_a_tokenizer(name):
            own = _SacreBleuTokens(name, self._tokenizer) if self._tokenizer else None
        self._library = RougeScorer([self._kind], use_stemmer=True, tokenizer=own)

    def require(self, references: Sequence[Sequence[str]]) -> None:
        if not self._tokenizer:
            require_english_letters(self.name, references)

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(self._library.score_multi(list(references), prediction)[self._kind].fmeasure)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        words = f"sacrebleu's {self._tokenizer} tokens" if self._tokenizer else "stemmed"
        lines = ", sentences are lines" if self._kind == "rougeLsum" else ""
        return f"rouge-score {version('rouge-score')}, F1, {words}{lines}, best reference"


class _SacreBleuTokens:
    """One of sacrebleu's tokenisers, as rouge-score calls them."""

    def __init__(self, metric: str, name: str) -> None:
        with extra("evaluate", f"the metric `{metric}`"):
            from sacrebleu.metrics import BLEU

        self._library: Any = BLEU(tokenize=name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        return [str(token) for token in self._library(text.lower()).split()]


make = Rouge
