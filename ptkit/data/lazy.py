"""Sequences whose entries are made when they are asked for, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
S = TypeVar("S")


class Lazy(Sequence[T], Generic[T]):
    """A sequence that knows how to make its n-th entry; equal to any sequence of equal entries."""

    def entry(self, number: int) -> T:
        """The entry `number`, from 0."""
        raise NotImplementedError

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Picked(self, np.arange(len(self))[number])
        at = int(number) + len(self) * (number < 0)
        if not 0 <= at < len(self):
            raise IndexError(f"there is no entry {number} of {len(self)}")
        return self.entry(at)

    def __iter__(self) -> Iterator[T]:
        return map(self.entry, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(
            own == theirs for own, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class Picked(Lazy[T]):
    """Some entries of `rows`, in the order of `numbers` `[entries]`."""

    def __init__(self, rows: Sequence[T], numbers: Sequence[int] | np.ndarray) -> None:
        self.rows, self.numbers = rows, np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def entry(self, number: int) -> T:
        return self.rows[int(self.numbers[number])]


class Mapped(Lazy[T], Generic[S, T]):
    """What `function` makes of each of `rows`."""

    def __init__(self, function: Callable[[S], T], rows: Sequence[S]) -> None:
        self.function, self.rows = function, rows

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, number: int) -> T:
        return self.function(self.rows[number])

    def __iter__(self) -> Iterator[T]:
        return map(self.function, self.rows)


def picked(rows: Sequence[T], numbers: Sequence[int] | np.ndarray) -> Sequence[T]:
    """The rows with these numbers: a list of a list's, and otherwise not read yet."""
    if isinstance(rows, list):
        return [rows[int(i)] for i in numbers]
    return Picked(rows, numbers)
