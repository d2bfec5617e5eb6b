"""The caches that generation fills: prefilled with prefixes, and grown without copying.

transformers' `DynamicCache` concatenates, so every new token copies all keys and values before it.
That is a quarter of the time of a batch of 16 on a CPU. Here the memory is reserved first.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from ptkit.errors import ModelError
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.placement import own_part

CacheT = TypeVar("CacheT", bound=Cache)


class _Reserve:
    """A tensor `[rows, heads, capacity, dim]` of which the first positions are in use."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def appended(self, used: Tensor, new: Tensor, capacity: int) -> Tensor:
        """`used` and `new` one after the other, a view of the reserve.

        used: what the layer holds. Where that is not the reserve's own beginning (rows were
        repeated, or reordered by a beam search), it is copied into a new reserve.
        """
        length = used.shape[-2] if used.numel() else 0
        needed = length + new.shape[-2]
        tensor = self.tensor
        if (
            tensor is None
            or needed > tensor.shape[-2]
            or (length and used.data_ptr() != tensor.data_ptr())
            or new.shape[:2] != tensor.shape[:2]
        ):
            room = capacity if capacity >= needed else needed + needed // 2
            tensor = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
            if length:
                tensor[..., :length, :] = used
            self.tensor = tensor
        tensor[..., length:needed, :] = new
        return tensor[..., :needed, :]


class _ReservedLayer(DynamicLayer):
    def __init__(self, positions: int) -> None:
        super().__init__()
        self._positions = positions
        self._key_reserve, self._value_reserve = _Reserve(), _Reserve()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._key_reserve.appended(self.keys, key_states, self._positions)
        self.values = self._value_reserve.appended(self.values, value_states, self._positions)
        return self.keys, self.values


class ReservedCache(DynamicCache):
    """A growing cache with memory for `positions` from the start (more is reserved when needed).

    For inference only: keys and values are written in place.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()
        make_layer: Any = partial(_ReservedLayer, positions)
        self.layer_class_to_replicate = make_layer


def sees_everything(model: PreTrainedModel) -> bool:
    """Whether all layers of `model` attend to everything before a token: none has a window, or
    keeps a state instead of keys and values. Only there a prefix can be part of the cache."""
    if getattr(
        model.config, "attention_types", None
    ):  # GPT-Neo's local layers, in masks of its own
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def has_state(model: PreTrainedModel) -> bool:
    """Whether some layers of `model` keep a running state beside keys and values, or instead."""
    return any(map(_keeps_state, DynamicCache(config=model.config).layers))


def shares_keys(model: PreTrainedModel) -> bool:
    """Whether some layers of `model` read the keys and values of earlier ones (Gemma 3n and 4)."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", None):  # what release 5.16 asks for
        return True
    return any(mode == "reuse" for mode in getattr(config, "kv_sharing_modes", None) or ())


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """What keeps a layer's memory of a text, as the config names it (`full_attention`, ...)."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = getattr(config, "layers_block_type", None)
    return list(kinds) if kinds else ["full_attention"] * config.num_hidden_layers


def require_no_state(model: PreTrainedModel) -> None:
    """Raise ModelError when a layer of `model` keeps a state instead of keys and values: what a
    prompt leaves there is not a KV prefix."""
    if not has_state(model):
        return
    kinds = sorted({kind for kind in layer_kinds(model) if "attention" not in kind or
                    kind.startswith("linear")}) or ["recurrent"]  # fmt: skip
    raise ModelError(
        f"no prompt compiles for {type(model).__name__}: its layers of kind "
        f"{', '.join(f'`{kind}`' for kind in kinds)} keep a running state, for which virtual "
        "tokens would be read again with every input; use prefix_tuning (keys and values of "
        "the attention layers) or lora"
    )


def _keeps_state(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def layers_with_keys(cache: Cache) -> list[Any]:
    """The layers of a filled `cache` that hold keys and values."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def whole_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps all keys and values, window or not, and states where there are."""
    own = DynamicCache(config=model.config)
    # A layer that reads the keys and values of another needs no place; others that have none do.
    keeps = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
    placed = not shares_keys(model) and not all(isinstance(layer, keeps) for layer in own.layers)
    return own if placed or has_state(model) else DynamicCache()


def cache_for(model: PreTrainedModel, batch: PrefixBatch | None, positions: int) -> DynamicCache:
    """An empty cache with memory for the rows' prefixes and `positions` more, reserved where all
    layers attend to everything. Layers with a window or a state keep the kind of cache that `model`
    would take itself. A prefix is then put into their attention instead of the cache.
    """
    if not sees_everything(model):
        return DynamicCache(config=model.config)
    longest = 0 if batch is None else batch.longest
    return ReservedCache(longest + positions)


def conversation_cache(
    model: PreTrainedModel, batch: PrefixBatch | None, positions: int
) -> DynamicCache:
    """`cache_for` the first turn, with the rows' prefixes in it where they can be part of it."""
    if batch is not None and batch.placeless is not None:
        return DynamicCache(config=model.config)  # of the text only, whose positions begin at 0
    cache = cache_for(model, batch, positions)
    if batch is not None and batch.longest and isinstance(cache, ReservedCache):
        prefilled_cache(model, batch, cache)
    return cache


def prefilled_cache(model: PreTrainedModel, batch: PrefixBatch, cache: CacheT) -> CacheT:
    """The empty `cache` with each row's prefix in it, as if `model` had read its virtual tokens."""
    batch = own_part(model, batch)
    for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        cache.update(keys, values, layer)
    return cache
