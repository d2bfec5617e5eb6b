"""Rows of large files as text in an Arrow file, parsed when they are asked for.

Files lie in `$PTKIT_CACHE/rows`, under a digest of what they were read from. They may be deleted
at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ptkit.data.arrow_file import ArrowFile, write_arrow
from ptkit.data.lazy import Lazy
from ptkit.data.table import Row, Spots, Table
from ptkit.formats import atomic
from ptkit.formats.cache_home import cache_home, make_room

#: The least recently used files go when all take more bytes than this.
MOST_BYTES = 20_000_000_000
#: Rows of a batch: those that are in memory at a time.
_BATCH = 2_000
#: Counted up when the same files give other rows than before.
_VERSION = 1
_SCHEMA = pa.schema({"row": pa.large_string(), "number": pa.int64()})


class StoredRows(Lazy[Row]):
    """Rows that are kept as text; `read` makes a row of one."""

    def __init__(self, file: ArrowFile, read: Callable[[str], Row]) -> None:
        self._file, self._read = file, read
        self._texts = [batch.column("row") for batch in file.mapped()]

    def __len__(self) -> int:
        return len(self._file)

    def entry(self, number: int) -> Row:
        batch, row = self._file.place(number)
        return self._read(self._texts[batch][row].as_py())

    def __iter__(self) -> Iterator[Row]:
        for batch in self._file.stream():
            yield from map(self._read, batch.column("row").to_pylist())


class _Places(Lazy[tuple[Path, int]]):
    """Of each row its file, and its number there."""

    def __init__(self, paths: Sequence[Path], ends: Sequence[int], numbers: np.ndarray) -> None:
        self._paths, self._ends, self._numbers = paths, ends, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def entry(self, number: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self._paths[file], int(self._numbers[number])


def stored(
    paths: Sequence[Path],
    rows: Callable[[Path], Iterator[tuple[int, str, Row]]],
    read: Callable[[str], Row],
    *,
    in_lines: bool,
) -> Table:
    """The rows of `paths`, written to the cache where they are not there yet.

    rows: of a file, each with its number and as text; read: text -> row

    Raises what `rows` raises, and OSError where the cache cannot be written to.
    """
    path = cache_home() / "rows" / f"{_digest(paths)}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid, KeyError, ValueError):  # absent or damaged
        table = _table(path, paths, read, in_lines=in_lines)
        path.touch()  # used just now
        return table
    notes: dict[str, Any] = {"columns": {}, "ends": []}
    write_arrow(path, _SCHEMA, _batches(paths, rows, notes), notes)
    make_room(path, MOST_BYTES)
    return _table(path, paths, read, in_lines=in_lines)


def mapped_table(path: Path) -> pa.Table:
    """The rows of a Parquet file, from an Arrow file in the cache that is mapped into memory.

    Raises OSError and ArrowException for a file that cannot be read, or a cache not be written to.
    """
    kept = cache_home() / "rows" / f"{_digest([path])}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        found = pa.ipc.open_file(pa.memory_map(str(kept))).read_all()
        kept.touch()
        return found
    source = pq.ParquetFile(path)
    with atomic.file(kept) as file, pa.ipc.new_file(file, source.schema_arrow) as writer:
        for batch in source.iter_batches(_BATCH):
            writer.write_batch(batch)
    make_room(kept, MOST_BYTES)
    return pa.ipc.open_file(pa.memory_map(str(kept))).read_all()


def _batches(
    paths: Sequence[Path], rows: Callable[[Path], Iterator[tuple[int, str, Row]]],
    notes: dict[str, Any],
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    count = 0
    for path in paths:
        found = rows(path)
        while batch := [*islice(found, _BATCH)]:
            for _, _, row in batch:
                notes["columns"].update(dict.fromkeys(row))
            count += len(batch)
            columns = {"row": [text for _, text, _ in batch], "number": [n for n, _, _ in batch]}
            yield pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
        notes["ends"].append(count)


def _table(
    path: Path, paths: Sequence[Path], read: Callable[[str], Row], *, in_lines: bool
) -> Table:
    file = ArrowFile(path)
    numbers = [batch.column("number").to_numpy() for batch in file.mapped()]
    places = _Places(paths, file.notes["ends"], np.concatenate([np.zeros(0, np.int64), *numbers]))
    columns = [*file.notes["columns"]]
    return Table(columns, StoredRows(file, read), spots=Spots(places, in_lines=in_lines))


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(repr((_VERSION, [path.suffix for path in paths])).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
