"""Blocks of keys and values: the memory of all running sequences (Kwon et al. 2023, "Efficient
memory management for large language model serving with PagedAttention", section 4).

A block holds a fixed number of positions of every layer. A sequence's positions are in the blocks
of its block table, in any order. Blocks are reference counted: sequences with an equal beginning
(one prefix, one system prompt) hold the same ones.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptkit.errors import PtkitError
from ptkit.prefix import KVLayout

#: Positions of a block unless said otherwise.
BLOCK_SIZE = 16
#: A pool grows by this many blocks at least, or by this part of what it has.
_LEAST_GROWTH, _GROWTH_PART = 16, 32


def position_bytes(layout: KVLayout, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position."""
    width = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layout)
    return width * dtype.itemsize


class NoBlocksError(PtkitError):
    """All blocks that the pool may have are in use."""


class BlockPool:
    """The blocks of one model. Not thread-safe: it belongs to the loop that runs its sequences.

    layout: of the base
    block_size: positions of a block
    most: blocks it may have; None: as memory lasts
    kept: blocks that no sequence uses any more, kept for those with an equal beginning
    reserved: blocks that it has memory for from the first write on, until it goes

    Position `i` of block `b` is slot `b * block_size + i` of every layer. Memory is taken as
    blocks are written to, a few at a time, and given back when most of them are free.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        block_size: int = BLOCK_SIZE,
        most: int | None = None,
        kept: int = 0,
        reserved: int = 0,
    ) -> None:
        self.layout, self.block_size, self.most, self.kept = layout, block_size, most, kept
        self._reserved = reserved
        #: References to each block; 0: free, or kept.
        self._uses: list[int] = []
        self._free: list[int] = []  # a heap: low numbers first, so that the end can be given back
        self._keys: list[Tensor | None] = [None] * len(layout)
        self._values: list[Tensor | None] = [None] * len(layout)
        self._by_content: dict[bytes, int] = {}
        self._content: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # kept blocks, longest unused first
        #: What the last reads returned, to be written over.
        self._gathered: dict[tuple[object, ...], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values it holds."""
        return sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)

    @property
    def used(self) -> int:
        """Blocks in use by sequences."""
        return len(self._uses) - len(self._free) - len(self._unused)

    def blocks_for(self, positions: int) -> int:
        """How many blocks hold so many positions."""
        return -(-positions // self.block_size)

    # Blocks

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of which the caller is the only user; all or none.

        Raises NoBlocksError.
        """
        room = len(self._free) + len(self._unused)
        missing = count - len(self._free)
        if missing > 0:
            size = len(self._uses)
            wanted = max(missing, _LEAST_GROWTH, size // _GROWTH_PART, self._reserved - size)
            grown = wanted if self.most is None else min(wanted, self.most - size)
            if grown + room < count:
                raise NoBlocksError(
                    f"{count} blocks of {self.block_size} positions are needed, of {self.most} "
                    f"all but {max(0, grown) + room} are in use"
                )
            self._uses += [0] * grown
            for block in range(size, size + grown):
                heapq.heappush(self._free, block)
            while len(self._free) < count:
                self._evict()
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._uses[block] = 1
        return blocks

    def share(self, block: int) -> int:
        """`block`, which has one user more."""
        self._uses[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each of `blocks`."""
        for block in blocks:
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            if block in self._content and self.kept:
                self._unused[block] = None
                if len(self._unused) > self.kept:
                    self._evict()
            else:
                self.withdraw(block)
                heapq.heappush(self._free, block)
        if not self._reserved and 2 * (len(self._uses) - len(self._free)) < len(self._uses):
            self._shrink()

    def found(self, content: bytes) -> int | None:
        """The block with this content, which has one user more; None where there is none."""
        block = self._by_content.get(content)
        if block is not None:
            self._unused.pop(block, None)
            self._uses[block] += 1
        return block

    def publish(self, block: int, content: bytes) -> None:
        """Let others find `block` by its content. It is not written to any more."""
        if content not in self._by_content:
            self._by_content[content] = block
            self._content[block] = content

    def withdraw(self, block: int) -> None:
        """Let no sequence find `block` any more."""
        content = self._content.pop(block, None)
        if content is not None:
            del self._by_content[content]

    def _evict(self) -> None:
        block, _ = self._unused.popitem(last=False)
        self.withdraw(block)
        heapq.heappush(self._free, block)

    def _shrink(self) -> None:
        """Give back the end of the pool, where more than half of it is free."""
        size = 1 + max((b for b, n in enumerate(self._uses) if n or b in self._unused), default=-1)
        if 2 * size > len(self._uses):
            return
        self._gathered.clear()
        del self._uses[size:]
        self._free = [block for block in self._free if block < size]
        heapq.heapify(self._free)
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                if tensor is not None:
                    kept = tensor[: size * self.block_size].clone() if size else None
                    tensors[layer] = kept

    # Keys and values

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys` and `values` `[positions, heads, dim]` of `layer` into `slots`
        `[positions]`."""
        for tensors, new in ((self._keys, keys), (self._values, values)):
            tensor = self._with_room(tensors, layer, new)
            tensor.index_copy_(0, _on(tensor, slots), new.to(tensor))

    def read(self, layer: int, slots: Tensor, rows: int, place: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of `layer` at `slots` `[rows * positions]`, each
        `[rows, heads, positions, dim]`. The next read into `place` writes over them."""
        pair = []
        for kind, tensors in enumerate((self._keys, self._values)):
            tensor = tensors[layer]
            assert tensor is not None
            room = self._room_for((kind, place), slots.shape[0], tensor)
            torch.index_select(tensor, 0, _on(tensor, slots), out=room)
            pair.append(room.view(rows, -1, *room.shape[1:]).transpose(1, 2))
        return pair[0], pair[1]

    def seen(
        self, layer: int, first: int, apart: int, rows: int, positions: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of `layer`, each `[rows, heads, positions, dim]`, where they are: row `i`
        in the slots from `first + i * apart` on. A later write may change them."""
        pair = []
        for tensors in (self._keys, self._values):
            tensor = tensors[layer]
            assert tensor is not None
            slot, head, value = tensor.stride()
            pair.append(
                tensor.as_strided(
                    (rows, tensor.shape[1], positions, tensor.shape[2]),
                    (apart * slot, head, slot, value),
                    tensor.storage_offset() + first * slot,
                )
            )
        return pair[0], pair[1]

    def _room_for(self, use: tuple[int, int], positions: int, like: Tensor) -> Tensor:
        """Memory for what is read, `[positions, heads, dim]`: the same for all layers, as fresh
        memory costs as much as the copy."""
        key = use, like.device, like.dtype, like.shape[1:]
        room = self._gathered.get(key)
        if room is None or room.shape[0] < positions:
            self._gathered[key] = room = like.new_empty(positions + positions // 4, *like.shape[1:])
        return room[:positions]

    def copy(self, source: int, target: int) -> None:
        """Put what is in block `source` into block `target`."""
        size = self.block_size
        for layer in range(len(self.layout)):
            for tensors in (self._keys, self._values):
                held = tensors[layer]
                if held is not None:
                    tensor = self._with_room(tensors, layer, held)
                    tensor[target * size : (target + 1) * size] = tensor[
                        source * size : (source + 1) * size
                    ]

    def _with_room(self, tensors: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        """The tensor of `layer` with a place for every block."""
        tensor, positions = tensors[layer], len(self._uses) * self.block_size
        if tensor is None or tensor.shape[0] < positions:
            grown = like.new_empty(positions, *like.shape[1:])
            if tensor is not None:
                grown[: len(tensor)] = tensor
            tensors[layer] = tensor = grown
        return tensor


def _on(tensor: Tensor, slots: Tensor) -> Tensor:
    """`slots` on the device of `tensor`."""
    return slots if slots.device == tensor.device else slots.to(tensor.device)


class BlockTable:
    """The blocks of one sequence, and the slot of each of its positions."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.blocks: list[int] = []
        self.length = 0
        self._slots = np.empty(64, dtype=np.int64)
        self._room = 0  # positions of the last block that are still to be written
        self._reserved: list[int] = []  # blocks that it has for later, the next one last

    @property
    def slots(self) -> np.ndarray:
        """The slots of its positions in order, `[length]`, int64."""
        return self._slots[: self.length]

    @property
    def last_slot(self) -> int:
        """The slot of its last position."""
        return int(self._slots[self.length - 1])

    def reserve(self, positions: int) -> None:
        """Take the blocks of so many more positions now. From a fresh pool they follow each other,
        so that they can be read where they are. Raises NoBlocksError."""
        self._reserved = self._allocate(self._pool.blocks_for(positions))[::-1]

    @property
    def mark(self) -> tuple[int, int, int]:
        """What `back_to` goes back to."""
        return len(self.blocks), self.length, self._room

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Give up what came after `mark`."""
        count, self.length, self._room = mark
        gone = self.blocks[count:]
        del self.blocks[count:]
        self._pool.release(gone)

    def take_over(self, block: int, positions: int | None = None) -> None:
        """Add a block with `positions` (all) that are not written to any more; its reference is
        this table's from now on."""
        size = self._pool.block_size
        positions = size if positions is None else positions
        self.blocks.append(block)
        self._append(np.arange(block * size, block * size + positions))
        self._room = 0

    def extend(self, positions: int) -> np.ndarray:
        """The slots of so many more positions, `[positions]`. Raises NoBlocksError, and is then as
        it was."""
        size, pool = self._pool.block_size, self._pool
        if positions == 1 and self._room and self.length < len(self._slots):  # nearly every token
            slot = (self.blocks[-1] + 1) * size - self._room
            self._slots[self.length] = slot
            self.length += 1
            self._room -= 1
            return self._slots[self.length - 1 : self.length]
        new = self._allocate(pool.blocks_for(max(0, positions - self._room)))
        start = self.length
        if self._room:
            first = (self.blocks[-1] + 1) * size - self._room
            taken = min(positions, self._room)
            self._append(np.arange(first, first + taken))
            self._room -= taken
        for block in new:
            left = min(size, start + positions - self.length)
            self.blocks.append(block)
            self._append(np.arange(block * size, block * size + left))
            self._room = size - left
        return self._slots[start : self.length]

    def fork(self) -> BlockTable:
        """Another sequence that goes on from here: it holds the same blocks, and a copy of the one
        that is to be written to. Raises NoBlocksError."""
        pool, other = self._pool, BlockTable(self._pool)
        last = pool.allocate(1) if self._room else []
        shared = self.blocks[: len(self.blocks) - len(last)]
        other.blocks = [*map(pool.share, shared), *last]
        other._slots, other.length, other._room = self._slots.copy(), self.length, self._room
        for block in last:
            try:
                pool.copy(self.blocks[-1], block)
            except BaseException:
                other.release()
                raise
            written = pool.block_size - self._room
            start = block * pool.block_size
            other._slots[self.length - written : self.length] = np.arange(start, start + written)
        return other

    def release(self) -> None:
        """Give all of it up."""
        self.back_to((0, 0, 0))
        self._pool.release(self._reserved)
        self._reserved = []

    def _allocate(self, count: int) -> list[int]:
        """So many blocks, reserved ones first; all or none."""
        reserved = self._reserved[len(self._reserved) - min(count, len(self._reserved)) :]
        new = self._pool.allocate(count - len(reserved)) if count > len(reserved) else []
        del self._reserved[len(self._reserved) - len(reserved) :]
        return reserved[::-1] + new

    def _append(self, slots: np.ndarray) -> None:
        end = self.length + len(slots)
        if end > len(self._slots):
            self._slots = np.concatenate([self._slots, np.empty(end, dtype=np.int64)])
        self._slots[self.length : end] = slots
        self.length = end


def as_tensor(slots: Sequence[np.ndarray]) -> Tensor:
    """Slots one after the other, `[positions]`."""
    return torch.from_numpy(np.concatenate(slots))
