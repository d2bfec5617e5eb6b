"""Rows of the three splits, from a built-in set, the hub or files.

Missing splits: without `test` the validation rows are the test rows; without `validation` the
last tenth of the training rows (at least one) is held out for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.schema import DataSection, Splits, resolve_path

BUILTIN = Path(__file__).resolve().parent / "builtin"
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits; all three are there and hold at least one row."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_rows(section: DataSection, folder: Path) -> Rows:
    """Read the rows `section` names; relative paths start at `folder`.

    Raises DataError naming what is missing, empty, unreadable or unreachable.
    """
    found = _found(section, folder)
    if "train" not in found:
        raise DataError(
            f"{_name(section)} has no train split; it has: {', '.join(found) or 'none'}"
        )
    for split, rows in found.items():
        if not len(rows):
            raise DataError(f"{_name(section)}: the {split} split is empty")
    train = found["train"]
    validation = found.get("validation")
    if validation is None:
        held_out = max(1, len(train) // 10)
        if len(train) <= held_out:
            raise DataError(
                f"{_name(section)} has one row and no validation split; at least two are needed"
            )
        validation = train.select(range(len(train) - held_out, len(train)))
        train = train.select(range(len(train) - held_out))
    test = found.get("test", validation)
    limits = section.limits
    return Rows(
        # A random draw is made per seed, from all rows (see `ptkit.training.experiment`).
        train if section.draw == "seed" else _first(train, limits.train),
        _first(validation, limits.validation),
        _first(test, limits.test),
    )


def builtin_sets() -> list[str]:
    """Names of the data sets that ship with ptkit."""
    return sorted(path.name for path in BUILTIN.iterdir() if (path / "train.jsonl").is_file())


def _name(section: DataSection) -> str:
    if section.builtin:
        return f"built-in data `{section.builtin}`"
    return f"hub data `{section.hub}`" if section.hub else "the recipe's `files`"


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _found(section: DataSection, folder: Path) -> dict[str, Dataset]:
    if section.hub:
        return _from_hub(section)
    if section.builtin:
        if section.builtin not in builtin_sets():
            raise DataError(
                f"no built-in data `{section.builtin}`; "
                + did_you_mean(section.builtin, builtin_sets())
            )
        home = BUILTIN / section.builtin
        return {
            split: _from_files([home / f"{split}.jsonl"])
            for split in SPLITS
            if (home / f"{split}.jsonl").is_file()
        }
    found = {}
    for split, paths in (section.files or {}).items():
        if split not in SPLITS:
            raise DataError(f"`files` has the split `{split}`; {did_you_mean(split, SPLITS)}")
        names = [paths] if isinstance(paths, str) else paths
        found[split] = _from_files([resolve_path(name, folder) for name in names])
    return found


def _from_files(paths: list[Path]) -> Dataset:
    kinds = set()
    for path in paths:
        if not path.is_file():
            raise DataError(f"no such data file: {path}")
        if path.suffix not in FORMATS:
            raise DataError(f"{path}: expected one of {', '.join(FORMATS)}")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
        kinds.add(path.suffix)
    if len(kinds) != 1:
        raise DataError(f"the files of one split must have one format, found {', '.join(kinds)}")
    suffix = kinds.pop()
    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        return load_dataset(
            FORMATS[suffix], data_files=[str(p) for p in paths], split="train", **options
        )
    except (DatasetGenerationError, ValueError, OSError) as error:
        for path in paths:
            _require_json_lines(path)
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"{', '.join(map(str, paths))} cannot be read: {reason}") from error


def _require_json_lines(path: Path) -> None:
    """Raise DataError naming the first line of a JSONL file that is not a JSON object."""
    if path.suffix != ".jsonl":
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error.msg})") from error
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: expected a JSON object per line")


def _from_hub(section: DataSection) -> dict[str, Dataset]:
    try:
        loaded = load_dataset(
            section.hub, section.config, revision=section.revision, data_dir=section.data_dir
        )
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"hub data `{section.hub}` cannot be loaded: {reason} "
            "(network, the name, its `config`, or `hf auth login` for gated data)"
        ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"hub data `{section.hub}` has no splits")
    found = {}
    for split in SPLITS:
        name = getattr(section.splits, split)
        if name is None:
            continue
        if name in loaded:
            found[split] = loaded[name]
        elif name != Splits.model_fields[split].default:  # a name somebody gave is not replaced
            raise DataError(
                f"hub data `{section.hub}` has no split `{name}`; {did_you_mean(name, loaded)}"
            )
    return found
