"""The rows of several tasks that are learnt together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ptkit.data.encoded import EncodedExample, TaskExample
from ptkit.data.encoded_rows import Lengths, MeasuredRows


class TaskRows(MeasuredRows):
    """The rows of all tasks, one task after another, each with its task's number and weight. Rows
    that lie in files stay there.

    rows: of each task

    A task counts by its rows. The losses of one with long targets get lower weights, so that over
    all rows the weights of the targets add up to their number.
    """

    def __init__(self, rows: Sequence[Sequence[EncodedExample]]) -> None:
        targets = [sum(row.supervised for row in own) for own in rows]
        mean = sum(targets) / sum(map(len, rows))
        self._rows, self._starts = rows, np.cumsum([0, *map(len, rows)])
        self._weights = [mean * len(own) / n for own, n in zip(rows, targets, strict=True)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def entry(self, number: int) -> EncodedExample:
        task = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._of_task(self._rows[task][number - int(self._starts[task])], task)

    def __iter__(self) -> Iterator[EncodedExample]:
        for task, own in enumerate(self._rows):
            yield from (self._of_task(row, task) for row in own)

    def lengths(self) -> Lengths:
        return Lengths.joined([Lengths.of(own) for own in self._rows])

    def _of_task(self, row: EncodedExample, task: int) -> TaskExample:
        return TaskExample(row.input_ids, row.target_ids, row.learnt, task, self._weights[task])
