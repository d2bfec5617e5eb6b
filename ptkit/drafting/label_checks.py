"""What is wrong with the labels of a file, before a model learns them."""

from __future__ import annotations

from collections.abc import Mapping

from ptkit.errors import DataError

#: With fewer rows than these in all splits, a label has next to none that it is judged on.
FEW_ROWS = 10


def require_apart_as_written(counts: Mapping[str, int]) -> None:
    """Raise DataError where labels differ in case or spaces only: that is mostly a slip of a few
    rows, and the model would learn both.

    counts: label -> its rows
    """
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    for labels in alike.values():
        if len(labels) > 1:
            told = ", ".join(f"`{label}` ({_rows(counts[label])})" for label in labels)
            raise DataError(
                f"labels differ in case or spaces only: {told}; write them alike in the file"
            )


def rare_labels(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A line about labels that have few rows; none where all have enough."""
    rare = {label: n for label, n in counts.items() if n < FEW_ROWS}
    if not rare:
        return ()
    told = ", ".join(f"`{label}` ({_rows(n)})" for label, n in rare.items())
    return (f"warning: too few rows to learn and judge these labels: {told}",)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
