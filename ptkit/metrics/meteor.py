"""METEOR, by nltk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from ptkit.errors import UserError
from ptkit.extras import extra
from ptkit.metrics.metric import MeanOverExamples
from ptkit.metrics.scope import require_words_at_spaces

NAMES = {"text": ["meteor"]}


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


make = Meteor
