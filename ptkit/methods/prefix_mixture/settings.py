"""What a recipe says of a mixture of prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ptkit.methods.prefix_tuning.settings import PrefixSettings
from ptkit.methods.prompt_settings import Start
from ptkit.section import FileType, register_method

#: PEFT has no adapter whose prompt depends on the input.
PREFIX_MIXTURE = "PTKIT_PREFIX_MIXTURE"


@register_method
class PrefixMixtureSection(PrefixSettings):
    """Several prefixes, weighed by a gate for every input (Wu et al. 2022; Asai et al. 2022)."""

    display_name: ClassVar[str] = "a mixture of prefixes"
    tags: ClassVar[tuple[str, ...]] = ("ptkit-prefix-mixture",)
    file_types: ClassVar[Mapping[str, FileType]] = {
        PREFIX_MIXTURE: FileType("its prefix is made anew from every input")
    }
    not_asked: ClassVar[str | None] = (
        "prefixes, weighed by the input, where one of them is asked about"
    )
    shares_batch: ClassVar[bool] = False
    alone: ClassVar[str] = "its prefixes are weighed anew for every row"
    kind: Literal["prefix_mixture"]
    """`prefix_mixture`."""
    prefixes: int = Field(default=4, ge=0, le=256)
    """Prefixes to train, each started as `start` says (with training rows of its own)."""
    adapters: list[str] = Field(default=[])
    """Adapter folders mixed in beside them, of the same base and length, whatever their method.
    Relative paths start at the recipe's folder."""
    train_adapters: bool = False
    """Train those of `adapters` too; otherwise they stay as they are (ATTEMPT)."""
    top: int | None = Field(default=None, ge=1)
    """A row gets the mean of so many prefixes, the likeliest for it; 1 chooses one. null: all."""
    start: Start = "task"
    """Values of the prefixes before training, as in prefix tuning. No `auto`: it tries several in
    one batch."""
    learning_rate: float | Literal["auto"] = 0.1
    """AdamW's peak learning rate of the prefixes, in units of the size (RMS) that keys and values
    have at the start in their layer. No `auto`: it tries several in one batch."""
    gate_learning_rate: float = Field(default=1e-2, gt=0)
    """AdamW's peak learning rate of the gate, a linear layer on the mean embedding of the input."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> PrefixMixtureSection:
        total = self.prefixes + len(self.adapters)
        if not total:
            raise ValueError("`prefixes: 0` leaves nothing to mix; name some `adapters`")
        if self.top is not None and self.top > total:
            raise ValueError(f"`top` is {self.top}, but there are {total} prefixes")
        if self.train_adapters and not self.adapters:
            raise ValueError("`train_adapters` needs `adapters`")
        if total == 1 and not self.prefixes and not self.train_adapters:
            raise ValueError(
                "one of `adapters` by itself always counts 1, so nothing is learnt; name another, "
                "or set `prefixes` or `train_adapters`"
            )
        return self
