"""What kind of transformer a model is, found by asking it rather than by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ptkit.runtime.facts import known
from ptkit.runtime.locks import running
from ptkit.runtime.row_adapters import rows_run_with

#: What a classification head labels: the whole input, or each of its tokens.
HeadKind = Literal["sequence", "token"]

_HEADS: dict[HeadKind, set[str]] = {
    "sequence": {*modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()},
    "token": {*modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()},
}


def head_kind(model: PreTrainedModel) -> HeadKind | None:
    """What the classification head of `model` labels; None for a language model."""
    name = type(model).__name__
    return next((kind for kind, names in _HEADS.items() if name in names), None)


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether every token of `model` sees those after it, as in BERT.

    Found by changing the last of three tokens and looking at the first. An encoder-decoder is
    none: its decoder does not.
    """
    if model.config.is_encoder_decoder:
        return False
    return known(model.base_model, _first_sees_last)


def reads_ids(model: PreTrainedModel) -> bool:
    """Whether every layer of `model` looks up token ids by itself, beside what was embedded (the
    per-layer embeddings of Gemma 3n and 4)."""
    return bool(getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context no module of `model` is in training mode; afterwards those that were
    are again."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _first_sees_last(backbone: Any) -> bool:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=backbone.device)
    with running(backbone), rows_run_with(()), evaluating(backbone):
        first = backbone(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0]
    return not torch.equal(first[0], first[1])


def first_position(model: PreTrainedModel) -> int:
    """The absolute position an encoder gives the first token.

    RoBERTa's begin after that of padding, which its table keeps a place for.
    """
    tables = [
        m for name, m in model.base_model.named_modules()
        if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]  # fmt: skip
    if tables and tables[0].padding_idx is not None:
        return tables[0].padding_idx + 1
    return 0


#: How families call their table of positions.
_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding")


def places_in_table(model: PreTrainedModel) -> int | None:
    """How many positions the decoder's table has; None where positions are computed, so that a
    text may be of any length."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or model.config.is_encoder_decoder:
        return None
    for name, module in model.base_model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            return int(most)
    return None
