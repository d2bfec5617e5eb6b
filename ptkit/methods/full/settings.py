"""What a recipe says of full fine-tuning."""

from __future__ import annotations

from typing import Literal

from ptkit.section import MethodSection, register_method


@register_method
class FullSection(MethodSection):
    """Full fine-tuning: all parameters of the base."""

    kind: Literal["full"]
    """`full`."""
    learning_rate: float = 5e-4
    """AdamW's peak learning rate."""
