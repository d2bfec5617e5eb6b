"""JSON files that ptkit writes and reads back: one model each, with a version.

A file's `format` says which version of its layout it has. Reading brings an older file up to date
by one small function per step, from version n to n + 1. Then it checks every value. A file
of a newer version is refused: this version cannot know what its values mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ptkit.errors import PtkitError
from ptkit.formats import atomic

#: The key of a file's version.
FORMAT = "format"
#: From the values of version n to those of version n + 1; the argument is left as it is.
Migration = Callable[[dict[str, Any]], dict[str, Any]]
#: pydantic's kinds of error for what should have been an object.
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
#: Faults that one message names.
_NAMED = 3


class FileSection(BaseModel):
    """A part of a file: all values are written, unknown keys are refused, types are not coerced."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    def updated(self, **changes: Any) -> Self:
        """The section with some values replaced; they are checked as those of a file are."""
        return type(self).model_validate({**self._given(), **changes})

    def _given(self) -> dict[str, Any]:
        """The values it was made of, unknown ones too."""
        named = [name for name in type(self).model_fields if name in self.model_fields_set]
        return {**{name: getattr(self, name) for name in named}, **(self.model_extra or {})}


class Stated(FileSection):
    """A section that writes only what it was given: what is read and written again is the same."""

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: v for name, v in dump(self).items() if name in self.model_fields_set}

    def without(self, *names: str) -> Self:
        """The section as if `names` had not been given."""
        given = self._given()
        return type(self).model_validate({k: given[k] for k in given if k not in names})


class Open(Stated):
    """A stated section that keeps keys it does not know, and writes them back."""

    model_config = ConfigDict(extra="allow")


Model = TypeVar("Model", bound=FileSection)


@dataclass(frozen=True)
class FileKind(Generic[Model]):
    """One kind of file.

    model: what it holds; migrations: the first leads from version 0, which has no `format`, to 1
    error: what is raised for a file that cannot be read; fix: what the user can do about it
    """

    model: type[Model]
    migrations: Sequence[Migration]
    error: type[PtkitError]
    fix: str

    @property
    def format(self) -> int:
        """The version that is written."""
        return len(self.migrations)

    def as_file(self, section: Model) -> dict[str, Any]:
        """The JSON values of a file."""
        return {FORMAT: self.format, **section.model_dump(mode="json")}

    def write(self, path: Path, section: Model) -> None:
        """Write the file `path`; it appears complete or not at all."""
        atomic.write_json(path, self.as_file(section))

    def read_file(self, path: Path) -> Model:
        """What the file `path`, which ptkit wrote on this machine, says; see `read`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} is not valid JSON ({error}); {self.fix}") from error
        return self.read(values, path)

    def read(self, values: Any, where: object) -> Model:
        """What the JSON values of the file `where` say, brought up to date.

        Raises `error` for a newer version, and for values that are not those of their version.
        """
        if not isinstance(values, dict):
            raise self.error(
                f"{where} should hold a JSON object, found {type(values).__name__}; {self.fix}"
            )
        found = values.get(FORMAT, 0)
        if type(found) is not int or found < 0:
            raise self.error(f"{where}: `{FORMAT}` should be a whole number; {self.fix}")
        if found > self.format:
            raise self.error(
                f"{where} has format {found}, written by a newer ptkit; this is ptkit "
                f"{version('ptkit')}, which reads formats up to {self.format}: update it with "
                "`pip install --upgrade ptkit`"
            )
        current = {key: value for key, value in values.items() if key != FORMAT}
        for step in self.migrations[found:]:
            current = step(current)
        try:
            # As JSON: a list is a tuple's there, and what is nested too deeply is refused.
            return self.model.model_validate_json(json.dumps(current))
        except ValidationError as error:
            raise self.error(f"{where}: {_faults(error)}; {self.fix}") from error


def _faults(error: ValidationError) -> str:
    """What is wrong with a file's values, without the values themselves."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = []
    for fault in found[:_NAMED]:
        place = "".join(f"`{'.'.join(map(str, fault['loc']))}` " if fault["loc"] else [])
        said = "should be an object" if fault["type"] in _NO_OBJECT else _SAID.get(fault["type"])
        told.append(place + (said or fault["msg"].replace("Input should", "should")))
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return ", ".join([*told, *more])


def unchanged(values: dict[str, Any]) -> dict[str, Any]:
    """0 -> 1 of files whose values stayed what they were: they only got a version."""
    return dict(values)


_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is not known to this version",
}
