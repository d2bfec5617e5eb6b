"""What a recipe says of a linear probe."""

from __future__ import annotations

from typing import Literal

from ptkit.section import MethodSection, register_method


@register_method
class LinearProbeSection(MethodSection):
    """The classification head alone, on the frozen model."""

    kind: Literal["linear_probe"]
    """`linear_probe`."""
    learning_rate: float = 1e-2
    """AdamW's peak learning rate."""
