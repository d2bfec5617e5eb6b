"""Templates of inputs and targets: text with `{column}` placeholders, nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from ptkit.errors import DataError, did_you_mean


class Template:
    """Text with `{column}` placeholders; `{{` and `}}` stand for braces.

    A column that holds a list is written one entry per line, an entry that is itself a list with
    its parts between bars: the triples of WebNLG and DART.

    No attribute or index access (`{a.b}`, `{a[0]}`) and no format specifications: a recipe
    names columns, it does not run code. Raises DataError when `text` is not such a template.
    """

    def __init__(self, text: str, name: str = "template") -> None:
        self.text, self.name = text, name
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, column, specification, conversion in Formatter().parse(text):
                if column is not None and (
                    not column or set(column) & set(".[]!") or specification or conversion
                ):
                    raise ValueError(f"placeholders are `{{column}}`, found `{{{column}...}}`")
                self._parts.append((literal, column))
        except ValueError as error:
            raise DataError(
                f"`{name}` is not a template ({error}); write `{{{{` for a literal brace"
            ) from error

    @property
    def columns(self) -> list[str]:
        """The columns the template reads, in order of first use."""
        return list(dict.fromkeys(column for _, column in self._parts if column is not None))

    @property
    def words(self) -> str:
        """The text without its placeholders."""
        return "".join(literal for literal, _ in self._parts)

    def require(self, known: list[str]) -> None:
        """Raise DataError unless every column is in `known`."""
        for column in self.columns:
            if column not in known:
                raise DataError(
                    f"`{self.name}` names the column `{column}`, which the data does not have; "
                    + did_you_mean(column, known)
                )

    def render(self, row: Mapping[str, Any]) -> str:
        """The template filled from `row`. Raises DataError for a missing column."""
        self.require(list(row))
        return "".join(
            literal + ("" if column is None else _written(row[column]))
            for literal, column in self._parts
        )


def filled(pattern: str | None, text: str) -> str:
    """`text` in the template `pattern`, if that has one column; else `text` as it is."""
    if pattern is None:
        return text
    template = Template(pattern)
    columns = set(template.columns)
    return template.render({columns.pop(): text}) if len(columns) == 1 else text


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(
            " | ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry)
            for entry in value
        )
    return str(value)
