"""Adapters that other libraries wrote, read as what they are. Each module with `LIBRARY` is one
library's format, and found by being there.

Such a module has

    LIBRARY             how people call the library
    FORMATS             rows of docs/foreign.md: what it wrote, what becomes of it, why, and how it
                        is tested
    found(source)       what `source` is, in a few words; None where another library wrote it
    why_not(source)     why it is refused, as far as names and settings tell; None where it may be
                        read. No pickle is opened for it
    read(source, base)  the adapter in PEFT's layout, or AdapterError that says why it is none
    labels(source)      where its adapters may classify: the labels of the head that the base is to
                        have, None for a language model

A refusal is as good as an answer: nothing is read as something that is only like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ptkit.declared import declared
from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import CONFIG, INT8_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from ptkit.formats.adapter_files import AdapterFiles
    from ptkit.hub.foreign.source import Source
    from ptkit.runtime.base_model import Base


@dataclass(frozen=True)
class Foreign:
    """An adapter of another library, in PEFT's layout.

    notes: what to know of it, a sentence each
    """

    files: AdapterFiles
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """One library's format; see the docstring of this package."""

    LIBRARY: str
    #: Whether `read` does without a base.
    NEEDS_BASE: bool

    def found(self, source: Source) -> str | None: ...

    def why_not(self, source: Source) -> str | None: ...

    def read(self, source: Source, base: Base | None) -> Foreign: ...


@cache
def libraries() -> dict[str, str]:
    """Module -> the library whose adapters it reads."""
    return declared(Path(__file__).parent, "LIBRARY")


def format_of(source: Source) -> tuple[Format, str]:
    """The format of `source`, and what it is in a few words.

    Raises AdapterError where no library that is known here wrote it.
    """
    known_one = recognised(source)
    if known_one is not None:
        return known_one
    if _is_pefts(source):
        raise AdapterError(
            f"{source.path} is an adapter in PEFT's layout already, which ptkit reads as it is: "
            "give it to --adapter"
        )
    below = foreign_below(source) + [n for n in source.folders if _is_pefts(source.below(n))]
    if below:
        names = ", ".join(f"`{source.path / name}`" for name in sorted(below))
        raise AdapterError(f"{source.path} holds several adapters, name one: {names}")
    known = ", ".join(sorted(libraries().values()))
    raise AdapterError(
        f"{source.path} is nothing that ptkit knows: neither an adapter in PEFT's layout nor one "
        f"of {known} (docs/foreign.md)"
    )


def recognised(source: Source) -> tuple[Format, str] | None:
    """As `format_of`; None where no library that is known here wrote it."""
    for name in libraries():
        module = cast(Format, import_module(f"{__name__}.{name}"))
        what = module.found(source)
        if what is not None:
            return module, what
    return None


def foreign_below(source: Source) -> list[str]:
    """The folders directly below `source` that another library wrote."""
    return [name for name in source.folders if recognised(source.below(name)) is not None]


def _is_pefts(source: Source) -> bool:
    named = isinstance(source.settings(CONFIG).get("peft_type"), str)
    return named and any(name in source.names for name in (WEIGHTS, INT8_WEIGHTS))
