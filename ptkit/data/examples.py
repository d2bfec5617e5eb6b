"""A task's examples: in memory where they are few, and otherwise made from their rows when asked
for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ptkit.data.dialogue import Dialogue
from ptkit.data.lazy import Lazy

if TYPE_CHECKING:  # it loads libraries of tables
    from ptkit.data.table import Row, Table

#: Of fewer rows, examples and token ids stay in memory.
FEWEST_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    target: what follows the input in training; references: acceptable texts (generation);
    label: the gold label (classification)
    words: those of the input, where each has a label of its own (token classification), and
        `target` their labels with spaces between.
    dialogue: the conversation (chat); `target` is then its last answer, and `input` what was said
        before, for people
    rejected: the same with the answer that was not preferred (preference); `target` is the one that
        was
    where: the place of its row, for messages; a conversation has its own
    """

    input: str
    target: str
    references: tuple[str, ...]
    label: str | None = None
    words: tuple[str, ...] = ()
    dialogue: Dialogue | None = None
    rejected: Example | None = None
    where: str = ""

    def with_system(self, system: str | None) -> Example:
        """The row with a system prompt in its conversations, where they bring none."""
        if self.dialogue is None:
            return self
        rejected = None if self.rejected is None else self.rejected.with_system(system)
        return replace(self, dialogue=self.dialogue.with_system(system), rejected=rejected)

    @property
    def content(self) -> bytes:
        """What makes two rows the same, as a digest: what the model reads, and what it should
        write. Texts of many rows are not kept."""
        said = None if self.dialogue is None else repr(self.dialogue.messages)
        other = b"" if self.rejected is None else self.rejected.content
        told = repr((self.input, self.target, self.words, said, other))
        return hashlib.blake2b(told.encode(), digest_size=16).digest()


@dataclass
class Facts:
    """What one pass over examples tells of all of them.

    labels: how many have each label; tags: labels of words that occur
    empty_inputs, empty_targets: how many have no text there
    digest: of all that their token ids depend on, hexadecimal
    """

    labels: Counter[str] = field(default_factory=Counter)
    tags: set[str] = field(default_factory=set)
    empty_inputs: int = 0
    empty_targets: int = 0
    digest: str = ""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Facts:
        """Those of `examples`, which are gone through unless they were before."""
        if isinstance(examples, StoredExamples):
            return examples.facts
        return _facts(examples)


def _facts(examples: Sequence[Example]) -> Facts:
    found, digest = Facts(), hashlib.sha256()
    for example in examples:
        if example.label is not None:
            found.labels[example.label] += 1
        if example.words:
            found.tags.update(example.target.split())
        found.empty_inputs += not example.input.strip()
        found.empty_targets += not example.target.strip()
        digest.update(repr(_read_of(example)).encode())
    found.digest = digest.hexdigest()
    return found


def _read_of(example: Example) -> tuple[object, ...]:
    """All of an example that its token ids depend on."""
    told: tuple[object, ...] = (example.input, example.target, example.words)
    if (said := example.dialogue) is not None:
        told = (said.messages, said.learnt, said.tools)
    return told if example.rejected is None else (*told, _read_of(example.rejected))


class StoredExamples(Lazy[Example]):
    """The examples of many rows. One pass has checked them, and found their `facts`."""

    def __init__(self, rows: Table, read: Callable[[int, Row], Example]) -> None:
        self._rows, self._read = rows, read
        self.facts = _facts(self)

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, number: int) -> Example:
        return self._read(number, self._rows.rows[number])

    def __iter__(self) -> Iterator[Example]:
        return (self._read(number, row) for number, row in enumerate(self._rows.rows))


def examples_of(rows: Table, read: Callable[[int, Row], Example]) -> Sequence[Example]:
    """The examples of `rows`; all of them are read once.

    read: the number of a row, from 0, and the row as read -> its example. Raises what `read` does.
    """
    if len(rows) < FEWEST_ROWS:
        return [read(number, row) for number, row in enumerate(rows.rows)]
    return StoredExamples(rows, read)
