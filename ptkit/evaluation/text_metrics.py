"""Metrics of texts, by sacrebleu, rouge-score and nltk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from ptkit.errors import UserError
from ptkit.evaluation.metric import MeanOverExamples, Metric, Statistics
from ptkit.evaluation.scope import require_english_letters, require_words_at_spaces
from ptkit.extras import extra


@contextmanager
def _needs_a_tokenizer(name: str) -> Iterator[None]:
    """Tokenisers of some languages are packages, or files to fetch, of their own."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tokeniser of `{name}` is not there: {reason}") from error


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
        with _needs_a_tokenizer(name):
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

    def score(self, rows: Statistics) -> float:
        # Reference lengths are means over several references, hence not whole.
        return float(self._library._compute_score_from_stats(rows.sum(axis=0).tolist()).score)


class Rouge(MeanOverExamples):
    """ROUGE F1 by rouge-score; the best reference counts.

    By default words are runs of `a-z` and `0-9`, stemmed: English. `rougeL-char`, `rouge1-zh`, ...
    read the tokens of sacrebleu's tokeniser of that name, in lower case.

    `rougeL` takes a text as one sequence; `rougeLsum` takes each line for a sentence and joins
    what is common to them, which is what papers report of summaries of several sentences.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from rouge_score.rouge_scorer import RougeScorer

        self._kind, _, self._tokenizer = name.partition("-")
        with _needs_a_tokenizer(name):
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


class Meteor(MeanOverExamples):
    """METEOR by nltk, lower-cased, stemmed, with WordNet's synonyms; the best reference counts.

    Mean over examples (nltk has no corpus value). WordNet is data nltk does not bring along.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with extra("evaluate", f"the metric `{name}`"):
            from nltk.corpus import wordnet
            from nltk.tokenize import wordpunct_tokenize
            from nltk.translate.meteor_score import meteor_score

        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise UserError(
                "`meteor` needs WordNet's data: `python -m nltk.downloader wordnet` fetches them"
            ) from error
        self._score, self._words, self._wordnet = meteor_score, wordpunct_tokenize, wordnet

    def require(self, references: Sequence[Sequence[str]]) -> None:
        require_words_at_spaces(self.name, references)

    def value(self, prediction: str, references: Sequence[str]) -> float:
        tokenised = [self._words(reference) for reference in references]
        words = self._words(prediction)
        return float(self._score(tokenised, words, wordnet=self._wordnet))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"nltk {version('nltk')}, wordpunct tokens, stems and WordNet, best reference"


class ExactMatch(MeanOverExamples):
    """Share of predictions equal to one of their references, spaces at the ends aside."""

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(prediction.strip() in {reference.strip() for reference in references})

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "equal to a reference, case and inner spaces included"
