"""LoRA's layer as one operation while it learns: the same products, and nothing wide beside them.

PEFT adds the low-rank part to what the frozen layer gave in three steps, each with a tensor as wide
as the layer. Here it is added in place, forward and backward. What is saved is memory and its
traffic: `W x + scaling * B A x` (Hu et al. 2021, section 4.1) stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


@contextmanager
def fused_low_rank(model: nn.Module) -> Iterator[None]:
    """Within this context PEFT's plain LoRA layers in `model` are one operation each.

    Others are left alone: variants (DoRA), dropout, quantised or trained base layers, autocast.
    Results differ from PEFT's by rounding. Outside of the context nothing is changed.
    """
    # Only this class: what derives from it may compute something else.
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = _Fused
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Linear


class _Fused(Linear):
    """PEFT's layer with another forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _plain_adapter(self, x)
        if name is None:
            told: Tensor = super().forward(x, *args, **kwargs)
            return told
        layer = self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        fused: Tensor = _LowRank.apply(x, layer.weight, layer.bias, down, up, self.scaling[name])
        return fused


def _plain_adapter(layer: Linear, x: Tensor) -> str | None:
    """The one adapter that `layer` adds to its frozen linear layer; None if it does otherwise."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name: str = active[0]
    up = layer.lora_B[name]
    if name in layer.lora_variant or up.bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and layer.training:
        return None
    base = layer.base_layer
    # A subclass may hold its weights in another form; a hook may bring them, or look at the result.
    if type(base) is not nn.Linear or "forward" in base.__dict__ or base._forward_hooks:
        return None
    if any(p.requires_grad or hasattr(p, "placements") for p in base.parameters()):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    same = x.dtype == base.weight.dtype == up.weight.dtype
    return name if same else None


class _LowRank(torch.autograd.Function):
    """`x` `[..., in]` through a frozen layer with `up` `[out, rank]` times `down` `[rank, in]`
    added to its weight `[out, in]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ down.T
        result = nn.functional.linear(flat, weight, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scaling = scaling
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        grad = upstream.reshape(-1, upstream.shape[-1])
        of_low = (grad @ up).mul_(ctx.scaling)
        of_up = (grad.T @ low).mul_(ctx.scaling)
        of_down = of_low.T @ x.reshape(-1, x.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight).addmm_(of_low, down).view(x.shape)
        return of_x, None, None, of_down, of_up, None
