"""(IA)³: activations scaled by learnt factors (Liu et al. 2022, section 3.3).

"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
https://arxiv.org/abs/2205.05638.
"""

from __future__ import annotations

from peft import IA3Config
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

from ptkit.errors import ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import register
from ptkit.methods.ia3.settings import IA3Section
from ptkit.methods.peft_layers import PeftLayers, head_modules, read_config, task_type
from ptkit.runtime.base_model import Base


@register
class IA3(PeftLayers):
    """Factors of keys, values and hidden units, in the base's own layers."""

    section_class = IA3Section

    @classmethod
    def peft_config(cls, section: IA3Section, base: Base) -> IA3Config:
        family = base.model.config.model_type
        if section.target_modules is None and family not in KNOWN:
            raise ModelError(
                f"`{section.title}`: PEFT has no choice of modules for {family}; name them "
                "(`target_modules`, and of those `feedforward_modules`)"
            )
        return IA3Config(
            task_type=task_type(base),
            exclude_modules=head_modules(base),
            target_modules=section.target_modules,
            feedforward_modules=section.feedforward_modules
            or (None if section.target_modules is None else []),
        )

    @classmethod
    def config_of_files(cls, files: AdapterFiles, base: Base) -> IA3Config:
        config = read_config(IA3Config, files, base)
        assert isinstance(config, IA3Config)
        return config
