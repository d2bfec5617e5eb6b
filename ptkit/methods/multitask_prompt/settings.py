"""Settings of a multi-task prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.methods.prompt_settings import Start
from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.section import FileType, register_method


@register_method
class MultitaskSection(PromptTuningSection):
    """Prompt tuning's settings, and those of the tasks' own part. A recipe has one task, so this is
    no method of recipes."""

    display_name: ClassVar[str] = "a prompt of several tasks"
    tags: ClassVar[tuple[str, ...]] = ()
    file_types: ClassVar[Mapping[str, FileType]] = {}  # prompt tuning reads each task's
    in_recipes: ClassVar[bool] = False
    not_asked: ClassVar[str | None] = (
        "a soft prompt for each task, where one of them is asked about"
    )
    shares_batch: ClassVar[bool] = False
    alone: ClassVar[str] = "it is a prompt of several tasks already"
    kind: Literal["multitask_prompt"] = "multitask_prompt"  # type: ignore[assignment]
    start: Start = "task"
    """Values before training. No `auto`: no run looks for the start of a multi-task prompt."""
    rank: int = Field(default=1, ge=1, le=64)
    """Rank of each task's matrix (the paper: 1)."""
    task_learning_rate: float = Field(default=0.1, gt=0)
    """AdamW's peak learning rate of the tasks' matrices, whose product is 1 at the start."""
