"""Rows of the three splits, from a built-in set, the hub or files.

Missing splits: without `test`, the validation rows are the test rows, and every score is shown with
that fact. Without `validation`, a tenth of the training rows (at least one) is held out for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ptkit.data.read_files import read_files
from ptkit.data.splits import SplitRows, divide
from ptkit.data.table import Table
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.tasks import DataSection, Splits
from ptkit.section import resolve_path

BUILTIN = Path(__file__).resolve().parent / "builtin"
SPLITS = ("train", "validation", "test")


def load_rows(
    section: DataSection,
    folder: Path,
    label: str | None = None,
    given: Mapping[str, Table] | None = None,
) -> SplitRows:
    """Read the rows `section` names; relative paths start at `folder`.

    label: the column by which draws of rows are balanced
    given: split -> rows that a program handed over, where `section.memory` is set

    Raises DataError naming what is missing, empty, unreadable or unreachable.
    """
    return divide(_found(section, folder, given), section, _name(section), label)


def builtin_sets() -> list[str]:
    """Names of the data sets that ship with ptkit."""
    return sorted(path.name for path in BUILTIN.iterdir() if (path / "train.jsonl").is_file())


def _name(section: DataSection) -> str:
    if section.memory:
        return "the data that was handed over"
    if section.builtin:
        return f"built-in data `{section.builtin}`"
    return f"hub data `{section.hub}`" if section.hub else "the recipe's `files`"


def _found(
    section: DataSection, folder: Path, given: Mapping[str, Table] | None
) -> dict[str, Table]:
    """The splits that the recipe names and the source has, by the source's names."""
    if section.hub:
        from ptkit.data.hub_rows import hub_rows  # it loads `datasets`

        loaded = hub_rows(section)
    elif section.builtin:
        loaded = _built_in(section.builtin)
    elif section.memory:
        if given is None:
            raise DataError(
                "the rows of this recipe were handed over by a program, and are not kept; name "
                "files or a hub dataset in `task.data`, or hand them over again (`dataset=`)"
            )
        loaded = dict(given)
    else:
        loaded = _from_files(section, folder)
    found = {}
    for split in SPLITS:
        name = getattr(section.splits, split)
        if name in loaded:
            found[name] = loaded[name]
        elif name not in (None, Splits.model_fields[split].default):
            # A name somebody gave is not replaced.
            raise DataError(f"{_name(section)} has no split `{name}`; {did_you_mean(name, loaded)}")
    return found


def _built_in(name: str) -> dict[str, Table]:
    if name not in builtin_sets():
        raise DataError(f"no built-in data `{name}`; {did_you_mean(name, builtin_sets())}")
    files = {split: BUILTIN / name / f"{split}.jsonl" for split in SPLITS}
    return {split: read_files([path]) for split, path in files.items() if path.is_file()}


def _from_files(section: DataSection, folder: Path) -> dict[str, Table]:
    files = section.files or {}
    known = [getattr(section.splits, split) or split for split in SPLITS]
    for split in files:
        if split not in known:
            raise DataError(f"`files` has the split `{split}`; {did_you_mean(split, known)}")
    found = {}
    for split, paths in files.items():
        names = [paths] if isinstance(paths, str) else paths
        found[split] = read_files([resolve_path(name, folder) for name in names])
    return found
