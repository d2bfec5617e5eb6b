"""Metrics as the field's libraries have them: sacrebleu, rouge-score, scikit-learn; or your own.

Each metric first turns every example into a row of statistics, then scores any set of rows.
Scoring all rows gives the library's own corpus value; a bootstrap re-scores resampled rows
without tokenising anything again.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from ptkit.errors import UserError, did_you_mean
from ptkit.evaluation.scope import (
    UNREAD,
    entity_scheme,
    require_english_letters,
    require_words_at_spaces,
)
from ptkit.plugins import brought, loaded, origin
from ptkit.recipe.schema import TOKENIZED, TOKENIZERS

Statistics = npt.NDArray[np.float64]


#: What a prediction carries beside its text, where a metric asks for it (see `Metric.needs`).
Details = Mapping[str, Any]


@contextmanager
def _needs_a_tokenizer(name: str) -> Iterator[None]:
    """Tokenisers of some languages are packages, or files to fetch, of their own."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tokeniser of `{name}` is not there: {reason}") from error


class Metric(ABC):
    """A score of predictions against references, in 0..100 unless its class says otherwise."""

    #: Whether more is better.
    higher_is_better: ClassVar[bool] = True
    #: The detail of a prediction it needs: `label_scores` (label -> log-probability) or `nats`
    #: (of the target, with `tokens`); None for those that read texts alone.
    needs: ClassVar[str | None] = None

    def __init__(self, name: str) -> None:
        self.name = name

    def statistics(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        details: Sequence[Details] = (),
    ) -> Statistics:
        """One row per example, `[examples, k]`; k depends on the metric.

        details: one per prediction, for metrics that need them

        Raises ValueError without predictions, when the lengths differ, and for an example without a
        reference. The libraries would score the rows that are left, or return NaN.
        """
        if not predictions or len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions and {len(references)} lists of references; "
                "expected equally many, at least one"
            )
        for number, row in enumerate(references, start=1):
            if isinstance(row, str) or not row:
                raise ValueError(f"example {number}: expected a list of references, found {row!r}")
        self.require(references)
        if self.needs is not None:
            if len(details) != len(predictions) or any(self.needs not in d for d in details):
                raise ValueError(f"`{self.name}` needs the `{self.needs}` of every prediction")
            return self._detailed_rows(references, details)
        return self._rows(predictions, references)

    def require(self, references: Sequence[Sequence[str]]) -> None:  # noqa: B027
        """Raise UserError for references that the metric cannot judge by, with what can.

        Needs no prediction, so that a run learns it before it trains.
        """

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        """`statistics` of checked texts."""
        raise NotImplementedError

    def _detailed_rows(
        self, references: Sequence[Sequence[str]], details: Sequence[Details]
    ) -> Statistics:
        """`statistics` of checked details."""
        raise NotImplementedError

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
    """BLEU, chrF and TER by sacrebleu, with its default settings and all references.

    `bleu-zh`, `bleu-char`, ...: BLEU with another of sacrebleu's tokenisers.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
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
    """ROUGE F1 by rouge-score; the best reference counts.

    By default words are runs of `a-z` and `0-9`, stemmed: English. `rougeL-char`, `rouge1-zh`, ...
    read the tokens of sacrebleu's tokeniser of that name, in lower case.

    `rougeL` takes a text as one sequence. `rougeLsum` takes each line for a sentence and joins what
    is common to them. Papers report it of summaries of several sentences.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from rouge_score.rouge_scorer import RougeScorer

        self._kind, _, self._tokenizer = name.partition("-")
        with _needs_a_tokenizer(name):
            own = _SacreBleuTokens(self._tokenizer) if self._tokenizer else None
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

    def __init__(self, name: str) -> None:
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

    def require(self, references: Sequence[Sequence[str]]) -> None:
        entity_scheme(label for row in references for label in row[0].split())

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        from seqeval.metrics.sequence_labeling import get_entities
        from seqeval.scheme import BILOU, IOBES, Entities

        scheme = entity_scheme(label for row in references for label in row[0].split())

        def spans(labels: str) -> set[Any]:
            known = ["O" if label == UNREAD else label for label in labels.split()]
            if scheme == "IOB":
                return set(get_entities(known))
            strict = {"IOBES": IOBES, "BILOU": BILOU}[scheme]
            return {entity.to_tuple() for entity in Entities([known], strict).entities[0]}

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
        ranks = rankdata(rows[:, 1 + present], axis=0)
        own = gold[:, None] == present
        count = own.sum(axis=0)
        above = (ranks * own).sum(axis=0) - count * (count + 1) / 2
        return 100.0 * float(np.mean(above / (count * (len(gold) - count))))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"one against the rest, macro; ranks by scipy {version('scipy')}"


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
