"""A base model that a program hands over."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptkit.errors import UserError
from ptkit.runtime.base_model import Base, frozen_base


def given_base(
    model: Base | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, call: str
) -> Base:
    """The base that a program hands over: loaded by ptkit, or a model of transformers, which is
    frozen, with its tokenizer.

    call: how it is handed over with a tokenizer, for the message

    Raises UserError for a model of transformers without its tokenizer.
    """
    if isinstance(model, Base):
        return model
    if tokenizer is None:
        raise UserError(f"give the tokenizer too: {call}")
    return frozen_base(model, tokenizer, str(model.name_or_path))
