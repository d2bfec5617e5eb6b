"""The prefixes that a worker keeps in memory, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ptkit.vllm_connector.library import spooled


class PrefixMemory:
    """Prefixes as a worker writes them: layer -> keys and values `[virtual_tokens, kv_heads,
    head_dim]` of all heads, in `dtype`. The least recently used are given up beyond `budget` bytes.

    layers: that the worker has; a stage of a pipeline reads and keeps no others

    `nbytes` is what they take. One prefix is kept, however large it is.
    """

    def __init__(
        self, spool: Path, dtype: torch.dtype, budget: int, layers: Collection[int]
    ) -> None:
        self._spool, self._dtype, self._budget = spool, dtype, budget
        self._layers = layers
        self._kept: OrderedDict[str, dict[int, tuple[Tensor, Tensor]]] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def __getitem__(self, digest: str) -> Mapping[int, tuple[Tensor, Tensor]]:
        if digest not in self._kept:
            with safe_open(spooled(self._spool, digest), "pt") as file:
                self._kept[digest] = {
                    layer: (
                        self._as_rows(file.get_tensor(f"keys.{layer}")),
                        self._as_rows(file.get_tensor(f"values.{layer}")),
                    )
                    for layer in self._layers
                }
            self.nbytes += _nbytes(self._kept[digest])
            while self.nbytes > self._budget and len(self._kept) > 1:
                self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(digest)
        return self._kept[digest]

    def _as_rows(self, states: Tensor) -> Tensor:
        return states.transpose(0, 1).to(self._dtype).contiguous()


def _nbytes(prefix: Mapping[int, tuple[Tensor, Tensor]]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in prefix.values())
