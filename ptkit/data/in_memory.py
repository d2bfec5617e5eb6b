"""Rows that a program hands over, in place of a recipe's files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from ptkit.data.table import Table, is_of
from ptkit.errors import DataError
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.tasks import DataSection, Splits

if TYPE_CHECKING:  # whoever hands over rows of these has loaded them
    import pandas as pd
    from datasets import Dataset

#: What may be handed over: one split, or several by name.
Rows: TypeAlias = "Dataset | pd.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Any]"


def tables_of(dataset: Rows) -> dict[str, Table]:
    """Split -> rows. A data set without splits is `train`; its rows are read where they lie.

    dataset: a `datasets.Dataset` or `DatasetDict`, a data frame of pandas, a list of mappings, or a
        mapping from splits to any of these

    Raises DataError for anything else, and for a row that is no mapping.
    """
    parts = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    return {str(split): table_of(str(split), rows) for split, rows in parts.items()}


def table_of(split: str, rows: Any) -> Table:
    """The rows of one split, which messages call by its name. Raises DataError as `tables_of`."""
    if is_of(rows, "pandas.DataFrame"):
        rows = _of_frame(split, rows)
    if is_of(rows, "datasets.Dataset"):
        return Table.of(rows)
    if is_of(rows, "datasets.IterableDataset"):
        raise DataError(
            f"the split `{split}` is streamed, and training reads its rows several times and in "
            "random order; hand over `Dataset.from_list([*rows])`, or name the set in the recipe"
        )
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise DataError(
            f"the split `{split}` is a {type(rows).__name__}; expected a datasets.Dataset, a "
            "data frame, or a list of rows, each a mapping from columns to values"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{split} row {number} is a {type(row).__name__}, expected a mapping")
    own = [_own_values(row) for row in rows]
    return Table([*dict.fromkeys(column for row in own for column in row)], own)


def _own_values(value: Any) -> Any:
    """`value` with Python's own lists and truth values in place of those of numpy, torch and
    pandas, and with names of columns that are texts. Numbers keep their types, and with them their
    digits."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _own_values(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _own_values([*value] if value.ndim else value[()])
    if is_of(value, "torch.Tensor"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_own_values(entry) for entry in value]
    if isinstance(value, np.bool | np.integer):
        return value.item()
    if isinstance(value, float | np.floating) and math.isnan(value):
        return None
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which need not be loaded
        return None
    return value


def _of_frame(split: str, frame: pd.DataFrame) -> Dataset:
    """The rows of a data frame, without its index. Raises DataError where a column has no type."""
    from datasets import Dataset

    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"the split `{split}` is a data frame that Arrow cannot hold: {error}"
        ) from error


def with_rows(loaded: LoadedRecipe, dataset: Rows) -> LoadedRecipe:
    """`loaded` with the rows of `dataset` in place of those its recipe names; its limits and its
    way to draw stay. Raises DataError as `tables_of` does."""
    given = tables_of(dataset)
    if "train" not in given:
        raise DataError(
            f"the data has the splits {', '.join(given) or 'none'}; one must be called `train`"
        )
    own = loaded.recipe.task.data
    absent = {split: None for split in ("validation", "test") if split not in given}
    names = Splits.model_validate(absent)
    section = DataSection(memory=True, splits=names, limits=own.limits, draw=own.draw)
    task = loaded.recipe.task.model_copy(update={"data": section})
    recipe = loaded.recipe.model_copy(update={"task": task})
    return replace(loaded, recipe=recipe, given=given)
