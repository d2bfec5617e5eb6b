"""What a draft needs to know of a base model, from its settings and tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from ptkit.errors import ModelError
from ptkit.runtime.gguf_model import is_gguf
from ptkit.runtime.named_models import source_of
from ptkit.runtime.tokenization import load_tokenizer

#: How a base reads: `decoder` from left to right, `encoder` both ways, `encoder_decoder` both.
BaseKind = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True)
class BaseFacts:
    """A base model that is not loaded.

    positions: the most tokens it reads, or None where that is not limited
    parameters: of its layers, roughly; None where its settings do not tell
    """

    id: str
    kind: BaseKind
    positions: int | None
    parameters: int | None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises ModelError where there is none."""
        return load_tokenizer(self.id)


def base_facts(id: str) -> BaseFacts:
    """What is known of the model called `id`. Raises ModelError where it cannot be found."""
    source = source_of(id)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot read the settings of the model `{id}`: {reason} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    text = config.get_text_config()
    kind: BaseKind = "decoder"
    if config.is_encoder_decoder:
        kind = "encoder_decoder"
    elif (
        config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
        and not is_gguf(id)
    ):
        kind = "encoder"
    width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    size = 12 * layers * width**2 if width and layers else None
    return BaseFacts(id, kind, getattr(text, "max_position_embeddings", None), size)
