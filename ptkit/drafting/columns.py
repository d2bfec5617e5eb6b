"""What the columns of a file hold: texts, labels, lists of texts, identifiers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ptkit.data.table import Table

#: `label`: a few short texts that repeat. `texts`: lists of texts. `words`: lists of single words.
#: `identifier`: a number, a date or an address of each row. `nested`: mappings. `constant`: the
#: same in all rows. `empty`: nothing.
Kind = Literal["text", "label", "texts", "words", "identifier", "nested", "constant", "empty"]

#: Rows that are looked at.
MOST_ROWS = 5_000
#: More different values than these are no labels.
MOST_LABELS = 50
_LABEL_WORDS = 5
_LABEL_LETTERS = 60
#: Numbers, dates, times, addresses and hexadecimal keys.
_CODE = re.compile(
    r"[-+]?[\d.,]+|\d{4}-\d\d-\d\d([T ][\d:.+Z-]+)?|[\d:/.]+|https?://\S+|(?=\S*\d)[0-9a-fA-F-]{8,}"
)
_CODE_NAME = re.compile(r"(^|.*[_\s-])(id|uuid|idx|index|url|date|time|timestamp|hash)$|.*Id$")


@dataclass(frozen=True)
class Column:
    """One column, by the rows that were looked at.

    filled: rows with a value; values: the different ones of a label column, the most frequent first
    words: median of words in a text
    """

    name: str
    kind: Kind
    filled: int
    words: float = 0
    values: tuple[str, ...] = ()

    @property
    def nameable(self) -> bool:
        """Whether a template can name it: braces and signs of formats are no part of a name."""
        return not re.search(r"[{}:!]", self.name) and bool(self.name.strip())

    def __str__(self) -> str:
        """For people: `text (texts of 12 words)`."""
        told = {
            "text": f"texts of about {self.words:g} words",
            "label": f"{len(self.values)} labels",
            "texts": "lists of texts", "words": "lists of words", "identifier": "identifiers",
            "nested": "mappings", "constant": "one value in all rows", "empty": "nothing",
        }[self.kind]  # fmt: skip
        return f"`{self.name}` ({told})"


def columns_of(table: Table) -> list[Column]:
    """The columns of `table`, in its order."""
    return [_column(name, table) for name in table.columns]


def names_like_values(columns: Sequence[Column]) -> list[str]:
    """Names of columns that look like values: texts, or one of the labels below them. The file has
    no line of names then, and its first row is taken for it."""
    return [
        c.name for c in columns
        if len(c.name.split()) > _LABEL_WORDS or (c.kind == "label" and c.name in c.values)
    ]  # fmt: skip


def listed_columns(columns: Sequence[Column]) -> str:
    """The columns for an error message."""
    return ", ".join(map(str, columns))


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _column(name: str, table: Table) -> Column:
    rows = islice(table.only([name]), MOST_ROWS)
    values = [value for row in rows if not _empty(value := row[name])]
    filled = len(values)
    if not values:
        return Column(name, "empty", 0)
    if all(isinstance(value, list) for value in values):
        entries = [entry for value in values for entry in value if entry is not None]
        if not all(isinstance(entry, str) for entry in entries):
            return Column(name, "nested", filled)
        single = all(" " not in entry.strip() for entry in entries)
        return Column(name, "words" if single and len(entries) > filled else "texts", filled)
    if not all(isinstance(value, str) for value in values):
        return Column(name, "nested", filled)
    words = statistics.median(len(value.split()) for value in values)
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    different = sorted(counts, key=lambda value: (-counts[value], value))
    if len(different) == 1 and filled > 1:
        return Column(name, "constant", filled, words, tuple(different))
    short = all(
        len(value.split()) <= _LABEL_WORDS and len(value) <= _LABEL_LETTERS for value in different
    )
    if short and 2 <= len(different) <= min(MOST_LABELS, filled // 2):
        return Column(name, "label", filled, words, tuple(different))
    coded = sum(_CODE.fullmatch(value.strip()) is not None for value in values)
    named = _CODE_NAME.match(name) is not None and len(different) == filled and words == 1
    kind: Kind = "identifier" if named or coded > 0.9 * filled else "text"
    return Column(name, kind, filled, words)
