"""Prompt tuning: soft embeddings before the input (Lester et al. 2021, section 2).

"The Power of Scale for Parameter-Efficient Prompt Tuning", https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

import torch
from torch import nn

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Demonstrations, register
from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.methods.soft_prompt import SoftPrompt, prompt_learning_shape
from ptkit.methods.start import rms
from ptkit.runtime.base_model import Base


@register
class PromptTuning(SoftPrompt):
    """Embeddings `[num_virtual_tokens, hidden]`, learnt directly."""

    section_class = PromptTuningSection
    start: torch.Tensor
    unit: torch.Tensor

    def __init__(
        self, section: PromptTuningSection, base: Base, start: torch.Tensor | None
    ) -> None:
        """start: embeddings `[num_virtual_tokens, hidden]`; None: noise, as PEFT's.

        What is learnt is a change of the start in units of its RMS. Embeddings are 0.02 in one
        family and 10 in another, and a step of AdamW has one size for all.
        """
        from peft import PromptTuningConfig
        from peft.tuners.prompt_tuning import PromptEmbedding

        super().__init__(section, base)
        self.config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=section.num_virtual_tokens,
            **prompt_learning_shape(base),
        )
        self.encoder = PromptEmbedding(self.config, base.embedding)
        self.encoder.to(base.model.device)
        if start is None:
            start, unit = torch.tensor(0.0), torch.tensor(1.0)
        else:
            nn.init.zeros_(self.encoder.embedding.weight)
            unit = rms(start)
        self.register_buffer("start", start.to(base.model.device))
        self.register_buffer("unit", unit.to(base.model.device))

    @classmethod
    def create(
        cls, section: PromptTuningSection, base: Base, demonstrations: Demonstrations
    ) -> PromptTuning:
        return cls(section, base, cls.start_from(section, base, demonstrations))

    @classmethod
    def from_files(
        cls, files: AdapterFiles, section: PromptTuningSection, base: Base
    ) -> PromptTuning:
        soft = cls.read_embeddings(files, base)
        return cls(section.model_copy(update={"num_virtual_tokens": soft.shape[0]}), base, soft)

    def embeddings(self) -> torch.Tensor:
        return self.start + self.unit * self.encoder.embedding.weight
