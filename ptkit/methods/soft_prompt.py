"""What prompt tuning and P-tuning share: they learn input embeddings, compiled by the base."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter
from ptkit.methods.peft_tensors import virtual_tokens_of
from ptkit.methods.start import PromptMethodSection
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import require_no_state
from ptkit.runtime.compile import compile_embeddings


def prompt_learning_shape(base: Base) -> dict[str, Any]:
    """The fields of PEFT's prompt-learning configs that describe the base model."""
    config = base.model.config.get_text_config()
    return {
        "num_layers": len(base.layout),
        "num_attention_heads": config.num_attention_heads,
        "token_dim": base.embedding.embedding_dim,
        "num_transformer_submodules": 1,
    }


class SoftPrompt(Adapter):
    """An adapter that learns embeddings `[num_virtual_tokens, hidden]` of virtual tokens."""

    section: PromptMethodSection

    def __init__(self, section: PromptMethodSection, base: Base) -> None:
        super().__init__(section, base)
        require_no_state(base.model)

    @abstractmethod
    def embeddings(self) -> Tensor:
        """The soft prompt `[num_virtual_tokens, hidden]`, differentiable."""

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    def prefix(self) -> KVPrefix:
        return compile_embeddings(self.base.model, self.embeddings())

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: Any, base: Base) -> KVPrefix:
        # The embeddings are all there is to compile: no encoder is built.
        with torch.no_grad():
            return compile_embeddings(base.model, cls.read_embeddings(files, base))

    @staticmethod
    def read_embeddings(files: AdapterFiles, base: Base) -> Tensor:
        """`prompt_embeddings` of `files`, checked against the base's hidden size."""
        soft, hidden = virtual_tokens_of(files), base.embedding.embedding_dim
        if soft.shape[1] != hidden:
            raise AdapterError(
                f"`prompt_embeddings` should have shape [virtual tokens, {hidden}], found "
                f"{list(soft.shape)}"
            )
        return soft.to(device=base.model.device, dtype=torch.float32)
