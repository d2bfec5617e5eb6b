"""The last layer's feed-forward block at the positions that are read, and nowhere else.

What the last layer computes at a position is read by the output head of that position only, and
the head is asked for the positions that carry a label. A feed-forward block treats positions one
by one, so the others can be left out: two thirds of the layer's products there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.runtime.attention_sites import attention_modules
from ptkit.runtime.compile import reading
from ptkit.runtime.row_adapters import row_adapters

#: Backbone -> its last feed-forward block, or None where it cannot be left out; found once.
_BLOCKS: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


@contextmanager
def last_block_on(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within this context the hidden states `model` ends with are right at `positions` only.

    positions: `[rows, tokens]` bool. Other threads' forwards are left alone, and so are models
    whose last block cannot be told apart or that recompute layers in the backward pass, where the
    context is over, and batches whose rows run with weights of their own: a block that reads
    single positions could not tell whose they are.
    """
    block = None
    if not (model.is_activation_checkpointing or row_adapters()):
        block = _last_block(model)
    if block is None:
        yield
        return
    with _only_on(block, positions):
        yield


@contextmanager
def _only_on(block: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let `block` read and write the rows of `positions` only; elsewhere it writes zeros.

    Hidden states of another length, among which a soft prompt is read, are left as they are.
    """
    thread = threading.get_ident()
    kept = positions.flatten().nonzero()[:, 0]

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or args[0].shape[:2] != positions.shape:
            return None
        return tuple(a.flatten(0, 1).index_select(0, kept)[None] for a in args)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread or output.shape[:2] != (1, len(kept)):
            return None
        full = output.new_zeros(positions.numel(), output.shape[-1])
        return full.index_copy(0, kept, output[0]).view(*positions.shape, -1)

    hooks = block.register_forward_pre_hook(before), block.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_block(model: PreTrainedModel) -> nn.Module | None:
    backbone = model.base_model
    if backbone not in _BLOCKS:
        block = _beside_last_attention(model)
        _BLOCKS[backbone] = block if block is not None and _is_by_position(model, block) else None
    return _BLOCKS[backbone]


def _beside_last_attention(model: PreTrainedModel) -> nn.Module | None:
    """The module called `mlp` in the last of the layers, if that layer has an attention."""
    attentions = attention_modules(model)
    if not attentions:
        return None
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack):
            layer = stack[-1]
            if attentions[-1] in layer.children():
                return layer._modules.get("mlp")
    return None


@torch.no_grad()
def _is_by_position(model: PreTrainedModel, block: nn.Module) -> bool:
    """Whether the model's logits at some positions are the same when `block` sees only those.

    Asked of the model, because families differ in what they do after a block.
    """
    ids = torch.arange(1, 9, device=model.device)[None]
    some = torch.zeros_like(ids, dtype=torch.bool)
    some[0, [3, 7]] = True
    shapes: list[bool] = []

    def plain(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = all(isinstance(t, Tensor) and t.shape[:2] == ids.shape for t in (*args, output))
        shapes.append(bool(args) and tensors)

    with reading(model):
        hook = block.register_forward_hook(plain)
        try:
            wanted = model(input_ids=ids, use_cache=False).logits[some].float()
        finally:
            hook.remove()
        if shapes != [True]:
            return False
        with _only_on(block, some):
            found = model(input_ids=ids, use_cache=False).logits[some].float()
    return bool((found - wanted).norm() <= 1e-3 * wanted.norm())
