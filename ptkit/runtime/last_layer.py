"""The last layer's feed-forward block at the positions that are read, and nowhere else.

The output head reads the last layer at single positions, and the head is asked for the positions
that carry a label. A feed-forward block treats positions one by one, so the others can be left out.
That is two thirds of the layer's products there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.runtime.attention_sites import attention_modules
from ptkit.runtime.checkpointing import recomputes
from ptkit.runtime.compile import reading
from ptkit.runtime.facts import known
from ptkit.runtime.row_adapters import row_adapters
from ptkit.runtime.views import StandIn, name_of, viewed


def last_block_on(model: PreTrainedModel, positions: Tensor) -> dict[str, nn.Module]:
    """What a forward pass of `model` runs in place of its own modules, by name. The hidden states
    it ends with are then right at `positions` only.

    positions: `[rows, tokens]` bool. Nothing is replaced in models whose last block cannot be
        recognised, or that recompute layers in the backward pass. Nor in batches whose rows run
        with weights of their own: a block that reads single positions does not know their rows.
    """
    if recomputes(model) or row_adapters():
        return {}
    block = last_block(model)
    return {} if block is None else {name_of(model, block): _OnlyAt(block, positions)}


class _OnlyAt(StandIn):
    """`inner` reading and writing the rows of `positions` only; elsewhere it writes zeros.

    Hidden states of another length, among which a soft prompt is read, are left as they are.
    """

    def __init__(self, inner: nn.Module, positions: Tensor) -> None:
        super().__init__(inner)
        self.positions = positions

    def forward(self, *args: Any, **kw: Any) -> Any:
        positions = self.positions
        if args[0].shape[:2] != positions.shape:
            return self.inner(*args, **kw)
        kept = positions.flatten().nonzero()[:, 0]
        read = (a.flatten(0, 1).index_select(0, kept)[None] for a in args)
        output = self.inner(*read, **kw)
        full = output.new_zeros(positions.numel(), output.shape[-1])
        return full.index_copy(0, kept, output[0]).view(*positions.shape, -1)


def last_block(model: PreTrainedModel) -> nn.Module | None:
    """The last feed-forward block of `model`, or None where it cannot be left out."""
    return known(model, _found_block)


def _found_block(model: PreTrainedModel) -> nn.Module | None:
    block = _beside_last_attention(model)
    return block if block is not None and _is_by_position(model, block) else None


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
    noting = _Noting(block, ids.shape)
    with reading(model):
        view = viewed(model, {name_of(model, block): noting})
        wanted = view(input_ids=ids, use_cache=False).logits[some].float()
        if noting.plain != [True]:
            return False
        view = viewed(model, {name_of(model, block): _OnlyAt(block, some)})
        found = view(input_ids=ids, use_cache=False).logits[some].float()
    return bool((found - wanted).norm() <= 1e-3 * wanted.norm())


class _Noting(StandIn):
    """A block, and whether it was given tensors of single positions and gave one back."""

    def __init__(self, inner: nn.Module, shape: torch.Size) -> None:
        super().__init__(inner)
        self.shape = shape
        self.plain: list[bool] = []

    def forward(self, *args: Any, **kw: Any) -> Any:
        output = self.inner(*args, **kw)
        alike = all(isinstance(t, Tensor) and t.shape[:2] == self.shape for t in (*args, output))
        self.plain.append(bool(args) and not kw and alike)
        return output
