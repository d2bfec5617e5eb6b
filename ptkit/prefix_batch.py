"""The prefixes of one batch's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptkit.errors import AdapterError

if TYPE_CHECKING:
    from ptkit.prefix import KVLayout, KVPrefix


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """The prefixes of one batch's rows, left-padded to the longest.

    keys, values: one tensor per layer, `[rows, kv_heads, longest, head_dim]`
    visible: `[rows, longest]` bool, False where a row's prefix is shorter (always at the left)
    infix: `[rows]` bool, rows whose virtual tokens stand before the last token of their input;
        None where there is no such row
    seen_from: `[rows]`, index of the first token that sees the virtual tokens; None: the first.
        Set for one forward pass, by `ptkit.runtime.infix`
    as_text: `[rows]` bool, rows whose virtual tokens a layer's window hides as it hides text; None
        where there is no such row
    placeless: `[rows]` bool, rows whose virtual tokens take no positions; None where there is no
        such row
    embeddings, embedded: the rows' soft prompts, where an encoder reads some,
        `[rows, longest soft prompt, hidden]`, and bool where a row has one (padded at the left)
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    visible: Tensor
    infix: Tensor | None = None
    seen_from: Tensor | None = None
    as_text: Tensor | None = None
    embeddings: Tensor | None = None
    embedded: Tensor | None = None
    placeless: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.visible.shape[0]

    @property
    def longest(self) -> int:
        """Width of the prefix region: positions of the longest prefix."""
        return self.visible.shape[1]

    @property
    def placed(self) -> Tensor:
        """`[rows, longest]` bool, virtual tokens that take a position before the text."""
        return self.visible if self.placeless is None else self.visible & ~self.placeless[:, None]

    @classmethod
    def shared(cls, prefix: KVPrefix, rows: int) -> PrefixBatch:
        """The same prefix for every row: expanded, not copied, so its gradient is summed once."""
        device = prefix.keys[0].device
        soft = prefix.embeddings

        def every(so: bool) -> Tensor | None:
            return torch.ones(rows, dtype=torch.bool, device=device) if so else None

        return cls(
            tuple(k.expand(rows, *k.shape) for k in prefix.keys),
            tuple(v.expand(rows, *v.shape) for v in prefix.values),
            torch.ones(rows, prefix.keys[0].shape[1], dtype=torch.bool, device=device),
            every(prefix.infix),
            as_text=every(prefix.as_text),
            placeless=every(prefix.placeless),
            embeddings=None if soft is None else soft.expand(rows, *soft.shape),
            embedded=None
            if soft is None
            else torch.ones(rows, len(soft), dtype=torch.bool, device=device),
        )

    def only(self, rows: Tensor) -> PrefixBatch:
        """The same with prefixes for `rows` (`[rows]` bool) alone: the others are the base's."""
        rows = rows.to(self.visible.device)

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor & rows

        return replace(
            self,
            visible=self.visible & rows[:, None],
            infix=some(self.infix),
            as_text=some(self.as_text),
            placeless=some(self.placeless),
            embedded=None if self.embedded is None else self.embedded & rows[:, None],
        )

    def repeated(self, times: int) -> PrefixBatch:
        """Every row `times` in a row, as beams are."""

        def each(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else each(tensor)

        return PrefixBatch(
            tuple(map(each, self.keys)), tuple(map(each, self.values)), each(self.visible),
            some(self.infix), some(self.seen_from), some(self.as_text), some(self.embeddings),
            some(self.embedded), some(self.placeless),
        )  # fmt: skip

    @classmethod
    def of_rows(cls, prefixes: Sequence[KVPrefix], layout: KVLayout) -> PrefixBatch:
        """One prefix per row: expanded where all have the same one, gathered where not."""
        if all(prefix is prefixes[0] for prefix in prefixes):
            return cls.shared(prefixes[0], len(prefixes))
        return cls.gathered(prefixes, layout)

    @classmethod
    def gathered(cls, prefixes: Sequence[KVPrefix | None], layout: KVLayout) -> PrefixBatch:
        """One prefix (or None, the plain base) per row, of any lengths, of the same base.

        Each row gets only its own keys and values; the padding is zeros and is masked.
        Gradients flow to every prefix.
        """
        # Rows that share a prefix share its padding, and their gradients meet in one place.
        slots = {id(p): p for p in prefixes if p is not None}
        present = [*slots.values()]
        for prefix in present:
            if prefix.layout != layout:
                raise AdapterError(
                    "a prefix in this batch was made for another base model: "
                    f"layers {list(prefix.layout)[:1]} x {len(prefix.layout)}, "
                    f"expected {list(layout)[:1]} x {len(layout)}"
                )
        if not present:
            return cls((), (), torch.zeros(len(prefixes), 0, dtype=torch.bool))
        longest = max(p.keys[0].shape[1] for p in present)
        device = present[0].keys[0].device
        numbers = {key: slot for slot, key in enumerate(slots)}
        plain = len(present)  # the slot of rows without a prefix, zeros
        rows = [plain if p is None else numbers[id(p)] for p in prefixes]
        with_plain = plain in rows
        index = torch.tensor(rows, device=device)
        in_order = rows == list(range(len(rows)))

        def table(parts: list[Tensor]) -> Tensor:
            padded = [
                nn.functional.pad(t, (0, 0, longest - t.shape[1], 0)) if t.shape[1] < longest else t
                for t in parts
            ]
            if with_plain:
                padded.append(torch.zeros_like(padded[0]))
            stacked = torch.stack(padded)
            return stacked if in_order else stacked.index_select(0, index)

        layers = range(len(layout))
        keys = tuple(table([p.keys[i] for p in present]) for i in layers)
        values = tuple(table([p.values[i] for p in present]) for i in layers)

        def filled(lengths: list[int], width: int) -> Tensor:
            empty = torch.tensor([width - length for length in lengths], device=device)
            return torch.arange(width, device=device) >= empty[:, None]

        def rows_where(chosen: Callable[[KVPrefix], bool]) -> Tensor | None:
            if not any(chosen(p) for p in present):
                return None
            return torch.tensor([p is not None and chosen(p) for p in prefixes], device=device)

        batch = cls(
            keys, values,
            filled([0 if p is None else p.keys[0].shape[1] for p in prefixes], longest),
            infix=rows_where(lambda p: p.infix), as_text=rows_where(lambda p: p.as_text),
            placeless=rows_where(lambda p: p.placeless),
        )  # fmt: skip
        softs = [None if p is None else p.embeddings for p in prefixes]
        counts = [0 if soft is None else len(soft) for soft in softs]
        if not any(counts):
            return batch
        hidden = next(soft for soft in softs if soft is not None)
        nothing = hidden.new_zeros(0, hidden.shape[1])
        embeddings = torch.stack([
            nn.functional.pad(nothing if soft is None else soft, (0, 0, max(counts) - n, 0))
            for soft, n in zip(softs, counts, strict=True)
        ])  # fmt: skip
        return replace(batch, embeddings=embeddings, embedded=filled(counts, max(counts)))
