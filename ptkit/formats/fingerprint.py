"""A fingerprint of a base model: which weights and tokenizer an adapter was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Values hashed per tensor. A sample makes it instant for any model size and still tells
#: checkpoints of one architecture apart (training moves every weight).
SAMPLES = 256


def model_fingerprint(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """16 hex digits over names, shapes and sampled values of all parameters.

    without: names of modules that are left out, because they were never pretrained

    Values are rounded to bfloat16 first, so a checkpoint has one fingerprint whichever floating
    type it is loaded in (rounding once or via another type gives the same bfloat16 for values
    stored as bfloat16, and float32 checkpoints round directly).
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if any(name.startswith(f"{module}.") for module in without):
            continue
        flat = value.detach().reshape(-1)
        # In integers: float32 cannot tell the positions of a large embedding apart.
        count = min(SAMPLES, flat.numel())
        at = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)
        sample = flat[at.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over the vocabulary (tokens and their ids)."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
