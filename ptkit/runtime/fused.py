"""Operations of training in one pass where models take several, to the same result.

What is saved is memory traffic: the products of matrices stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation, SiLUActivation

from ptkit.runtime.block_head import block_head_divergences, block_head_losses
from ptkit.runtime.block_layers import BlockLinear
from ptkit.runtime.compile import reading
from ptkit.runtime.facts import NotNow, holds
from ptkit.runtime.made_again import can_be_made_again
from ptkit.runtime.views import StandIn, looks_into_views, name_of, viewed

#: Positions whose logits exist at the same time. Fewer would read the head's matrix too often.
CHUNK = 128


@contextmanager
def fused_activations(model: PreTrainedModel, *, long_rows: bool = False) -> Iterator[None]:
    """Within this context activations keep their inputs for the backward pass and nothing else.

    The tanh form of GELU (Hendrycks & Gimpel 2016, section 2) is one operation. transformers'
    `NewGELUActivation` (GPT-2, GPT-J, Phi) takes eight, and keeps five tensors as wide as the
    layer; results differ by rounding. SwiGLU (Shazeer 2020, section 2; Llama, Mistral, Qwen) keeps
    two such tensors in place of three, to the same bits. Outside of the context nothing is changed.

    long_rows: keep none of the two, and compute them again in the backward pass. They are half of
        what a frozen layer keeps, and behind the attention of long rows their products take little.
    """
    held = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is NewGELUActivation
    ]
    fused = nn.GELU(approximate="tanh")
    for module, name, _ in held:
        module._modules[name] = fused
    # These stay the objects they are, because others know them by identity.
    gated = [(m, type(m)) for m in model.modules() if _may_be_swiglu(m)]
    swiglu = {kind: _is_swiglu(module) for module, kind in reversed(gated)}
    gated = [(module, kind) for module, kind in gated if swiglu[kind]]
    for module, kind in gated:
        module.__class__ = _with_forward(kind, _swiglu_again if long_rows else _swiglu_forward)
    try:
        yield
    finally:
        for module, name, child in held:
            module._modules[name] = child
        for module, kind in gated:
            module.__class__ = kind


def _may_be_swiglu(module: nn.Module) -> bool:
    """Whether `module` has the parts of Llama's MLP."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return (
        isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
        and all(isinstance(module._modules.get(part), nn.Module) for part in parts)
        and "forward" not in module.__dict__
    )


@torch.no_grad()
def _is_swiglu(module: nn.Module) -> bool:
    """Whether `module` computes what its parts would in Llama; tried on one position."""
    weight = next(module.parameters(), None)
    width = getattr(module.gate_proj, "in_features", None)
    if width is None or weight is None or not weight.is_floating_point() or weight.is_meta:
        return False
    hidden = torch.linspace(-1, 1, width, device=weight.device, dtype=weight.dtype)[None, None]
    return torch.equal(module(hidden), _swiglu_forward(module, hidden))


def _with_forward(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """The class `kind` with another forward."""
    return type(kind.__name__, (kind,), {"forward": forward})


def _swiglu_forward(self: Any, hidden: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden), self.up_proj(hidden)
    product = _SwiGLU.apply(gate, up)
    can_be_made_again(product, _swiglu, gate, up)
    return self.down_proj(product)


def _swiglu_again(self: Any, hidden: Tensor) -> Tensor:
    if not hidden.requires_grad or not torch.is_grad_enabled():
        return _swiglu_forward(self, hidden)
    again: Tensor = checkpoint(_swiglu_forward, self, hidden, use_reentrant=False)
    return again


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`. What `silu` gives is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_silu = upstream[0] * up
        of_up = _swiglu(gate, upstream[0])
        return torch.ops.aten.silu_backward(of_silu, gate), of_up


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are what a frozen linear output head gives, with nothing after.

    Some families scale or cap logits; that is found out by comparing, once per model.
    """
    head = model.get_output_embeddings()
    if not looks_into_views(model):
        return False
    if "forward" in head.__dict__:  # split over processes, or fetched when it runs
        return False
    if type(head) not in (nn.Linear, BlockLinear) or any(
        p.requires_grad for p in head.parameters()
    ):
        return False
    return holds(model, _gives_what_its_head_gives)


@torch.no_grad()
def _gives_what_its_head_gives(model: PreTrainedModel) -> bool:
    word = int(model.config.get_text_config().vocab_size) // 2
    ids = torch.full((1, 2), word, dtype=torch.long, device=model.device)
    head = _Heard(model.get_output_embeddings())
    with reading(model):
        logits = viewed(model, {name_of(model, head.inner): head})(
            input_ids=ids, use_cache=False
        ).logits
    if not bool(logits.isfinite().all()):
        raise NotNow  # training has diverged, and will be given up
    return len(head.said) == 1 and torch.equal(head.said[0], logits)


class _Heard(StandIn):
    """An output head, and what it gave."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.said: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.said.append(self.inner(hidden))
        return self.said[-1]


def head_losses(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, `[n]` float32, under a frozen output head.

    hidden: `[n, hidden]`; targets: token ids `[n]`. Only the logits of `CHUNK` positions exist
    at a time: the gradient with respect to `hidden` is taken while they do.
    """
    if isinstance(head, BlockLinear):
        return block_head_losses(head, hidden, targets)
    return _HeadLoss.apply(hidden, *_matrix(head), targets)


def _matrix(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `head`, the weight in autocast's type: once, not once per chunk."""
    kind = head.weight.device.type
    if torch.is_autocast_enabled(kind):
        return head.weight.to(torch.get_autocast_dtype(kind)), head.bias
    return head.weight, head.bias


class _PerPosition(torch.autograd.Function):
    """A loss of each position whose gradient with respect to the first of four inputs, `[n,
    hidden]`, was taken in the forward pass and saved."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else gradient * upstream[0][:, None].to(gradient.dtype)
        return scaled, None, None, None


class _HeadLoss(_PerPosition):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = nn.functional.linear(hidden[part], weight, bias).float()
            logits.sub_(logits.amax(-1, keepdim=True))  # in place: it is nobody else's
            target = logits.gather(1, targets[part, None])
            total = logits.exp_().sum(-1, keepdim=True)
            losses[part] = (total.log() - target)[:, 0]
            if gradient is not None:
                # d loss / d logits is the probabilities, less one at the target.
                mean = (logits.to(weight.dtype) @ weight) / total
                gradient[part] = mean - weight[targets[part]]
        ctx.save_for_backward(gradient)
        return losses


def head_divergences(head: nn.Linear, hidden: Tensor, wanted: Tensor) -> Tensor:
    """KL(teacher || student) in nats of each position, `[n]` float32, under a frozen output head.

    hidden, wanted: what the head reads of the student and of the teacher, `[n, hidden]`; gradients
    flow to `hidden`. As in `head_losses`, only the logits of `CHUNK` positions exist at a time.
    """
    if isinstance(head, BlockLinear):
        return block_head_divergences(head, hidden, wanted)
    return _HeadDivergence.apply(hidden, *_matrix(head), wanted)


class _HeadDivergence(_PerPosition):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            student, teacher = (
                nn.functional.linear(read[part], weight, bias).float().log_softmax(-1)
                for read in (hidden, wanted)
            )
            shares = teacher.exp()
            losses[part] = teacher.sub_(student).mul_(shares).sum(-1)
            if gradient is not None:
                # d KL / d logits is the student's probabilities, less the teacher's.
                gradient[part] = student.exp_().sub_(shares).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses
