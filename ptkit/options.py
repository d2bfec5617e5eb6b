"""Words for how a base model is loaded, the same in a recipe and in a call of `load_base`."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager"]
Quantize = Literal["int8", "nf4", "blocks"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
TensorParallel = Literal["auto"]
