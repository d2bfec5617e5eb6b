"""What a recipe says of full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from ptkit.section import MethodSection, register_method


@register_method
class FullSection(MethodSection):
    """Full fine-tuning: all parameters of the base."""

    display_name: ClassVar[str] = "full fine-tuning"
    not_asked: ClassVar[str | None] = (
        "all weights of transformers' own model are trained; nothing is added to it"
    )
    anchor: ClassVar[Literal["base", "full"] | None] = "full"
    kind: Literal["full"]
    """`full`."""
    learning_rate: float = 5e-4
    """AdamW's peak learning rate."""
