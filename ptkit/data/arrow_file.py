"""Rows in an Arrow file: mapped into memory where one is asked for, streamed where all are.

A pass over all rows reads batch after batch into memory that is given back at once. One row is read
through a memory map, so only the pages that were asked for are resident.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ptkit.formats import atomic


class ArrowFile:
    """A file that `write_arrow` wrote. Raises OSError or ArrowInvalid for one that is not whole.

    notes: what the writer had to say at the end; starts: the number of each batch's first row
    """

    def __init__(self, path: Path) -> None:
        # Held open: another process may make room in the cache while this one reads.
        self._file = path.open("rb")
        self._streamed = pa.ipc.open_file(self._file)
        self._mapped = pa.ipc.open_file(pa.memory_map(str(path)))
        last = self._mapped.num_record_batches - 1
        told = self._mapped.get_batch_with_custom_metadata(last).custom_metadata
        self.notes: dict[str, Any] = json.loads(told[b"notes"])
        counts = [self._mapped.get_batch(i).num_rows for i in range(last)]
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def stream(self) -> Iterator[pa.RecordBatch]:
        """All batches in order, each in memory of its own."""
        for i in range(len(self.starts) - 1):
            yield self._streamed.get_batch(i)

    def mapped(self) -> list[pa.RecordBatch]:
        """All batches in order, mapped: nothing is read before it is used."""
        return [self._mapped.get_batch(i) for i in range(len(self.starts) - 1)]

    def place(self, row: int) -> tuple[int, int]:
        """The number of the batch that has `row`, and the row's number in it."""
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        return batch, row - int(self.starts[batch])


def write_arrow(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], notes: dict[str, Any]
) -> None:
    """Write `batches` to `path`, which appears whole or not at all.

    notes: for JSON; read after the last batch, so that they may be what was found on the way
    """
    with atomic.file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, f.type) for f in schema], schema=schema)
        writer.write_batch(empty, custom_metadata={"notes": json.dumps(notes)})
