"""Which precision a device computes in quickly."""

from __future__ import annotations

import warnings

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies matrices in bfloat16 by instructions of its own.

    PyTorch computes in it everywhere; where it has to be emulated, that takes several times as
    long as float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        told = getattr(torch.cpu, "get_capabilities", dict)  # older versions of PyTorch do not tell
        return any(there for name, there in told().items() if name.endswith("bf16"))
    return False


def mixed_precision(autocast: str, device: torch.device) -> str:
    """accelerate's `mixed_precision` for a recipe's `train.autocast`: what `auto` is on `device`.

    Warns where bf16 is asked of a CPU that has to emulate it.
    """
    if autocast == "auto":
        return "bf16" if has_bf16(device) else "no"
    if autocast == "bf16" and device.type == "cpu" and not has_bf16(device):
        warnings.warn(
            "`train.autocast: bf16` on a CPU without bfloat16 instructions takes several times as "
            "long as float32; `auto` uses it where it is fast",
            stacklevel=2,
        )
    return autocast
