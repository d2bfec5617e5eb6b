"""The rows a draft is made from: those that were given, and the splits that lie beside a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ptkit.data.in_memory import Rows, table_of
from ptkit.data.read_files import READERS, read_files
from ptkit.data.table import Table
from ptkit.errors import DataError
from ptkit.formats.places import no_such_file

#: What a draft can be made from: a file or its folder, or rows that a program hands over.
Source: TypeAlias = "str | Path | Rows"
#: Names of the other splits, as they stand in names of files.
_NAMES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class DraftRows:
    """The rows of each split. `train` is always there.

    paths: split -> file; empty where one of them was handed over by a program
    found: splits that were found beside the given file, and not named
    """

    tables: Mapping[str, Table]
    paths: Mapping[str, Path]
    found: tuple[str, ...] = ()

    @property
    def train(self) -> Table:
        """The training rows."""
        return self.tables["train"]

    @property
    def title(self) -> str:
        """What a recipe calls them."""
        return self.paths["train"].name if self.paths else "rows of a program"

    def called(self, split: str) -> str:
        """What messages call a split."""
        return str(self.paths[split]) if self.paths else f"the split `{split}`"

    def as_written(self, folder: Path) -> dict[str, Any]:
        """`task.data` of a recipe in `folder`. Paths are relative where a folder is shared."""
        if self.paths:
            return {"files": {split: _relative(path, folder) for split, path in self.paths.items()}}
        absent = {split: None for split in _NAMES if split not in self.tables}
        return {"memory": True, **({"splits": absent} if absent else {})}


def read_splits(
    data: Source, *, validation: Source | None = None, test: Source | None = None
) -> DraftRows:
    """The rows of `data`, and of the other splits: those named, else those beside its file.

    data: a file, or a folder with a file whose name has `train`; or rows (see
        `ptkit.data.in_memory`), of one split or of several by name

    Raises DataError for a file that cannot be read, a folder without one, and for what is no rows.
    """
    given: dict[str, Source] = _splits(data) if isinstance(data, Mapping) else {"train": data}
    given |= {
        split: own for split, own in (("validation", validation), ("test", test)) if own is not None
    }
    paths = {split: Path(own) for split, own in given.items() if isinstance(own, str | Path)}
    found = []
    if "train" in paths:
        paths["train"] = _train_file(paths["train"])
        for split in _NAMES:
            beside = None if split in given else _beside(paths["train"], split)
            if beside is not None:
                paths[split] = beside
                found.append(split)
    tables = {
        split: read_files([paths[split]]) if split in paths else table_of(split, given[split])
        for split in ("train", *_NAMES) if split in paths or split in given
    }  # fmt: skip
    rows = DraftRows(tables, paths if len(paths) == len(tables) else {}, tuple(found))
    for split, table in tables.items():
        if not len(table):
            raise DataError(f"{rows.called(split)} has no rows")
    if "validation" not in tables and len(tables["train"]) < 2:
        raise DataError(
            f"{rows.called('train')} has one row; at least two are needed{_rows_within(rows.train)}"
        )
    return rows


def _rows_within(table: Table) -> str:
    """Where the rows of a table of one row seem to be, for a message."""
    lists = {name: value for name, value in next(iter(table)).items() if isinstance(value, list)}
    for name, value in lists.items():
        if value and all(isinstance(entry, Mapping) for entry in value):
            return f"; its `{name}` is a list of rows: make that list the whole file"
    if len(lists) == len(table.columns) and len({len(value) for value in lists.values()}) == 1:
        return "; its columns are lists: write an object for each row instead"
    return ""


def _splits(data: Mapping[str, Any]) -> dict[str, Source]:
    """Split -> its rows, by ptkit's names of splits. Raises DataError where none is `train`."""
    if "train" not in data:
        raise DataError(
            f"the data has the splits {', '.join(map(str, data)) or 'none'}; one must be called "
            "`train` (are these columns? Then hand over `datasets.Dataset.from_dict(...)`)"
        )
    named = {split: next((n for n in names if n in data), None) for split, names in _NAMES.items()}
    return {
        "train": data["train"],
        **{split: data[name] for split, name in named.items() if name is not None},
    }


def _train_file(data: Path) -> Path:
    if not data.is_dir():
        if not data.exists():
            raise DataError(no_such_file(data))
        return data
    named = sorted(p for p in data.iterdir() if p.suffix in READERS and _TRAIN.search(p.stem))
    if len(named) != 1:
        what = "no file" if not named else f"several files ({', '.join(p.name for p in named)})"
        raise DataError(f"{data} has {what} of training rows; name the file itself")
    return named[0]


def _beside(data: Path, split: str) -> Path | None:
    """The file of another split beside `data`: `train.csv` and `test.csv`, or `x.csv` and
    `x-test.csv`."""
    for name in _NAMES[split]:
        stems = [_TRAIN.sub(name, data.stem)] if _TRAIN.search(data.stem) else []
        stems += [f"{data.stem}{sign}{name}" for sign in "-_."]
        for stem in stems:
            path = data.with_name(stem + data.suffix)
            if path.is_file():
                return path
    return None


def _relative(path: Path, folder: Path) -> str:
    whole, start = path.resolve(), folder.resolve()
    shared = len(os.path.commonpath([whole, start])) > 1 if whole.drive == start.drive else False
    return Path(os.path.relpath(whole, start)).as_posix() if shared else whole.as_posix()
