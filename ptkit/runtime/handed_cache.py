"""A prefix that a model takes for something it has cached.

It is for families with an attention of their own that may be handed a cache (bloom, falcon, gptj).

Mask, positions and ALiBi's distances are then the model's own. No infix: all tokens see what is in
a cache (`ptkit.runtime.infix` refuses it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.attention import Call, Noted, Repeats, layers_read
from ptkit.runtime.checkpointing import recomputes
from ptkit.runtime.views import StandIn, name_of


class HandedCache:
    """The back end of these families."""

    def put(
        self, model: PreTrainedModel, prefixes: Repeats | None, call: Call, noted: Noted = None
    ) -> None:
        assert prefixes is not None
        assert noted is None  # decoders leave their keys and values in a cache
        given = call.arguments
        inner = given.get("past_key_values")
        read = next(t for n in ("input_ids", "inputs_embeds") if (t := given.get(n)) is not None)
        mask = given.get("attention_mask")
        if mask is None:
            cached = 0 if inner is None else inner.get_seq_length()
            mask = prefixes.batch.visible.new_ones(
                (len(read), cached + read.shape[1]), dtype=torch.long
            )
        batch = prefixes.times(len(mask) // prefixes.batch.rows)
        cache = _PrefixThenOwn(batch, inner)
        call.arguments |= {
            "attention_mask": torch.cat([batch.visible.to(mask), mask], dim=1),
            "past_key_values": cache,
        }
        if recomputes(model):
            # A checkpointed layer drops its cache, so the attention is handed it once more.
            call.replaced |= {
                name_of(model, module): _Handed(module, cache) for module in layers_read(model)
            }

        def own_cache(output: Any) -> Any:
            output.past_key_values = inner
            return output

        call.after = own_cache


class _Handed(StandIn):
    """An attention module that is handed `cache`."""

    def __init__(self, inner: nn.Module, cache: Cache) -> None:
        super().__init__(inner)
        self.cache = cache

    def forward(self, *args: Any, **kw: Any) -> Any:
        return self.inner(*args, **{**kw, "layer_past": self.cache})


class _PrefixThenOwn(Cache):
    """What an attention module takes for its cache: the prefix before its own keys and values.

    Nothing is stored, so reading twice (as gradient checkpointing does) gives the same. `inner` is
    the cache of the tokens themselves, if there is one.
    """

    def __init__(self, batch: PrefixBatch, inner: Cache | None) -> None:
        super().__init__(layers=[])
        self.batch, self.inner = batch, inner

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx)
        keys, values = (
            t[layer_idx].to(key_states.dtype) for t in (self.batch.keys, self.batch.values)
        )
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        read = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return self.batch.longest + read

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)
