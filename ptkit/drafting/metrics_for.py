"""Which metrics judge the labels or texts of a file."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence

#: Letters of scripts whose words have no spaces between them.
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")
_SUMMARY = re.compile(r"summar|highlight|headline|abstract|title|tldr", re.IGNORECASE)
#: Labels of IOB, IOBES and BILOU.
_ENTITY = re.compile(r"O|[BIESLU]-.+")
#: How many times as frequent as another a label is before accuracy misleads.
_UNEVEN = 3


def label_metrics(counts: Sequence[int]) -> tuple[list[str], str]:
    """Metrics of labels that stand in so many rows each, the score first, and why."""
    if max(counts) > _UNEVEN * min(counts):
        uneven = f"labels are uneven ({min(counts):,} to {max(counts):,} rows each)"
        return ["macro_f1", "accuracy"], f"{uneven}, and macro F1 counts each label the same"
    return ["accuracy", "macro_f1"], "labels have about as many rows each"


def word_metrics(labels: Sequence[str]) -> tuple[list[str], str]:
    """Metrics of words with these labels, the score first, and why."""
    if all(map(_ENTITY.fullmatch, labels)) and any("-" in label for label in labels):
        return ["entity_f1", "word_accuracy"], "labels mark where names begin and end"
    return ["word_macro_f1", "word_accuracy"], "macro F1 counts each label the same"


def text_metrics(texts: Sequence[str], column: str) -> tuple[list[str], str]:
    """Metrics of texts like these from `column`, the score first, and why."""
    if texts and all(map(_is_json, texts)):
        return ["json_equal", "json_valid"], "every target is JSON"
    if sum(bool(_NO_SPACES.search(text)) for text in texts) > len(texts) / 2:
        return ["chrf", "exact_match"], "the script has no spaces, so characters are compared"
    if statistics.median(len(text.split()) for text in texts) <= 3:
        return ["exact_match", "chrf"], "targets are short, so they are right or wrong"
    if _SUMMARY.search(column):
        return ["rougeL", "rouge1"], "ROUGE is the measure of summaries"
    return ["bleu", "chrf"], "BLEU and chrF compare texts with their references"


def _is_json(text: str) -> bool:
    if not text.strip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
