"""The forms in which rows hold two answers to one prompt, a preferred one and a rejected one.

They are TRL's: `prompt`, `chosen` and `rejected` as texts or as messages. Conversations in `chosen`
and `rejected` may also share their beginning, which is the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptkit.data.chat_formats import with_own_system
from ptkit.data.dialogue import Dialogue, answer_text, dialogue_of
from ptkit.data.fillers import without_fillers
from ptkit.data.table import Row, Table
from ptkit.data.templates import Template
from ptkit.data.values import kind_of
from ptkit.errors import DataError
from ptkit.recipe.tasks import PreferenceTask

#: The columns of the two answers.
ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A row as text, and its conversations where it has some.

    where: the place of the row, for messages
    dialogues: the prompt with each of the answers; only what follows the prompt is learnt
    """

    where: str
    input: str
    chosen: str
    rejected: str
    dialogues: tuple[Dialogue, Dialogue] | None = None


@dataclass(frozen=True)
class PairFormat:
    """How rows write pairs. messages: as lists of messages, else as texts."""

    messages: bool

    def __str__(self) -> str:
        """In words, for whoever started a run."""
        what = "lists of messages" if self.messages else "texts"
        return f"`chosen` and `rejected` as {what}"

    def reader(
        self, task: PreferenceTask, table: Table, source: str
    ) -> tuple[Table, Callable[[int, Row], Pair]]:
        """The columns of `table` that are read, and what makes a pair of a row's number, from 0,
        and the row as read. It raises DataError, with the row's place, for a broken one.

        source: what messages call rows that are in no file of this machine
        """
        used, read = (_conversations if self.messages else _texts)(task, table)

        def checked(number: int, row: Row) -> Pair:
            pair = read(table.where(number, source), row)
            if pair.chosen == pair.rejected:
                raise DataError(
                    f"{pair.where}: `chosen` and `rejected` are the same; expected two answers "
                    "that differ; leave the row out"
                )
            return pair

        return used, checked


def pair_format(task: PreferenceTask, table: Table) -> PairFormat:
    """The form of the rows of `table`: that of the first chosen answer."""
    if task.chosen == type(task).model_fields["chosen"].default and "chosen" in table.columns:
        answers = (row.get("chosen") for _, row in table.only(["chosen"]).raw(""))
        first = next((answer for answer in answers if answer is not None), None)
        if isinstance(first, list) and (not first or isinstance(first[0], Mapping)):
            for column in ANSWERS:
                if column not in table.columns:
                    raise DataError(f"the data has no column `{column}` beside `chosen`")
            return PairFormat(messages=True)
    return PairFormat(messages=False)


#: What makes a pair of a row's place and the row as read.
_Read = Callable[[str, Row], Pair]


def _texts(task: PreferenceTask, table: Table) -> tuple[Table, _Read]:
    templates = [Template(getattr(task, key), f"task.{key}") for key in ("input", *ANSWERS)]
    for template in templates:
        template.require(table)
    used = table.only([column for own in templates for column in own.columns_of(table)])

    def read(where: str, row: Row) -> Pair:
        plain = used.plain(row)
        asked, chosen, rejected = (own.render(plain, where, complete=True) for own in templates)
        if not asked:
            raise DataError(
                f"{where}: the prompt is empty; expected a text for the answers to follow"
            )
        return Pair(where, asked, chosen, rejected)

    return used, read


def _conversations(task: PreferenceTask, table: Table) -> tuple[Table, _Read]:
    def read(where: str, row: Row) -> Pair:
        row = without_fillers(row, table.features)
        shared, whole = _split(row, where)
        chosen, rejected = (
            with_own_system(
                dialogue_of(
                    whole[column], f"{where}, `{column}`", tools=row.get("tools"),
                    learn_from=shared, column=column,
                ), row, where,
            ).with_system(task.system)
            for column in ANSWERS
        )  # fmt: skip
        before = len(chosen.messages) - (len(whole["chosen"]) - shared)
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in chosen.messages[:before])
        said, other = _said(chosen, before), _said(rejected, before)
        return Pair(where, asked, said, other, (chosen, rejected))

    return table, read


def _said(dialogue: Dialogue, before: int) -> str:
    """What follows the first messages, as text; one answer is that answer."""
    rest = dialogue.messages[before:]
    if len(rest) == 1:
        return answer_text(rest[0])
    return "\n".join(f"{m['role']}: {answer_text(m)}" for m in rest)


def _split(row: Row, where: str) -> tuple[int, dict[str, list[Any]]]:
    """How many messages are the prompt, and the prompt with each answer."""
    answers: dict[str, list[Any]] = {}
    for column in ANSWERS:
        value = row.get(column)
        if not isinstance(value, list) or not value:
            found = "nothing" if value is None else "an empty list" if value == [] else None
            raise DataError(
                f"{where}: `{column}` should be a non-empty list of messages, as in the first row, "
                f"found {found or kind_of(value)}"
            )
        answers[column] = value
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return _shared(prompt, answers["chosen"], answers["rejected"], where), answers
    if not prompt:
        raise DataError(f"{where}: `prompt` should be a non-empty list of messages")
    return len(prompt), {column: [*prompt, *value] for column, value in answers.items()}


def _shared(prompt: Any, chosen: Sequence[Any], rejected: Sequence[Any], where: str) -> int:
    """How many messages two conversations begin with alike: their prompt.

    prompt: what the row says of it, a text or nothing. Raises DataError where none is shared, where
    they part elsewhere than at an answer, and where the text is none of the shared messages.
    """
    both = zip(chosen, rejected, strict=False)
    count = next((i for i, (a, b) in enumerate(both) if a != b), min(len(chosen), len(rejected)))
    if count == len(chosen) == len(rejected):
        raise DataError(
            f"{where}: `chosen` and `rejected` are the same; expected two answers that differ; "
            "leave the row out"
        )
    if not count:
        raise DataError(
            f"{where}: `chosen` and `rejected` begin differently, so there is no prompt; expected "
            "the same messages before the answers, or a column `prompt` that is a list of messages"
        )
    for column, turns in zip(ANSWERS, (chosen, rejected), strict=True):
        if count == len(turns):
            raise DataError(
                f"{where}: all of `{column}` is the beginning of the other conversation; expected "
                "an answer after the messages that both share"
            )
        turn = turns[count]
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if role is not None and role != "assistant":
            raise DataError(
                f"{where}, turn {count + 1}: `chosen` and `rejected` part at a turn of "
                f"`{role}`, expected `assistant`: they must share all that is asked"
            )
    if isinstance(prompt, str) and prompt not in [
        turn.get("content") for turn in chosen[:count] if isinstance(turn, Mapping)
    ]:
        raise DataError(
            f"{where}: the text in `prompt` is none of the messages that `chosen` and `rejected` "
            "share; expected one of them, a list of messages, or no column `prompt`"
        )
    return count
