"""Frozen weights in eight bits: less memory for a base that nothing trains.

Through torchao (`pip install 'ptkit[quantize]'`), which runs on CPUs, too. Only what is frozen is
rounded; keys, values, soft prompts and gradients stay in the model's floating type.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ptkit.errors import ModelError


def quantize_int8(model: PreTrainedModel) -> None:
    """Round the weights of `model`'s linear layers, but for its output head, to eight bits with a
    scale per row.

    Raises ModelError without torchao, and for models that have no such layers.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            "`model.quantize: int8` needs torchao: pip install 'ptkit[quantize]'"
        ) from error
    # The head stays as it is: losses read it in pieces, and rounding it costs the most.
    head = model.get_output_embeddings()
    chosen = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear layers that torchao could round (GPT-2's are "
            "another kind); leave `model.quantize` out"
        )
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)
