"""Rows as token ids in a file: as many as the disk holds, a few of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from ptkit.data.arrow_file import ArrowFile
from ptkit.data.encoded import EncodedExample
from ptkit.data.lazy import Lazy, Picked

_IDS = ("input_ids", "target_ids", "learnt")
SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "target_ids": pa.list_(pa.int32()),
     "learnt": pa.list_(pa.uint8())}
)  # fmt: skip


class EncodedRows(Lazy[EncodedExample]):
    """The rows of a file whose batches `batch_of` made.

    inputs, targets: lengths of each row's, in tokens, `[rows]`
    """

    def __init__(self, file: ArrowFile) -> None:
        self.file = file
        self._columns = [_lists(batch) for batch in file.mapped()]

        def lengths(part: int) -> np.ndarray:
            known = [np.diff(columns[part][0]) for columns in self._columns]
            return np.concatenate([np.zeros(0, dtype=np.int32), *known])

        self.inputs, self.targets = lengths(0), lengths(1)

    def __len__(self) -> int:
        return len(self.file)

    def entry(self, number: int) -> EncodedExample:
        batch, row = self.file.place(number)
        return _row(self._columns[batch], row)

    def __iter__(self) -> Iterator[EncodedExample]:
        for batch in self.file.stream():
            columns = _lists(batch)
            yield from (_row(columns, row) for row in range(batch.num_rows))


#: Of each list column: where each row begins, and the values of all.
_Lists = list[tuple[np.ndarray, np.ndarray]]


def _lists(batch: pa.RecordBatch) -> _Lists:
    columns: list[Any] = [batch.column(name) for name in _IDS]
    return [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]


def _row(columns: _Lists, row: int) -> EncodedExample:
    inputs, targets, learnt = (
        values[offsets[row] : offsets[row + 1]].tolist() for offsets, values in columns
    )
    # A row has a target, so no marks means that all targets are learnt.
    return EncodedExample(inputs, targets, tuple(map(bool, learnt)) if learnt else None)


def batch_of(rows: Sequence[EncodedExample], more: dict[str, Any] | None = None) -> pa.RecordBatch:
    """`rows` for a file; `more` are further columns of one number per row."""

    def lists(parts: list[Sequence[int]], kind: Any) -> pa.Array:
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(parts), kind, count=int(offsets[-1]))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    columns = {
        "input_ids": lists([row.input_ids for row in rows], np.int32),
        "target_ids": lists([row.target_ids for row in rows], np.int32),
        "learnt": lists([row.learnt or () for row in rows], np.uint8),
        **{name: pa.array(values, pa.int32()) for name, values in (more or {}).items()},
    }
    return pa.RecordBatch.from_pydict(columns)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row, `[rows]` each.

    inputs, targets: of its input and of its target; of a pair, of the longer ones
    whole: of all of it; passes: of the longest row of a batch that it is read as
    """

    inputs: np.ndarray
    targets: np.ndarray
    whole: np.ndarray
    passes: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[EncodedExample]) -> Lengths:
        """Those of `rows`, without reading rows that are in a file."""
        if isinstance(rows, EncodedRows):
            whole = rows.inputs + rows.targets
            return cls(rows.inputs, rows.targets, whole, whole)
        if isinstance(rows, Picked):
            within, at = cls.of(rows.rows), rows.numbers
            return cls(within.inputs[at], within.targets[at], within.whole[at], within.passes[at])
        found = [
            (
                max(len(one.input_ids) for one in row.passes()),
                max(len(one.target_ids) for one in row.passes()),
                len(row),
                max(map(len, row.passes())),
            )
            for row in rows
        ]
        return cls(*np.array(found, dtype=np.int64).reshape(-1, 4).T)
