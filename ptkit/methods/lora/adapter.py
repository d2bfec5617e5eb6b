"""LoRA, to compare with: low-rank changes of the weights (Hu et al. 2021, section 4).

"LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from peft import LoraConfig

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import register
from ptkit.methods.lora.files import lora_config
from ptkit.methods.lora.settings import LoraSection
from ptkit.methods.peft_layers import PeftLayers, head_modules, task_type
from ptkit.runtime.base_model import Base


@register
class Lora(PeftLayers):
    """Low-rank matrices inside the base's own linear layers, put in and taken out by PEFT."""

    section_class = LoraSection
    mixes_in_batch = True

    @classmethod
    def peft_config(cls, section: LoraSection, base: Base) -> LoraConfig:
        return LoraConfig(
            task_type=task_type(base),
            exclude_modules=head_modules(base),
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=section.target_modules,
        )

    @classmethod
    def config_of_files(cls, files: AdapterFiles, base: Base) -> LoraConfig:
        return lora_config(files, base)
