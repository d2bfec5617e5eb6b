"""Where a prompt method starts from: the choice that, with the learning rate, decides most.

Real tokens are the good start (PEFT's own benchmark: a prefix from real activations forgets
2x less than a zero start and 9x less than a random one). The token ids chosen here become
soft embeddings in prompt tuning and P-tuning, and keys and values in prefix tuning.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ptkit.methods.adapter import Demonstrations
from ptkit.recipe.schema import MethodSection
from ptkit.runtime.base_model import Base


class PromptMethodSection(MethodSection):
    """Settings shared by the methods that learn virtual tokens."""

    shares_batch: ClassVar[bool] = True
    num_virtual_tokens: int = Field(default=10, ge=1, le=4096)
    """Virtual tokens: learnt positions before the input."""
    start: Literal["examples", "text", "vocabulary", "random"] = "examples"
    """Values before training: `examples` (tokens of training rows), `text` (of `start_text`),
    `vocabulary` (random tokens), `random` (noise; PEFT's default, and the worst)."""
    start_text: str | None = None
    """The text `start: text` reads; repeated or cut to `num_virtual_tokens` tokens."""

    @model_validator(mode="after")
    def _text_given(self) -> PromptMethodSection:
        if (self.start == "text") != (self.start_text is not None):
            raise ValueError("`start_text` is needed with `start: text`, and only there")
        return self


def start_tokens(
    section: PromptMethodSection, base: Base, demonstrations: Demonstrations
) -> Tensor | None:
    """Token ids `[num_virtual_tokens]` to start from; None for `random`."""
    count = section.num_virtual_tokens
    if section.start == "random":
        return None
    if section.start == "vocabulary":
        return torch.randint(len(base.tokenizer), (count,))
    if section.start == "text":
        ids = base.tokenizer(section.start_text, add_special_tokens=False)["input_ids"]
    else:
        ids = []
        for text in demonstrations.shuffled():
            ids += base.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= count:
                break
    if not ids:
        return torch.randint(len(base.tokenizer), (count,))
    repeats = -(-count // len(ids))
    return torch.tensor((ids * repeats)[:count])


def start_embeddings(base: Base, tokens: Tensor) -> Tensor:
    """What the base's input embedding gives for `tokens`, `[num_virtual_tokens, hidden]`."""
    with torch.no_grad():
        embedded = base.embedding(tokens.to(base.model.device))
    return embedded.float().clone()
