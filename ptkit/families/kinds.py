"""Kinds of models: which class loads them, and what can be asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig


@dataclass(frozen=True)
class Kind:
    """A kind of models.

    loader: transformers' class of the whole model, head included
    methods: those that are asked about, by their columns
    padded_left: rows may be padded at the left, too (an encoder numbers its tokens from the first)
    goes_on: its text goes on after an answer, in a cache that may be of fixed size
    """

    name: str
    loader: Any
    methods: tuple[str, ...]
    padded_left: bool = True
    goes_on: bool = True


DECODER = Kind(
    "decoder",
    AutoModelForCausalLM,
    ("prefix", "prefix (MLP)", "infix", "prompt", "p-tuning", "text prompt", "lora"),
)
# An infix and a text prompt are about text that goes on; an encoder's input does not.
ENCODER_DECODER = Kind(
    "encoder-decoder",
    AutoModelForSeq2SeqLM,
    ("prefix", "prefix (MLP)", "prompt", "p-tuning", "lora"),
    padded_left=False,
    goes_on=False,
)
KINDS = (DECODER, ENCODER_DECODER)


def kind_of(config: PretrainedConfig) -> Kind:
    """The kind of model that `config` describes."""
    return ENCODER_DECODER if config.is_encoder_decoder else DECODER
