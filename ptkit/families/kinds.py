"""Kinds of models: which class loads them, and what can be asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from ptkit.errors import ModelError
from ptkit.runtime.architecture import HeadKind, is_encoder
from ptkit.runtime.base_model import Base


@dataclass(frozen=True)
class ModelKind:
    """A kind of models, or of use that is made of them.

    loader: transformers' class of the whole model, head included
    methods: those that are asked about, by their columns
    head: what its classification head labels; None for a language model
    pretrained: classes of the checkpoints it starts from (the first that a family has), where that
        is another one. What they have no weights for is new whenever one is loaded
    padded_left: rows may be padded at the left, too (an encoder numbers its tokens from the first)
    goes_on: its text goes on after an answer, in a cache that may be of fixed size
    takes_positions: virtual tokens take positions that words could have had
    """

    name: str
    loader: Any
    methods: tuple[str, ...]
    head: HeadKind | None = None
    pretrained: tuple[Any, ...] = ()
    padded_left: bool = False
    goes_on: bool = False
    takes_positions: bool = False


DECODER = ModelKind(
    "decoder",
    AutoModelForCausalLM,
    ("prefix", "prefix (MLP)", "infix", "prompt", "p-tuning", "text prompt", "lora"),
    padded_left=True,
    goes_on=True,
    takes_positions=True,
)
# An infix and a text prompt are about text that goes on; an encoder's input does not.
ENCODER_DECODER = ModelKind(
    "encoder-decoder",
    AutoModelForSeq2SeqLM,
    ("prefix", "prefix (MLP)", "prompt", "p-tuning", "lora"),
)
_HEADED = ("prefix", "prefix (MLP)", "prompt", "p-tuning", "lora", "linear probe")
SEQUENCE_ENCODER = ModelKind(
    "encoder as sequence classifier",
    AutoModelForSequenceClassification,
    _HEADED,
    head="sequence",
    pretrained=(AutoModelForPreTraining, AutoModelForMaskedLM),
)
TOKEN_ENCODER = ModelKind(
    "encoder as token classifier",
    AutoModelForTokenClassification,
    _HEADED,
    head="token",
    pretrained=(AutoModelForPreTraining, AutoModelForMaskedLM),
)
SEQUENCE_DECODER = ModelKind(
    "decoder as sequence classifier",
    AutoModelForSequenceClassification,
    _HEADED,
    head="sequence",
    pretrained=(AutoModelForCausalLM,),
    takes_positions=True,
)
KINDS = (DECODER, SEQUENCE_DECODER, ENCODER_DECODER, SEQUENCE_ENCODER, TOKEN_ENCODER)


def kinds_of(config: PretrainedConfig) -> tuple[ModelKind, ...]:
    """The kinds that a model of `config` can be, as far as transformers has a class for it.

    config: of a small model, which is made to see whether it is an encoder
    """
    if config.is_encoder_decoder:
        return (ENCODER_DECODER,)
    with torch.random.fork_rng(devices=[]):
        encoder = is_encoder(AutoModel.from_config(config).eval())
    able = (SEQUENCE_ENCODER, TOKEN_ENCODER) if encoder else (DECODER, SEQUENCE_DECODER)
    return tuple(kind for kind in able if type(config) in kind.loader._model_mapping)


def used_as(base: Base) -> ModelKind:
    """The kind that `base` is used as."""
    if base.encoder_decoder:
        return ENCODER_DECODER
    if base.head is None:
        return DECODER
    if base.encoder:
        return SEQUENCE_ENCODER if base.head.kind == "sequence" else TOKEN_ENCODER
    if base.head.kind == "sequence":
        return SEQUENCE_DECODER
    raise ModelError(f"{base.id} is a decoder that labels tokens, about which nothing is asked yet")
