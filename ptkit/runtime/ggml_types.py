"""The block types of GGUF files (ggml's): their sizes, their names, and how values are read.

Sizes and names are those of the package `gguf`. transformers reads blocks in torch, on any device,
from the release that has `integrations.gguf`; earlier ones leave it to `gguf`, in numpy on the CPU.
Both give the same values, bit for bit.
"""

from __future__ import annotations

from typing import Final

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

try:
    from transformers.integrations.gguf.dequant import dequantize as in_torch
except ModuleNotFoundError:  # 5.16 has none
    in_torch = None  # type: ignore[assignment]

Q4_0: Final = int(GGMLQuantizationType.Q4_0)
Q4_1: Final = int(GGMLQuantizationType.Q4_1)
Q5_0: Final = int(GGMLQuantizationType.Q5_0)
Q5_1: Final = int(GGMLQuantizationType.Q5_1)
Q8_0: Final = int(GGMLQuantizationType.Q8_0)

_READ = (
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S "
    "IQ2_S IQ4_XS IQ1_M"
)
_TYPES = [GGMLQuantizationType[name] for name in _READ.split()]

#: Values of a block and its bytes, by type.
BLOCKS: dict[int, tuple[int, int]] = {int(kind): GGML_QUANT_SIZES[kind] for kind in _TYPES}
NAMES: dict[int, str] = {int(kind): kind.name for kind in _TYPES}


def dequantized(blocks: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """The values of `blocks`, `[blocks, bytes of one]` uint8, as `[blocks, values of one]` in
    `dtype`, on the same device."""
    if in_torch is not None and kind not in (Q5_0, Q5_1):
        return in_torch(blocks.reshape(-1), kind, dtype).reshape(len(blocks), -1)
    values = torch.from_numpy(dequantize(blocks.cpu().numpy(), GGMLQuantizationType(kind)))
    return values.to(blocks.device, dtype)
