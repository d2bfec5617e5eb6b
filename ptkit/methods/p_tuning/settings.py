"""What a recipe says of P-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ptkit.methods.prompt_settings import (
    ENCODER_PROMPT,
    READ_BY_ENCODER,
    PromptMethodSection,
)
from ptkit.section import FileType, register_method


@register_method
class PTuningSection(PromptMethodSection):
    """P-tuning (Liu et al. 2021): an MLP or LSTM makes the input embeddings."""

    display_name: ClassVar[str] = "P-tuning"
    on_split_base: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("p-tuning", "p_tuning")
    file_types: ClassVar[Mapping[str, FileType]] = {
        "P_TUNING": FileType(),
        ENCODER_PROMPT: READ_BY_ENCODER,
    }
    kind: Literal["p_tuning"]
    """`p_tuning`."""
    num_virtual_tokens: int = 20
    """Virtual tokens: learnt positions before the input."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Reparameterisation of the embeddings; dropped at export."""
    encoder_hidden_size: int = Field(default=128, ge=1)
    """Width of the encoder."""
    learning_rate: float | Literal["auto"] = 0.03
    """AdamW's peak learning rate (for the encoder's weights; its output is in units of twenty times
    the size of the start's embeddings). `auto`: of four, the one nearest the default that
    learns enough in a short test before the run."""
    learn_embeddings: bool = True
    """Train the embeddings that the encoder's output is added to, too. `start: random` has none."""
