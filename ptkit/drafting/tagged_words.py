"""Columns that hold the words of sentences, and a label for each word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice

from ptkit.data.table import Table
from ptkit.drafting.columns import MOST_LABELS, Column

#: Names of the labels' column, where several columns may hold them.
_TAGS = re.compile(r"(ner|pos|chunk|upos|xpos)?_?(tag|label)s?$|ner$|pos$", re.IGNORECASE)
#: Rows whose lists are compared.
_ROWS = 200


def _spaced(values: set[str]) -> int:
    """How many of `values` are not one word."""
    return sum(re.fullmatch(r"\S+", value) is None for value in values)


def tagged_words(
    table: Table,
    columns: Mapping[str, Column],
    words: str | None = None,
    tags: str | None = None,
) -> tuple[Column, Column] | None:
    """The column of words and that of their labels, or None where no two columns are those.

    words, tags: the columns that were named

    Both hold lists, as long as each other in every row, and labels are few and without spaces.
    """
    lists = [c for c in columns.values() if c.kind in ("words", "texts")]
    if len(lists) < 2:
        return None
    rows = [*islice(table.only([c.name for c in lists]), _ROWS)]
    different = {c.name: {str(value) for row in rows for value in row[c.name] or ()} for c in lists}
    able = [
        (own, labels)
        for own in lists for labels in lists
        if own is not labels
        and words in (None, own.name) and tags in (None, labels.name)
        and len(different[labels.name]) <= min(MOST_LABELS, len(different[own.name]))
        and 2 * len(different[labels.name]) <= sum(len(row[labels.name] or ()) for row in rows)
        and not _spaced(different[labels.name])
        and 10 * _spaced(different[own.name]) <= len(different[own.name])
        and all(len(row[own.name] or ()) == len(row[labels.name] or ()) for row in rows)
    ]  # fmt: skip
    named = [pair for pair in able if _TAGS.match(pair[1].name)] or able
    # Of two columns of words with the same labels, the one with more different values is read.
    return max(named, key=lambda pair: len(different[pair[0].name]), default=None)
