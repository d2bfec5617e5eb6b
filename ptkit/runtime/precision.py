"""Which precision and attention a device computes in quickly, and frozen weights in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptkit.errors import ModelError
from ptkit.runtime.attention_choice import attention_of, set_attention
from ptkit.runtime.locks import lock_of


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

    Warns where bf16 is asked of a CPU that has to emulate it. Raises ModelError for fp16 on a CPU,
    where float16 cannot be trained in.
    """
    if autocast == "fp16" and device.type == "cpu":
        raise ModelError(
            "`train.autocast: fp16` needs a GPU; on a CPU set `train.autocast` to auto or bf16"
        )
    if autocast == "auto":
        return "bf16" if has_bf16(device) else "no"
    if autocast == "bf16" and device.type == "cpu" and not has_bf16(device):
        warnings.warn(
            "`train.autocast: bf16` on a CPU without bfloat16 instructions takes several times as "
            "long as float32; `auto` uses it where it is fast",
            stacklevel=2,
        )
    return autocast


#: Tokens of the longest row up to which eager attention is faster than sdpa in bf16 on a CPU. Its
#: scores, rows x heads x tokens x tokens, are kept for the backward pass.
SHORT_ROWS = 256


@contextmanager
def fastest_attention(model: PreTrainedModel, precision: str, longest: int) -> Iterator[None]:
    """Within this context `model` computes attention in the way that trains fastest.

    precision: accelerate's `mixed_precision`; longest: tokens of the longest row

    Known from measurements (docs/benchmarks.md): `eager` for short rows in bf16 on a CPU, what the
    model was loaded with everywhere else. In float32 the two differ by less than 5 % on rows of 48
    to 128 tokens, and sdpa is 1.6 times as fast on 384.
    """
    own = attention_of(model)
    short = precision == "bf16" and model.device.type == "cpu" and longest <= SHORT_ROWS
    if own != "sdpa" or not short or not model._can_set_attn_implementation():
        yield
        return
    held = model.config._attn_implementation
    with lock_of(model):  # not in the middle of a pass of another thread
        set_attention(model, "eager")
    try:
        yield
    finally:
        with lock_of(model):
            set_attention(model, held)


@contextmanager
def weights_cast_once(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within this context the frozen matrices that autocast multiplies in `dtype` are in it.

    autocast keeps its copy of a weight that learns, for one pass. It copies a frozen weight again
    in every forward, and the backward pass keeps the copy alive. Results are the same bit for bit,
    and so are the weights afterwards. Embeddings tied to the output head stay in float32: only what
    a linear layer multiplies with is replaced.
    """
    held = [
        (module, module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and is_frozen_float32(module.weight)
    ]
    copies: dict[int, nn.Parameter] = {}  # one of each, should layers share a weight
    for module, weight in held:
        if id(weight) not in copies:
            copies[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        module.weight = copies[id(weight)]
    try:
        yield
    finally:
        for module, weight in held:
            module.weight = weight


def is_frozen_float32(weight: Tensor) -> bool:
    """Whether `weight` is a plain float32 matrix with values, and does not learn."""
    # A quantised weight says that it is float32, too.
    plain = type(weight.data) is Tensor and weight.dtype == torch.float32 and not weight.is_meta
    return plain and not weight.requires_grad
