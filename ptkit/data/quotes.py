"""Whether the quotes of a CSV or TSV file are marks around cells, or letters of texts.

A reader of quoted cells takes everything up to the next quote for one cell. Where the first quote
is a letter of a text, rows would be lost silently.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ptkit.errors import DataError


@dataclass
class _Lines:
    """Lines of a file, counted as they are read.

    columns: of lines that are not blank, the different numbers of separators
    """

    file: TextIO
    separator: str
    columns: set[int] = field(default_factory=set)

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            if line.strip("\r\n"):
                self.columns.add(line.count(self.separator))
            yield line


def quotes_are_marks(path: Path, separator: str) -> bool:
    """Whether cells of `path` may be quoted. In a TSV file quotes are letters where they cannot be
    marks, or where every line has all columns without them.

    Raises DataError naming the line where a quoted cell has no end of its own.
    """
    with path.open("rb") as raw:  # most files have none, and need no second reading as text
        if not any(b'"' in part for part in iter(lambda: raw.read(1 << 20), b"")):
            return True
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _Lines(file, separator)
        broken, longer = _records(lines)
    even = len(lines.columns) == 1 and lines.columns != {0}
    tabs = separator == "\t"
    if not broken and not (longer and even):
        return True
    if tabs and even:
        return False
    swallowed = next((place for place in broken if tabs or place[1] > place[0]), None)
    told = " without a proper end"
    if swallowed is None and even and longer:
        swallowed, told = longer[0], ", though every line has all columns by itself"
    if swallowed is None:
        return True
    first, last = swallowed
    raise DataError(
        f"{path}:{first}: a quote begins a cell there, and the cell reaches to line {last}{told}; "
        'write a quote that is a letter twice, in a quoted cell: `"a ""word"""`. If the cell is '
        "right, save the file as JSON lines or Parquet"
    )


def _records(lines: _Lines) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first and last lines of records that are malformed, and of those of several lines."""
    broken, longer = list[tuple[int, int]](), list[tuple[int, int]]()
    reader = csv.reader(lines, delimiter=lines.separator, strict=True)
    most = csv.field_size_limit(sys.maxsize)
    try:
        while True:
            first = reader.line_num + 1
            try:
                next(reader)
            except StopIteration:
                return broken, longer
            except csv.Error:
                broken.append((first, reader.line_num))
                continue
            if reader.line_num > first:
                longer.append((first, reader.line_num))
    finally:
        csv.field_size_limit(most)
