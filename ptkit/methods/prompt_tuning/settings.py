"""What a recipe says of prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from ptkit.methods.prompt_settings import (
    ENCODER_PROMPT,
    READ_BY_ENCODER,
    PromptMethodSection,
)
from ptkit.section import FileType, register_method


@register_method
class PromptTuningSection(PromptMethodSection):
    """Prompt tuning (Lester et al. 2021): learns `num_virtual_tokens` input embeddings."""

    display_name: ClassVar[str] = "prompt tuning"
    on_split_base: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("prompt-tuning", "prompt_tuning", "ptkit-encoder-prompt")
    # CPT's file is the soft prompt it ended with; a multi-task prompt is one per task.
    file_types: ClassVar[Mapping[str, FileType]] = {
        "PROMPT_TUNING": FileType(),
        "CPT": FileType(name="context-aware prompt tuning"),
        "MULTITASK_PROMPT_TUNING": FileType(name="multi-task prompt tuning"),
        ENCODER_PROMPT: READ_BY_ENCODER,
    }
    kind: Literal["prompt_tuning"]
    """`prompt_tuning`."""
    num_virtual_tokens: int = 20
    """Virtual tokens: learnt positions before the input (the paper uses 20 to 100)."""
    learning_rate: float | Literal["auto"] = 6.0
    """AdamW's peak learning rate, in units of the size (RMS) of the start's embeddings, so that one
    rate fits bases of any scale. Soft prompts want rates far above those of weights. `auto`: of
    four, the one nearest the default that learns enough in a short test before the run."""
