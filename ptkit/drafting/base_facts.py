"""What a draft needs to know of a base model, from its settings and tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from ptkit.errors import ModelError
from ptkit.options import Quantize
from ptkit.runtime.base_model import Base
from ptkit.runtime.gguf_model import is_gguf
from ptkit.runtime.named_models import source_of
from ptkit.runtime.tokenization import load_tokenizer

#: How a base reads: `decoder` from left to right, `encoder` both ways, `encoder_decoder` both.
BaseKind = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True)
class BaseFacts:
    """A base model that need not be loaded.

    positions: the most tokens it reads, or None where that is not limited
    parameters: of its layers, roughly; None where its settings do not tell
    loaded: the model itself, where a program has it
    """

    id: str
    kind: BaseKind
    positions: int | None
    parameters: int | None
    loaded: Base | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises ModelError where there is none."""
        return load_tokenizer(self.id) if self.loaded is None else self.loaded.tokenizer

    @property
    def section(self) -> dict[str, Any]:
        """`model` of a recipe, without what is the default."""
        base = self.loaded
        if base is None:
            return {"id": self.id}
        dtype = str(base.model.dtype).removeprefix("torch.")
        rounded = base.stored if base.stored in get_args(Quantize) else "blocks"
        return {
            "id": base.id,
            **({} if base.revision is None else {"revision": base.revision}),
            **({} if dtype == "float32" else {"dtype": dtype}),
            **({"quantize": rounded} if base.quantized else {}),
        }


def base_facts(model: str | Base) -> BaseFacts:
    """What is known of a model, by its name or loaded. Raises ModelError where it cannot be
    found."""
    if isinstance(model, Base):
        return _facts(model.id, model.model.config, model)
    id = model
    source = source_of(id)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot read the settings of the model `{id}`: {reason} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    return _facts(id, config)


def _facts(id: str, config: PretrainedConfig, loaded: Base | None = None) -> BaseFacts:
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
    positions = getattr(text, "max_position_embeddings", None)
    return BaseFacts(id, kind, positions, size, loaded)
