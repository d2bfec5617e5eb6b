"""What a recipe says of LLaMA-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.section import FileType, MethodSection, register_method


@register_method
class AdaptionPromptSection(MethodSection):
    """LLaMA-Adapter (Zhang et al. 2023), through PEFT: tokens beside the attention of upper layers,
    let in by a gate that begins at zero."""

    display_name: ClassVar[str] = "LLaMA-Adapter"
    tags: ClassVar[tuple[str, ...]] = ("adaption-prompt", "adaption_prompt", "llama-adapter")
    file_types: ClassVar[Mapping[str, FileType]] = {"ADAPTION_PROMPT": FileType(in_layers=True)}
    not_asked: ClassVar[str | None] = "PEFT has it for three families: GPT-2, Llama and Mistral"
    alone: ClassVar[str] = "it replaces the base's attention modules"
    kind: Literal["adaption_prompt"]
    """`adaption_prompt`."""
    num_virtual_tokens: int = Field(default=10, ge=1, le=4096)
    """Learnt tokens of each layer (the paper: 10)."""
    layers: int | None = Field(default=None, ge=1)
    """Upper layers that have them (the paper: 30 of 32). null: all."""
    learning_rate: float = Field(default=9e-3, gt=0)
    """AdamW's peak learning rate (the paper's)."""
