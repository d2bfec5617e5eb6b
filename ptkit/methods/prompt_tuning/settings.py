"""What a recipe says of prompt tuning."""

from __future__ import annotations

from typing import Literal

from ptkit.methods.prompt_settings import PromptMethodSection
from ptkit.section import register_method


@register_method
class PromptTuningSection(PromptMethodSection):
    """Prompt tuning (Lester et al. 2021): learns `num_virtual_tokens` input embeddings."""

    kind: Literal["prompt_tuning"]
    """`prompt_tuning`."""
    num_virtual_tokens: int = 20
    """Virtual tokens: learnt positions before the input (the paper uses 20 to 100)."""
    learning_rate: float | Literal["auto"] = 6.0
    """AdamW's peak learning rate, in units of the size (RMS) of the start's embeddings, so that one
    rate fits bases of any scale. Soft prompts want rates far above those of weights. `auto`: of
    four, the one nearest the default that learns enough in a short test before the run."""
