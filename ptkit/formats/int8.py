"""Tensors as 8-bit integers with one scale per channel (symmetric, absolute maximum).

A quarter of float32's bytes. PEFT does not read it, so the file has a name of its own. Nagel et
al. 2021, "A White Paper on Neural Network Quantization", section 2.4 (per-channel granularity).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptkit.errors import AdapterError

#: End of the name under which a tensor's scales are stored.
SCALE = ".scale"
_LARGEST = 127


def _channel(name: str) -> int:
    """Dimension of a matrix that gets a scale per index.

    Virtual tokens are rows of `prompt_embeddings`, so its channels are columns; everywhere else
    (LoRA's matrices) they are the outputs, rows.
    """
    return -1 if name.endswith("prompt_embeddings") else 0


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating matrix as int8 and its scales; all else as it is."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim != 2:
            stored[name] = tensor
            continue
        values = tensor.detach().float().cpu()
        scale = values.abs().amax(dim=0 if _channel(name) else 1) / _LARGEST
        # Half precision where that keeps three digits: scales are most of a short prompt's cost.
        half = scale.half()
        fits = torch.isfinite(half) & ((half >= 6.2e-5) | (scale == 0))
        scale = half if bool(fits.all()) else scale
        stored[name] = _divided(values, _spread(scale.float(), name))
        stored[name + SCALE] = scale
    return stored


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors that `quantised` stored. Raises AdapterError when scales do not fit."""
    restored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        scale = tensors.get(name + SCALE)
        if tensor.dtype != torch.int8 or scale is None:
            restored[name] = tensor
            continue
        if tensor.ndim != 2 or scale.shape != (tensor.shape[_channel(name)],):
            raise AdapterError(
                f"`{name}` has shape {list(tensor.shape)}, its scales {list(scale.shape)}: "
                "not one scale per channel"
            )
        restored[name] = tensor.float() * _spread(scale.float(), name)
    return restored


def _spread(scale: Tensor, name: str) -> Tensor:
    """`scale` in a shape that multiplies the matrix `name`."""
    return scale[None, :] if _channel(name) else scale[:, None]


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    steps = torch.where(scale > 0, values / scale, 0.0)
    return steps.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
