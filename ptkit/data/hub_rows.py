"""Rows of the Hub's data sets.

`datasets` reads them, and keeps what it read in its cache. Of CSV files it would infer types, so
those are read here by the rule for files (`ptkit.data.read_files`): a cell is its text, and an
empty one is missing. What came of them is kept apart, in `$PTKIT_CACHE/hub-data`: the common cache
may hold the same files with other types.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, DatasetDict, load_dataset, load_dataset_builder
from datasets.builder import DatasetBuilder, Key
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.csv.csv import Csv, CsvConfig

from ptkit.data.table import Table
from ptkit.errors import DataError
from ptkit.formats.cache_home import cache_home
from ptkit.recipe.schema import DataSection


def hub_rows(section: DataSection) -> dict[str, Table]:
    """The splits of the data set `section.hub`, by their names.

    Raises DataError when it cannot be found, reached or read, or has no splits.
    """
    assert section.hub is not None
    asked: dict[str, Any] = {
        "path": section.hub, "name": section.config, "revision": section.revision,
        "data_dir": section.data_dir,
    }  # fmt: skip
    try:
        loaded = _of_text(asked) or load_dataset(**asked)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        reason = str(told or error).strip().splitlines()[0]
        raise DataError(
            f"hub data `{section.hub}` cannot be loaded: {reason} "
            "(network, the name, its `config`, or `hf auth login` for gated data)"
        ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"hub data `{section.hub}` has no splits")
    return {str(name): Table.of(rows) for name, rows in loaded.items()}


def _of_text(asked: dict[str, Any]) -> DatasetDict | None:
    """The data set as texts, where its files are CSV; None where they are of another kind."""
    kept = str(cache_home() / "hub-data")
    try:
        builder: Any = load_dataset_builder(**asked, cache_dir=kept)
    except (OSError, ValueError):  # without a network, and not in this cache
        return None
    if isinstance(builder, Csv):
        _read_as_text(builder)
        builder.download_and_prepare()
    elif not isinstance(builder, Cache):
        return None
    loaded = builder.as_dataset()
    return loaded if isinstance(loaded, DatasetDict) else None


def _read_as_text(builder: Any) -> None:
    """Let `builder` make a text of every cell, and the name of every numbered label."""
    assert isinstance(builder, DatasetBuilder)
    declared = builder.info.features or {}
    labels = {name: kind for name, kind in declared.items() if isinstance(kind, ClassLabel)}
    config: Any = builder.config
    config.features = builder.info.features = None
    reader: Any = builder
    reader._generate_tables = partial(_tables, config, labels)


def _tables(
    config: CsvConfig, labels: dict[str, ClassLabel], base_files: Any, files_iterables: Any
) -> Iterator[tuple[Key, pa.Table]]:
    """What `Csv._generate_tables` gives, with columns of texts."""
    settings = {
        **config.pd_read_csv_kwargs, "dtype": str, "keep_default_na": False,
        # What the data set's own card calls missing is missing.
        "na_filter": config.na_values is not None,
    }  # fmt: skip
    for number, files in enumerate(files_iterables):
        for file in files:
            for part, frame in enumerate(pd.read_csv(file, iterator=True, **settings)):
                if config.index_col is None and not isinstance(frame.index, pd.RangeIndex):
                    raise ValueError("a row of its CSV file has more cells than the header")
                columns = {
                    str(name): [_cell(value, labels.get(str(name))) for value in frame[name]]
                    for name in frame.columns
                }
                yield (
                    Key(number, part),
                    pa.table(
                        {name: pa.array(cells, pa.string()) for name, cells in columns.items()}
                    ),
                )


def _cell(value: Any, label: ClassLabel | None) -> str | None:
    text = value if isinstance(value, str) and value else None
    if text is None or label is None or text in label.names:
        return text
    try:
        number = int(text)
    except ValueError:
        return text
    return str(label.int2str(number)) if 0 <= number < label.num_classes else None
