"""Methods and metrics that other packages bring, by the entry points of their distributions.

`ptkit.methods`: any name -> a package with `settings` and `adapter`, as those in `ptkit.methods`.
`ptkit.metrics`: the metric's name in recipes -> `module:function`, of (prediction, references).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from ptkit.errors import UserError

Group = Literal["ptkit.methods", "ptkit.metrics"]


@cache
def brought(group: Group) -> dict[str, EntryPoint]:
    """Name -> what other packages bring; nothing is imported. Raises UserError for a name that two
    packages bring."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UserError(
                f"{origin(other)} and {origin(entry)} both bring `{entry.name}` ({group}); "
                "uninstall one of them"
            )
    return found


def origin(entry: EntryPoint) -> str:
    """The package that brings `entry`, with its version."""
    dist = entry.dist
    return entry.value if dist is None else f"{dist.name} {dist.version}"


def loaded(entry: EntryPoint, part: str = "") -> Any:
    """What `entry` stands for, or the module `part` of it. Raises UserError when it cannot be
    imported."""
    try:
        return import_module(f"{entry.value}.{part}") if part else entry.load()
    except Exception as error:  # whatever a stranger's module raises as it is imported
        raise UserError(
            f"`{entry.name}` ({entry.value}), which {origin(entry)} brings, cannot be imported: "
            f"{type(error).__name__}: {error}; repair that package or uninstall it"
        ) from error
