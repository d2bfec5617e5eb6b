"""Adapters that other libraries wrote, read as what they are. Each module with `LIBRARY` is one
library's format, and found by being there.

Such a module has

    LIBRARY             how people call the library
    FORMATS             rows of docs/foreign.md: what it wrote, what becomes of it, why
    found(source)       what `source` is, in a few words; None where another library wrote it
    read(source, base)  the adapter in PEFT's layout, or AdapterError that says why it is none

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

    def read(self, source: Source, base: Base | None) -> Foreign: ...


@cache
def libraries() -> dict[str, str]:
    """Module -> the library whose adapters it reads."""
    return declared(Path(__file__).parent, "LIBRARY")


def format_of(source: Source) -> tuple[Format, str]:
    """The format of `source`, and what it is in a few words.

    Raises AdapterError where no library that is known here wrote it.
    """
    for name in libraries():
        module = cast(Format, import_module(f"{__name__}.{name}"))
        what = module.found(source)
        if what is not None:
            return module, what
    known = ", ".join(sorted(libraries().values()))
    raise AdapterError(
        f"{source.path} is nothing that ptkit knows: neither an adapter in PEFT's layout nor one "
        f"of {known} (docs/foreign.md)"
    )
