"""What a recipe says of a prefix with LoRA."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ptkit.methods.lora.settings import LoraSettings
from ptkit.methods.prefix_tuning.settings import PrefixSettings
from ptkit.methods.prompt_settings import Start
from ptkit.section import register_method


@register_method
class PrefixLoraSection(LoraSettings, PrefixSettings):
    """A prefix and LoRA, trained together (He et al. 2022; Mao et al. 2022)."""

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
