"""Fields that a row of typed data never had.

Arrow gives all mappings of a column the same fields, and fills those that one lacks with null. So a
tool call in Parquet has the arguments of every other tool. What JSON files hold is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptkit.data.table import Row, is_of


def without_fillers(row: Row, features: Mapping[str, Any] | None) -> Row:
    """`row` without fields that are null within its values, where it is of typed data.

    features: see `Table`; a column of JSON keeps its nulls, for it is filled with none
    """
    if features is None:
        return row
    return {column: _unfilled(value, features.get(column)) for column, value in row.items()}


def _unfilled(value: Any, feature: Any) -> Any:
    if is_of(feature, "datasets.Json"):
        return value
    if isinstance(value, list):
        inner = getattr(feature, "feature", None)
        if isinstance(feature, list) and feature:
            inner = feature[0]
        return [_unfilled(entry, inner) for entry in value]
    if isinstance(value, Mapping):
        fields = feature if isinstance(feature, Mapping) else {}
        kept = {name: entry for name, entry in value.items() if entry is not None}
        return {name: _unfilled(entry, fields.get(name)) for name, entry in kept.items()}
    return value
