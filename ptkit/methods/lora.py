"""LoRA, to compare with: low-rank changes of the weights (Hu et al. 2021, section 4).

"LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.
PEFT does all of it.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any, Literal

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict, register
from ptkit.recipe.schema import MethodSection, register_method
from ptkit.runtime.base_model import Base


@register_method
class LoraSection(MethodSection):
    """LoRA (Hu et al. 2021), through PEFT."""

    kind: Literal["lora"]
    """`lora`."""
    rank: int = Field(default=8, ge=1)
    """Rank of each weight's change."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the change is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank matrices."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get one: names, or PEFT's `all-linear`."""
    learning_rate: float = 2e-3
    """AdamW's peak learning rate."""


@register
class Lora(Adapter):
    """Low-rank matrices beside the base's linear layers, put in and taken out by PEFT."""

    section_class = LoraSection
    peft_types = ("LORA",)

    def __init__(self, section: LoraSection, base: Base, config: LoraConfig) -> None:
        super().__init__(section, base)
        self.peft_model: PeftModel = get_peft_model(base.model, config)

    @classmethod
    def create(cls, section: LoraSection, base: Base, demonstrations: Demonstrations) -> Lora:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=section.target_modules,
        )
        return cls(section, base, config)

    @classmethod
    def from_files(cls, files: AdapterFiles, section: LoraSection, base: Base) -> Lora:
        adapter = cls(section, base, lora_config(files, base))
        result: Any = set_peft_model_state_dict(adapter.peft_model, dict(files.tensors))
        if result.unexpected_keys:
            adapter.close()
            raise AdapterError(f"tensors this base has no place for: {result.unexpected_keys[:3]}")
        return adapter

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: LoraSection, base: Base) -> None:
        return None

    @property
    def model(self) -> PreTrainedModel:
        # LoRA acts inside the base's own modules, so the base is what is run.
        return self.base.model

    def files(self) -> AdapterFiles:
        config = self.peft_model.peft_config["default"]
        tensors = get_peft_model_state_dict(self.peft_model)
        return AdapterFiles(peft_config_dict(config, self.base), dict(tensors))

    def off(self) -> AbstractContextManager[None]:
        return self.peft_model.disable_adapter()

    def close(self) -> None:
        self.peft_model.unload()
        self.base.model.requires_grad_(False)


#: A LoRA matrix in PEFT's files: the module it belongs to, and which of the two it is.
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def lora_config(files: AdapterFiles, base: Base) -> LoraConfig:
    """PEFT's settings of the LoRA adapter `files`, after checking its matrices against `base`.

    Raises AdapterError for settings PEFT does not take, for ranks that are not those of the
    matrices, and for matrices the base has no place for: PEFT would have changed the base's
    modules by the time it notices.
    """
    values = {k: v for k, v in files.config.items() if k in LoraConfig.__dataclass_fields__}
    # The base was checked by its fingerprint; PEFT would warn about its name.
    values |= {"inference_mode": False, "base_model_name_or_path": None}
    try:
        config = LoraConfig(**values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise AdapterError(f"PEFT does not take this LoRA's settings: {error}") from error
    ranks = _require_fitting(files, base)
    named = {config.r, *(config.rank_pattern or {}).values()}
    if not ranks:
        raise AdapterError("the file holds no LoRA matrices")
    if not all(type(r) is int for r in named) or max(named) > max(ranks):
        raise AdapterError(f"the settings name ranks {sorted(map(str, named))}, the matrices have "
                           f"{sorted(ranks)}")  # fmt: skip
    if type(config.lora_alpha) not in (int, float) or not isinstance(config.lora_dropout, float):
        raise AdapterError("`lora_alpha` and `lora_dropout` should be numbers")
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        # A pattern of somebody else's may take forever; the matrices say where they belong.
        modules = (m["module"] for m in map(_MATRIX.fullmatch, files.tensors) if m)
        config.target_modules = sorted(set(modules))
    return config


def _require_fitting(files: AdapterFiles, base: Base) -> set[int]:
    """The ranks of the matrices. Raises AdapterError when one fits no module of the base."""
    modules = dict(base.model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.tensors.items():
        found = _MATRIX.fullmatch(name)
        if found:
            pairs.setdefault(found["module"], {})[found["side"]] = tensor
    for name, pair in pairs.items():
        module = modules.get(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        shapes = {side: list(t.shape) for side, t in pair.items()}
        fits = (
            isinstance(weight, Tensor)
            and set(pair) == {"A", "B"}
            and all(t.ndim == 2 and t.is_floating_point() for t in pair.values())
            and pair["A"].shape[0] == pair["B"].shape[1] > 0
            and sorted((pair["A"].shape[1], pair["B"].shape[0])) == sorted(weight.shape)
        )
        if not fits:
            place = "no such module" if weight is None else f"a weight of {list(weight.shape)}"
            raise AdapterError(
                f"the matrices of `{name}` have shapes {shapes}, the base has {place} there"
            )
    return {pair["A"].shape[0] for pair in pairs.values()}
