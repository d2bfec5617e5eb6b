"""Rows as numbers: token ids, and what of them is learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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

    def passes(self) -> tuple[EncodedExample, ...]:
        """The rows of a batch that it is read as: itself."""
        return (self,)

    def with_inputs(self, change: Callable[[list[int]], list[int]]) -> EncodedExample:
        """The same with what `change` makes of its input."""
        return replace(self, input_ids=change(self.input_ids))

    @property
    def terms(self) -> int:
        """How many terms a mean loss has of it: a target that is learnt each."""
        return self.supervised


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


@dataclass(frozen=True, slots=True)
class PairExample(EncodedExample):
    """An input with a preferred answer, its target, and a rejected one.

    rejected: the input with the other answer
    reference: the cross-entropy in nats by the base alone, of the chosen answer and of the rejected
        one. None where it was not read (see `ptkit.training.preference`)

    It is read as two rows that follow each other in one batch, and its length is that of both.
    """

    rejected: EncodedExample = field(kw_only=True)
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.target_ids) + len(self.rejected)

    @property
    def content(self) -> tuple[object, ...]:
        chosen, rejected = self.passes()
        return (*chosen.content, *rejected.content)

    def passes(self) -> tuple[EncodedExample, ...]:
        """The rows of a batch that it is read as: the chosen answer, then the rejected one."""
        return EncodedExample(self.input_ids, self.target_ids, self.learnt), self.rejected

    def with_inputs(self, change: Callable[[list[int]], list[int]]) -> PairExample:
        """The same with what `change` makes of both inputs."""
        ids, rejected = change(self.input_ids), self.rejected.with_inputs(change)
        return replace(self, input_ids=ids, rejected=rejected)

    @property
    def terms(self) -> int:
        """How many terms a mean loss has of it: one."""
        return 1


def each_pass(rows: Iterable[EncodedExample]) -> Iterator[EncodedExample]:
    """The rows of a batch that `rows` are read as, in their order, one at a time: `rows` may be
    more than memory holds."""
    return (one for row in rows for one in row.passes())


def passes_of(rows: Iterable[EncodedExample]) -> list[EncodedExample]:
    """The same, of the rows of one batch."""
    return [*each_pass(rows)]
