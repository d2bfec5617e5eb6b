"""What a recipe says of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.section import FileType, MethodSection, register_method


class LoraSettings(MethodSection):
    """What says which weights change, and how much they can."""

    rank: int = Field(default=8, ge=1)
    """Rank of each weight's change."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the change is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank matrices."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get one: names, or PEFT's `all-linear`."""


@register_method
class LoraSection(LoraSettings):
    """LoRA (Hu et al. 2021), through PEFT."""

    display_name: ClassVar[str] = "LoRA"
    tags: ClassVar[tuple[str, ...]] = ("lora",)
    file_types: ClassVar[Mapping[str, FileType]] = {"LORA": FileType(in_layers=True)}
    kind: Literal["lora"]
    """`lora`."""
    learning_rate: float = 2e-3
    """AdamW's peak learning rate."""


def lora_section(settings: LoraSettings) -> LoraSection:
    """`settings` as those of LoRA by itself."""
    own = {name: getattr(settings, name) for name in LoraSettings.model_fields if name != "kind"}
    return LoraSection(kind="lora", **own)
