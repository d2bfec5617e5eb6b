"""One recipe that stands for many: sweeps over its keys, and searches for its methods' settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ptkit.errors import did_you_mean
from ptkit.methods.catalogue import method_section
from ptkit.recipe.values import Range, Values
from ptkit.section import MethodSection

if TYPE_CHECKING:
    from ptkit.recipe.schema import Recipe

#: Swept key, as it is shown -> value.
Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method with one combination of its own swept keys.

    family: the entry of the recipe it comes from; settings: what it differs in from its siblings
    """

    section: MethodSection
    family: str
    settings: Settings


@dataclass(frozen=True)
class Variant:
    """The recipe with one combination of the swept keys that lie outside its methods."""

    recipe: Recipe
    settings: Settings
    entries: tuple[Entry, ...]


def expand(recipe: Recipe) -> list[Variant]:
    """Every combination of the values in `recipe.sweep`; without a sweep, the recipe alone.

    Raises ValueError naming the key for one that is not there or a value it does not take.
    """
    outer = {k: v for k, v in recipe.sweep.items() if not k.startswith("methods.")}
    variants = []
    for settings in _combinations(outer):
        data = recipe.model_dump(exclude={"sweep", "methods"})
        for key, value in settings.items():
            _set(data, key.split("."), value, key)
        entries = [e for method in recipe.methods for e in _entries(method, recipe)]
        data["methods"] = [entry.section.model_dump() for entry in entries]
        # These two name the methods as the recipe does, not as the entries made of them.
        data |= {"budget": None, "evaluate": {**data["evaluate"], "baseline": None}}
        try:
            varied = type(recipe).model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{_told(settings)}: {_reason(error)}") from error
        evaluate = varied.evaluate.model_copy(update={"baseline": recipe.evaluate.baseline})
        varied = varied.model_copy(update={"budget": recipe.budget, "evaluate": evaluate})
        shown = {_short(key): value for key, value in settings.items()}
        variants.append(Variant(varied, shown, tuple(entries)))
    return variants


def check_sweep(recipe: Recipe) -> None:
    """Raise ValueError when a key or value of `recipe.sweep` cannot be."""
    for key, values in recipe.sweep.items():
        if isinstance(values, Range) and values.steps is None:
            raise ValueError(f"`{key}`: a range that is swept needs `steps`")
        if not key.startswith("methods."):
            continue
        title, _, name = key.removeprefix("methods.").partition(".")
        if title != "*":
            _require(title, [m.title for m in recipe.methods], f"`{key}`: no method `{title}`")
        if not any(_has(method, title, name) for method in recipe.methods):
            known = {k for m in recipe.methods if title in ("*", m.title) for k in m.model_dump()}
            raise ValueError(f"`{key}`: no key `{name}`; {did_you_mean(name, known)}")
    defaults = type(recipe).model_construct(**{**recipe.__dict__, "budget": None})
    expand(defaults)


def check_budget(recipe: Recipe) -> None:
    """Raise ValueError when a method, key or value of `recipe.budget` cannot be."""
    assert recipe.budget is not None
    for title, search in recipe.budget.search.items():
        titles = [m.title for m in recipe.methods]
        _require(title, titles, f"`search.{title}`: no such method in the recipe")
        section = next(m for m in recipe.methods if m.title == title)
        if not section.trains:
            raise ValueError(f"`search.{title}`: `{section.kind}` trains nothing")
        for key, values in search.items():
            _require(key, section.model_dump(), f"`search.{title}`: no key `{key}`")
            ends = [values.low, values.high] if isinstance(values, Range) else values
            for value in ends:
                changed(section, {key: value})


def changed(section: MethodSection, settings: Settings, label: str | None = None) -> MethodSection:
    """`section` with other settings. Raises ValueError for a value the key does not take."""
    data = section.model_dump()
    for key, value in settings.items():
        whole = isinstance(value, float) and value.is_integer()
        # Ranges and searches draw real numbers; whole ones may stand for counts.
        _set(data, key.split("."), int(value) if whole and value else value, key)
    if label is not None:
        data["label"] = label
    try:
        return method_section(data)
    except ValidationError as error:
        raise ValueError(f"`{section.title}`, {_told(settings)}: {_reason(error)}") from error


def values_of(values: Values) -> list[Any]:
    """The values a sweep takes. A range of whole numbers gives whole numbers."""
    if not isinstance(values, Range):
        return values
    found = [float(f"{v:.6g}") for v in _spaced(values)]
    if float(values.low).is_integer() and float(values.high).is_integer():
        return list(dict.fromkeys(round(v) for v in found))
    return found


def _spaced(values: Range) -> Iterator[float]:
    """`values.steps` numbers from `low` to `high`, both included."""
    assert values.steps is not None
    for step in range(values.steps):
        share = step / (values.steps - 1)
        if values.log:
            yield values.low ** (1 - share) * values.high**share
        else:
            yield values.low * (1 - share) + values.high * share


def _entries(method: MethodSection, recipe: Recipe) -> Iterator[Entry]:
    own = {}
    for key, values in recipe.sweep.items():
        title, _, name = key.removeprefix("methods.").partition(".")
        if key.startswith("methods.") and _has(method, title, name):
            own[name] = values
    for settings in _combinations(own):
        shown = {_short(name): value for name, value in settings.items()}
        label = " ".join([method.title, *(f"{k}={_written(v)}" for k, v in shown.items())])
        section = changed(method, settings, label) if settings else method
        yield Entry(section, method.title, shown)


def _combinations(swept: dict[str, Values]) -> Iterator[Settings]:
    for values in product(*(values_of(v) for v in swept.values())):
        yield dict(zip(swept, values, strict=True))


def _has(method: MethodSection, title: str, name: str) -> bool:
    return title in ("*", method.title) and name.split(".")[0] in type(method).model_fields


def _set(data: Any, path: list[str], value: Any, key: str) -> None:
    """Put `value` at `path` in nested dicts. Raises ValueError when there is no such place."""
    for position, part in enumerate(path):
        if not isinstance(data, dict):
            raise ValueError(f"`{key}`: `{'.'.join(path[:position])}` is not a section here")
        _require(part, data, f"`{key}`: no key `{part}`")
        if position == len(path) - 1:
            data[part] = copy.deepcopy(value)
        data = data[part]


def _require(name: str, known: Any, fault: str) -> None:
    if name not in known:
        raise ValueError(f"{fault}; {did_you_mean(name, known)}")


def _short(key: str) -> str:
    """What is left of a key in tables: its last two parts, of a method's key the last one."""
    return ".".join(key.split(".")[-2:])


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _told(settings: Settings) -> str:
    return ", ".join(f"`{key}` = {value!r}" for key, value in settings.items())


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
