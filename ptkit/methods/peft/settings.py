"""What a recipe says of a method of PEFT's that has no settings of its own here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ptkit.errors import did_you_mean
from ptkit.section import FileType, MethodSection, register_method

#: PEFT's types -> what they are called. A test compares them with those that PEFT has.
NAMES = {
    "ADAMSS": "AdaMSS", "BEFT": "BEFT", "BOFT": "BOFT", "C3A": "C3A", "DEFT": "DEFT",
    "DELORA": "DeLoRA", "FOURIERFT": "FourierFT", "GLORA": "GLoRA", "GRALORA": "GraLoRA",
    "HIRA": "HiRA", "HRA": "HRA", "LN_TUNING": "LayerNorm tuning", "LOHA": "LoHa",
    "LOKR": "LoKr", "LORA": "LoRA", "MISS": "MiSS", "OFT": "OFT", "OSF": "OSF",
    "PEANUT": "PEANuT", "PSOFT": "PSOFT", "PVERA": "PVeRA", "RANDLORA": "RandLoRA",
    "ROAD": "RoAd", "SHIRA": "SHiRA", "SUPERTUNING": "SuperTuning", "TINYLORA": "TinyLoRA",
    "UNILORA": "UniLoRA",
    "VBLORA": "VB-LoRA", "VERA": "VeRA", "WAVEFT": "WaveFT",
}  # fmt: skip
#: PEFT's other types -> why they are not taken.
REFUSED = {
    "ADALORA": "its ranks are given out between training steps, by calls that ptkit does not make",
    "FROD": "a saved one is another adapter with another number of threads",
    "LILY": "what it adds to a row depends on the rows beside it, on padding and on later tokens",
    "POLY": "every row needs the number of its task",
    "SHADOW": "a second model runs beside the base, and the base alone is what ptkit runs",
    "TRAINABLE_TOKENS": "it replaces the table of embeddings, which everything else reads",
    "XLORA": "it mixes adapters that are loaded from elsewhere",
}
#: Those of which PEFT computes a part from the base's weights: a decomposition, groups of rows.
_OF_WEIGHTS = {"ADAMSS", "PSOFT"}
#: Starts of LoRA's that leave the base's weights alone; the others (PiSSA, OLoRA) change them.
_STARTS = (True, False, "gaussian")


@register_method
class PeftSection(MethodSection):
    """Any other method of PEFT's that works in the base's layers: DoRA, VeRA, LoKr, BOFT, ..."""

    display_name: ClassVar[str] = "an adapter of PEFT's"
    file_types: ClassVar[Mapping[str, FileType]] = {
        peft_type: FileType(name=name, in_layers=True, one_precision=peft_type in _OF_WEIGHTS)
        for peft_type, name in NAMES.items()
    }
    not_asked: ClassVar[str | None] = "PEFT's own layers, tried on PEFT's own families"
    kind: Literal["peft"]
    """`peft`."""
    type: str
    """PEFT's type: `VERA`, `LOKR`, `BOFT`, `LORA` (with `use_dora` for DoRA), ..."""
    config: dict[str, Any] = Field(default={})
    """Keys of PEFT's config of that type (`r`, `target_modules`, ...), as PEFT names them."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """AdamW's peak learning rate. No two of PEFT's methods want the same: search for it."""

    @property
    def title(self) -> str:
        """The name of results: the label, or PEFT's type."""
        return self.label or self.type.lower()

    @classmethod
    def of_files(cls, peft_type: str) -> Self:
        return cls(kind="peft", type=peft_type)

    @field_validator("type", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        name = value.upper()
        if name in REFUSED:
            raise ValueError(f"`{value}` is not taken: {REFUSED[name]}")
        if name not in NAMES:
            raise ValueError(f"PEFT has no `{value}` for layers; {did_you_mean(name, NAMES)}")
        return name

    @model_validator(mode="after")
    def _base_stays(self) -> PeftSection:
        if self.config.get("init_lora_weights", True) not in _STARTS:
            raise ValueError(
                f"`config.init_lora_weights` {self.config['init_lora_weights']!r} changes the "
                "base's own weights, which all methods share; use true or `gaussian`"
            )
        return self
