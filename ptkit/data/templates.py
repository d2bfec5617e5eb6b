"""Templates of inputs and targets: text with `{column}` placeholders, nothing more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import TYPE_CHECKING, Any

from ptkit.data.values import kind_of
from ptkit.errors import DataError, did_you_mean

if TYPE_CHECKING:  # it loads libraries of tables
    from ptkit.data.table import Table

#: `column`, then `.field` and `[number]` in any order.
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[-?\d+\])*")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?\d+)\]")


class Template:
    """Text with `{column}` placeholders; `{{` and `}}` stand for braces.

    A column that holds a list is written one entry per line. An entry that is itself a list is
    written with its parts between bars: the triples of WebNLG and DART. `{answers.text}` is a field
    of a mapping, and `{answers.text[0]}` one entry of a list. A column with that name comes first.

    No attributes, conversions or format specifications: a recipe names what the data holds, it
    does not run code. Raises DataError when `text` is not such a template.
    """

    def __init__(self, text: str, name: str = "template") -> None:
        self.text, self.name = text, name
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, place, specification, conversion in Formatter().parse(text):
                if place is not None and (specification or conversion or not place.strip()):
                    raise ValueError(f"placeholders are `{{column}}`, found `{{{place}...}}`")
                self._parts.append((literal, place))
        except ValueError as error:
            raise DataError(
                f"`{name}` is not a template ({error}); write `{{{{` for a literal brace"
            ) from error

    @property
    def columns(self) -> list[str]:
        """What the placeholders name, in order of first use."""
        return list(dict.fromkeys(place for _, place in self._parts if place is not None))

    @property
    def words(self) -> str:
        """The text without its placeholders."""
        return "".join(literal for literal, _ in self._parts)

    def columns_of(self, rows: Table) -> list[str]:
        """The columns of `rows` that the template reads. Raises DataError for a missing one."""
        return [self._column(place, rows.columns)[0] for place in self.columns]

    def require(self, rows: Table) -> None:
        """Raise DataError unless `rows` has every column, and some row every field named."""
        for place in self.columns:
            column, steps = self._column(place, rows.columns)
            if not steps:
                continue
            fault = None
            for row in rows.only([column]):
                try:
                    if _reach(row[column], steps) is not None:
                        break
                except LookupError as error:
                    fault = fault or str(error.args[0])
            else:
                if fault is not None:
                    raise DataError(f"`{self.name}`: no row has `{{{place}}}`: {fault}")

    def render(self, row: Mapping[str, Any], where: str = "", *, complete: bool = False) -> str:
        """The template filled from `row`; what is missing in it is written as nothing.

        where: the row, for error messages; complete: nothing may be missing

        Raises DataError for a missing column, and for a value that has no text.
        """
        return "".join(
            literal + ("" if place is None else self._value(place, row, where, complete))
            for literal, place in self._parts
        )

    def _column(self, place: str, known: list[str]) -> tuple[str, list[str | int]]:
        """The column of a placeholder, and the steps from it to the value."""
        if place in known:
            return place, []
        ends = [i for i, letter in enumerate(place) if letter in ".["]
        for end in reversed(ends):
            steps = place[end:]
            if place[:end] in known and _PATH.fullmatch(f"x{steps}"):
                return place[:end], [field or int(number) for field, number in _STEP.findall(steps)]
        if not known:
            raise DataError(f"the data has no rows, so `{self.name}` finds no column `{place}`")
        raise DataError(
            f"`{self.name}` names the column `{place}`, which the data does not have; "
            + did_you_mean(place, known)
        )

    def _value(self, place: str, row: Mapping[str, Any], where: str, complete: bool) -> str:
        column, steps = self._column(place, list(row))
        try:
            value = _reach(row[column], steps)
        except LookupError:  # another row has it (see `require`)
            value = None
        told = f"{where}: " if where else ""
        if value is None:
            if complete:
                raise DataError(
                    f"{told}`{self.name}` names `{place}`, which is missing there; fill it in, or "
                    'leave the row out (in JSON, `""` is a text that is meant to be empty)'
                )
            return ""
        try:
            return _written(value)
        except TypeError as error:
            found = row[column] if not steps else value
            raise DataError(
                f"{told}`{self.name}` names `{place}`, which holds {kind_of(found)}: that is no "
                f"text. {_remedy(found, place)}"
            ) from error


def filled(pattern: str | None, text: str) -> str:
    """`text` in the template `pattern`, whose one column it is; as it is without a template.

    Raises DataError for a template of several columns, because it cannot tell which one is meant.
    """
    if pattern is None:
        return text
    template = Template(pattern)
    columns = template.columns
    if len(columns) > 1:
        named = ", ".join(f"`{column}`" for column in columns)
        raise DataError(
            f"the adapter's inputs are made of {named}, as {json_text(pattern)}; write the whole "
            "input like that and give it as it is (`--raw`, or without `template`)"
        )
    return template.render({columns[0]: text}) if columns else text


def json_text(text: str) -> str:
    """`text` on one line, between quotes."""
    return '"' + text.replace("\n", "\\n") + '"'


def _reach(value: Any, steps: list[str | int]) -> Any:
    """What lies at the end of `steps`; None where something on the way is missing.

    Raises LookupError saying what there is instead."""
    for step in steps:
        if value is None:
            return None
        if isinstance(step, int):
            if not isinstance(value, list):
                raise LookupError(f"`[{step}]` is of a list, and there is {kind_of(value)}")
            value = value[step] if -len(value) <= step < len(value) else None
            continue
        if not isinstance(value, Mapping):
            raise LookupError(f"`.{step}` is of a mapping, and there is {kind_of(value)}")
        if step not in value:
            raise LookupError(f"there is no field `{step}`; {did_you_mean(step, value)}")
        value = value[step]
    return value


def _written(value: Any) -> str:
    """Raises TypeError for what has no text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TypeError
    lines = []
    for entry in value:
        if entry is None:
            continue
        parts = entry if isinstance(entry, list) else [entry]
        if not all(part is None or isinstance(part, str) for part in parts):
            raise TypeError
        lines.append(" | ".join(part or "" for part in parts))
    return "\n".join(lines)


def _remedy(value: Any, place: str) -> str:
    if isinstance(value, Mapping) and value:
        return f"Name a field of it: `{{{place}.{next(iter(value))}}}`"
    if isinstance(value, list):
        first = next((entry for entry in value if entry is not None), None)
        if isinstance(first, Mapping) and first:
            return f"Name an entry and its field: `{{{place}[0].{next(iter(first))}}}`"
    return "Write the column as text in the file"
