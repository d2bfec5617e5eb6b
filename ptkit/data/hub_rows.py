"""Rows of the Hub's data sets.

`datasets` reads them, and keeps what it read in its cache. It would infer types of CSV and JSON
files. So those are read here by the rule for files (`ptkit.data.read_files`): a cell is its text,
and an empty one is missing. The result is kept apart, in `$PTKIT_CACHE/hub-data`, because the
common cache may hold the same files with other types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_dataset_builder
from datasets.builder import DatasetBuilder, Key
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json, JsonConfig

from ptkit.data.read_files import json_rows
from ptkit.data.streamed_rows import streamed
from ptkit.data.table import Row, Table
from ptkit.data.values import json_of, json_value
from ptkit.errors import DataError
from ptkit.formats.cache_home import cache_home
from ptkit.recipe.tasks import DataSection

#: The one column of rows that are JSON objects.
_ROW = "row, as JSON"


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
        loaded: Any
        if section.streaming:
            loaded = streamed(_raw_builder(asked), section)
        else:
            loaded = _untyped(asked) or _typed(asked)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        reason = (str(told or error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"hub data `{section.hub}` cannot be loaded: {reason} "
            "(network, the name, its `config`, or `hf auth login` for gated data)"
        ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"hub data `{section.hub}` has no splits")
    return {str(name): _table(rows) for name, rows in loaded.items()}


def _table(rows: Dataset) -> Table:
    if rows.column_names != [_ROW]:
        return Table.of(rows)
    objects = _Objects(rows)
    return Table(list(dict.fromkeys(name for row in objects for name in row)), objects)


@dataclass(frozen=True)
class _Objects(Sequence[Row]):
    """Rows that are kept as the text of a JSON object each, and read when they are asked for."""

    kept: Dataset

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, number: Any) -> Any:
        return json_value(self.kept[number][_ROW])

    def __iter__(self) -> Iterator[Row]:
        for row in self.kept:
            yield json_value(row[_ROW])


def _untyped(asked: dict[str, Any]) -> DatasetDict | None:
    """The data set as its files say it, where they are CSV or JSON; None where they are of another
    kind, or cannot be asked about."""
    try:
        builder = _raw_builder(asked)
    except (OSError, ValueError):  # without a network, and not in this cache
        return None
    if isinstance(builder, Csv | Json):
        builder.download_and_prepare()
    elif not isinstance(builder, Cache):
        return None
    loaded = builder.as_dataset()
    return loaded if isinstance(loaded, DatasetDict) else None


def _raw_builder(asked: dict[str, Any]) -> Any:
    """What reads the data set's files; CSV and JSON as they are written."""
    builder: Any = load_dataset_builder(**asked, cache_dir=str(cache_home() / "hub-data"))
    if isinstance(builder, Csv | Json):
        _infer_nothing(builder)
    return builder


def _typed(asked: dict[str, Any]) -> Any:
    """The data set as `datasets` reads it. Raises ValueError where types were inferred."""
    loaded = load_dataset(**asked)
    made_by = {rows.info.builder_name for rows in loaded.values()}
    if made_by & {"csv", "json"}:
        # Only without a network: the common cache holds what `load_dataset` made of the files.
        raise ValueError(
            "the cache has its cells with inferred types alone; read it once with a network"
        )
    return loaded


def _infer_nothing(builder: Any) -> None:
    """Let `builder` keep every cell as it is written, with the name of every numbered label."""
    assert isinstance(builder, DatasetBuilder)
    declared = builder.info.features or {}
    config: Any = builder.config
    config.features = builder.info.features = None
    reader: Any = builder
    if isinstance(builder, Csv):
        labels = {name: kind for name, kind in declared.items() if isinstance(kind, ClassLabel)}
        reader._generate_tables = partial(_tables, config, labels)
    else:
        reader._generate_tables = partial(_json_tables, config, declared)


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


def _json_tables(
    config: JsonConfig, declared: Mapping[str, Any], files_iterables: Any, **told: Any
) -> Iterator[tuple[Key, pa.Table]]:
    """What `Json._generate_tables` gives, with one column: the text of each row's object.

    Columns of Arrow have one type each, which the fields of objects need not have.
    """
    encoding = "utf-8-sig" if config.encoding.lower() in ("utf-8", "utf8") else config.encoding
    names = list(map(str, told.get("original_files") or ()))
    for number, files in enumerate(files_iterables):
        part = 0
        for file in files:
            name = names[number].rsplit("/", 1)[-1] if number < len(names) else f"file {number + 1}"
            # A compressed file, or one of an archive, has a name such as `gzip://a.json::/b`.
            with fsspec.open(file, "rt", encoding=encoding, errors=config.encoding_errors) as text:
                rows = (_named(row, declared) for row in json_rows(text, name, config.field))
                while batch := [json_of(row) for row in islice(rows, 10_000)]:
                    yield Key(number, part), pa.table({_ROW: pa.array(batch, pa.string())})
                    part += 1
        if not part:
            raise DataError(f"{name} has no rows")


def _named(value: Any, feature: Any) -> Any:
    """`value` with the names of numbered labels, at whatever depth `feature` declares them."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else feature
        return [_named(entry, getattr(inner, "feature", inner)) for entry in value]
    if isinstance(value, dict):
        fields = feature if isinstance(feature, Mapping) else {}
        return {name: _named(entry, fields.get(name)) for name, entry in value.items()}
    return _cell(value, feature) if isinstance(feature, ClassLabel) else value


def _cell(value: Any, label: ClassLabel | None) -> str | None:
    text = value if isinstance(value, str) and value else None
    if text is None or label is None or text in label.names:
        return text
    try:
        number = int(text)
    except ValueError:
        return text
    return str(label.int2str(number)) if 0 <= number < label.num_classes else None
