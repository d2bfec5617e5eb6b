"""What recipes and methods' settings are made of.

Below both, so that a method's settings need no recipe, and a recipe no tensor library.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MethodSection(Section):
    """What every method's settings share; each method's own are in its folder's `settings.py`."""

    trains: ClassVar[bool] = True
    """False for baselines that learn nothing (they run once, whatever the seeds)."""
    shares_batch: ClassVar[bool] = False
    """Whether adapters of this method can be trained in one batch, row by row."""
    alone: ClassVar[str] = "it changes the base's weights"
    """Why they cannot."""

    kind: str
    """The method."""
    label: str | None = None
    """Name in tables; must be unique within the recipe. Default: the method's name."""

    @property
    def title(self) -> str:
        """The name under which results of this entry are stored and shown."""
        return self.label or self.kind


#: kind -> settings class, filled by `register_method` as the settings of methods are imported.
REGISTERED: dict[str, type[MethodSection]] = {}

_Settings = TypeVar("_Settings", bound=MethodSection)


def register_method(section: type[_Settings]) -> type[_Settings]:
    """Class decorator: make a method's settings known under its `kind`."""
    kind = section.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    REGISTERED[kind] = section
    return section


def resolve_path(path: str, folder: Path) -> Path:
    """`path` as written in a recipe that lies in `folder`."""
    return (folder / Path(path).expanduser()).resolve()
