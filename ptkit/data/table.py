"""Rows of named columns whose values are what their file says: texts, lists, mappings.

A value is a text, None (missing), a list or mapping of values, or something without a text of its
own. Bytes, timestamps and images are examples. Those are kept as they are, and refused where they
are used.
"""

from __future__ import annotations

import datetime
import decimal
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptkit.data.lazy import picked
from ptkit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

#: Types whose values Python holds with more digits than they have.
_SHORT = ("float16", "float32")

#: Column or field -> value.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spots:
    """Where rows stand in files: of the n-th row that was read, `read[n - 1]`.

    in_lines: the numbers are those of lines, as editors count them; else those of rows
    """

    read: Sequence[tuple[Path, int]]
    in_lines: bool

    def of(self, number: int) -> str:
        """Where the row with this number, from 1, is: `file:line`, or `file, row n`."""
        path, at = self.read[number - 1]
        return f"{path}:{at}" if self.in_lines else f"{path}, row {at}"


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    columns: names of the columns; a row may lack some, which are then missing there
    rows: as read; iterating gives them with plain values (see `plain`)
    features: of typed data (Parquet, the Hub) the type of each column
    places: where each row stood in what was read, from 1; None: as they stand here
    spots: where that is in files
    """

    columns: list[str]
    rows: Sequence[Row]
    features: Mapping[str, Any] | None = None
    places: Sequence[int] | np.ndarray | None = None
    spots: Spots | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> Table:
        """The rows of `dataset`, as Python's values: a format (`with_format`) is undone.

        Raises DataError for a transform, whose columns are known only when a row is read.
        """
        if dataset.format["type"] == "custom":
            raise DataError(
                "the data set makes its rows by a transform (`with_transform`) when they are read; "
                "write them with `Dataset.map`, or hand over a list of the rows"
            )
        if dataset.format["type"] is not None or {*dataset.format["columns"]} != {
            *dataset.column_names
        }:
            dataset = dataset.with_format(None)
        return cls(dataset.column_names, dataset, dataset.features)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return map(self.plain, self.rows)

    def plain(self, row: Row) -> Row:
        """One of the rows as read, with plain values."""
        features = self.features or {}
        return {c: plain(row.get(c), features.get(c)) for c in self.columns}

    def place(self, number: int) -> int:
        """Where the `number`-th row, from 0, was read, from 1. Messages name this number, so that
        the row is found there whatever was drawn."""
        return number + 1 if self.places is None else int(self.places[number])

    def where(self, number: int, source: str) -> str:
        """The file and line of the `number`-th row, from 0.

        source: what messages call rows that are in no file of this machine
        """
        place = self.place(number)
        return f"{source} row {place}" if self.spots is None else self.spots.of(place)

    def placed(self) -> Iterator[tuple[int, Row]]:
        """The rows, each with its `place`."""
        for number, row in enumerate(self):
            yield self.place(number), row

    def raw(self, source: str) -> Iterator[tuple[str, Row]]:
        """The rows as read, truth values and numbers included, each with where it is."""
        for number, row in enumerate(self.rows):
            yield self.where(number, source), row

    def only(self, columns: Sequence[str]) -> Table:
        """The same rows with these of the columns: others, images say, are not even decoded."""
        kept = [column for column in self.columns if column in columns]
        rows: Any = self.rows
        if kept and is_of(rows, "datasets.Dataset"):
            rows = rows.select_columns(kept)
        return Table(kept, rows, self.features, self.places, self.spots)

    def select(self, numbers: Sequence[int] | np.ndarray) -> Table:
        """The rows with these numbers, in this order."""
        rows: Any = self.rows
        kept = np.asarray(numbers, dtype=np.int64)
        chosen = rows.select(kept) if is_of(rows, "datasets.Dataset") else picked(rows, kept)
        places = kept + 1 if self.places is None else np.asarray(self.places)[kept]
        return Table(self.columns, chosen, self.features, places, self.spots)


def is_of(value: Any, name: str) -> bool:
    """Whether `value` is of the class `name`, as `pandas.DataFrame`. The library is not loaded for
    it, which takes a second: before it is, nothing can be of its classes."""
    library, _, own = name.partition(".")
    loaded = sys.modules.get(library)
    return loaded is not None and isinstance(value, getattr(loaded, own))


def plain(value: Any, feature: Any = None) -> Any:
    """`value` as text where it has one. Numbers are as Python writes them, truth values `true` and
    `false`, dates in ISO 8601, and numbered labels by name. None for what is missing, NaN
    included."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, np.floating):
        return None if np.isnan(value) else str(value)
    if isinstance(value, np.bool | np.integer):
        return plain(value.item(), feature)
    if isinstance(value, int) and is_of(feature, "datasets.ClassLabel"):
        return str(feature.int2str(value)) if value >= 0 else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | decimal.Decimal):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        # As many digits as its type tells apart: 0.1 of 32 bits is no 0.10000000149011612.
        short = getattr(feature, "dtype", None) in _SHORT
        return str(getattr(np, feature.dtype)(value)) if short else str(value)
    if isinstance(value, datetime.date | datetime.time) and not isinstance(
        value, datetime.datetime
    ):
        return value.isoformat()
    if isinstance(value, list | tuple):
        inner = getattr(feature, "feature", None)
        if isinstance(feature, list | tuple) and feature:
            inner = feature[0]
        return [plain(entry, inner) for entry in value]
    if isinstance(value, Mapping):
        fields = feature if isinstance(feature, Mapping) else {}
        return {str(name): plain(entry, fields.get(name)) for name, entry in value.items()}
    return value
