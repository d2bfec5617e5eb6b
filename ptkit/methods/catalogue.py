"""Which methods there are, and what each can be told; no tensor library is loaded.

A method is a package with two modules: `settings`, with its settings class, and `adapter`, with
what it does. Those in this folder are found by being there, those of other packages by their entry
points (`ptkit.plugins`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

from ptkit.errors import did_you_mean
from ptkit.plugins import brought, loaded
from ptkit.section import REGISTERED, FileType, MethodSection


@cache
def method_packages() -> tuple[str, ...]:
    """Dotted names of the packages that are methods."""
    found = iter_modules([str(Path(__file__).parent)])
    own = [f"ptkit.methods.{module.name}" for module in found if module.ispkg]
    return (*own, *(entry.value for entry in brought("ptkit.methods").values()))


def import_part(package: str, part: Literal["settings", "adapter"]) -> None:
    """Import a part of the method `package`, which registers it.

    Raises UserError naming the distribution that brings a method that cannot be imported.
    """
    for entry in brought("ptkit.methods").values():
        if entry.value == package:
            loaded(entry, part)
            return
    import_module(f"{package}.{part}")


@cache
def all_sections() -> dict[str, type[MethodSection]]:
    """Every method's settings class by its `kind`, in alphabetical order."""
    for package in method_packages():
        import_part(package, "settings")
    # In whatever order they were imported first, which is not the same in every program.
    return dict(sorted(REGISTERED.items()))


@cache
def method_sections() -> dict[str, type[MethodSection]]:
    """As `all_sections`, of those that a recipe may name."""
    return {kind: section for kind, section in all_sections().items() if section.in_recipes}


def method_of_files(peft_type: str, recorded: object = None) -> type[MethodSection] | None:
    """The settings class of the method whose files have this type; None where no method's have.

    recorded: the `kind` that ptkit's record names; without it the first method that reads them
    """
    able = {k: s for k, s in method_sections().items() if peft_type in s.file_types}
    return able.get(str(recorded)) or next(iter(able.values()), None)


def file_type(peft_type: str, recorded: object = None) -> FileType | None:
    """What the method of such files says of them; None where no method reads them."""
    section = method_of_files(peft_type, recorded)
    return None if section is None else section.file_types[peft_type]


def method_section(settings: dict[str, Any]) -> MethodSection:
    """The settings of one method. Raises ValueError for an unknown `kind`."""
    known = method_sections()
    kind = str(settings.get("kind"))
    if kind not in known:
        raise ValueError(f"`{kind}` is not a method; {did_you_mean(kind, known)}")
    return known[kind].model_validate(settings)
