"""What a recipe says of (IA)³."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.section import FileType, MethodSection, register_method


@register_method
class IA3Section(MethodSection):
    """(IA)³ (Liu et al. 2022), through PEFT: one learnt factor per key, value and hidden unit."""

    display_name: ClassVar[str] = "(IA)³"
    tags: ClassVar[tuple[str, ...]] = ("ia3",)
    file_types: ClassVar[Mapping[str, FileType]] = {"IA3": FileType(in_layers=True)}
    not_asked: ClassVar[str | None] = "PEFT's own layers, tried on PEFT's own families"
    kind: Literal["ia3"]
    """`ia3`."""
    target_modules: list[str] | None = None
    """Modules whose output is scaled, or whose input where they are `feedforward_modules` too.
    null: PEFT's own choice for the family, where it has one."""
    feedforward_modules: list[str] | None = None
    """Those of `target_modules` whose input is scaled. null: PEFT's own choice."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """AdamW's peak learning rate of the factors, which begin at 1."""
