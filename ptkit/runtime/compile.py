"""Compiling tokens or soft prompts into a KV prefix: the frozen model reads them once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ptkit.errors import ModelError
from ptkit.prefix import KVLayout, KVPrefix, LayerShape
from ptkit.runtime.architecture import evaluating, is_encoder, reads_ids
from ptkit.runtime.attention import Call
from ptkit.runtime.backends import backend_of
from ptkit.runtime.cache import layers_with_keys, require_no_state, whole_cache
from ptkit.runtime.locks import running
from ptkit.runtime.placement import whole
from ptkit.runtime.row_adapters import rows_run_with
from ptkit.runtime.views import viewed


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode while a prompt is read, by the base alone.

    Dropout would make a compiled prefix random, and gradient checkpointing (active in training
    mode only) would switch off the cache the prefix is taken from.
    """
    with running(model), evaluating(model), rows_run_with(()):
        yield


def _cache_as_prefix(model: PreTrainedModel, cache: DynamicCache) -> KVPrefix:
    layers: list[Any] = layers_with_keys(cache)
    own = KVPrefix(
        tuple(layer.keys[0] for layer in layers),
        tuple(layer.values[0] for layer in layers),
        as_text=True,
    )
    return whole(model, own)


def compile_embeddings(model: PreTrainedModel, embeddings: Tensor) -> KVPrefix:
    """The KV prefix of soft embeddings `[virtual_tokens, hidden]`; differentiable in them.

    Costs one forward of the backbone (no LM head) over `virtual_tokens` positions with a batch of
    one. The number of rows that will use it does not matter. Raises ModelError for models with
    layers that keep a state, or that look up token ids.
    """
    require_no_state(model)
    require_no_ids(model)
    cache = whole_cache(model)
    backbone = model.base_model
    with reading(model):
        backbone(
            inputs_embeds=embeddings[None].to(model.dtype), past_key_values=cache, use_cache=True
        )
    return _cache_as_prefix(model, cache)


def require_no_ids(model: PreTrainedModel) -> None:
    """Raise ModelError where embeddings alone cannot be read: layers look up token ids."""
    if reads_ids(model):
        raise ModelError(
            f"every layer of {type(model).__name__} looks up an embedding of its own by a token's "
            "id, and a soft prompt's virtual tokens have no id; use prefix_tuning or lora"
        )


def compile_tokens(model: PreTrainedModel, input_ids: Tensor) -> KVPrefix:
    """The KV prefix of real tokens `[virtual_tokens]`: a text prompt, or a prefix's start.

    One entry per attention module (see `ptkit.runtime.attention.attention_modules`).
    """
    if model.config.is_encoder_decoder or is_encoder(model):
        return _read_by_all(model, input_ids)
    with torch.no_grad():
        cache = whole_cache(model)
        with reading(model):
            model.base_model(
                input_ids=input_ids[None].to(model.device), past_key_values=cache, use_cache=True
            )
    return _cache_as_prefix(model, cache)


@torch.no_grad()
def _read_by_all(model: PreTrainedModel, input_ids: Tensor) -> KVPrefix:
    """What every attention makes of the tokens where nothing is cached: in an encoder-decoder the
    encoder reads them, and the decoder writes them, looking at what the encoder read."""
    ids = input_ids[None].to(model.device)
    call = Call({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if model.config.is_encoder_decoder:
        call.arguments |= {"decoder_input_ids": ids, "use_cache": False}
    noted: dict[int, tuple[Tensor, Tensor]] = {}
    with reading(model):
        backend_of(model).put(model, None, call, noted)
        viewed(model, call.replaced).base_model(**call.arguments)
    read = [noted[layer] for layer in sorted(noted)]
    own = KVPrefix(tuple(k[0].clone() for k, _ in read), tuple(v[0].clone() for _, v in read))
    return whole(model, own)


def kv_layout(model: PreTrainedModel) -> KVLayout:
    """The layer shapes of `model`, read from what it caches for one token.

    Asking the model rather than its config is right for every family: multi-query, grouped
    heads, head sizes other than hidden / heads, layers of different widths.
    """
    prefix = compile_tokens(model, torch.zeros(1, dtype=torch.long))
    return KVLayout(
        LayerShape(k.shape[0], k.shape[2], v.shape[2])
        for k, v in zip(prefix.keys, prefix.values, strict=True)
    )
