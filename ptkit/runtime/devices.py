"""The device a model is put on."""

from __future__ import annotations

import os

import torch

from ptkit.errors import ModelError


def resolve_device(name: str) -> torch.device:
    """`auto` picks CUDA, then MPS, then CPU; `cuda` is this process's own where several run on one
    machine. Raises ModelError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    name = own_device(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device `{name}` is not available here ({error})") from error
    return device


def own_device(name: str) -> str:
    """`cuda` with the number that this process has on its machine, and other names as they are.
    torchrun and accelerate give these numbers."""
    rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if name != "cuda" or rank < 0 or not torch.cuda.is_available():
        return name
    return f"cuda:{rank % torch.cuda.device_count()}"
