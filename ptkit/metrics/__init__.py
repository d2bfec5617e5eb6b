"""Metrics as the field's libraries have them: sacrebleu, rouge-score, scikit-learn; or your own.

Each metric first turns every example into a row of statistics, then scores any set of rows.
Scoring all rows gives the library's own corpus value; a bootstrap re-scores resampled rows
without tokenising anything again.

A module of this folder that has `NAMES` and `make(name)` is a metric, or several, and is found by
being there. `NAMES` says what is judged: a `text`, the `label` of an input, the labels of its
`words`, a `pair` of answers. It is read from the source, so that reading a recipe loads no library.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from ptkit.declared import declared

Judged = Literal["text", "label", "words", "pair"]

#: Tokenisers of sacrebleu's that stand for `TOKENIZER` in a name, as in `bleu-zh`.
TOKENIZERS = ("zh", "char", "intl", "ja-mecab", "ko-mecab", "flores200")


@cache
def _found() -> dict[str, tuple[str, str]]:
    """Name -> the module that makes it, and what it judges."""
    found = {}
    for module, names in declared(Path(__file__).parent, "NAMES").items():
        for judged, listed in names.items():
            for name in listed:
                for own in TOKENIZERS if "TOKENIZER" in name else ("",):
                    found[name.replace("TOKENIZER", own)] = (module, judged)
    return found


def metric_modules() -> dict[str, str]:
    """The name of every metric, and the module of this folder that makes it."""
    return {name: module for name, (module, _) in _found().items()}


def metric_names(judged: Judged) -> tuple[str, ...]:
    """Metrics that judge texts, labels, labels of words or pairs of answers."""
    return tuple(name for name, (_, what) in _found().items() if what == judged)
