"""LoRA, to compare with: low-rank changes of the weights (Hu et al. 2021, section 4).

"LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.
PEFT does all of it.
"""

from __future__ import annotations

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

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict, register
from ptkit.methods.lora_files import lora_config, lora_task_type
from ptkit.methods.saved_modules import modules_named
from ptkit.recipe.schema import MethodSection, register_method
from ptkit.runtime.base_model import Base


class LoraSettings(MethodSection):
    """What says which weights change, and how much they can."""

    rank: int = Field(default=8, ge=1)
    """Rank of each weight's change."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the change is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank matrices."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get one: names, or PEFT's `all-linear`."""


@register_method
class LoraSection(LoraSettings):
    """LoRA (Hu et al. 2021), through PEFT."""

    kind: Literal["lora"]
    """`lora`."""
    learning_rate: float = 2e-3
    """AdamW's peak learning rate."""


def lora_section(settings: LoraSettings) -> LoraSection:
    """`settings` as those of LoRA by itself."""
    own = {name: getattr(settings, name) for name in LoraSettings.model_fields if name != "kind"}
    return LoraSection(kind="lora", **own)


def _head_modules(base: Base) -> list[str] | None:
    """Names of all modules of the base's head: it is trained as a whole."""
    if base.head is None:
        return None
    inside = tuple(f"{name}." for name in base.head.modules)
    return [name for name, _ in base.model.named_modules() if f"{name}.".startswith(inside)]


@register
class Lora(Adapter):
    """Low-rank matrices inside the base's own linear layers, put in and taken out by PEFT."""

    section_class = LoraSection
    peft_types = ("LORA",)
    encoder_decoder = True
    changes_weights = True

    def __init__(self, section: LoraSection, base: Base, config: LoraConfig) -> None:
        super().__init__(section, base)
        training = base.model.training
        # What PEFT's `unload` would leave as it was trained.
        self._own_modules = {
            name: base.model.get_submodule(name)
            for name in modules_named(list(config.modules_to_save or ()), base)
        }
        self._own_biases = {
            name: bias.detach().clone()
            for name, bias in base.model.named_parameters()
            if config.bias != "none" and name.endswith("bias")
        }
        self.peft_model: PeftModel = get_peft_model(base.model, config)
        self.peft_model.train(training)  # new modules begin in training mode, dropout and all

    @classmethod
    def create(cls, section: LoraSection, base: Base, demonstrations: Demonstrations) -> Lora:
        config = LoraConfig(
            task_type=lora_task_type(base),
            exclude_modules=_head_modules(base),
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=section.target_modules,
        )
        return cls(section, base, config)

    @classmethod
    def from_files(cls, files: AdapterFiles, section: LoraSection, base: Base) -> Lora:
        adapter = cls(section, base, lora_config(files, base))
        try:
            result: Any = set_peft_model_state_dict(adapter.peft_model, dict(files.tensors))
        except RuntimeError as error:
            adapter.close()
            raise AdapterError(f"PEFT cannot load this LoRA: {error}") from error
        if result.unexpected_keys:
            adapter.close()
            raise AdapterError(f"tensors this base has no place for: {result.unexpected_keys[:3]}")
        return adapter

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: LoraSection, base: Base) -> None:
        return None

    def own_files(self) -> AdapterFiles:
        config = self.peft_model.peft_config["default"]
        # By itself PEFT asks the Hub whether the base's vocabulary has grown; ptkit never grows it.
        tensors = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return AdapterFiles(peft_config_dict(config, self.base), dict(tensors))

    def off(self) -> AbstractContextManager[None]:
        return self.peft_model.disable_adapter()

    def close(self) -> None:
        self.peft_model.unload()
        for name, module in self._own_modules.items():
            self.base.model.set_submodule(name, module)
        for name, bias in self._own_biases.items():
            self.base.model.get_parameter(name).data.copy_(bias)
        self.base.model.requires_grad_(False)
