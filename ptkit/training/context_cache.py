"""Inputs read once for all epochs: what an infix comes after does not depend on it.

An infix stands before the last token of the input. Everything earlier is read as by the plain base,
so its keys and values stay the same while the infix is trained. They are computed once and kept.
Every later epoch runs the virtual tokens, one token of input and the target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ptkit.data.encoded import EncodedExample
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.locks import running


@dataclass(frozen=True)
class _Context:
    """Keys and values of one input without its last token.

    keys, values: per layer, `[kv_heads, tokens, head_dim]`; one of nothing has no layers
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class ContextCache:
    """Contexts of the rows it is asked for, kept while they fit into `budget` bytes.

    Those that do not fit are read again each time, which still costs no backward pass. Each is read
    alone, so what is computed does not depend on the other rows. A resumed run ends with the same
    weights.
    """

    def __init__(self, base: Base, budget: int) -> None:
        self.base, self.budget = base, budget
        self.nbytes = 0
        self._kept: dict[tuple[int, ...], _Context] = {}

    def shortened(self, rows: Sequence[EncodedExample]) -> list[EncodedExample]:
        """The rows as far as they still have to be run: the input's last token and the target."""
        return [replace(row, input_ids=row.input_ids[-1:]) for row in rows]

    def contexts(self, rows: Sequence[EncodedExample]) -> PrefixBatch:
        """What comes before that, left-padded to the longest, `[rows, kv_heads, longest, dim]`."""
        found = [self._context(row.input_ids[:-1]) for row in rows]
        longest = max(context.tokens for context in found)
        device, layout = self.base.model.device, self.base.layout
        lengths = torch.tensor([context.tokens for context in found], device=device)
        visible = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
        if not longest:
            return PrefixBatch((), (), visible)

        def padded(layer: int, side: str, width: int) -> Tensor:
            heads = layout[layer].kv_heads
            table = torch.zeros(
                len(found), heads, longest, width, device=device, dtype=self.base.model.dtype
            )
            for row, context in enumerate(found):
                if context.tokens:
                    table[row, :, longest - context.tokens :] = getattr(context, side)[layer]
            return table

        layers = range(len(layout))
        return PrefixBatch(
            tuple(padded(i, "keys", layout[i].key_dim) for i in layers),
            tuple(padded(i, "values", layout[i].value_dim) for i in layers),
            visible,
        )

    def _context(self, ids: list[int]) -> _Context:
        key = tuple(ids)
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        context = self._read(ids)
        if self.nbytes + context.nbytes <= self.budget:
            self._kept[key] = context
            self.nbytes += context.nbytes
        return context

    @torch.no_grad()
    def _read(self, ids: list[int]) -> _Context:
        if not ids:
            return _Context((), (), 0)
        model = self.base.model
        cache = DynamicCache()
        training = model.training
        model.eval()  # dropout would be kept for good; checkpointing would switch the cache off
        try:
            with running(model):
                model.base_model(
                    input_ids=torch.tensor([ids], device=model.device),
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            model.train(training)
        layers: Any = cache.layers
        dtype = model.dtype
        return _Context(
            tuple(layer.keys[0].to(dtype).clone() for layer in layers),
            tuple(layer.values[0].to(dtype).clone() for layer in layers),
            len(ids),
        )
