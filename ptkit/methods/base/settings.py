"""What a recipe says of the base as a row of its own: nothing."""

from __future__ import annotations

from typing import ClassVar, Literal

from ptkit.section import MethodSection, register_method


@register_method
class BaseSection(MethodSection):
    """The base model as it is, without any prompt: nothing is trained."""

    display_name: ClassVar[str] = "the base model"
    on_split_base: ClassVar[bool] = True
    not_asked: ClassVar[str | None] = "the model itself, which is what the others are compared with"
    trains: ClassVar[bool] = False
    kind: Literal["base"]
    """`base`."""
