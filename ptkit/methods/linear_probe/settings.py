"""What a recipe says of a linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from ptkit.section import FileType, MethodSection, register_method

#: Not a type of PEFT's: there is nothing but the head.
LINEAR_PROBE = "PTKIT_LINEAR_PROBE"


@register_method
class LinearProbeSection(MethodSection):
    """The classification head alone, on the frozen model."""

    display_name: ClassVar[str] = "a linear probe"
    tags: ClassVar[tuple[str, ...]] = ("ptkit-linear-probe",)
    file_types: ClassVar[Mapping[str, FileType]] = {LINEAR_PROBE: FileType("it is a head alone")}
    kind: Literal["linear_probe"]
    """`linear_probe`."""
    learning_rate: float = 1e-2
    """AdamW's peak learning rate."""
