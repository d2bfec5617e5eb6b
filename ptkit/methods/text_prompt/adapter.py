"""A text prompt with few-shot demonstrations: nothing is learnt.

The untrained baseline every comparison needs (Brown et al. 2020, section 2,
https://arxiv.org/abs/2005.14165). It compiles to a KV prefix like the learnt methods.

The text and the input are one text for the model. The begin-of-text token that some tokenizers add
stands before the prompt, and not again before the input.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch

from ptkit.data.tokens import without_lead
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, register
from ptkit.methods.soft_prompt import soft_prefix
from ptkit.methods.start import start_embeddings
from ptkit.methods.text_prompt.settings import TextPromptSection
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state
from ptkit.runtime.compile import compile_tokens


@register
class TextPrompt(Adapter):
    """Real tokens read once by the base and kept as a KV prefix."""

    section_class = TextPromptSection
    works_with_head = False
    section: TextPromptSection

    def __init__(self, section: TextPromptSection, base: Base, text: str) -> None:
        super().__init__(section, base)
        if not base.encode_part(text):
            raise UserError("a text prompt needs an instruction or at least one example")
        (ids,) = base.encode([text])
        self._lead = base.lead
        base.require_positions(len(ids), 1, "the text prompt")
        self.token_ids = torch.tensor(ids)
        self._prefix: KVPrefix | None = None

    @classmethod
    def create(
        cls, section: TextPromptSection, base: Base, demonstrations: Demonstrations
    ) -> TextPrompt:
        parts = [section.instruction] if section.instruction else []
        parts += islice(demonstrations.shuffled(), section.examples)
        return cls(section, base, "".join(part + section.separator for part in parts))

    @property
    def virtual_tokens(self) -> int:
        return len(self.token_ids)

    def behind(self, ids: list[int]) -> list[int]:
        return without_lead(ids, self._lead)

    @property
    def answer_end(self) -> str | None:
        # After its answer the base goes on with a demonstration of its own.
        return self.section.separator or None

    def prefix(self) -> KVPrefix:
        if self._prefix is None:
            if has_state(self.base.model):
                read = soft_prefix(self.base, start_embeddings(self.base, self.token_ids))
            else:
                read = compile_tokens(self.base.model, self.token_ids)
            self._prefix = replace(read, begins_text=bool(self._lead))
        return self._prefix

    def own_files(self) -> AdapterFiles:
        raise AdapterError("a text prompt has no trained parameters to export; keep its text")
