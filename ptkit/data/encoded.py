"""Rows as numbers: token ids, and what of them is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptkit.data.tokens import without_lead

#: Label of positions that are not supervised (transformers' and PyTorch's convention).
IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example as numbers: the input's token ids, and what is learnt.

    target_ids: token ids that follow the input. For a classification head, numbers of labels: one
        for the whole input, or one per token of it (`IGNORED` where a token has none)
    learnt: which of the targets are learnt, where others are only read (the questions of a
        conversation); None: all
    """

    input_ids: list[int]
    target_ids: list[int]
    learnt: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.target_ids)

    @property
    def labels(self) -> list[int]:
        """The targets, `IGNORED` where they are not learnt."""
        if self.learnt is None:
            return self.target_ids
        pairs = zip(self.target_ids, self.learnt, strict=True)
        return [target if learnt else IGNORED for target, learnt in pairs]

    @property
    def supervised(self) -> int:
        """How many targets are learnt."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def content(self) -> tuple[object, ...]:
        """All that it is, for digests."""
        told = (self.input_ids, self.target_ids)
        return told if self.learnt is None else (*told, self.learnt)


@dataclass(frozen=True, slots=True)
class StudiedText(EncodedExample):
    """A text that a teacher wrote with a document in view: an opening, and what it wrote after it.

    chunk: number of the document's piece that was in view
    """

    chunk: int = 0

    def behind(self, lead: Sequence[int]) -> StudiedText:
        """The text as it is read behind something that begins with `lead`."""
        return replace(self, input_ids=without_lead(self.input_ids, lead))

    def __hash__(self) -> int:
        return hash((*self.input_ids, *self.target_ids, self.chunk))


@dataclass(frozen=True, slots=True)
class TaskExample(EncodedExample):
    """An example of one of several tasks that are learnt together.

    task: the task's number; weight: what its targets' losses count, so that a task of long targets
        does not outweigh one of single words
    """

    task: int = 0
    weight: float = 1.0
