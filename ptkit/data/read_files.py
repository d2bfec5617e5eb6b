"""Rows of files as the files write them: nothing is inferred, nothing is renamed.

A CSV cell is its text (`NA`, `02108`, `3.10` and `TRUE` too), and an empty cell is missing. Quotes
in a TSV file are letters where they mark no cells (see `quotes_are_marks`). A JSON
text is that text, a JSON number the digits that stand there, `null` or an absent key is missing.
Parquet keeps the types it was written with. A path is a path: `*`, `?` and brackets are letters.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from ptkit.data.quotes import quotes_are_marks
from ptkit.data.stored_rows import mapped_table, stored
from ptkit.data.table import Spots, Table
from ptkit.data.values import json_of, json_value
from ptkit.errors import DataError
from ptkit.formats.places import no_such_file

#: Larger files are kept as rows on disk, and read row by row.
IN_MEMORY_BYTES = 16_000_000


def read_files(paths: Sequence[Path]) -> Table:
    """The rows of files of one format, one after another.

    Raises DataError naming the file, and the line or row, that is missing, empty or malformed.
    """
    kinds = set()
    for path in paths:
        if not path.is_file():
            raise DataError(no_such_file(path))
        if path.suffix not in READERS:
            raise DataError(f"{path}: expected one of {', '.join(READERS)}")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
        kinds.add(path.suffix)
    if len(kinds) != 1:
        raise DataError(f"the files of one split must have one format, found {', '.join(kinds)}")
    suffix = kinds.pop()
    if suffix == ".parquet":
        return _parquet(paths)
    if sum(path.stat().st_size for path in paths) > IN_MEMORY_BYTES:
        with contextlib.suppress(OSError):  # no place for them: they are read into memory
            return stored(paths, partial(_texts, suffix), json_value, in_lines=suffix == ".jsonl")
    rows: list[dict[str, Any]] = []
    spots: list[tuple[Path, int]] = []
    for path in paths:
        for number, row in _read(suffix, path):
            rows.append(row)
            spots.append((path, number))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, rows, spots=Spots(spots, in_lines=suffix == ".jsonl"))


#: Rows, each with the number of its line, or of its row, in the file.
_Rows = Iterator[tuple[int, dict[str, Any]]]


def _read(suffix: str, path: Path) -> _Rows:
    try:
        yield from READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _texts(suffix: str, path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The rows of a file, each with its number and its JSON text."""
    return ((number, json_of(row), row) for number, row in _read(suffix, path))


def _csv(path: Path, separator: str = ",") -> _Rows:
    import pandas as pd

    header: list[str] = []
    number = 0
    quoting = csv.QUOTE_MINIMAL if quotes_are_marks(path, separator) else csv.QUOTE_NONE
    try:
        # Without a header of its own, pandas renames no column and takes none for an index.
        with pd.read_csv(
            path, sep=separator, header=None, dtype=str, keep_default_na=False, na_filter=False,
            encoding="utf-8-sig", chunksize=10_000, quoting=quoting,
        ) as frames:  # fmt: skip
            for frame in frames:
                cells = frame.to_numpy(dtype=object).tolist()
                if not header:
                    header, *cells = cells
                    twice = sorted({name for name in header if header.count(name) > 1})
                    if twice:
                        raise DataError(f"{path}: two columns are called `{twice[0]}`; rename one")
                for row in cells:
                    number += 1
                    yield number, {n: cell or None for n, cell in zip(header, row, strict=True)}
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path} cannot be read: {reason}") from error


def _tsv(path: Path) -> _Rows:
    return _csv(path, "\t")


def _jsonl(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig") as file:
        yield from _json_lines(file, str(path))


def _whole_json(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig") as file:
        yield from enumerate(json_rows(file, str(path)), start=1)


def json_rows(file: TextIO, name: str, field: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON: a list of objects, one object, or an object per line.

    file: open for reading text, at its beginning
    name: what messages call it
    field: of the file's one object, the key whose value is the rows

    Raises DataError naming the line or entry that is malformed or no object.
    """
    first = next(filter(str.strip, iter(file.readline, "")), "")
    file.seek(0)
    if field is None and _is_object(first):
        yield from (row for _, row in _json_lines(file, name))
        return
    text = file.read()
    try:
        value = json_value(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and field is None:
            yield from (row for _, row in _json_lines(io.StringIO(text), name))
            return
        raise DataError(f"{name}:{error.lineno}: not valid JSON ({error.msg})") from error
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            raise DataError(f"{name} should be one JSON object with the key `{field}`")
        value = value[field]
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}: entry {number} should be a JSON object")
        yield row


def _is_object(line: str) -> bool:
    try:
        return isinstance(json_value(line), dict)
    except json.JSONDecodeError:
        return False


def _json_lines(file: TextIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json_value(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{number}: not valid JSON ({error.msg})") from error
        if not isinstance(value, dict):
            raise DataError(f"{name}:{number}: expected a JSON object per line")
        yield number, value


def _parquet(paths: Sequence[Path]) -> Table:
    from datasets import Dataset

    tables = []
    for path in paths:
        try:
            tables.append(
                mapped_table(path)
                if path.stat().st_size > IN_MEMORY_BYTES
                else pq.read_table(path, memory_map=True)
            )
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{path} cannot be read: {reason}") from error
    try:
        whole = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise DataError(
            f"{', '.join(map(str, paths))} have columns of different types: {error}"
        ) from error
    whole = _without_maps(whole)
    # Otherwise `datasets` would hash all values for it.
    told = repr([(str(path), path.stat().st_mtime_ns) for path in paths])
    return Table.of(Dataset(whole, fingerprint=hashlib.sha256(told.encode()).hexdigest()[:16]))


def _without_maps(table: pa.Table) -> pa.Table:
    """`table` with each map as the list of its pairs, which is how Arrow lays it out: `datasets`
    has no type for maps."""
    for place, part in enumerate(table.schema):
        if pa.types.is_map(part.type):
            pair = pa.struct([("key", part.type.key_type), ("value", part.type.item_type)])
            table = table.set_column(place, part.name, table.column(place).cast(pa.list_(pair)))
    return table


READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _jsonl,
    ".json": _whole_json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": lambda path: ((n, dict(row)) for n, row in _parquet([path]).placed()),
}
