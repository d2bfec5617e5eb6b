"""What is wrong with the labels of a file, before a model learns them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from ptkit.data.table import Table
from ptkit.errors import DataError

#: With fewer rows than these in all splits, a label has next to none that it is judged on.
FEW_ROWS = 10
#: Places of a rarer spelling that a message names.
_PLACES = 3


def require_apart_as_written(
    counts: Mapping[str, int], column: str, tables: Mapping[str, Table]
) -> None:
    """Raise DataError where labels differ in case or spaces only: that is mostly a slip of a few
    rows, and the model would learn both. The message names where the rarer spellings stand.

    counts: label -> its rows; column: where labels stand
    tables: what messages call the rows of a split -> these rows
    """
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    for labels in alike.values():
        if len(labels) > 1:
            labels.sort(key=lambda label: -counts[label])
            told = ", ".join(f"`{label}` ({_rows(counts[label])})" for label in labels)
            places = "".join(
                f"\n  `{label}`: {_places(label, counts[label], column, tables)}"
                for label in labels[1:]
            )
            raise DataError(
                f"labels differ in case or spaces only: {told}; write them alike in the file:"
                f"{places}"
            )


def _places(label: str, count: int, column: str, tables: Mapping[str, Table]) -> str:
    """Where the first rows with `label` are, of `count` that there are."""
    found = (
        table.where(number, source)
        for source, table in tables.items() if column in table.columns
        for number, row in enumerate(table.only([column])) if str(row[column]) == label
    )  # fmt: skip
    named = "; ".join(islice(found, _PLACES))
    return named if count <= _PLACES else f"{named} and {count - _PLACES:,} more"


def rare_labels(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A line about labels that have few rows; none where all have enough."""
    rare = {label: n for label, n in counts.items() if n < FEW_ROWS}
    if not rare:
        return ()
    told = ", ".join(f"`{label}` ({_rows(n)})" for label, n in rare.items())
    return (f"warning: too few rows to learn and judge these labels: {told}",)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
