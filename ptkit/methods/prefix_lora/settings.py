"""What a recipe says of a prefix with LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.methods.lora.settings import LoraSettings
from ptkit.methods.prefix_tuning.settings import PrefixSettings
from ptkit.methods.prompt_settings import Start
from ptkit.section import FileType, register_method

#: One file with both. PEFT holds either in an adapter; told of one, it would lose the other.
PREFIX_LORA = "PTKIT_PREFIX_LORA"


@register_method
class PrefixLoraSection(LoraSettings, PrefixSettings):
    """A prefix and LoRA, trained together (He et al. 2022; Mao et al. 2022)."""

    display_name: ClassVar[str] = "a prefix with LoRA"
    tags: ClassVar[tuple[str, ...]] = ("ptkit-prefix-lora",)
    file_types: ClassVar[Mapping[str, FileType]] = {
        PREFIX_LORA: FileType(
            "it is a prefix and a LoRA; `ptkit export --as parts` writes two that it can read"
        )
    }
    not_asked: ClassVar[str | None] = "a prefix and a LoRA, each of which is asked about by itself"
    shares_batch: ClassVar[bool] = False
    kind: Literal["prefix_lora"]
    """`prefix_lora`."""
    start: Start = "task"
    """Values of the prefix before training, as in prefix tuning. No `auto`: it tries several in one
    batch."""
    learning_rate: float | Literal["auto"] = 0.1
    """AdamW's peak learning rate of the prefix, in units of the size (RMS) that keys and values
    have at the start in their layer. No `auto`: it tries several in one batch."""
    lora_learning_rate: float = Field(default=2e-3, gt=0)
    """AdamW's peak learning rate of the low-rank matrices."""
