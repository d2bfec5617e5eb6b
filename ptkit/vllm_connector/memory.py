"""The prefixes that a worker keeps in memory, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptkit.vllm_connector.library import spooled


class PrefixMemory:
    """Prefixes as a worker writes them: layer -> keys and values `[virtual_tokens, kv_heads,
    head_dim]` of all heads, in `dtype`. The least recently used are given up beyond `budget` bytes.

    `nbytes` is what they take. One prefix is kept, however large it is.
    """

    def __init__(self, spool: Path, dtype: torch.dtype, budget: int) -> None:
        self._spool, self._dtype, self._budget = spool, dtype, budget
        self._kept: OrderedDict[str, list[tuple[Tensor, Tensor]]] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def __getitem__(self, digest: str) -> Sequence[tuple[Tensor, Tensor]]:
        if digest not in self._kept:
            tensors = load_file(spooled(self._spool, digest))
            self._kept[digest] = [
                (self._as_rows(tensors[f"keys.{i}"]), self._as_rows(tensors[f"values.{i}"]))
                for i in range(len(tensors) // 2)
            ]
            self.nbytes += _nbytes(self._kept[digest])
            while self.nbytes > self._budget and len(self._kept) > 1:
                self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(digest)
        return self._kept[digest]

    def _as_rows(self, states: Tensor) -> Tensor:
        return states.transpose(0, 1).to(self._dtype).contiguous()


def _nbytes(prefix: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in prefix)
