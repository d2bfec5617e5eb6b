"""Loading the frozen base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ptkit.errors import ModelError
from ptkit.formats.fingerprint import model_fingerprint, tokenizer_fingerprint
from ptkit.prefix import KVLayout
from ptkit.recipe.schema import ModelSection
from ptkit.runtime.compile import kv_layout
from ptkit.runtime.quantize import quantize_int8

#: Name of the base model that ships inside the package.
TINY_EN = "tiny-en"
TINY_EN_FOLDER = Path(__file__).resolve().parent.parent / "models" / TINY_EN


@dataclass(frozen=True)
class Base:
    """A frozen language model, causal or an encoder-decoder, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    quantized: bool = False

    @cached_property
    def layout(self) -> KVLayout:
        """Shapes of the keys and values of each layer."""
        return kv_layout(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights (see `ptkit.formats.fingerprint`), before they were quantised."""
        return model_fingerprint(self.model)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the vocabulary."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the input and a decoder writes the target."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def pad_token_id(self) -> int:
        """The id used for padding (never attended to)."""
        return int(self.tokenizer.pad_token_id)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of input embeddings, `[vocabulary, hidden]`."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_positions(self) -> int | None:
        """The most positions the model was made for, virtual tokens included; None: unbounded."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def require_positions(self, virtual: int, tokens: int, what: str) -> None:
        """Raise ModelError unless `virtual` + `tokens` positions fit into the model."""
        if self.max_positions is not None and virtual + tokens > self.max_positions:
            raise ModelError(
                f"too few positions: {self.id} has {self.max_positions}, {what} takes {virtual} "
                f"virtual tokens and leaves {max(0, self.max_positions - virtual)}, but the data "
                f"needs {tokens}; lower the number of virtual tokens (or demonstrations), "
                "`max_input_tokens` or `max_target_tokens`"
            )


def resolve_device(name: str) -> torch.device:
    """`auto` picks CUDA, then MPS, then CPU. Raises ModelError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device `{name}` is not available here ({error})") from error
    return device


@contextmanager
def no_weights_bar() -> Iterator[None]:
    """Hide the bars of reading and writing weights; downloads keep theirs."""
    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


def load_base(section: ModelSection) -> Base:
    """Load the base a recipe names, frozen and in evaluation mode.

    Raises ModelError when it cannot be found or is not a causal language model. Never runs code
    from a repository and reads safetensors only.
    """
    source = str(TINY_EN_FOLDER) if section.id == TINY_EN else section.id
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ModelError(f"cannot load the base model `{section.id}`: no such folder")
    device = resolve_device(section.device)
    options = {"revision": section.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the base model `{section.id}`: {_first_line(error)} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    try:
        with no_weights_bar():
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model: Any = kind.from_pretrained(
                source,
                dtype=getattr(torch, section.dtype),
                attn_implementation=None if section.attention == "auto" else section.attention,
                use_safetensors=True,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        if "attention implementation" in str(error):
            raise ModelError(
                f"`{section.id}` has no `{section.attention}` attention; "
                "set `model.attention: auto`"
            ) from error
        raise ModelError(
            f"cannot load the weights of `{section.id}`: {_first_line(error)} "
            "(only safetensors are read, never pickles such as pytorch_model.bin)"
        ) from error
    base = frozen_base(model.to(device), tokenizer, section.id, section.revision)
    return base if section.quantize is None else quantized_base(base)


def quantized_base(base: Base) -> Base:
    """`base` with its linear layers in eight bits (see `ptkit.runtime.quantize`).

    It keeps the fingerprint: adapters of the one are loaded on the other, at their user's choice.
    """
    fingerprint = base.fingerprint  # while there are floating-point weights to read
    quantize_int8(base.model)
    base = replace(base, quantized=True)
    base.__dict__["fingerprint"] = fingerprint
    return base


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def frozen_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    id: str,
    revision: str | None = None,
) -> Base:
    """Freeze `model` and pair it with its tokenizer (given a padding token if it has none)."""
    model.requires_grad_(False)
    model.eval()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {id} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Base(model, tokenizer, id, revision)
