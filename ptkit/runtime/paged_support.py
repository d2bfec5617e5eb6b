"""Which models blocks of keys and values serve, and how long their sequences may get."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ptkit.errors import ModelError
from ptkit.runtime.cache import shares_keys


def why_not_paged(model: PreTrainedModel) -> str | None:
    """What of `model` blocks of keys and values have no place for; None: they do for all of it."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder, and blocks are for causal language models"
    if shares_keys(model):
        return "has layers that read the keys and values of others, which blocks have no place for"
    if {*map(type, _layers(model))} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return (
            "has layers that keep a state instead of keys and values, which cannot be handed from "
            "row to row"
        )
    return None


def smallest_window(model: PreTrainedModel) -> int | None:
    """The positions that the layer with the smallest window sees; None where all see everything.

    Up to there a window hides nothing, and blocks hold what such a layer reads.
    """
    sizes = [x.sliding_window for x in _layers(model) if type(x) is DynamicSlidingWindowLayer]
    config: Any = model.config.get_text_config()
    if getattr(config, "attention_types", None):  # GPT-Neo's local layers
        sizes.append(config.window_size)
    return min(sizes, default=None)


def _layers(model: PreTrainedModel) -> list[Any]:
    return DynamicCache(config=model.config).layers


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most positions a sequence of a `PagedBatch` of `model` may take; None: no limit.

    Where layers see a window only, it is the window. Raises ModelError for models that
    `why_not_paged` tells something of.
    """
    reason = why_not_paged(model)
    if reason is not None:
        raise ModelError(f"{type(model).__name__} {reason}; `ptkit generate` runs it")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((limit for limit in (most, smallest_window(model)) if limit), default=None)
