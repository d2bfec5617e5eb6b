"""What a recipe says of a text prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ptkit.section import MethodSection, register_method


@register_method
class TextPromptSection(MethodSection):
    """An instruction and training examples, written out as text before the input."""

    display_name: ClassVar[str] = "a text prompt"
    on_split_base: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    kind: Literal["text_prompt"]
    """`text_prompt`."""
    instruction: str = ""
    """Text before the demonstrations."""
    examples: int = Field(default=3, ge=0)
    """Demonstrations: training rows, chosen by the seed."""
    separator: str = "\n\n"
    """Text after the instruction and after each demonstration."""
