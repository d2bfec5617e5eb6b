"""The decode loop: rows whose inputs are read, and that get one token after the other.

Generation (`ptkit.runtime.paged_generation`) and the server (`ptkit.serve.executor`) run it. They
differ in where rows come from, and in how a token is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ptkit.runtime.paged_batch import PagedBatch, PagedSequence


class LoopRow(ABC):
    """A row of a `DecodeLoop`."""

    def __init__(self, sequence: PagedSequence) -> None:
        self.sequence = sequence

    @property
    @abstractmethod
    def last_token(self) -> int:
        """The token that was chosen last, which the next step decodes."""

    @property
    def owner(self) -> object:
        """What the row belongs to: the rows of one owner get their first tokens together."""
        return self

    @property
    def left(self) -> int:
        """Tokens of its input that are still to be read."""
        return len(self.sequence.given.prompt) - self.sequence.read


Row = TypeVar("Row", bound=LoopRow)


@dataclass(frozen=True)
class Ready(Generic[Row]):
    """Rows that get a token now, and their `logits` `[rows, vocabulary]`; the first `decoded` of
    them have some already."""

    rows: list[Row]
    logits: Tensor
    decoded: int


class DecodeLoop(Generic[Row]):
    """The running rows of one `PagedBatch`.

    piece: tokens of inputs read between two steps; None: all that there are

    Not thread-safe: it belongs to the thread that runs it.
    """

    def __init__(self, batch: PagedBatch, piece: int | None = None) -> None:
        self.batch, self._piece = batch, piece
        #: Rows whose inputs are being read, and rows that have read theirs.
        self.prefilling: list[Row] = []
        self.decoding: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.decoding, *self.prefilling]

    def pieces(self) -> list[list[Row]]:
        """Rows whose inputs are read in the next step, in groups that get a piece each. So long
        inputs do not hold back short ones, nor these them."""
        if self._piece is None:
            return [self.prefilling] if self.prefilling else []
        short = [row for row in self.prefilling if row.left <= self._piece]
        long = [row for row in self.prefilling if row.left > self._piece]
        return [rows for rows in (short, long) if rows]

    def step(self) -> Ready[Row]:
        """Read a piece of the inputs, and decode one token in every row, in one pass. When it
        fails, all rows are as they were."""
        pieces, decoding = self.pieces(), self.decoding
        logits = self.batch.step(
            [row.sequence for row in decoding],
            [row.last_token for row in decoding],
            [([row.sequence for row in rows], self._tokens(rows)) for rows in pieces],
        )
        return self._ready(logits)

    def prefill(self, rows: Sequence[Row]) -> None:
        """Read a piece of the inputs of `rows`, and nothing else."""
        self.batch.prefill([row.sequence for row in rows], self._tokens(rows))

    def decode(self) -> Ready[Row]:
        """Decode one token in every row; inputs that were read by `prefill` get their first."""
        rows = self.decoding
        if not rows:
            return self._ready(torch.empty(0))
        return self._ready(
            self.batch.decode([row.sequence for row in rows], [row.last_token for row in rows])
        )

    def remove(self, rows: Collection[Row]) -> None:
        """Take `rows` out, and give up their blocks."""
        if not rows:
            return
        gone = {*rows}
        for row in gone:
            self.batch.end(row.sequence)
        self.decoding = [row for row in self.decoding if row not in gone]
        self.prefilling = [row for row in self.prefilling if row not in gone]

    def _tokens(self, rows: Sequence[Row]) -> int:
        return sum(row.left for row in rows) if self._piece is None else self._piece

    def _ready(self, logits: Tensor) -> Ready[Row]:
        """The rows that `logits` `[decoding, vocabulary]` are of, and those of the owners whose
        inputs have all been read, which decode from now on."""
        if not self.prefilling:
            return Ready(self.decoding, logits, len(self.decoding))
        waiting = {row.owner for row in self.prefilling if row.sequence.logits is None}
        first = [row for row in self.prefilling if row.owner not in waiting]
        decoded = self.decoding
        parts = [logits] if decoded else []
        parts += [row.sequence.logits[None] for row in first if row.sequence.logits is not None]
        if len(parts) > 1:
            logits = torch.cat(parts)
        elif parts:
            logits = parts[0]
        for row in first:
            row.sequence.logits = None
        self.prefilling = [row for row in self.prefilling if row.owner in waiting]
        self.decoding = [*decoded, *first]
        return Ready(self.decoding, logits, len(decoded))
