"""Prefixes in buffers of fixed shape, so that compiled graphs survive every swap.

`AdapterBank.rows` makes a batch as wide as its longest prefix, which is best when nothing is
compiled. `torch.compile`, CUDA graphs and static caches want tensors that keep their shape and
address: here a swap writes values into a slot, or an index, and nothing else changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base


class SlotTable:
    """A table of prefixes `[slots, kv_heads, virtual_tokens, head_dim]` per layer, and the slot
    each of a fixed number of rows reads.

    Slot 0 is the plain base: all of it is hidden. A shorter prefix stands at the right of its
    slot, the rest is hidden. Not thread-safe: a table belongs to the loop that runs its rows.

    prefix: gives the compiled adapter of a name (`AdapterBank.prefix`)
    """

    def __init__(
        self,
        base: Base,
        prefix: Callable[[str], KVPrefix],
        rows: int,
        slots: int,
        virtual_tokens: int,
    ) -> None:
        device, dtype = base.model.device, base.model.dtype
        self._prefix = prefix
        self.virtual_tokens = virtual_tokens
        shape = (slots + 1, virtual_tokens)
        self._keys = [
            torch.zeros(shape[0], s.kv_heads, shape[1], s.key_dim, device=device, dtype=dtype)
            for s in base.layout
        ]
        self._values = [
            torch.zeros(shape[0], s.kv_heads, shape[1], s.value_dim, device=device, dtype=dtype)
            for s in base.layout
        ]
        self._visible = torch.zeros(shape, dtype=torch.bool, device=device)
        #: Asked for only by layers with a window (see `PrefixBatch.as_text`).
        self._as_text = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self._placeless = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self._some_placeless = False
        #: Slot of each row, `[rows]`: what a compiled function takes as its input.
        self.index = torch.zeros(rows, dtype=torch.long, device=device)
        self._row_slots = [0] * rows
        self._slot_of: dict[str, int] = {}
        # slot -> what it holds, least recently assigned first; None where nothing was written.
        self._held: OrderedDict[int, tuple[str, KVPrefix] | None] = OrderedDict.fromkeys(
            range(1, slots + 1)
        )

    def assign(self, row: int, name: str | None) -> None:
        """Let `row` use the adapter `name` (None: the plain base) from its next forward on.

        A name that has a slot costs one index; another takes the slot longest unused by any row.
        A name whose adapter was swapped in the bank is written anew. Raises AdapterError when the
        prefix is too long for a slot, or every slot is in use by other rows.
        """
        slot = 0 if name is None else self._slot(row, name)
        if self._row_slots[row] != slot:
            self._row_slots[row] = slot
            self.index[row] = slot

    def batch(self, index: Tensor | None = None) -> PrefixBatch:
        """The rows' prefixes, always `virtual_tokens` wide. May run inside a compiled function.

        index: the slot of each row, `[rows]`; default: as assigned.
        """
        index = self.index if index is None else index
        return PrefixBatch(
            tuple(k.index_select(0, index) for k in self._keys),
            tuple(v.index_select(0, index) for v in self._values),
            self._visible.index_select(0, index),
            as_text=self._as_text.index_select(0, index),
            placeless=self._placeless.index_select(0, index) if self._some_placeless else None,
        )

    def _slot(self, row: int, name: str) -> int:
        """The slot that holds the adapter `name` as it is now; written if there is none."""
        prefix = self._prefix(name)
        slot = self._slot_of.get(name)
        held = None if slot is None else self._held[slot]
        if slot is None or held is None or held[1] is not prefix:
            slot = self._unused_slot(row)
            self._write(slot, prefix)
            previous = self._held[slot]
            if previous is not None and self._slot_of.get(previous[0]) == slot:
                del self._slot_of[previous[0]]
            self._held[slot] = name, prefix
            self._slot_of[name] = slot
        self._held.move_to_end(slot)
        return slot

    def _unused_slot(self, row: int) -> int:
        """The slot longest unassigned that no other row reads.

        Never one below a row under way, not even for a new version of the same name: a row keeps
        what it started with.
        """
        in_use = {slot for r, slot in enumerate(self._row_slots) if r != row}
        for slot in self._held:
            if slot not in in_use:
                return slot
        raise AdapterError(
            f"all {len(self._held)} slots are in use by other rows; make the table with as many "
            "slots as rows"
        )

    def _write(self, slot: int, prefix: KVPrefix) -> None:
        if prefix.infix:
            raise AdapterError("an infix has no fixed place among the positions, as slots need")
        if prefix.embeddings is not None:
            raise AdapterError("a soft prompt that an encoder reads has no keys and values to slot")
        missing = self.virtual_tokens - prefix.virtual_tokens
        if missing < 0:
            raise AdapterError(
                f"a prefix of {prefix.virtual_tokens} virtual tokens does not fit into slots of "
                f"{self.virtual_tokens}"
            )
        for table, parts in ((self._keys, prefix.keys), (self._values, prefix.values)):
            for layer, part in zip(table, parts, strict=True):
                layer[slot, :, missing:] = part
        self._as_text[slot] = prefix.as_text
        self._placeless[slot] = prefix.placeless
        self._some_placeless |= prefix.placeless
        self._visible[slot] = torch.arange(self.virtual_tokens) >= missing
