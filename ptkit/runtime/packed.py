"""Copies of frozen weights in the layout that a CPU's products read fastest.

A product with few rows reads a weight once and computes little with it. MKL, which PyTorch calls,
copies it into an order of its own at every call. oneDNN takes a weight that has such an order.

With 32 rows on two AVX2 cores, a vocabulary of 49,152 takes 2.1 times less time. A layer's own
products take 1.4 to 1.7 times less (docs/benchmarks.md). From some hundred rows on both are equal.
"""

from __future__ import annotations

import platform
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ptkit.runtime.precision import is_frozen_float32

#: Values of a weight below which the two take equally long.
_LEAST = 2**18
#: Rows up to which a packed product is the faster one, and values per row from which it is with
#: any number of rows. One row alone is multiplied faster by several threads only.
_ROWS, _WIDE = 128, 8192


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed products are faster where `model` is. That was measured on x86 alone."""
    return (
        model.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class PackedWeights:
    """Linear layers of one model multiply with packed copies of their weights, until `close`.

    most: bytes that the copies may take; the widest layers come first

    Only what is computed without gradients does, and only while a weight is the one that was
    packed: layers are as they were for whoever trains, and a weight that changes counts at once.
    """

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._layers: list[nn.Linear] = []
        self.nbytes = 0
        if not can_pack(model):
            return
        for layer in sorted(_layers(model), key=lambda layer: -layer.out_features):
            if self.nbytes + layer.weight.nbytes <= most:
                layer.__dict__["forward"] = _Packed(layer)
                self._layers.append(layer)
                self.nbytes += layer.weight.nbytes

    def close(self) -> None:
        """The layers compute as they did, and the copies are freed."""
        for layer in self._layers:
            del layer.__dict__["forward"]
        self._layers, self.nbytes = [], 0


def _layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The layers of `model` that may be packed: frozen, float32, and without another forward."""
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and is_frozen_float32(module.weight)
        and module.weight.device.type == "cpu"
        and not module.weight.is_inference()  # which does not tell when it changes
        and module.weight.numel() >= _LEAST
    ]


class _Packed:
    """The forward of `layer` with a packed copy of its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._weight = layer, layer.weight
        self._version = layer.weight._version
        self._wide = layer.out_features >= _WIDE
        with torch.no_grad():
            # The layout for so many rows is read nearly as fast by other numbers of them.
            self._copy = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 32)

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._layer
        if not self._serves(input):
            return linear(input, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._copy, layer.bias, "none", [], ""
        )
        return product

    def _serves(self, input: Tensor) -> bool:
        weight, rows = self._layer.weight, input.numel() // self._layer.in_features
        least = 1 if self._wide or torch.get_num_threads() > 1 else 2
        return (
            rows >= least
            and (rows <= _ROWS or self._wide)
            and input.dtype == torch.float32
            and weight is self._weight
            and weight._version == self._version
            and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied layer multiplies with its own weight, which may learn."""
        return MethodType(nn.Linear.forward, deepcopy(self._layer, memo))
