"""Frozen weights in eight or four bits: less memory for a base that nothing trains.

transformers rounds each weight while it loads it, so there is no full-precision copy at any time.
Only what is frozen is rounded; keys, values, soft prompts and gradients stay in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from ptkit.errors import ModelError
from ptkit.extras import extra, require
from ptkit.runtime.block_layers import BlockEmbedding, BlockLinear

#: `model.quantize` -> the package it needs. `blocks` needs none (`ptkit.runtime.gguf_blocks`).
_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantization_config(kind: str | None, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes for a recipe's `model.quantize`; None where it takes nothing.

    int8: a scale per row, torchao's rounding of weights alone
    nf4: bitsandbytes' normal floats of four bits with scales that are quantised too (Dettmers et
        al. 2023, "QLoRA", section 3); products are computed in `dtype`

    Output heads stay as they are: losses read them in pieces, and rounding them costs the most.
    Raises MissingExtraError without the package.
    """
    if kind is None or kind == "blocks":
        return None
    wanted_by = f"`model.quantize: {kind}`"
    require("quantize", wanted_by, _PACKAGES[kind])
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    with extra("quantize", wanted_by):
        from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def require_quantized(model: PreTrainedModel, kind: str, id: str) -> None:
    """Raise ModelError where no weight of `model` was rounded."""
    changed = any(
        type(module.weight) is not nn.Parameter or not module.weight.is_floating_point()
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    if not changed:
        raise ModelError(
            f"`model.quantize: {kind}` rounds no layer of {id}: {type(model).__name__} has no "
            "plain linear layers (GPT-2's are another kind); leave `model.quantize` out"
        )


def logical_size(parameter: nn.Parameter, module: nn.Module) -> int:
    """How many values `parameter` of `module` stands for: packed ones are fewer, or bytes."""
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes
    if packed is not None:
        return int(torch.Size(packed.shape).numel())
    if isinstance(module, BlockLinear) and parameter is module.weight:
        return module.out_features * module.in_features
    if isinstance(module, BlockEmbedding):
        return module.num_embeddings * module.embedding_dim
    return parameter.numel()
