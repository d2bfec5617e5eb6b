"""Activations that are computed again in the backward pass, under the name transformers has for it.

Early releases of version 5 speak of gradient checkpointing, later ones of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


def recomputes(model: PreTrainedModel) -> bool:
    """Whether the layers of `model` keep no activations in training."""
    if hasattr(type(model), "is_activation_checkpointing"):
        return bool(model.is_activation_checkpointing)
    return bool(model.is_gradient_checkpointing)


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the layers of `model` keep no activations in training."""
    calls: Any = model
    word = "activation" if hasattr(calls, "activation_checkpointing_enable") else "gradient"
    getattr(calls, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(calls, f"{word}_checkpointing_disable")()
