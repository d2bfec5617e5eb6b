"""What recipes say of the methods that learn virtual tokens, whichever they are."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ptkit.section import FileType, MethodSection

Start = Literal["task", "examples", "text", "labels", "vocabulary", "adapter", "random", "auto"]

#: What a start needs beside its name, and the key that holds it.
_NEEDS = {"text": "start_text", "adapter": "start_adapter"}

#: In place of PEFT's types, where an encoder reads the prompt: PEFT would let it use up positions,
#: pool its first token for `[CLS]`, and expect as many rows again for the decoder.
ENCODER_PROMPT = "PTKIT_ENCODER_PROMPT"
READ_BY_ENCODER = FileType("its virtual tokens take no positions from the input")


class PromptMethodSection(MethodSection):
    """Settings shared by the methods that learn virtual tokens."""

    shares_batch: ClassVar[bool] = True
    num_virtual_tokens: int = Field(default=10, ge=1, le=4096)
    """Virtual tokens: learnt positions before the input."""
    start: Start = "auto"
    """Values before training. `task`: in classification the template's own words, once with the
    words of each label; in generation as `examples`. `examples`: tokens of training rows. `text`:
    of `start_text`. `labels`: the words of a classification task's labels. `vocabulary`: random
    tokens. `adapter`: what `start_adapter` learnt. `random`: noise, PEFT's default and the worst.
    `auto`: `task`, unless another of these, or a text made from the task, has a clearly lower loss
    on a few training rows. It is `task` where a run is too short to tell, and with a classification
    head."""
    start_text: str | None = None
    """The text `start: text` reads; repeated or cut to `num_virtual_tokens` tokens."""
    start_adapter: Annotated[list[str], Field(min_length=1)] | None = None
    """Adapter folders `start: adapter` begins from, of the same base and length; of several, the
    mean. Relative paths start at the recipe's folder."""
    start_weights: list[float] | None = None
    """What each of `start_adapter` counts in the mean; they add up to 1. null: all the same."""
    learning_rate: float | Literal["auto"]
    """AdamW's peak learning rate, or `auto`: of a few, the one nearest the default that learns
    enough in a short test before the run."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """How long AdamW remembers the size of gradients. A prompt's first steps learn what answers
    look like, and their gradients are many times the later ones. With 0.999 (PyTorch's default)
    they keep the steps small for the rest of a short run."""

    @field_validator("start", "learning_rate")
    @classmethod
    def _can_be_found(cls, value: str | float) -> str | float:
        if value == "auto" and not cls.shares_batch:
            raise ValueError(
                f"`auto` tries several adapters in one batch, which this method cannot share: "
                f"{cls.alone}; give a value"
            )
        return value

    @model_validator(mode="after")
    def _start_is_complete(self) -> PromptMethodSection:
        for start, key in _NEEDS.items():
            if (self.start == start) != (getattr(self, key) is not None):
                raise ValueError(f"`{key}` is needed with `start: {start}`, and only there")
        if self.start_weights is not None:
            if len(self.start_weights) != len(self.start_adapter or ()):
                raise ValueError("`start_weights` needs one weight per adapter of `start_adapter`")
            if abs(sum(self.start_weights) - 1) > 1e-6:
                raise ValueError("`start_weights` must add up to 1")
        return self
