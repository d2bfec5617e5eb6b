"""The files a draft is made from: the one that was given, and the splits that lie beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptkit.data.read_files import READERS, read_files
from ptkit.data.table import Table
from ptkit.errors import DataError

#: Names of the other splits, as they stand in names of files.
_NAMES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Files:
    """Split -> file, and its rows. `train` is always there.

    found: splits that were found beside the given file, and not named
    """

    paths: Mapping[str, Path]
    tables: Mapping[str, Table]
    found: tuple[str, ...]

    @property
    def train(self) -> Table:
        """The training rows."""
        return self.tables["train"]

    def as_written(self, folder: Path) -> dict[str, str]:
        """The paths for a recipe in `folder`: relative ones where a folder is shared."""
        return {split: _relative(path, folder) for split, path in self.paths.items()}


def read_splits(data: Path, *, validation: Path | None = None, test: Path | None = None) -> Files:
    """The rows of `data`, and of the other splits: those named, else those beside it.

    data: a file, or a folder with a file whose name has `train`

    Raises DataError for a file that cannot be read, and for a folder without one.
    """
    data = _train_file(data)
    paths = {"train": data}
    found = []
    for split, named in (("validation", validation), ("test", test)):
        path = named or _beside(data, split)
        if path is not None:
            paths[split] = path
            found += [] if named else [split]
    tables = {split: read_files([path]) for split, path in paths.items()}
    for split, table in tables.items():
        if not len(table):
            raise DataError(f"{paths[split]} has no rows")
    if "validation" not in tables and len(tables["train"]) < 2:
        raise DataError(f"{data} has one row; at least two are needed")
    return Files(paths, tables, tuple(found))


def _train_file(data: Path) -> Path:
    if not data.is_dir():
        if not data.exists() and data.suffix not in READERS:
            raise DataError(f"no such data file: {data}; expected {', '.join(READERS)}")
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
