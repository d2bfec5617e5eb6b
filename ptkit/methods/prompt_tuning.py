"""Prompt tuning: soft embeddings before the input (Lester et al. 2021, section 2).

"The Power of Scale for Parameter-Efficient Prompt Tuning", https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

from typing import Literal

import torch
from peft import PromptTuningConfig
from peft.tuners.prompt_tuning import PromptEmbedding

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Demonstrations, register
from ptkit.methods.peft_tensors import MULTITASK
from ptkit.methods.soft_prompt import ENCODER_PROMPT, SoftPrompt, prompt_learning_shape
from ptkit.methods.start import PromptMethodSection, start_embeddings, start_tokens
from ptkit.recipe.schema import register_method
from ptkit.runtime.base_model import Base


@register_method
class PromptTuningSection(PromptMethodSection):
    """Prompt tuning (Lester et al. 2021): learns `num_virtual_tokens` input embeddings."""

    kind: Literal["prompt_tuning"]
    """`prompt_tuning`."""
    num_virtual_tokens: int = 20
    """Virtual tokens: learnt positions before the input (the paper uses 20 to 100)."""
    learning_rate: float = 0.3
    """AdamW's peak learning rate. Soft prompts want rates far above those of weights."""


@register
class PromptTuning(SoftPrompt):
    """Embeddings `[num_virtual_tokens, hidden]`, learnt directly."""

    section_class = PromptTuningSection
    # CPT's file is the soft prompt it ended with; a multi-task prompt is one per task.
    peft_types = ("PROMPT_TUNING", "CPT", MULTITASK, ENCODER_PROMPT)

    def __init__(self, section: PromptTuningSection, base: Base) -> None:
        super().__init__(section, base)
        self.config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=section.num_virtual_tokens,
            **prompt_learning_shape(base),
        )
        self.encoder = PromptEmbedding(self.config, base.embedding)
        self.encoder.to(base.model.device)

    @classmethod
    def create(
        cls, section: PromptTuningSection, base: Base, demonstrations: Demonstrations
    ) -> PromptTuning:
        adapter = cls(section, base)
        tokens = start_tokens(section, base, demonstrations)
        with torch.no_grad():
            weight = adapter.encoder.embedding.weight
            if tokens is None:
                weight.normal_(std=float(base.embedding.weight.float().std()))
            else:
                weight.copy_(start_embeddings(base, tokens))
        return adapter

    @classmethod
    def from_files(
        cls, files: AdapterFiles, section: PromptTuningSection, base: Base
    ) -> PromptTuning:
        soft = cls.read_embeddings(files, base)
        adapter = cls(section.model_copy(update={"num_virtual_tokens": soft.shape[0]}), base)
        with torch.no_grad():
            adapter.encoder.embedding.weight.copy_(soft)
        return adapter

    def embeddings(self) -> torch.Tensor:
        return self.encoder.embedding.weight
