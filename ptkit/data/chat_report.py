"""What files of conversations hold, and what a model would read of them."""

from __future__ import annotations

import hashlib
import json
import statistics
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_formats import ChatFormat, recognised
from ptkit.data.chat_rows import ChatEncoder, ChatNotes
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.read_files import read_files
from ptkit.data.summary import chat_lines
from ptkit.data.table import Table
from ptkit.recipe.tasks import ChatTask

K = TypeVar("K")

#: Conversations, or pairs, that are encoded at a time.
AT_A_TIME = 1_000


@dataclass(frozen=True)
class SplitReport:
    """One file of conversations.

    rows: conversations; turns: median and most messages of one; roles: messages of each role
    tokens_median, tokens_longest: of a conversation, as far as it is read
    shortened: conversations that lose early turns; dropped: the messages they lose
    supervised: share of the tokens that are learnt
    duplicates: conversations that another of the files has, too, by its name
    notes: what was decided, in lines
    """

    name: str
    rows: int
    turns_median: float
    turns_most: int
    roles: dict[str, int]
    tokens_median: float
    tokens_longest: int
    shortened: int
    dropped: int
    supervised: float
    duplicates: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class ChatReport:
    """Files of conversations: how they are written, each one, and the first rows as they are read.

    shown: of each row its pieces of text, with whether they are learnt
    """

    form: str
    splits: list[SplitReport]
    shown: list[list[tuple[str, bool]]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [[{"text": text, "learnt": own} for text, own in row] for row in self.shown]
        return {"form": self.form, "files": [asdict(s) for s in self.splits], "first_rows": rows}


def inspect_chats(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, task: ChatTask, show: int
) -> ChatReport:
    """What `files`, a split each, hold for `tokenizer` in a task of conversations.

    show: how many of the first rows are written out

    Raises DataError as training would: for broken rows, a template that refuses one, and so on.
    """
    tables = {name: read_files([path]) for name, path in by_name(files).items()}
    form = recognised(task, next(iter(tables.values())))
    encoder = ChatEncoder(tokenizer, task)
    found = {name: _Split(form, table, name, encoder, show) for name, table in tables.items()}
    keys = {name: split.keys for name, split in found.items()}
    splits: list[SplitReport] = []
    shown: list[list[tuple[str, bool]]] = []
    for name, split in found.items():
        lengths = split.lengths
        splits.append(
            SplitReport(
                name=name, rows=len(split.turns),
                turns_median=statistics.median(split.turns), turns_most=max(split.turns),
                roles=dict(split.roles),
                tokens_median=statistics.median(lengths), tokens_longest=max(lengths),
                shortened=split.notes.shortened, dropped=split.notes.dropped,
                supervised=split.learnt / sum(lengths),
                duplicates=duplicates_of(name, keys),
                notes=chat_lines(task, name, split.notes),
            )
        )  # fmt: skip
        shown += [_pieces(row, tokenizer) for row in split.first[: show - len(shown)]]
    return ChatReport(str(form), splits, shown)


class _Split:
    """What one pass over the conversations of a file tells.

    keys: how often each occurs, by a digest of it; turns: of each its messages
    lengths: tokens of each row, learnt: of all rows; first: the first rows, at least `show`
    """

    def __init__(
        self, form: ChatFormat, table: Table, name: str, encoder: ChatEncoder, show: int
    ) -> None:
        self.notes, self._show = ChatNotes(), show
        self.keys, self.roles = Counter[bytes](), Counter[str]()
        self.turns, self.lengths = array("q"), array("q")
        self.learnt = 0
        self.first: list[EncodedExample] = []
        system = encoder.task.system
        left = (own.with_system(system) for _, own in form.dialogues(table, name))
        while some := [*islice(left, AT_A_TIME)]:
            self._add(some, encoder)

    def _add(self, dialogues: Sequence[Dialogue], encoder: ChatEncoder) -> None:
        self.keys.update(map(_content, dialogues))
        self.turns.extend(len(dialogue.messages) for dialogue in dialogues)
        self.roles.update(m["role"] for dialogue in dialogues for m in dialogue.messages)
        examples = [Example("", "", (), dialogue=dialogue) for dialogue in dialogues]
        rows = [row for _, row in encoder.cuts(examples, self.notes)]
        self.lengths.extend(map(len, rows))
        self.learnt += sum(row.supervised for row in rows)
        if len(self.first) < self._show:
            self.first += rows


def _content(dialogue: Dialogue) -> bytes:
    return digest_of([*map(dict, dialogue.messages)])


def digest_of(said: Any) -> bytes:
    """A digest of what a row says, as JSON: texts of many rows are not kept."""
    text = json.dumps(said, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """The files by what a report calls them: their names, with the folders where two share one."""
    names = Counter(path.name for path in files)
    return {path.name if names[path.name] == 1 else str(path): path for path in files}


def duplicates_of(name: str, keys: Mapping[str, Counter[K]]) -> dict[str, int]:
    """How many rows of the file `name` each of the others has; only those that have some.

    keys: of each file, how often each row occurs, by what makes two rows the same
    """
    found = {
        other: sum(count for key, count in keys[name].items() if key in theirs)
        for other, theirs in keys.items()
        if other != name
    }
    return {other: count for other, count in found.items() if count}


def _pieces(row: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a row in runs of tokens that are learnt, or not."""
    learnt = [False] * len(row.input_ids) + list(row.learnt or [True] * len(row.target_ids))
    runs: list[tuple[list[int], bool]] = []
    for token, own in zip([*row.input_ids, *row.target_ids], learnt, strict=True):
        if not runs or runs[-1][1] != own:
            runs.append(([], own))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), own) for ids, own in runs]
