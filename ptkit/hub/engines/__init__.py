"""Engines that adapters are exported to. Each is a module of this folder, and found by being there.

Such a module has

    write(sources, out, *, base=None, replace_out=False) -> Written

which reads the adapters `sources` (runs or adapter folders of one base) and writes the folder
`out`, whole or not at all. It raises UserError or AdapterError for what its engine cannot hold.
Further keywords are the engine's settings: `ptkit export` sets those that it has options for. The
first line of a module's docstring says what it writes: `ptkit export --help` shows it, and imports
nothing for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ptkit.declared import declared

if TYPE_CHECKING:
    from ptkit.runtime.base_model import Base


@dataclass(frozen=True)
class Written:
    """What was written. bytes: of all files; prompts: adapter -> what its requests begin with,
    where an engine knows it by its prompt."""

    path: Path
    virtual_tokens: int
    bytes: int
    prompts: dict[str, str] = field(default_factory=dict)


class Write(Protocol):
    """Writes adapters for one engine."""

    def __call__(
        self,
        sources: Sequence[Path],
        out: Path,
        *,
        base: Base | None = None,
        replace_out: bool = False,
        **settings: Any,
    ) -> Written: ...


@cache
def engines() -> dict[str, str]:
    """Each engine's name, and in a line what is written for it."""
    said = declared(Path(__file__).parent, "__doc__")
    return {name.replace("_", "-"): line for name, line in said.items()}


def writer(engine: str) -> Write:
    """What writes adapters for `engine`, one of `engines()`."""
    module = import_module(f"{__name__}.{engine.replace('-', '_')}")
    return cast(Write, module.write)
