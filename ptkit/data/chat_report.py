"""What files of conversations hold, and what a model would read of them."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_formats import recognised
from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.read_files import read_files
from ptkit.data.summary import chat_lines
from ptkit.data.task import Example
from ptkit.recipe.tasks import ChatTask


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
    tables = {path.name: read_files([path]) for path in files}
    form = recognised(task, next(iter(tables.values())))
    dialogues = {
        name: [d.with_system(task.system) for _, d in form.dialogues(table, name)]
        for name, table in tables.items()
    }
    keys = {name: Counter(map(_content, own)) for name, own in dialogues.items()}
    encoder = ChatEncoder(tokenizer, task)
    splits: list[SplitReport] = []
    shown: list[list[tuple[str, bool]]] = []
    for name, own in dialogues.items():
        rows = encoder.rows([Example("", "", (), dialogue=d) for d in own])
        lengths = [len(row) for row in rows.encoded]
        turns = [len(d.messages) for d in own]
        learnt = sum(row.supervised for row in rows.encoded)
        splits.append(
            SplitReport(
                name=name, rows=len(own),
                turns_median=statistics.median(turns), turns_most=max(turns),
                roles=dict(Counter(m["role"] for d in own for m in d.messages)),
                tokens_median=statistics.median(lengths), tokens_longest=max(lengths),
                shortened=rows.notes.shortened, dropped=rows.notes.dropped,
                supervised=learnt / sum(lengths),
                duplicates=_duplicates(name, keys),
                notes=chat_lines(task, name, rows.notes),
            )
        )  # fmt: skip
        shown += [_pieces(row, tokenizer) for row in rows.encoded[: show - len(shown)]]
    return ChatReport(str(form), splits, shown)


def _content(dialogue: Dialogue) -> str:
    return json.dumps([*map(dict, dialogue.messages)], sort_keys=True)


def _duplicates(name: str, keys: Mapping[str, Counter[str]]) -> dict[str, int]:
    """How many of this file's conversations each of the others has."""
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
