"""The one idea: every prompt-learning adapter ends as keys and values at virtual positions.

In a causal transformer the input sees what a prompt method learnt only through the keys and
values of its virtual tokens. `KVPrefix` is that compiled form for one adapter, `PrefixBatch`
the form for the rows of one batch, which may carry different adapters or none.

One thing cannot be compiled: a soft prompt that an encoder reads, for there the virtual tokens
see the input too. Both forms carry its embeddings beside keys and values of no positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ptkit.errors import AdapterError
from ptkit.prefix_batch import PrefixBatch


class LayerShape(NamedTuple):
    """Shape of one layer's cache entry: what a KV prefix must match."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVLayout(tuple[LayerShape, ...]):
    """One `LayerShape` per layer of a base model."""

    @property
    def widest(self) -> LayerShape:
        """The shape that every layer fits into. Raises AdapterError when keys and values differ.

        PEFT's PREFIX_TUNING file is one matrix, so it gives every layer as much room. A layer with
        fewer or narrower heads (Gemma 4) uses the first of each.
        """
        if any(shape.key_dim != shape.value_dim for shape in self):
            raise AdapterError(
                "this base model has values of another width than its keys, which PEFT's "
                "PREFIX_TUNING format cannot hold; use lora"
            )
        dim = max(shape.key_dim for shape in self)
        return LayerShape(max(shape.kv_heads for shape in self), dim, dim)

    @property
    def wide_everywhere(self) -> bool:
        """Whether a layer with the widest heads has as many of them as any: PEFT has no room for
        more."""
        return max(self, key=lambda shape: shape.key_dim).kv_heads == self.widest.kv_heads


class Compiled(Protocol):
    """A compiled adapter: it gives every row of a batch its prefix.

    Mostly that is one for all rows, a `KVPrefix`; where it depends on what the row reads, it is
    made from the row's input, once.
    """

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens of a row."""

    @property
    def positions(self) -> int:
        """See `KVPrefix.positions`."""

    @property
    def infix(self) -> bool:
        """See `KVPrefix.infix`."""

    @property
    def layout(self) -> KVLayout:
        """The layer shapes of the base model it was made for."""

    @property
    def nbytes(self) -> int:
        """Bytes held by all its tensors."""

    def for_rows(self, input_ids: Tensor, read: Tensor) -> PrefixBatch:
        """The prefixes of a batch's rows, differentiable.

        input_ids: `[rows, tokens]`; read: the same, true at the tokens of the rows' inputs, false
            at padding and at what is to be written
        """

    def for_input(self, ids: Sequence[int]) -> KVPrefix:
        """The prefix of one row whose input is `ids`."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` applied to every tensor."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """The same on `device` in `dtype`."""

    def detach(self) -> Self:
        """The same cut from the graph that made it."""


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """Keys and values at the virtual positions of one adapter.

    keys, values: one tensor per layer, `[kv_heads, virtual_tokens, head_dim]`; keys are those of
        the first positions
    infix: the virtual tokens stand before the last token of the input, not before all of it (Li &
        Liang 2021, section 7.2). What comes earlier is read as by the plain base
    as_text: the virtual tokens were read as text is (a soft prompt, a text prompt), so a layer's
        window hides them as it hides text. Otherwise every token sees them
    embeddings: a soft prompt `[virtual_tokens, hidden]` that an encoder reads with every input;
        None where there is nothing but keys and values
    begins_text: the virtual tokens begin with what the tokenizer puts before a text (a text
        prompt's do), so that the input is read without it
    placeless: the virtual tokens take no positions, so the text begins at position 0 (as in
        AdapterHub's and OpenDelta's libraries). Otherwise it begins after them
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    infix: bool = False
    as_text: bool = False
    embeddings: Tensor | None = None
    begins_text: bool = False
    placeless: bool = False

    @classmethod
    def of_embeddings(cls, embeddings: Tensor, layout: KVLayout) -> KVPrefix:
        """The soft prompt `[virtual_tokens, hidden]` of an encoder, with keys and values of no
        positions."""

        def none(heads: int, width: int) -> Tensor:
            return embeddings.new_zeros(heads, 0, width)

        return cls(
            tuple(none(s.kv_heads, s.key_dim) for s in layout),
            tuple(none(s.kv_heads, s.value_dim) for s in layout),
            embeddings=embeddings,
        )

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens."""
        return self.keys[0].shape[1] + (0 if self.embeddings is None else len(self.embeddings))

    @property
    def positions(self) -> int:
        """Number of positions that its virtual tokens take before the text."""
        return 0 if self.placeless else self.virtual_tokens

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds."""
        soft = () if self.embeddings is None else (self.embeddings,)
        return (*self.keys, *self.values, *soft)

    @cached_property
    def layout(self) -> KVLayout:
        """The layer shapes of the base model this prefix was made for."""
        return KVLayout(
            LayerShape(k.shape[0], k.shape[2], v.shape[2])
            for k, v in zip(self.keys, self.values, strict=True)
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes held by all keys and values."""
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def alone(self) -> PrefixBatch:
        """The batch of one row that uses this prefix; made once, so that a swap is a look-up."""
        return PrefixBatch.shared(self, 1)

    def for_rows(self, input_ids: Tensor, read: Tensor) -> PrefixBatch:
        """Itself for every row."""
        return PrefixBatch.shared(self, len(input_ids))

    def for_input(self, ids: Sequence[int]) -> KVPrefix:
        """Itself."""
        return self

    def map(self, change: Callable[[Tensor], Tensor]) -> KVPrefix:
        """A prefix with `change` applied to every tensor."""
        return replace(
            self,
            keys=tuple(map(change, self.keys)),
            values=tuple(map(change, self.values)),
            embeddings=None if self.embeddings is None else change(self.embeddings),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> KVPrefix:
        """The prefix on `device` in `dtype` (itself where nothing changes)."""
        device = torch.device(device)
        if all(t.device == device and t.dtype == dtype for t in self.tensors):
            return self
        return self.map(lambda t: t.to(device=device, dtype=dtype))

    def emptied(self) -> KVPrefix:
        """A prefix of the same base and kind, of no virtual tokens."""
        return replace(
            self,
            keys=tuple(k[:, :0] for k in self.keys),
            values=tuple(v[:, :0] for v in self.values),
            embeddings=None if self.embeddings is None else self.embeddings[:0],
        )

    def detach(self) -> KVPrefix:
        """The prefix cut from the graph that made it."""
        return self.map(lambda t: t.detach())

    @classmethod
    def concatenated(cls, prefixes: Sequence[KVPrefix]) -> KVPrefix:
        """All virtual tokens of `prefixes`, in order: a style and a task, say.

        Each keeps the keys and values it was trained to; none reads another. The input comes
        after all of them, so an earlier one is further away than it was in training. Where some
        are prefixes, a layer's window hides none of them.
        Raises AdapterError when they are of different base models.
        """
        _require_one_layout(prefixes)
        return _by_layer(prefixes, lambda parts: torch.cat(parts, dim=1))

    @classmethod
    def averaged(
        cls, prefixes: Sequence[KVPrefix], weights: Sequence[float] | None = None
    ) -> KVPrefix:
        """The weighted mean of prefixes of equal length; `weights` (default: equal) add up to 1.

        Raises AdapterError when lengths or base models differ, ValueError for a wrong number of
        weights.
        """
        _require_one_layout(prefixes)
        lengths = [p.virtual_tokens for p in prefixes]
        if len(set(lengths)) > 1:
            raise AdapterError(
                f"only prefixes of equal length can be averaged, these have {lengths} virtual "
                "tokens; concatenate them instead"
            )
        shares = [1 / len(prefixes)] * len(prefixes) if weights is None else list(weights)
        if len(shares) != len(prefixes):
            raise ValueError(f"{len(prefixes)} prefixes need as many weights, found {len(shares)}")

        def mean(parts: list[Tensor]) -> Tensor:
            return torch.stack([t * share for t, share in zip(parts, shares, strict=True)]).sum(0)

        return _by_layer(prefixes, mean)

    def flat(self) -> Tensor:
        """PEFT's PREFIX_TUNING layout, `[virtual_tokens, layers * 2 * kv_heads * head_dim]`.

        Row order per token: layer 0 keys, layer 0 values, layer 1 keys, ... A layer smaller than
        the widest is filled up with zeros.
        """
        heads, dim, _ = self.layout.widest
        pairs = [
            nn.functional.pad(t, (0, dim - t.shape[2], 0, 0, 0, heads - t.shape[0]))
            if t.shape[::2] != (heads, dim) else t
            for kv in zip(self.keys, self.values, strict=True) for t in kv
        ]  # fmt: skip
        # [2 * layers, kv_heads, tokens, head_dim] -> [tokens, 2 * layers, kv_heads, head_dim]
        return torch.stack(pairs).permute(2, 0, 1, 3).reshape(self.virtual_tokens, -1)

    @classmethod
    def from_flat(
        cls,
        flat: Tensor,
        layout: KVLayout,
        *,
        copied_to: tuple[torch.device, torch.dtype] | None = None,
    ) -> KVPrefix:
        """Read PEFT's PREFIX_TUNING layout (see `flat`); differentiable, makes views only.

        copied_to: device and dtype of a copy, made at once for all layers, instead of views

        Raises AdapterError when the row width does not fit `layout`.
        """
        shape = layout.widest
        width = len(layout) * 2 * shape.kv_heads * shape.key_dim
        if flat.ndim != 2 or flat.shape[1] != width:
            raise AdapterError(
                f"a prefix for this base has {width} values per virtual token "
                f"({len(layout)} layers x 2 x {shape.kv_heads} kv heads x {shape.key_dim}); "
                f"found a tensor of shape {list(flat.shape)}"
            )
        pairs = flat.view(flat.shape[0], 2 * len(layout), shape.kv_heads, shape.key_dim)
        pairs = pairs.permute(1, 2, 0, 3)
        if copied_to is not None:
            device, dtype = copied_to
            pairs = torch.empty_like(
                pairs, device=device, dtype=dtype, memory_format=torch.contiguous_format
            ).copy_(pairs)
        parts = [
            part[: s.kv_heads, :, : s.key_dim]
            for part, s in zip(pairs.unbind(0), [s for s in layout for _ in range(2)], strict=True)
        ]
        return cls(tuple(parts[0::2]), tuple(parts[1::2]))


def prefixes_of(batch: PrefixBatch) -> list[KVPrefix | None]:
    """The prefix of each row of `batch`, None for the plain base; keys and values are views. Rows
    that `PrefixBatch.shared` gave one prefix have one here."""
    lengths = batch.visible.sum(-1).tolist()
    kinds = [
        [False] * batch.rows if kind is None else kind.tolist()
        for kind in (batch.infix, batch.as_text, batch.placeless)
    ]
    shared = all(t.stride(0) == 0 for t in (*batch.keys, *batch.values))
    made: dict[object, KVPrefix] = {}
    rows: list[KVPrefix | None] = []
    for row, kind in enumerate(zip(lengths, *kinds, strict=True)):
        length, infix, as_text, placeless = kind
        if not length:
            rows.append(None)
            continue
        name = kind if shared else row
        if name not in made:
            start = batch.longest - length
            made[name] = KVPrefix(
                tuple(k[row, :, start:] for k in batch.keys),
                tuple(v[row, :, start:] for v in batch.values),
                infix,
                as_text,
                placeless=placeless,
            )
        rows.append(made[name])
    return rows


def _by_layer(prefixes: Sequence[KVPrefix], combine: Callable[[list[Tensor]], Tensor]) -> KVPrefix:
    """A prefix whose keys and values are `combine` of the same tensor of all `prefixes`."""
    layers = range(len(prefixes[0].keys))
    return KVPrefix(
        tuple(combine([p.keys[i] for p in prefixes]) for i in layers),
        tuple(combine([p.values[i] for p in prefixes]) for i in layers),
        prefixes[0].infix,
        all(p.as_text for p in prefixes),
        begins_text=any(p.begins_text for p in prefixes),
        placeless=prefixes[0].placeless,
    )


def _require_one_layout(prefixes: Sequence[KVPrefix]) -> None:
    if not prefixes:
        raise AdapterError("no prefix to compose")
    if any(p.layout != prefixes[0].layout for p in prefixes):
        raise AdapterError("only prefixes of one base model can be composed")
    if any(p.infix != prefixes[0].infix for p in prefixes):
        raise AdapterError("a prefix and an infix cannot be composed into one")
    if any(p.placeless != prefixes[0].placeless for p in prefixes):
        raise AdapterError(
            "a prefix that takes no positions cannot be composed with one that takes some: their "
            "texts begin at different positions"
        )
    if any(p.embeddings is not None for p in prefixes):
        raise AdapterError(
            "a soft prompt that an encoder reads has no keys and values to compose; train prefix "
            "tuning for that"
        )
