"""The one idea: every prompt-learning adapter ends as keys and values at virtual positions.

In a causal transformer the input sees what a prompt method learnt only through the keys and
values of its virtual tokens. `KVPrefix` is that compiled form for one adapter, `PrefixBatch`
the form for the rows of one batch, which may carry different adapters or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptkit.errors import AdapterError


class LayerShape(NamedTuple):
    """Shape of one layer's cache entry: what a KV prefix must match."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVLayout(tuple[LayerShape, ...]):
    """One `LayerShape` per layer of a base model."""

    @property
    def uniform(self) -> LayerShape:
        """The shape shared by all layers. Raises AdapterError when layers differ.

        PEFT's PREFIX_TUNING file is one matrix, so it can hold uniform layouts only.
        """
        first = self[0]
        if any(shape != first for shape in self) or first.key_dim != first.value_dim:
            raise AdapterError(
                "this base model's layers have keys and values of different shapes, which PEFT's "
                "PREFIX_TUNING format cannot hold; use prompt_tuning or p_tuning on this base"
            )
        return first


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values at the virtual positions of one adapter.

    keys, values: one tensor per layer, `[kv_heads, virtual_tokens, head_dim]`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual positions."""
        return self.keys[0].shape[1]

    @property
    def layout(self) -> KVLayout:
        """The layer shapes of the base model this prefix was made for."""
        return KVLayout(
            LayerShape(k.shape[0], k.shape[2], v.shape[2])
            for k, v in zip(self.keys, self.values, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by all keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def map(self, change: Callable[[Tensor], Tensor]) -> KVPrefix:
        """A prefix with `change` applied to every tensor."""
        return KVPrefix(tuple(map(change, self.keys)), tuple(map(change, self.values)))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> KVPrefix:
        """The prefix on `device` in `dtype` (no copy where nothing changes)."""
        return self.map(lambda t: t.to(device=device, dtype=dtype))

    def detach(self) -> KVPrefix:
        """The prefix cut from the graph that made it."""
        return self.map(lambda t: t.detach())

    def flat(self) -> Tensor:
        """PEFT's PREFIX_TUNING layout, `[virtual_tokens, layers * 2 * kv_heads * head_dim]`.

        Row order per token: layer 0 keys, layer 0 values, layer 1 keys, ...
        """
        self.layout.uniform  # noqa: B018  (raises when the layout cannot be flattened)
        pairs = [t for kv in zip(self.keys, self.values, strict=True) for t in kv]
        # [2 * layers, kv_heads, tokens, head_dim] -> [tokens, 2 * layers, kv_heads, head_dim]
        return torch.stack(pairs).permute(2, 0, 1, 3).reshape(self.virtual_tokens, -1)

    @classmethod
    def from_flat(cls, flat: Tensor, layout: KVLayout) -> KVPrefix:
        """Read PEFT's PREFIX_TUNING layout (see `flat`); differentiable, makes views only.

        Raises AdapterError when the row width does not fit `layout`.
        """
        shape = layout.uniform
        width = len(layout) * 2 * shape.kv_heads * shape.key_dim
        if flat.ndim != 2 or flat.shape[1] != width:
            raise AdapterError(
                f"a prefix for this base has {width} values per virtual token "
                f"({len(layout)} layers x 2 x {shape.kv_heads} kv heads x {shape.key_dim}), "
                f"found a tensor of shape {list(flat.shape)}"
            )
        pairs = flat.view(flat.shape[0], 2 * len(layout), shape.kv_heads, shape.key_dim)
        parts = pairs.permute(1, 2, 0, 3).unbind(0)
        return cls(tuple(parts[0::2]), tuple(parts[1::2]))


@dataclass(frozen=True)
class PrefixBatch:
    """The prefixes of one batch's rows, left-padded to the longest.

    keys, values: one tensor per layer, `[rows, kv_heads, longest, head_dim]`
    visible: `[rows, longest]` bool, False where a row's prefix is shorter (always at the left)
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    visible: Tensor

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.visible.shape[0]

    @property
    def longest(self) -> int:
        """Width of the prefix region: virtual tokens of the longest prefix."""
        return self.visible.shape[1]

    @classmethod
    def shared(cls, prefix: KVPrefix, rows: int) -> PrefixBatch:
        """The same prefix for every row: expanded, not copied, so its gradient is summed once."""
        device = prefix.keys[0].device
        return cls(
            tuple(k.expand(rows, *k.shape) for k in prefix.keys),
            tuple(v.expand(rows, *v.shape) for v in prefix.values),
            torch.ones(rows, prefix.virtual_tokens, dtype=torch.bool, device=device),
        )

    @classmethod
    def gathered(cls, prefixes: Sequence[KVPrefix | None], layout: KVLayout) -> PrefixBatch:
        """One prefix (or None, the plain base) per row, of any lengths, of the same base.

        Each row gets only its own keys and values; the padding is zeros and is masked.
        Gradients flow to every prefix.
        """
        present = [p for p in prefixes if p is not None]
        for prefix in present:
            if prefix.layout != layout:
                raise AdapterError(
                    "a prefix in this batch was made for another base model: "
                    f"layers {list(prefix.layout)[:1]} x {len(prefix.layout)}, "
                    f"expected {list(layout)[:1]} x {len(layout)}"
                )
        if not present:
            return cls((), (), torch.zeros(len(prefixes), 0, dtype=torch.bool))
        longest = max(p.virtual_tokens for p in present)
        device, dtype = present[0].keys[0].device, present[0].keys[0].dtype

        def row(tensor: Tensor | None, heads: int, dim: int) -> Tensor:
            if tensor is None:
                return torch.zeros(heads, longest, dim, device=device, dtype=dtype)
            missing = longest - tensor.shape[1]
            return torch.nn.functional.pad(tensor, (0, 0, missing, 0)) if missing else tensor

        def stacked(parts: list[Tensor | None], heads: int, dim: int) -> Tensor:
            return torch.stack([row(part, heads, dim) for part in parts])

        keys = tuple(
            stacked([p.keys[i] if p else None for p in prefixes], shape.kv_heads, shape.key_dim)
            for i, shape in enumerate(layout)
        )
        values = tuple(
            stacked([p.values[i] if p else None for p in prefixes], shape.kv_heads, shape.value_dim)
            for i, shape in enumerate(layout)
        )
        lengths = torch.tensor([p.virtual_tokens if p else 0 for p in prefixes], device=device)
        visible = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
        return cls(keys, values, visible)
