"""Pydantic's validation errors as lines a recipe's author understands."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ptkit.errors import did_you_mean, nearest
from ptkit.methods.catalogue import method_sections
from ptkit.recipe.elsewhere import elsewhere
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import Task
from ptkit.recipe.yaml_source import KeyPath, YamlSource
from ptkit.section import MethodSection

TASKS: dict[str, type[BaseModel]] = {
    get_args(task.model_fields["kind"].annotation)[0]: task for task in get_args(Task)
}


def recipe_faults(source: YamlSource) -> tuple[Recipe | None, list[str]]:
    """Validate `source`; returns the recipe, or every fault as one line with its place.

    Methods are validated one by one with the settings class their `kind` names, so that a
    fault in one hides none in another.
    """
    faults: list[str] = []
    data = dict(source.data)
    entries = data.get("methods")
    if isinstance(entries, list):
        sections = [_method(source, i, entry, faults) for i, entry in enumerate(entries)]
        if all(section is not None for section in sections):
            data["methods"] = sections
        else:
            # Anything valid, so that the rest of the recipe is still checked.
            stand_in = method_sections()["base"](kind="base")
            data["methods"] = [
                stand_in.model_copy(update={"label": f"{i}"}) for i in range(len(entries))
            ]
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # A default that depends on other fields is not made where one of those is at fault.
        found = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
        faults += [_fault(source, e, ()) for e in found]
        recipe = None
    unique = list(dict.fromkeys(faults))
    return (None, unique) if unique else (recipe, [])


def _method(source: YamlSource, index: int, entry: Any, faults: list[str]) -> MethodSection | None:
    path: KeyPath = ("methods", index)
    known = method_sections()
    if not isinstance(entry, dict):
        faults.append(
            f"{source.where(path)}: `methods.{index}` expected `{{kind: ..., ...}}`, "
            f"found {entry!r}"
        )
        return None
    kind = entry.get("kind")
    if kind not in known:
        what = "is missing" if kind is None else f"`{kind}` is not a method"
        hint = f"known: {', '.join(known)}" if kind is None else did_you_mean(str(kind), known)
        faults.append(f"{source.where((*path, 'kind'))}: `methods.{index}.kind` {what}; {hint}")
        return None
    try:
        return known[kind].model_validate(entry)
    except ValidationError as error:
        faults += [_fault(source, e, path) for e in error.errors()]
        return None


def _fault(source: YamlSource, error: Any, below: KeyPath) -> str:
    """One line for one of pydantic's errors, found under the path `below`."""
    path = _written_path(source.data, (*below, *error["loc"]))
    dotted = ".".join(map(str, path))
    where = source.where(path)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _fields_at(source.data, path[:-1])
        key = str(path[-1])
        return f"{where}: `{dotted}` unknown; {elsewhere(key, known) or did_you_mean(key, known)}"
    if kind == "missing":
        description = _description(source.data, path)
        return f"{where}: `{dotted}` is missing" + (
            f"; expected: {description}" if description else ""
        )
    if kind == "union_tag_not_found":
        kinds = ", ".join(f"`{kind}`" for kind in TASKS)
        return f"{where}: `{dotted}.kind` is missing; expected one of {kinds}"
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        return f"{where}: `{dotted}.kind` `{tag}` unknown; {did_you_mean(tag, TASKS)}"
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ")
        found = _shown(error["input"])
        hint = ""
        if kind == "literal_error" and isinstance(error["input"], str):
            options = list(expected.split("'")[1::2])
            close = nearest(error["input"], options)
            hint = f"; did you mean `{close}`?" if close else ""
        return f"{where}: `{dotted}` expected {expected}, found {found}{hint}"
    if not path:
        # Faults of several keys at once name the one to change first.
        named = re.match(r"`([\w.]+)`: ", message)
        where = source.where(tuple(named[1].split("."))) if named else where
    return f"{where}: {f'`{dotted}`: ' if dotted else ''}{message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written_path(data: Any, location: KeyPath) -> KeyPath:
    """Pydantic's error location without what is not in the file.

    Discriminated unions put their tag into it (`task.generation.input`), plain unions the name
    of the alternative that failed (`files.train.list[str]`).
    """
    path: KeyPath = ()
    place = data
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(place, dict):
            if part in place:
                place = place[part]
            elif not last and part == place.get("kind"):
                continue
            elif not last:
                break
            else:
                place = None  # a missing key
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        else:
            break
        path = (*path, part)
    return path


def _section_at(data: Any, path: KeyPath) -> type[BaseModel] | None:
    """The section class that describes the mapping at `path`."""
    section: type[BaseModel] | None = Recipe
    place: Any = data
    for i, part in enumerate(path):
        inside = isinstance(place, list) or (isinstance(place, dict) and part in place)
        place = place[part] if inside else {}
        kind = place.get("kind") if isinstance(place, dict) else None
        if path[:1] == ("task",) and i == 0:
            section = TASKS.get(str(kind))
        elif path[:1] == ("methods",):
            section = method_sections().get(str(kind)) if i == 1 else None
        elif section is not None and part in section.model_fields:
            section = _section_in(section.model_fields[str(part)].annotation)
        else:
            section = None
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in `annotation`, which may be optional."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _fields_at(data: Any, path: KeyPath) -> list[str]:
    section = _section_at(data, path)
    return list(section.model_fields) if section else []


def _description(data: Any, path: KeyPath) -> str | None:
    section = _section_at(data, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return " ".join((field.description or "").split()) if field else None
