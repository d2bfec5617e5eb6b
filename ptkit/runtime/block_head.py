"""Losses under an output head that is stored in blocks: its weight is never unpacked whole.

The head is read a piece of the vocabulary at a time. Sums over the vocabulary are kept relative to
the largest logit so far, as in Milakov & Gimelshein 2018 ("Online normalizer calculation for
softmax", algorithm 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptkit.runtime.block_layers import BlockLinear, pieces, unpacked

#: Positions that are read together: their logits of a piece of SmolLM2 are 256 x 1,820.
POSITIONS = 256


def block_head_losses(head: BlockLinear, hidden: Tensor, targets: Tensor) -> Tensor:
    """As `ptkit.runtime.fused.head_losses`, for a head in blocks."""
    return _BlockHeadLoss.apply(hidden, targets, head)


def block_head_divergences(head: BlockLinear, hidden: Tensor, wanted: Tensor) -> Tensor:
    """As `ptkit.runtime.fused.head_divergences`, for a head in blocks."""
    return _BlockHeadDivergence.apply(hidden, wanted, head)


def _dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    of_piece = None if bias is None else bias[part].to(weight.dtype)
    return nn.functional.linear(hidden, weight, of_piece).float()


class _BlockPerPosition(torch.autograd.Function):
    """A loss of each position; the gradient with respect to the first of three inputs was taken in
    the forward pass."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else gradient * upstream[0][:, None].to(gradient.dtype)
        return scaled, None, None


class _BlockHeadLoss(_BlockPerPosition):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: BlockLinear) -> Tensor:
        parts = [
            _losses(head, read, wanted, ctx.needs_input_grad[0])
            for read, wanted in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True)
        ]
        losses = torch.cat([loss for loss, _ in parts])
        found = [gradient for _, gradient in parts if gradient is not None]
        ctx.save_for_backward(torch.cat(found).to(hidden.dtype) if found else None)
        return losses


def _losses(
    head: BlockLinear, hidden: Tensor, targets: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = _dtype(hidden)
    read = hidden.to(dtype)
    largest = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
    total = torch.zeros_like(largest)
    target = torch.zeros_like(largest)
    # The mean of the head's rows under the probabilities is the first half of the gradient.
    mean = torch.zeros(hidden.shape, device=hidden.device) if learns else None
    for part, weight in pieces(head.weight, head.kind, head.in_features, dtype):
        logits = _logits(read, weight, head.bias, part)
        here = (targets >= part.start) & (targets < part.stop)
        at = (targets - part.start).clamp(0, part.stop - part.start - 1)
        target += torch.where(here[:, None], logits.gather(1, at[:, None]), 0.0)
        larger = torch.maximum(largest, logits.amax(1, keepdim=True))
        shrunk = (largest - larger).exp()
        shares = logits.sub_(larger).exp_()
        total = total * shrunk + shares.sum(1, keepdim=True)
        if mean is not None:
            mean.mul_(shrunk).add_((shares.to(dtype) @ weight).float())
        largest = larger
    losses = (total.log() + largest - target)[:, 0]
    if mean is None:
        return losses, None
    return losses, (mean / total).sub_(unpacked(head.weight[targets], head.kind).float())


class _BlockHeadDivergence(_BlockPerPosition):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: BlockLinear) -> Tensor:
        parts = [
            _divergences(head, student, teacher, ctx.needs_input_grad[0])
            for student, teacher in zip(
                hidden.split(POSITIONS), wanted.split(POSITIONS), strict=True
            )
        ]
        found = [gradient for _, gradient in parts if gradient is not None]
        ctx.save_for_backward(torch.cat(found).to(hidden.dtype) if found else None)
        return torch.cat([divergence for divergence, _ in parts])


def _divergences(
    head: BlockLinear, hidden: Tensor, wanted: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = _dtype(hidden)
    both = torch.cat([hidden, wanted]).to(dtype)
    largest = torch.full((len(both), 1), -torch.inf, device=hidden.device)
    total = torch.zeros_like(largest)
    for part, weight in pieces(head.weight, head.kind, head.in_features, dtype):
        logits = _logits(both, weight, head.bias, part)
        larger = torch.maximum(largest, logits.amax(1, keepdim=True))
        total = total * (largest - larger).exp() + logits.sub_(larger).exp_().sum(1, keepdim=True)
        largest = larger
    normaliser = total.log_().add_(largest)
    divergences = torch.zeros(len(hidden), device=hidden.device)
    gradient = torch.zeros(hidden.shape, device=hidden.device) if learns else None
    for part, weight in pieces(head.weight, head.kind, head.in_features, dtype):
        logs = _logits(both, weight, head.bias, part).sub_(normaliser)
        student, teacher = logs.split(len(hidden))
        shares = teacher.exp()
        divergences += teacher.sub_(student).mul_(shares).sum(1)
        if gradient is not None:
            gradient += (student.exp_().sub_(shares).to(dtype) @ weight).float()
    return divergences, gradient
