"""Rows as token ids in a file: as many as the disk holds, a few of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from ptkit.data.arrow_file import ArrowFile
from ptkit.data.encoded import EncodedExample, PairExample
from ptkit.data.lazy import Lazy, Picked

_IDS = ("input_ids", "target_ids", "learnt")
SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "target_ids": pa.list_(pa.int32()),
     "learnt": pa.list_(pa.uint8())}
)  # fmt: skip
#: Put before the columns of a rejected answer.
_REJECTED = "rejected_"
PAIR_SCHEMA = pa.schema([*SCHEMA, *(pa.field(_REJECTED + f.name, f.type) for f in SCHEMA)])


class MeasuredRows(Lazy[EncodedExample]):
    """Rows whose lengths are known without reading them."""

    def lengths(self) -> Lengths:
        """Tokens of each row."""
        raise NotImplementedError


class EncodedRows(MeasuredRows):
    """The rows of a file whose batches `batch_of` made."""

    def __init__(self, file: ArrowFile) -> None:
        self.file = file
        self._columns = [_lists(batch) for batch in file.mapped()]
        self._lengths = self._sizes(0), self._sizes(1)

    def __len__(self) -> int:
        return len(self.file)

    def entry(self, number: int) -> EncodedExample:
        batch, row = self.file.place(number)
        return _row(self._columns[batch], row)

    def __iter__(self) -> Iterator[EncodedExample]:
        for batch in self.file.stream():
            columns = _lists(batch)
            yield from (_row(columns, row) for row in range(batch.num_rows))

    def lengths(self) -> Lengths:
        inputs, targets = self._lengths
        whole = inputs + targets
        return Lengths(inputs, targets, whole, whole)

    def _sizes(self, column: int) -> np.ndarray:
        """How many entries each row has in the `column`-th of its lists."""
        known = [np.diff(columns[column][0]) for columns in self._columns]
        return np.concatenate([np.zeros(0, dtype=np.int32), *known])


class EncodedPairs(EncodedRows):
    """The pairs of a file whose batches `pair_batch_of` made."""

    def __init__(self, file: ArrowFile) -> None:
        super().__init__(file)
        self._rejected = self._sizes(3), self._sizes(4)

    def lengths(self) -> Lengths:
        (asked, said), (again, other) = self._lengths, self._rejected
        chosen, rejected = asked + said, again + other
        return Lengths(
            np.maximum(asked, again), np.maximum(said, other), chosen + rejected,
            np.maximum(chosen, rejected),
        )  # fmt: skip


#: Of each list column: where each row begins, and the values of all.
_Lists = list[tuple[np.ndarray, np.ndarray]]


def _lists(batch: pa.RecordBatch) -> _Lists:
    names = [name for name in PAIR_SCHEMA.names if name in batch.schema.names]
    columns: list[Any] = [batch.column(name) for name in names]
    return [(_numbers(column.offsets), _numbers(column.values)) for column in columns]


def _numbers(array: pa.Array) -> np.ndarray:
    """The values of `array`, none missing, as they lie; without pandas, as `_column`."""
    dtype, data = np.dtype(str(array.type)), array.buffers()[1]
    if data is None:  # nothing was written
        return np.zeros(0, dtype)
    return np.frombuffer(data, dtype, count=len(array), offset=array.offset * dtype.itemsize)


def _row(columns: _Lists, row: int) -> EncodedExample:
    first, *others = [
        _example(columns[start : start + len(_IDS)], row)
        for start in range(0, len(columns), len(_IDS))
    ]
    if not others:
        return first
    return PairExample(first.input_ids, first.target_ids, first.learnt, rejected=others[0])


def _example(columns: _Lists, row: int) -> EncodedExample:
    inputs, targets, learnt = (
        values[offsets[row] : offsets[row + 1]].tolist() for offsets, values in columns
    )
    # A row has a target, so no marks means that all targets are learnt.
    return EncodedExample(inputs, targets, tuple(map(bool, learnt)) if learnt else None)


def batch_of(rows: Sequence[EncodedExample], more: dict[str, Any] | None = None) -> pa.RecordBatch:
    """`rows` for a file; `more` are further columns of one number per row."""
    further = {n: _column(np.ascontiguousarray(own, np.int32)) for n, own in (more or {}).items()}
    return pa.RecordBatch.from_pydict(_arrays(rows, "") | further)


def pair_batch_of(pairs: Sequence[PairExample]) -> pa.RecordBatch:
    """`pairs` for a file; what the base made of their answers is not kept."""
    rejected = _arrays([pair.rejected for pair in pairs], _REJECTED)
    return pa.RecordBatch.from_pydict(_arrays(pairs, "") | rejected)


def _column(values: np.ndarray) -> pa.Array:
    """`values`, `[rows]`, as they lie. `pa.array` would load pandas for it: most of a second."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _arrays(rows: Sequence[EncodedExample], prefix: str) -> dict[str, pa.Array]:
    """The columns of `rows`, their names with `prefix`."""

    def lists(parts: list[Sequence[int]], kind: Any) -> pa.Array:
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(parts), kind, count=int(offsets[-1]))
        return pa.ListArray.from_arrays(_column(offsets), _column(values))

    return {
        f"{prefix}input_ids": lists([row.input_ids for row in rows], np.int32),
        f"{prefix}target_ids": lists([row.target_ids for row in rows], np.int32),
        f"{prefix}learnt": lists([row.learnt or () for row in rows], np.uint8),
    }


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
        """Those of `rows`, without reading those whose lengths are known."""
        if isinstance(rows, MeasuredRows):
            return rows.lengths()
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

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Lengths:
        """Those of the rows of `parts`, one after another."""
        named = (field.name for field in fields(cls))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in named))
