"""Compiled adapters within a budget of bytes, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from ptkit.prefix import Compiled


class PrefixCache:
    """Compiled adapters by name, in the order of their last use.

    budget: bytes they may take together; None is no limit. Not thread-safe: the bank's lock
    guards it.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.bytes = 0
        self._held: OrderedDict[str, Compiled] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def over_budget(self) -> bool:
        """Whether the prefixes take more than the budget."""
        return self.budget is not None and self.bytes > self.budget

    def names(self) -> list[str]:
        """Names, least recently used first."""
        return [*self._held]

    def get(self, name: str) -> Compiled | None:
        """The prefix `name`, now the most recently used; None when it is not here."""
        prefix = self._held.get(name)
        if prefix is not None:
            self._held.move_to_end(name)
        return prefix

    def peek(self, name: str) -> Compiled | None:
        """The prefix `name` without counting as a use."""
        return self._held.get(name)

    def put(self, name: str, prefix: Compiled) -> None:
        """Keep `prefix` as the most recently used, in place of what had that name."""
        self.pop(name)
        self._held[name] = prefix
        self.bytes += prefix.nbytes

    def pop(self, name: str) -> Compiled | None:
        """Take the prefix `name` out, if it is here."""
        prefix = self._held.pop(name, None)
        if prefix is not None:
            self.bytes -= prefix.nbytes
        return prefix

    def overflow(self, staying: Collection[str]) -> Iterator[tuple[str, Compiled]]:
        """Take out the least recently used until the rest fits, never one of `staying`."""
        while self.over_budget:
            name = next((n for n in self._held if n not in staying), None)
            if name is None:
                return
            prefix = self.pop(name)
            assert prefix is not None
            yield name, prefix
