"""What recipes, commands and calls from Python take alike: words for how a base model is loaded,
and how many seeds there are."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager"]
Quantize = Literal["int8", "nf4", "blocks"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
TensorParallel = Literal["auto"]

#: Seeds of training are below this: torch, NumPy and Optuna all take them.
SEEDS = 2**32
