"""From what a source has to the three splits: what is held out, what limits keep, where it is from.

Nothing here depends on the order of a source's rows unless the recipe has `draw: first`. A file
sorted by label would otherwise hold out one label, and limits would keep another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptkit.data.table import Table
from ptkit.errors import DataError
from ptkit.recipe.tasks import DataSection

#: Of every draw that is the same for all seeds of a recipe.
SEED = 0


@dataclass(frozen=True)
class Origin:
    """Where the rows of a split are from.

    source: the source's name of the split they are from
    held_out: whether they were set apart from that split's rows for this
    of: how many there were before `limits`
    """

    source: str
    held_out: bool
    of: int


@dataclass(frozen=True)
class SplitRows:
    """The rows of the three splits; all three are there and hold at least one row.

    origins: of each split; test_chose: the test rows are the validation rows, which choose the
    checkpoint and the settings
    """

    train: Table
    validation: Table
    test: Table
    origins: dict[str, Origin]
    test_chose: bool


def divide(
    found: dict[str, Table], section: DataSection, what: str, label: str | None
) -> SplitRows:
    """The splits of a source that has `found` (name of a split -> rows).

    what: the source, for error messages; label: the column draws are balanced by

    Raises DataError without training rows, and for a split without rows.
    """
    names, in_order = section.splits, _in_order(section)
    if names.train not in found:
        raise DataError(f"{what} has no train split; it has: {', '.join(found) or 'none'}")
    for split, rows in found.items():
        if not len(rows):
            raise DataError(f"{what}: the {split} split is empty")
    train, origins = found[names.train], {}
    origins["train"] = Origin(names.train, False, len(train))
    if names.validation is not None and names.validation in found:
        validation = found[names.validation]
        origins["validation"] = Origin(names.validation, False, len(validation))
    else:
        train, validation = _held_out(train, what, label, in_order)
        origins["train"] = Origin(names.train, False, len(train))
        origins["validation"] = Origin(names.train, True, len(validation))
    if names.test is None or names.test not in found:
        test, origins["test"], same = validation, origins["validation"], True
    else:
        test = found[names.test]
        origins["test"] = Origin(names.test, False, len(test))
        files = section.files or {}
        same = names.validation in found and (
            names.test == names.validation
            or (names.test in files and files[names.test] == files.get(names.validation or ""))
        )
    limits = section.limits
    return SplitRows(
        # A draw per seed is made by each cell, from all rows (see `ptkit.training.experiment`).
        train if section.draw == "seed" else _limited(train, limits.train, label, in_order),
        _limited(validation, limits.validation, label, in_order),
        _limited(test, limits.test, label, in_order),
        origins,
        same,
    )


def _in_order(section: DataSection) -> bool:
    """Built-in rows lie in random order; to keep the first is to draw."""
    return section.draw == "first" or section.builtin is not None


def _held_out(rows: Table, what: str, label: str | None, in_order: bool) -> tuple[Table, Table]:
    """Training rows, and a tenth of them (at least one) that is set apart."""
    count = max(1, len(rows) // 10)
    if len(rows) <= count:
        raise DataError(f"{what} has one row and no validation split; at least two are needed")
    if in_order:
        apart = np.arange(len(rows) - count, len(rows))
    else:
        apart = np.array(drawn(_groups(rows, label), count))
    left = np.setdiff1d(np.arange(len(rows)), apart, assume_unique=True)
    return rows.select(left), rows.select(apart)


def _limited(rows: Table, limit: int | None, label: str | None, in_order: bool) -> Table:
    if limit is None or limit >= len(rows):
        return rows
    if in_order:
        return rows.select(range(limit))
    return rows.select(drawn(_groups(rows, label), limit))


def _groups(rows: Table, label: str | None) -> np.ndarray:
    """What draws are balanced by, of each row: its label's number, where there is one."""
    if label is None or label not in rows.columns:
        return np.zeros(len(rows), dtype=np.int64)
    numbers: dict[str, int] = {}
    found = (numbers.setdefault(repr(row[label]), len(numbers)) for row in rows.only([label]))
    return np.fromiter(found, np.int64, count=len(rows))


def drawn(groups: Sequence[object] | np.ndarray, count: int) -> list[int]:
    """Numbers of `count` rows, in order: a draw in which every group has its share.

    The i-th of a group's n rows (in random order) stands at (i + 1/2) / n; those that stand
    first are taken. So a group of n gets n x count / rows of them, rounded.
    """
    order = list(range(len(groups)))
    random.Random(SEED).shuffle(order)
    rows = np.array(order, dtype=np.int64)
    _, own, sizes = np.unique(np.asarray(groups)[rows], return_inverse=True, return_counts=True)
    by_group = np.argsort(own, kind="stable")
    seen = np.empty(len(rows), dtype=np.int64)
    seen[by_group] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = (seen + 0.5) / sizes[own]
    found: list[int] = np.sort(rows[np.argsort(places, kind="stable")[:count]]).tolist()
    return found
