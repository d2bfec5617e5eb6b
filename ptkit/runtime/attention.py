"""Injecting a KV prefix into a model's attention for training and scoring.

The model is switched to a registered attention function that puts the layer's prefix before
its keys and values. Nothing is cached, so gradient checkpointing recomputes the right thing
(a cache would be appended to a second time). Off, the model's own attention is back, and its
outputs are bit-identical to those of a model never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ptkit.errors import ModelError
from ptkit.prefix import PrefixBatch
from ptkit.runtime.architecture import is_encoder
from ptkit.runtime.disentangled import disentangled_attention


class Injection:
    """What the attention modules of one model read: the prefix of the batch in flight.

    batch: set before each forward; None (or an empty batch) is the plain base.
    """

    def __init__(self) -> None:
        self._batch: PrefixBatch | None = None
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}
        self._repeated: dict[int, PrefixBatch] = {}
        #: Layer -> keys and values it computed in the last forward pass, while this is not None.
        self.read: dict[int, tuple[Tensor, Tensor]] | None = None

    @property
    def batch(self) -> PrefixBatch | None:
        """The prefixes in place, or None."""
        return self._batch

    @batch.setter
    def batch(self, batch: PrefixBatch | None) -> None:
        self._batch = batch if batch is not None and batch.longest else None
        self._extended.clear()
        self._repeated.clear()

    def repeated(self, batch: PrefixBatch, times: int) -> PrefixBatch:
        """`batch` with every row `times` in a row; made once per batch."""
        if times not in self._repeated:
            self._repeated[times] = batch.repeated(times)
        return self._repeated[times]

    def extended(self, batch: PrefixBatch, mask: Tensor) -> Tensor:
        """`mask` `[rows|1, 1, queries, keys]` with the prefix region before its keys.

        The layers of a model share a mask object, so the work is done once per distinct mask;
        holding the mask itself keeps its id from being reused.
        """
        if torch.compiler.is_compiling():  # the compiler shares equal work by itself
            return _joined(batch, mask)
        held = self._extended.get(id(mask))
        if held is None:
            held = self._extended[id(mask)] = (mask, _joined(batch, mask))
        return held[1]


def _joined(batch: PrefixBatch, mask: Tensor) -> Tensor:
    """Columns for the prefix region, then those of `mask`."""
    rows, heads, queries = batch.rows, mask.shape[1], mask.shape[-2]
    visible = batch.visible[:, None, None, :]
    if batch.seen_from is not None:
        query = torch.arange(queries, device=visible.device)
        visible = visible & (query >= batch.seen_from[:, None])[:, None, :, None]
    if mask.dtype != torch.bool:  # additive, as eager attention wants it
        visible = torch.where(visible, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    columns = visible.expand(rows, heads, queries, batch.longest)
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
    return key, value, injection.extended(batch, mask)


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


#: What families call the layer that makes keys.
_KEY_PROJECTIONS = {"k_proj", "k", "key", "k_lin", "key_proj", "Wqkv"}


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of `model`, one per entry of its layout.

    In an encoder-decoder: those of the encoder, then the decoder's own, then those through which
    the decoder reads the encoder, each from the first layer up.
    """
    if not (model.config.is_encoder_decoder or is_encoder(model)):
        return [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    # Encoders of some families do not number their layers, or number what is around them, too;
    # modules come from the first one up.
    found = [
        (name, module) for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and _KEY_PROJECTIONS & {*module._modules}
    ]  # fmt: skip
    crossing = ("encoder_attn", "EncDecAttention")

    def site(entry: tuple[str, nn.Module]) -> int:
        name, _ = entry
        return 2 if name.endswith(crossing) else 1 if ".decoder." in f".{name}" else 0

    return [module for _, module in sorted(found, key=site)]


@contextmanager
def prefix_attention(model: PreTrainedModel) -> Iterator[Injection]:
    """Within this context `model` attends to whatever prefixes the yielded injection holds.

    Entering again while active is free and yields the same injection, so a training loop can
    hold the context around all its steps. With gradient checkpointing the backward pass must
    run inside, with the batch unchanged: it recomputes the forward. Raises ModelError for
    families whose attention is not on transformers' `AttentionInterface`, or that use an
    implementation other than sdpa and eager.
    """
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
    modules = attention_modules(model)
    replaced = disentangled_attention(modules, _with_prefix)
    if replaced is None:
        replaced = _interface_attention(model, modules, own)
    injection = Injection()
    # On the backbone: models that differ in their heads share it.
    model.base_model.__dict__["ptkit_injection"] = injection
    for layer, module in enumerate(modules):
        # Not module attributes: they must not appear among children, parameters or state.
        module.__dict__ |= {"ptkit_injection": injection, "ptkit_layer": layer}
    try:
        with replaced:
            yield injection
    finally:
        for holder in (model.base_model, *modules):
            holder.__dict__.pop("ptkit_injection", None)
            holder.__dict__.pop("ptkit_layer", None)


@contextmanager
def _interface_attention(
    model: PreTrainedModel, modules: list[nn.Module], own: str
) -> Iterator[None]:
    """Within this context `model` uses our attention in place of `own`."""
    try:
        model.set_attn_implementation(f"ptkit_{own}")
        if model.config._attn_implementation != f"ptkit_{own}" or not modules:
            raise ModelError(
                f"{type(model).__name__} does not let its attention be replaced "
                "(it is not on transformers' AttentionInterface)"
            )
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def prefix_removed(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model reads without any prefix, whether or not one is in place."""
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
