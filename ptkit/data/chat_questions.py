"""Conversations to answer, from files in the forms that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.data.chat_formats import SPEAKERS, ChatFormat, recognised
from ptkit.data.dialogue import Message
from ptkit.data.read_files import read_files
from ptkit.data.table import Row, Table
from ptkit.recipe.tasks import ChatTask, DataSection

#: Columns of turns.
_TURNS = {"messages", "conversations"}


@dataclass(frozen=True)
class Question:
    """A conversation up to where an answer is due.

    tools: JSON schemas of what the model may call; text: the conversation, for people
    replaced: whether the file has an answer there
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    text: str
    replaced: bool


def read_questions(file: Path) -> list[Question]:
    """The question of each row of a file of conversations, or of prompts.

    A row may end with a question or with an answer. That last answer is left out, and the model is
    asked for its own. Raises DataError as training does for a broken row, with its place.
    """
    table = _completed(read_files([file]))
    form = recognised(ChatTask(kind="chat", data=DataSection(memory=True)), table)
    ended = [_asked(row, form) for row in table.rows]
    asked = Table(table.columns, [row for row, _ in ended], table.features, spots=table.spots)
    found = []
    for (_, dialogue), (_, replaced) in zip(
        form.dialogues(asked, str(file)), ended, strict=True
    ):  # fmt: skip
        messages = dialogue.messages[:-1]
        alone = [message["role"] for message in messages] in (["user"], ["system", "user"])
        text = messages[-1]["content"] if alone else dialogue.as_text()
        found.append(Question(messages, dialogue.tools, text, replaced))
    return found


def holds_turns(file: Path) -> bool:
    """Whether `file` has a column that is called as those of conversations are."""
    return bool(_TURNS & {*read_files([file]).columns})


def _completed(table: Table) -> Table:
    """`table` with the column of answers that its form needs, where it has questions only."""
    wanted = {"instruction": "output", "prompt": "completion"}
    turns = _TURNS & {*table.columns}
    absent = [] if turns else [a for q, a in wanted.items() if q in table.columns]
    columns = list(dict.fromkeys([*table.columns, *absent]))
    rows = [{**row, **{a: row.get(a) or _nothing(row) for a in absent}} for row in table.rows]
    return Table(columns, rows, table.features, spots=table.spots)


def _nothing(row: Row) -> Any:
    """An empty answer in the form of the row's question."""
    return [{"role": "assistant", "content": ""}] if isinstance(row.get("prompt"), list) else ""


def _asked(row: Row, form: ChatFormat) -> tuple[Row, bool]:
    """`row` with an empty answer at its end, and whether it has another one there."""
    if form.column is None:
        answer = "output" if form.name == "alpaca" else "completion"
        empty = _nothing(row) if answer == "completion" else ""
        return {**row, answer: empty}, row[answer] != empty
    turns = row.get(form.column)
    if not isinstance(turns, list) or not turns:
        return row, False  # refused with its place
    last = turns[-1]
    own = form.name == "messages"
    said = last.get("role" if own else "from") if isinstance(last, Mapping) else None
    answers = (said if own else SPEAKERS.get(str(said))) == "assistant"
    empty = {"role": "assistant", "content": ""} if own else {"from": "gpt", "value": ""}
    return {**row, form.column: [*turns[: len(turns) - answers], empty]}, answers
