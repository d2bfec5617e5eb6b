"""Injecting a KV prefix into a model's attention: for training and scoring, and for generation
where a prefix cannot be part of the cache.

The model is switched to a registered attention function that puts the layer's prefix before
its keys and values. Nothing is cached, so gradient checkpointing recomputes the right thing
(a cache would be appended to a second time). Off, the model's own attention is back, and its
outputs are bit-identical to those of a model never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ptkit.errors import ModelError
from ptkit.prefix import PrefixBatch
from ptkit.runtime.attention_sites import layers_of, require_attention
from ptkit.runtime.disentangled import disentangled_attention, is_disentangled
from ptkit.runtime.turns import turn


class Injection:
    """What the attention modules of one model read: the prefix of the batch in flight.

    batch: set before each forward; None (or an empty batch) is the plain base.
    """

    def __init__(self) -> None:
        self._batch: PrefixBatch | None = None
        #: Mask -> a batch, and the mask with that batch's prefix region, while somebody has it.
        self._extended: Any = WeakTensorKeyDictionary()
        self._repeated: dict[int, PrefixBatch] = {}
        #: Tokens that were in the cache before the forward pass under way.
        self.cached: int | Tensor = 0
        #: Position ids of the forward pass under way, `[rows, tokens]`, where it was given some.
        self.positions: Tensor | None = None
        #: Layer -> keys and values it computed in the last forward pass, while this is not None.
        self.read: dict[int, tuple[Tensor, Tensor]] | None = None

    @property
    def batch(self) -> PrefixBatch | None:
        """The prefixes in place, or None."""
        return self._batch

    @batch.setter
    def batch(self, batch: PrefixBatch | None) -> None:
        self._batch = batch if batch is not None and batch.longest else None
        if not torch.compiler.is_compiling():  # what it compiles keeps no masks
            self._extended.clear()
        self._repeated.clear()

    def repeated(self, batch: PrefixBatch, times: int) -> PrefixBatch:
        """`batch` with every row `times` in a row; made once per batch."""
        if times not in self._repeated:
            self._repeated[times] = batch.repeated(times)
        return self._repeated[times]

    def begin(
        self, _: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note where a forward pass of the model begins (a hook before it)."""
        cache = kw.get("past_key_values")
        self.cached = 0 if cache is None else cache.get_seq_length()
        self.positions = kw.get("position_ids")
        whole = cache is None and kw.get("attention_mask") is None
        if self._batch is None or self.positions is None or not whole:
            return None
        # Without a mask, transformers takes positions with a gap (an infix) for several texts.
        return args, {**kw, "attention_mask": torch.ones_like(self.positions)}

    def extended(self, batch: PrefixBatch, mask: Tensor, window: int | None) -> Tensor:
        """`mask` `[rows|1, 1, queries, keys]` with the prefix region before its keys.

        window: of the layer, which hides from a token what is so far behind it

        The layers of a model share a mask object, so the work is done once per distinct mask. It
        goes with the mask: that of a token goes when the token is written, that of a checkpointed
        layer when the backward pass has been there.
        """
        if torch.compiler.is_compiling():  # the compiler shares equal work by itself
            return self._joined(batch, mask, window)
        made_for, found = self._extended.get(mask, (None, None))
        if made_for is not batch:
            found = self._joined(batch, mask, window)
            self._extended[mask] = batch, found
        return found

    def _joined(self, batch: PrefixBatch, mask: Tensor, window: int | None) -> Tensor:
        """Columns for the prefix region, then those of `mask`."""
        rows, heads, queries = batch.rows, mask.shape[1], mask.shape[-2]
        visible = batch.visible[:, None, None, :]
        # Some layers are asked about the last tokens of a pass only (Gemma 4's that share keys).
        ahead = 0 if self.positions is None else self.positions.shape[1] - queries
        if batch.seen_from is not None:
            query = torch.arange(queries, device=visible.device) + ahead + self.cached
            visible = visible & (query >= batch.seen_from[:, None])[:, None, :, None]
        if batch.as_text is not None and window is not None:
            assert self.positions is not None
            distance = self.positions[:, -queries:, None] - (batch.visible.cumsum(-1) - 1)[:, None]
            near = (distance < window) | ~batch.as_text[:, None, None]
            visible = visible & near[:, None]
        return _with_columns(visible, mask, (rows, heads, queries, batch.longest))


def _with_columns(visible: Tensor, mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """`visible`, expanded to `shape`, in the form of `mask`, and `mask` after it."""
    rows, heads, queries, _ = shape
    if mask.dtype != torch.bool:  # additive, as eager attention wants it
        least = torch.finfo(mask.dtype).min
        visible = mask.new_zeros(visible.shape).masked_fill(~visible, least)
    columns = visible.expand(shape)
    return torch.cat([columns, mask.expand(rows, heads, queries, mask.shape[-1])], dim=-1)


def _with_prefix(
    module: nn.Module, key: Tensor, value: Tensor, mask: Tensor, kw: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Put this layer's prefix (if any) before `key` and `value`, and widen `mask` to match.

    kw: of the attention function; a relative position bias in it is widened too, by zeros: virtual
    tokens have no distance
    """
    injection: Injection = module.__dict__["ptkit_injection"]
    layer: int = module.__dict__["ptkit_layer"]
    if injection.read is not None:
        injection.read[layer] = key, value
    batch = injection.batch
    if batch is None:
        return key, value, mask
    if len(key) != batch.rows:  # beams, of a decoder whose encoder reads every row once
        batch = injection.repeated(batch, len(key) // batch.rows)
    key = torch.cat([batch.keys[layer].to(key.dtype), key], dim=2)
    value = torch.cat([batch.values[layer].to(value.dtype), value], dim=2)
    if kw.get("position_bias") is not None:
        kw["position_bias"] = nn.functional.pad(kw["position_bias"], (batch.longest, 0))
    return key, value, injection.extended(batch, mask, kw.get("sliding_window"))


def _prefix_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kw: Any
) -> tuple[Tensor, None]:
    key, value, mask = _with_prefix(module, key, value, attention_mask, kw)
    return sdpa_attention_forward(module, query, key, value, mask, **kw)


def _prefix_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kw: Any
) -> tuple[Tensor, Tensor]:
    key, value, mask = _with_prefix(module, key, value, attention_mask, kw)
    # Every family keeps its own eager attention (scaling, soft caps, sinks) in its module.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kw)


#: Shortcuts in which a mask of None says "all", or "causal": neither can say "and the prefix".
_WHOLE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def _prefix_sdpa_mask(*args: Any, **kw: Any) -> Tensor:
    mask = sdpa_mask(*args, **{**kw, **_WHOLE})
    assert mask is not None
    return mask


def _prefix_eager_mask(*args: Any, **kw: Any) -> Tensor:
    return eager_mask(*args, **{**kw, **_WHOLE})


AttentionInterface.register("ptkit_sdpa", _prefix_sdpa)
AttentionMaskInterface.register("ptkit_sdpa", _prefix_sdpa_mask)
AttentionInterface.register("ptkit_eager", _prefix_eager)
AttentionMaskInterface.register("ptkit_eager", _prefix_eager_mask)


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
        times = len(key_states) // self.batch.rows
        keys, values = (
            t[layer_idx].to(key_states.dtype).repeat_interleave(times, dim=0)
            for t in (self.batch.keys, self.batch.values)
        )
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        read = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return self.batch.longest + read

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)


@contextmanager
def handed_a_cache(
    model: PreTrainedModel, modules: list[nn.Module], injection: Injection
) -> Iterator[None]:
    """Within this context the backbone of `model` takes the prefix for something it has cached.

    For families off the AttentionInterface (bloom, falcon, gptj): mask, positions and ALiBi's
    distances are then the model's own. A checkpointed layer drops its cache, so that it is handed
    to the attention itself once more. No infix: all tokens see what is in a cache
    (`ptkit.runtime.infix` refuses it).
    """
    taken: list[_PrefixThenOwn] = []

    def before_backbone(
        _: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        batch = injection.batch
        taken.clear()
        if batch is None:
            return None
        given = (*args[:1], kw.get("input_ids"), kw.get("inputs_embeds"))
        read = next(tensor for tensor in given if tensor is not None)
        inner = kw.get("past_key_values")
        mask = kw.get("attention_mask")
        if mask is None:
            cached = 0 if inner is None else inner.get_seq_length()
            mask = batch.visible.new_ones((len(read), cached + read.shape[1]), dtype=torch.long)
        times = len(mask) // batch.rows
        visible = batch.visible.to(mask).repeat_interleave(times, dim=0)
        taken.append(_PrefixThenOwn(batch, inner))
        changed = {
            "attention_mask": torch.cat([visible, mask], dim=1), "past_key_values": taken[0],
        }  # fmt: skip
        return args, {**kw, **changed}

    def before_attention(
        _: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return (args, {**kw, "layer_past": taken[0]}) if taken else None

    def after_backbone(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if taken:
            output.past_key_values = taken[0].inner
        return output

    backbone = model.base_model
    hooks = [
        backbone.register_forward_pre_hook(before_backbone, with_kwargs=True),
        backbone.register_forward_hook(after_backbone),
        *(m.register_forward_pre_hook(before_attention, with_kwargs=True) for m in modules),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def prefix_attention(model: PreTrainedModel) -> Iterator[Injection]:
    """Within this context `model` attends to whatever prefixes the yielded injection holds.

    Entering again while active is free and yields the same injection, so a training loop can
    hold the context around all its steps. With gradient checkpointing the backward pass must
    run inside, with the batch unchanged: it recomputes the forward. Other threads that read with
    the model wait until the context ends. Raises ModelError for models whose attention can neither
    be replaced nor be handed a cache, or that use an implementation other than sdpa and eager.
    """
    # The compiler traces no locks: who runs what it compiled has the model already.
    alone: Any = nullcontext() if torch.compiler.is_compiling() else turn(model)
    with alone, _injected(model) as injection:
        yield injection


@contextmanager
def _injected(model: PreTrainedModel) -> Iterator[Injection]:
    """`prefix_attention` of the thread that has the model's turn."""
    active: Injection | None = model.base_model.__dict__.get("ptkit_injection")
    if active is not None:
        yield active
        return
    own = model.config._attn_implementation
    if own not in ("sdpa", "eager"):
        raise ModelError(
            f"a prefix can be trained with `sdpa` or `eager` attention, this model uses `{own}`; "
            'load it with attn_implementation="sdpa"'
        )
    modules = require_attention(model)
    injection = Injection()
    replaced = _replaced_attention(model, modules, own, injection)
    # On the backbone: models that differ in their heads share it.
    model.base_model.__dict__["ptkit_injection"] = injection
    for layer, module in zip(layers_of(modules), modules, strict=True):
        # Not module attributes: they must not appear among children, parameters or state.
        module.__dict__ |= {"ptkit_injection": injection, "ptkit_layer": layer}
    try:
        with replaced:
            yield injection
    finally:
        for holder in (model.base_model, *modules):
            holder.__dict__.pop("ptkit_injection", None)
            holder.__dict__.pop("ptkit_layer", None)


def _replaced_attention(
    model: PreTrainedModel, modules: list[nn.Module], own: str, injection: Injection
) -> AbstractContextManager[None]:
    """A context within which `modules` attend to what `injection` holds."""
    if is_disentangled(modules):
        return disentangled_attention(modules, _with_prefix)
    if not model._can_set_attn_implementation():
        return handed_a_cache(model, modules, injection)
    return _interface_attention(model, own, injection)


@contextmanager
def _interface_attention(model: PreTrainedModel, own: str, injection: Injection) -> Iterator[None]:
    """Within this context `model` uses our attention in place of `own`."""
    model.set_attn_implementation(f"ptkit_{own}")
    hook = model.register_forward_pre_hook(injection.begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(own)


@contextmanager
def prefix_removed(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model reads without any prefix, whether or not one is in place."""
    with turn(model):
        injection: Injection | None = model.base_model.__dict__.get("ptkit_injection")
        if injection is None:
            yield
            return
        held, injection.batch = injection.batch, None
        try:
            yield
        finally:
            injection.batch = held


def prefixed_positions(batch: PrefixBatch, attention_mask: Tensor) -> Tensor:
    """Position ids `[rows, tokens]` of real tokens around each row's own virtual tokens.

    attention_mask: `[rows, tokens]`, 1 on real tokens, padding on either side. Virtual tokens
    take the first positions, as in PEFT and in both prefix-tuning and prompt-tuning papers; an
    infix takes those between the tokens before `batch.seen_from` and the others.
    """
    lengths = batch.visible.sum(-1, keepdim=True).to(attention_mask.device)
    if batch.seen_from is not None:
        token = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        lengths = lengths * (token >= batch.seen_from[:, None])
    positions = attention_mask.long().cumsum(-1) - 1 + lengths
    return positions.masked_fill(attention_mask == 0, 0)
