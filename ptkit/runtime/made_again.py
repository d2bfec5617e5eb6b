"""What is made again in the backward pass, because that takes less than keeping it.

A layer that learns keeps its input for its gradient. Often that is what a norm or an activation
gave, whose own input is kept too. Then one of the two is enough: the operation is cheap, and run
again on the same values it gives the same bits. (Chen et al. 2016, "Training deep nets with
sublinear memory cost", section 4, drops the results of cheap operations in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation, SiLUActivation

#: Activations that keep their input. A ReLU keeps its result, and would have to keep both.
_ACTIVATIONS = (nn.GELU, nn.SiLU, GELUActivation, NewGELUActivation, SiLUActivation)
#: Where a tensor says how it was made. It goes when the tensor goes.
_ORIGIN = "ptkit_origin"


class _Origin(NamedTuple):
    """How a tensor was made, which is at `version` since: `compute` of `inputs`, in the precision
    of the pass."""

    version: int
    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    autocast: torch.dtype | None

    def again(self) -> Tensor:
        _require_unchanged(self.inputs, self.versions)
        kind = self.inputs[0].device.type
        with torch.no_grad(), torch.autocast(kind, self.autocast, self.autocast is not None):
            return self.compute(*self.inputs)


@contextmanager
def making_again(model: nn.Module) -> Iterator[None]:
    """Within this context no pass keeps what norms and activations of `model` give, nor what was
    given to `can_be_made_again`. The gradients are the same, bit for bit."""
    hooks = [m.register_forward_hook(_note) for m in model.modules() if _is_cheap(m)]
    last = _Last()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_packed, last.unpacked):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def can_be_made_again(result: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Say that `result` is `compute(*inputs)`, whose inputs the backward pass needs anyway."""
    if not result.requires_grad or not result.is_contiguous() or result._is_view():
        return
    kind = result.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    detached = tuple(tensor.detach() for tensor in inputs)  # without what made them
    versions = tuple(tensor._version for tensor in detached)
    setattr(result, _ORIGIN, _Origin(result._version, compute, detached, versions, autocast))


def _is_cheap(module: nn.Module) -> bool:
    """Whether `module` is a norm of each position by itself, or an activation that keeps its
    input."""
    if isinstance(module, _ACTIVATIONS):
        return True
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return named and not [*module.children()] and not [*module.buffers()]


def _note(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
    if len(given) == 1 and isinstance(result, Tensor) and isinstance(given[0], Tensor):
        can_be_made_again(result, module, given[0])


class _Part(NamedTuple):
    """A kept tensor that is not kept: a view of what `origin` makes."""

    origin: _Origin
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _packed(tensor: Tensor) -> _Part | _Kept:
    whole = tensor if tensor._base is None else tensor._base
    origin: _Origin | None = getattr(whole, _ORIGIN, None)
    if origin is not None and whole._version == origin.version and tensor.dtype == whole.dtype:
        return _Part(origin, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
    # A result that keeps what made it would be kept by it for ever.
    return _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)


class _Last:
    """The tensor that was made again last: layers that read the same one ask in turn."""

    def __init__(self) -> None:
        self._of: _Origin | None = None
        self._made = torch.empty(0)

    def unpacked(self, packed: _Part | _Kept) -> Tensor:
        if isinstance(packed, _Kept):
            _require_unchanged((packed.tensor,), (packed.version,))
            return packed.tensor
        if packed.origin is not self._of:
            self._of, self._made = packed.origin, packed.origin.again()
        return self._made.as_strided(packed.size, packed.stride, packed.offset)


def _require_unchanged(tensors: tuple[Tensor, ...], versions: tuple[int, ...]) -> None:
    """As autograd does for what it keeps itself."""
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} that the backward pass needs was changed in place "
                "after the forward pass had read it"
            )
