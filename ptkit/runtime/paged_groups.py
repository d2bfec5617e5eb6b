"""Which tokens of a pass over blocks attend together, and where their keys and values are.

Sequences of similar length are read together. A beginning that several of them share (a prefix, a
system prompt) is read once for all of them, where that pays (`shared_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.runtime.attention_choice import attention_of
from ptkit.runtime.block_pool import BlockPool, BlockTable

#: Sequences are read together while the shorter one has so much of the longer one's length, or
#: lacks so few positions of it.
_SIMILAR, _CLOSE = 0.7, 32
#: A shared beginning is read once where that saves so many positions: its length times the
#: sequences less one. Measured on a CPU: at 300 to 600 positions both ways take as long, at 700 one
#: reading is a quarter faster.
WORTH_SHARING = 640
#: Steps for which decoded sequences stay in their groups.
GROUPED_FOR = 32


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: `ids`, which take the last positions of its `table`.

    number: which sequence of the pass it is
    placeless: how many of the sequence's first slots take no position
    """

    number: int
    ids: Sequence[int]
    table: BlockTable
    placeless: int = 0

    @property
    def slots(self) -> np.ndarray:
        """The slots of all positions of the sequence, `[positions]`."""
        return self.table.slots

    @property
    def written(self) -> np.ndarray:
        """The slots of the new tokens."""
        return self.slots[self.before :]

    @property
    def before(self) -> int:
        """Slots before the new tokens."""
        return self.table.length - len(self.ids)

    @property
    def position(self) -> int:
        """Position of the first new token."""
        return self.before - self.placeless


def grouped(chunks: Sequence[Chunk], shared: int = 0) -> list[list[Chunk]]:
    """`chunks` in groups of similar numbers of new tokens and similar lengths.

    shared: positions at the beginning that are not counted
    """
    ordered = sorted(chunks, key=lambda chunk: (-len(chunk.ids), -chunk.table.length))
    groups: list[list[Chunk]] = []
    most = longest = 0  # new tokens, and positions, of the last group
    for chunk in ordered:
        new, length = len(chunk.ids), chunk.table.length - shared
        if groups and _similar(new, most) and _similar(length, longest):
            groups[-1].append(chunk)
            longest = max(longest, length)
        else:
            groups.append([chunk])
            most, longest = new, length
    return groups


def of_one_length(group: Sequence[Chunk]) -> list[list[Chunk]]:
    """`group` in parts that a `TogetherPass` takes: one token each, or equal lengths."""
    parts: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in group:
        single = len(chunk.ids) == 1
        parts.setdefault((len(chunk.ids), 0 if single else chunk.table.length), []).append(chunk)
    return [*parts.values()]


def _similar(one: int, other: int) -> bool:
    if one > other:
        one, other = other, one
    if one == 1 < other:
        return False  # one token alone needs no mask of its own
    return one >= _SIMILAR * other or other - one <= _CLOSE


def grouped_by_beginning(chunks: Sequence[Chunk]) -> list[tuple[list[Chunk], int]]:
    """`chunks` in groups, and how many first positions the sequences of each share.

    0: they share none, or too few to read them once
    """
    found: list[tuple[list[Chunk], int]] = []
    rest: list[Chunk] = []
    beginnings: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        beginnings.setdefault(int(chunk.slots[0]), []).append(chunk)
    for alike in beginnings.values():
        for several, shared in _sharing(alike):
            for group in grouped(several, shared):
                if _is_worth_sharing(len(group), shared):
                    found.append((group, shared))
                else:
                    rest += group
    return [*found, *((group, 0) for group in grouped(rest))]


def _sharing(chunks: list[Chunk]) -> Iterator[tuple[list[Chunk], int]]:
    """`chunks`, whose first positions are the same, in sets that share as much as is worth it."""
    while chunks:
        first, *others = chunks
        lengths = [_common(first, other) for other in others]
        shared, best = 0, WORTH_SHARING - 1
        for length in {*lengths}:
            saved = length * sum(other >= length for other in lengths)
            if saved > best:
                shared, best = length, saved
        several = [first]
        if shared:
            several += [c for c, n in zip(others, lengths, strict=True) if n >= shared]
        yield several, shared
        taken = {*map(id, several)}
        chunks = [chunk for chunk in others if id(chunk) not in taken]


def _is_worth_sharing(sequences: int, shared: int) -> bool:
    return (sequences - 1) * shared >= WORTH_SHARING


def _common(one: Chunk, other: Chunk) -> int:
    """How many first positions are the same in both, and before the new tokens."""
    most = min(one.before, other.before)
    differ = one.slots[:most] != other.slots[:most]
    return int(differ.argmax()) if differ.any() else most


class SlotGrid:
    """The slots of the same positions of several sequences, `[rows, positions]` int64.

    Keys and values are read where they are if the slots of each row follow each other and the rows
    are evenly apart. Otherwise they are copied together.
    """

    def __init__(self, slots: np.ndarray, device: torch.device) -> None:
        self.rows, self.positions = slots.shape
        self._first = int(slots[0, 0])
        self._apart = int(slots[1, 0]) - self._first if self.rows > 1 else self.positions
        self._slots: Tensor | None = None
        if not self._is_even(slots):
            self._slots = torch.from_numpy(slots.reshape(-1)).to(device)

    def _is_even(self, slots: np.ndarray) -> bool:
        rows, last = self._first + self._apart * np.arange(self.rows), self.positions - 1
        return (
            self._apart > 0
            and bool((slots[:, 0] == rows).all() and (slots[:, last] == rows + last).all())
            and bool((slots == rows[:, None] + np.arange(self.positions)).all())
        )

    def read(self, pool: BlockPool, layer: int, place: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of `layer`, each `[rows, heads, positions, dim]`. The next read into
        `place` writes over them."""
        if self._slots is None:
            return pool.seen(layer, self._first, self._apart, self.rows, self.positions)
        return pool.read(layer, self._slots, self.rows, place)


class TokenGroup:
    """Sequences of a pass that attend together: `rows` of them, each with `queries` tokens.

    start, tokens: where their tokens are among those of the pass
    shared: the slots of the first positions, which are the same in all; None: no such are left out
    own: the slots of the positions after them. A row that is shorter than others repeats its first
        one: it is hidden, but must be finite where the sequence is
    mask: what the queries attend to of `own`, `[rows, 1, queries, positions]`, added to the scores.
        None: all of it, or what is causal
    """

    def __init__(
        self, chunks: Sequence[Chunk], start: int, model: PreTrainedModel, shared: int = 0
    ) -> None:
        self.chunks, self._model = chunks, model
        self._device, rows = model.device, len(chunks)
        device = self._device
        counts = np.array([len(chunk.ids) for chunk in chunks])
        self._lengths = np.array([chunk.table.length for chunk in chunks]) - shared
        self.start, self.tokens, self.rows = start, int(counts.sum()), rows
        self.queries, longest = int(counts.max()), int(self._lengths.max())
        self.shared = SlotGrid(chunks[0].slots[None, :shared], device) if shared else None
        self._slots = np.empty((rows, longest + GROUPED_FOR), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            self._slots[row] = chunk.slots[shared]
            self._slots[row, : self._lengths[row]] = chunk.slots[shared:]
        #: Padded query -> token, and token -> padded query; None where nothing is padded.
        self.query: Tensor | None = None
        self.back: Tensor | None = None
        if self.tokens != rows * self.queries:
            first = np.cumsum(counts) - counts
            column = np.arange(self.queries)
            there = column < counts[:, None]
            self.query = torch.from_numpy(
                np.where(there, first[:, None] + column, first[:, None]).reshape(-1)
            ).to(device)
            self.back = torch.from_numpy(np.flatnonzero(there)).to(device)
        self._place(self._lengths - counts)

    def advance(self) -> None:
        """Take one more token in each sequence, which has been added to its table."""
        written = [chunk.table.last_slot for chunk in self.chunks]
        self._slots[np.arange(self.rows), self._lengths] = written
        self._lengths += 1
        self._place(self._lengths - 1)

    def mask_on(self, device: torch.device) -> Tensor | None:
        """`mask` where it is needed: layers may lie on several devices."""
        return None if self.mask is None else self.mask.to(device)

    def whole(self) -> TokenGroup:
        """The same group with all positions among its own."""
        return TokenGroup(self.chunks, self.start, self._model)

    def _place(self, before: np.ndarray) -> None:
        """before: positions of `own` before the new tokens, `[rows]`"""
        self.positions = longest = int(self._lengths.max())
        self.own = SlotGrid(self._slots[:, :longest], self._device)
        self.mask = self._mask(before, longest)

    def _mask(self, before: np.ndarray, longest: int) -> Tensor | None:
        model = self._model
        if self.queries == 1 and (self._lengths == longest).all():
            return None
        if not before.any() and attention_of(model) == "sdpa":
            return None  # plainly causal, by itself
        seen = torch.from_numpy(before)[:, None] + torch.arange(self.queries)
        hidden = torch.arange(longest) > seen[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype)
        mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        return mask.to(self._device)
