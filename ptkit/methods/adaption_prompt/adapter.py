"""LLaMA-Adapter: learnt tokens that every layer attends to beside its input, behind a zero gate.

Zhang et al. 2023, section 3, https://arxiv.org/abs/2303.16199; PEFT's ADAPTION_PROMPT. It resembles
a prefix and is none. The tokens have a softmax of their own, so keys and values before the input
cannot replace them.
"""

from __future__ import annotations

from peft import AdaptionPromptConfig
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as KNOWN

from ptkit.errors import ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import register
from ptkit.methods.adaption_prompt.settings import AdaptionPromptSection
from ptkit.methods.peft_layers import PeftLayers, read_config, task_type
from ptkit.runtime.base_model import Base


@register
class AdaptionPrompt(PeftLayers):
    """Attention modules of PEFT's around the base's own."""

    section_class = AdaptionPromptSection

    @classmethod
    def peft_config(cls, section: AdaptionPromptSection, base: Base) -> AdaptionPromptConfig:
        family, layers = base.model.config.model_type, len(base.layout)
        if family not in KNOWN:
            raise ModelError(
                f"`{section.title}`: PEFT has LLaMA-Adapter for {', '.join(KNOWN)}, and {base.id} "
                f"is a {family}; leave it out, or use prefix_tuning"
            )
        if section.layers is not None and section.layers > layers:
            raise ModelError(f"`layers` is {section.layers}, but {base.id} has {layers} layers")
        return AdaptionPromptConfig(
            task_type=task_type(base),
            adapter_len=section.num_virtual_tokens,
            adapter_layers=section.layers or layers,
        )

    @classmethod
    def config_of_files(cls, files: AdapterFiles, base: Base) -> AdaptionPromptConfig:
        config = read_config(AdaptionPromptConfig, files, base)
        assert isinstance(config, AdaptionPromptConfig)
        return config
