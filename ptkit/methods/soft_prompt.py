"""What prompt tuning and P-tuning share: they learn input embeddings.

The base compiles them where it reads from left to right, and reads them with every input where it
does not."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict
from ptkit.methods.base_names import require_shapes
from ptkit.methods.peft_tensors import virtual_tokens_of
from ptkit.methods.prompt_settings import ENCODER_PROMPT, PromptMethodSection
from ptkit.methods.read_start import compiles_embeddings
from ptkit.methods.start import (
    start_embeddings,
    start_files,
    start_shares,
    start_tokens,
)
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_embeddings, require_no_ids
from ptkit.runtime.soft_prompts import has_positions

if TYPE_CHECKING:
    from peft import PeftConfig


def prompt_learning_shape(base: Base) -> dict[str, Any]:
    """The fields of PEFT's prompt-learning configs that describe the base model."""
    config = base.model.config.get_text_config()
    return {
        "num_layers": len(base.layout),
        "num_attention_heads": config.num_attention_heads,
        "token_dim": base.embedding.embedding_dim,
        "num_transformer_submodules": 1,
    }


def soft_prefix(base: Base, embeddings: Tensor) -> KVPrefix:
    """What `embeddings` `[virtual_tokens, hidden]` become on `base`; differentiable in them."""
    if compiles_embeddings(base):
        return compile_embeddings(base.model, embeddings)
    return KVPrefix.of_embeddings(embeddings.to(base.model.dtype), base.layout)


def _read_by_encoder(files: AdapterFiles, base: Base) -> AdapterFiles:
    """`files` with the rows that are read. For an encoder-decoder PEFT keeps twice as many: the
    encoder reads the first half, and nobody the second.

    Raises AdapterError where PEFT's virtual tokens have absolute positions, and ptkit's none.
    """
    said, tokens = files.config.get("num_virtual_tokens"), files.tensors.get("prompt_embeddings")
    if files.config.get("num_transformer_submodules") != 2 or tokens is None:
        return files
    if not isinstance(said, int) or tokens.ndim != 2 or len(tokens) != 2 * said:
        return files
    if base.encoder_decoder and has_positions(base.model.get_encoder()):
        raise AdapterError(
            f"PEFT gives the first positions of the encoder to its virtual tokens, and `{base.id}` "
            "numbers positions from the first word here; train the soft prompt again with ptkit"
        )
    return replace(files, tensors={**files.tensors, "prompt_embeddings": tokens[:said].clone()})


class SoftPrompt(Adapter):
    """An adapter that learns embeddings `[num_virtual_tokens, hidden]` of virtual tokens."""

    section: PromptMethodSection
    encoder_decoder = True
    config: PeftConfig

    def __init__(self, section: PromptMethodSection, base: Base) -> None:
        """Raises ModelError for a base that reads no embeddings alone."""
        super().__init__(section, base)
        require_no_ids(base.model)

    @abstractmethod
    def embeddings(self) -> Tensor:
        """The soft prompt `[num_virtual_tokens, hidden]`, differentiable."""

    @classmethod
    def start_from(
        cls, section: PromptMethodSection, base: Base, demonstrations: Demonstrations
    ) -> Tensor | None:
        """Embeddings `[num_virtual_tokens, hidden]` to start from; None for `random`."""
        if section.start == "adapter":
            shares = start_shares(section)
            files = start_files(section, base, demonstrations)
            soft = [cls.read_embeddings(f, base) for f in files]
            return sum(
                (s * share for s, share in zip(soft, shares, strict=True)), torch.tensor(0.0)
            )
        tokens = start_tokens(section, base, demonstrations)
        return None if tokens is None else start_embeddings(base, tokens)

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    def prefix(self) -> KVPrefix:
        return soft_prefix(self.base, self.embeddings())

    def own_files(self) -> AdapterFiles:
        config = peft_config_dict(self.config, self.base)
        if self.base.encoder or self.base.encoder_decoder:
            config["peft_type"] = ENCODER_PROMPT
        if self.base.encoder_decoder:
            config["task_type"] = "SEQ_2_SEQ_LM"
        return AdapterFiles(config, {"prompt_embeddings": self.embeddings().detach()})

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: Any, base: Base) -> KVPrefix:
        # The embeddings are all there is to compile: no encoder is built.
        with torch.no_grad():
            prefix = soft_prefix(base, cls.read_embeddings(files, base))
        # Finite embeddings may be so large that the base makes nothing finite of them.
        if not all(bool(t.isfinite().all()) for t in prefix.tensors):
            raise AdapterError(
                "the base cannot read this soft prompt: what it makes of it is not finite; the "
                "weights are damaged, fetch or export them again"
            )
        return prefix

    @staticmethod
    def read_embeddings(files: AdapterFiles, base: Base) -> Tensor:
        """`prompt_embeddings` of `files`, checked against the base's hidden size."""
        soft, hidden = (
            virtual_tokens_of(_read_by_encoder(files, base)),
            base.embedding.embedding_dim,
        )
        stated = getattr(base.model.config.get_text_config(), "num_hidden_layers", None)
        # PEFT counts the layers of the config, ptkit those with keys and values.
        layers = [n for n in (len(base.layout), stated) if n is not None]
        require_shapes(files.config, {"num_layers": layers, "token_dim": [hidden]}, base)
        if soft.shape[1] != hidden:
            raise AdapterError(
                f"`prompt_embeddings` should have shape [virtual tokens, {hidden}], found "
                f"{list(soft.shape)}"
            )
        return soft.to(device=base.model.device, dtype=torch.float32)
