"""Where a model attends: the modules a prefix is put into, and the layer of it that each reads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from ptkit.errors import ModelError
from ptkit.runtime.architecture import is_encoder

#: What families call the layer that makes keys.
_KEY_PROJECTIONS = {"k_proj", "k", "key", "k_lin", "key_proj", "Wqkv"}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether `model` is told its tokens' positions (others derive them from the mask)."""
    kind: Any = type(model)
    if torch.compiler.is_compiling():  # a cache would be traced, and with it what is in it
        return _takes_positions(kind)
    return _takes_positions_asked_once(kind)  # every forward pass asks


def _takes_positions(kind: type[PreTrainedModel]) -> bool:
    # Asked of the class: who replaces a model's forward may not name its arguments.
    return "position_ids" in inspect.signature(kind.forward).parameters


_takes_positions_asked_once = lru_cache(maxsize=64)(_takes_positions)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of `model`, one per entry of its layout (see `layer_table`).

    An encoder-decoder has three groups, each from the first layer up. They are those of the
    encoder, the decoder's own, and those through which the decoder reads the encoder.
    """
    if not (model.config.is_encoder_decoder or is_encoder(model)):
        return [
            module for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
            and type(module).__name__.endswith(("Attention", "SelfAttention", "SdpaAttention"))
        ]  # fmt: skip
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


def is_disentangled(modules: Sequence[nn.Module]) -> bool:
    """Whether these attention modules are DeBERTa's."""
    return bool(modules) and all(isinstance(m, DisentangledSelfAttention) for m in modules)


def layer_table(modules: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """Attention module -> which entry of its model's layout it reads.

    One that shares keys and values reads those of the last module of its kind that has its own.
    """
    layers: dict[nn.Module, int] = {}
    latest: dict[Any, int] = {}
    own = 0
    for module in modules:
        kind = getattr(module, "layer_type", None)
        if getattr(module, "is_kv_shared_layer", False):
            layers[module] = latest[kind]
            continue
        layers[module] = own
        latest[kind] = own
        own += 1
    return layers


def require_attention(model: PreTrainedModel) -> list[nn.Module]:
    """`attention_modules` of `model`. Raises ModelError where no prefix can be put into them."""
    modules = attention_modules(model)
    if not modules:
        raise ModelError(
            f"{type(model).__name__} has no attention that a prefix could be put into; use lora"
        )
    if is_disentangled(modules):
        return modules
    if not model._can_set_attn_implementation() and any(
        "layer_past" not in inspect.signature(module.forward).parameters for module in modules
    ):
        raise ModelError(
            f"{type(model).__name__} lets its attention neither be replaced (it is not on "
            "transformers' AttentionInterface) nor be handed a cache; use lora"
        )
    return modules
