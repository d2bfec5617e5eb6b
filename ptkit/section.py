"""What recipes and methods' settings are made of.

Below both, so that a method's settings need no recipe, and a recipe no tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

from ptkit.errors import UserError


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class FileType:
    """What a method says of one `peft_type` that its files may have.

    unreadable: why PEFT cannot read such a file; None where it can
    name: what the adapter in it is called, where that is not the method's `display_name`
    in_layers: whether PEFT keeps the tensors in layers of the base, below a second wrapper
    one_precision: whether a part of it is computed from the base's weights whenever it is loaded,
        and comes out otherwise where they are rounded otherwise
    """

    unreadable: str | None = None
    name: str | None = None
    in_layers: bool = False
    one_precision: bool = False


class MethodSection(Section):
    """What every method's settings share; each method's own are in its folder's `settings.py`.

    What the rest of the package needs to know of a method, it asks here or of the adapter class.
    """

    display_name: ClassVar[str] = ""
    """What cards call it; it may stand at the beginning of a sentence."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of the Hub that name it, as cards of ptkit and of others write them."""
    file_types: ClassVar[Mapping[str, FileType]] = {}
    """PEFT's types, and ptkit's own (`PTKIT_...`), whose files hold its adapters."""
    in_recipes: ClassVar[bool] = True
    """Whether a recipe may name it."""
    not_asked: ClassVar[str | None] = None
    """Why nothing is asked about it, family by family (`ptkit.families`); None where it is."""
    trains: ClassVar[bool] = True
    """False for baselines that learn nothing (they run once, whatever the seeds)."""
    anchor: ClassVar[Literal["base", "full"] | None] = None
    """Which end it is of the way from the base to full fine-tuning, where tables measure the others
    by it; None where it is neither."""
    shares_batch: ClassVar[bool] = False
    """Whether adapters of this method can be trained in one batch, row by row."""
    alone: ClassVar[str] = "it changes the base's weights"
    """Why they cannot."""
    on_split_base: ClassVar[bool] = False
    """Whether it works on a base whose layers are split over several processes."""

    kind: str
    """The method."""
    label: str | None = None
    """Name in tables; must be unique within the recipe. Default: the method's name."""

    @classmethod
    def own_kind(cls) -> str:
        """The one `kind` that these settings are of."""
        return str(get_args(cls.model_fields["kind"].annotation)[0])

    @classmethod
    def of_files(cls, peft_type: str) -> Self:
        """The settings of an adapter that was read from files of this type."""
        return cls(kind=cls.own_kind())

    @property
    def title(self) -> str:
        """The name under which results of this entry are stored and shown."""
        return self.label or self.kind


#: kind -> settings class, filled by `register_method` as the settings of methods are imported.
REGISTERED: dict[str, type[MethodSection]] = {}

_Settings = TypeVar("_Settings", bound=MethodSection)


def register_method(section: type[_Settings]) -> type[_Settings]:
    """Class decorator: make a method's settings known under its `kind`.

    Raises UserError where another method has that `kind`.
    """
    other = REGISTERED.setdefault(section.own_kind(), section)
    if (other.__module__, other.__name__) != (section.__module__, section.__name__):
        raise UserError(
            f"two methods are called `{section.own_kind()}`: {other.__module__} and "
            f"{section.__module__}; uninstall the package that brings one of them"
        )
    REGISTERED[section.own_kind()] = section
    return section


def resolve_path(path: str, folder: Path) -> Path:
    """`path` as written in a recipe that lies in `folder`."""
    return (folder / Path(path).expanduser()).resolve()
