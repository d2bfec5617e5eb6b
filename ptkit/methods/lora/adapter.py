"""LoRA, to compare with: low-rank changes of the weights (Hu et al. 2021, section 4).

"LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.
PEFT does all of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict, register
from ptkit.methods.lora.files import lora_config, lora_task_type
from ptkit.methods.lora.settings import LoraSection
from ptkit.runtime.base_model import Base


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
        self.base.model.requires_grad_(False)
