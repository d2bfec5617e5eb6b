"""The forms in which files hold conversations, told apart by their columns.

`messages` is OpenAI's and TRL's form, `sharegpt` that of FastChat and Axolotl, `alpaca` Stanford's
with LLaMA-Factory's `system` and `history`, `prompt_completion` TRL's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptkit.data.dialogue import Dialogue, dialogue_of
from ptkit.data.fillers import without_fillers
from ptkit.data.table import Row, Table
from ptkit.data.values import Digits, kind_of
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.tasks import ChatTask

#: ShareGPT's names of who speaks -> the role.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "system": "system", "observation": "tool", "tool": "tool",
    "function_call": "assistant",
}  # fmt: skip
#: ShareGPT's name of an answer that is a tool call, as JSON.
_CALL = "function_call"


@dataclass(frozen=True)
class ChatFormat:
    """How rows write conversations.

    name: as `task.format` has it; column: of the turns; None where columns are the turns
    """

    name: str
    column: str | None = None

    def __str__(self) -> str:
        """In words, for whoever started a run."""
        return {
            "messages": f"messages, as OpenAI's and TRL's (column `{self.column}`)",
            "sharegpt": f"ShareGPT's turns of `from` and `value` (column `{self.column}`)",
            "alpaca": "Alpaca's `instruction`, `input` and `output`",
            "prompt_completion": "`prompt` and `completion`",
        }[self.name]

    def dialogues(self, table: Table, source: str) -> Iterator[tuple[Row, Dialogue]]:
        """Every row, with its conversation. Raises DataError for a row of another form."""
        for where, row in table.raw(source):
            yield row, self.dialogue(row, where, table.features)

    def dialogue(self, row: Row, where: str, features: Mapping[str, Any] | None = None) -> Dialogue:
        """The conversation of a row at the place `where`. Raises DataError as `dialogues` does.

        features: those of its table
        """
        missing = [c for c in self._needed() if row.get(c) is None]
        if missing:
            others = ", ".join(f"`{c}`" for c in row if row[c] is not None) or "nothing"
            raise DataError(
                f"{where}: `{missing[0]}` is missing; the rows were recognised as {self}, and "
                f"this one has {others}"
            )
        row = without_fillers(row, features)
        return with_own_system(_READERS[self.name](self, row, where), row, where)

    def _needed(self) -> tuple[str, ...]:
        if self.column is not None:
            return (self.column,)
        return ("instruction", "output") if self.name == "alpaca" else ("prompt", "completion")


def recognised(task: ChatTask, table: Table) -> ChatFormat:
    """The form that `task` names, or the one that the columns of `table` tell.

    Raises DataError where columns are missing, or tell of several forms.
    """
    if task.format in ("alpaca", "prompt_completion"):
        return _required(ChatFormat(task.format), table)
    if task.format != "auto":
        usual = "messages" if task.format == "messages" else "conversations"
        return _required(ChatFormat(task.format, task.column or usual), table)
    if task.column is not None:
        return _of_turns(_required(ChatFormat("messages", task.column), table).column or "", table)
    # The first row tells; a row of another form is then refused by its place.
    first = next(iter(table.rows), {})
    found = _told_by({c for c in table.columns if first.get(c) is not None}, table)
    found = found or _told_by({*table.columns}, table)
    if len(found) != 1:
        listed = ", ".join(f"`{c}`" for c in table.columns)
        told = " and ".join(map(str, found))
        raise DataError(
            f"the columns tell of several forms of conversation: {told}; name one with "
            f"`task.format` (columns: {listed})"
            if found
            else "no column holds conversations; expected `messages`, `conversations`, "
            "`instruction` and `output`, or `prompt` and `completion`, found "
            f"{listed}; name the column of the turns with `task.column`"
        )
    return found[0]


def _told_by(columns: set[str], table: Table) -> list[ChatFormat]:
    """The forms that these columns tell of."""
    found = [_of_turns(c, table) for c in ("messages", "conversations") if c in columns]
    if {"instruction", "output"} <= columns:
        found.append(ChatFormat("alpaca"))
    if {"prompt", "completion"} <= columns:
        found.append(ChatFormat("prompt_completion"))
    return found


def _required(form: ChatFormat, table: Table) -> ChatFormat:
    for column in form._needed():
        if column not in table.columns:
            raise DataError(
                f"the data has no column `{column}`, as {form} need; "
                + did_you_mean(column, table.columns)
            )
    return form


def _of_turns(column: str, table: Table) -> ChatFormat:
    """The form of a column of turns, by what its first turn has."""
    for where, row in table.raw(""):
        turns = row.get(column)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping):
            keys = {key for key, value in first.items() if value is not None}
            if "role" in keys:
                return ChatFormat("messages", column)
            if keys & {"from", "value"}:
                return ChatFormat("sharegpt", column)
        if turns is not None:
            raise DataError(
                f"{where.strip()}: `{column}` should be a list of messages with `role` and "
                f"`content`, or of turns with `from` and `value`, found {kind_of(turns)}"
            )
    raise DataError(f"the column `{column}` is empty in every row")


def _messages(form: ChatFormat, row: Row, where: str) -> Dialogue:
    assert form.column is not None
    return dialogue_of(row[form.column], where, tools=row.get("tools"), column=form.column)


def _sharegpt(form: ChatFormat, row: Row, where: str) -> Dialogue:
    assert form.column is not None
    turns = row[form.column]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: `{form.column}` should be a non-empty list of turns, found {kind_of(turns)}"
        )
    messages = [_turn(turn, f"{where}, turn {n}") for n, turn in enumerate(turns, start=1)]
    return dialogue_of(messages, where, tools=row.get("tools"), column=form.column)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn of ShareGPT's as a message."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError(f"{where}: expected a turn with `from` and `value`, found {kind_of(turn)}")
    speaker = turn["from"]
    if speaker not in SPEAKERS:
        raise DataError(f"{where}: unknown speaker {speaker!r} in `from`; "
                        + did_you_mean(str(speaker), SPEAKERS))  # fmt: skip
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker != _CALL:
        return {"role": SPEAKERS[speaker], "content": turn["value"], **rest}
    try:
        calls = json.loads(turn["value"])
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: a `{_CALL}` should be JSON ({error})") from error
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls],
            **rest}  # fmt: skip


def _alpaca(form: ChatFormat, row: Row, where: str) -> Dialogue:
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{where}: `history` should be a list of pairs, found {kind_of(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{where}: `history` should be a list of pairs of a question and its answer; "
                f"entry {number} is {kind_of(pair)}"
            )
        messages += _exchange(*pair)
    asked = [row["instruction"], row.get("input")]
    if not all(text is None or _is_text(text) for text in asked):
        raise DataError(f"{where}: `instruction` and `input` should be texts")
    messages += _exchange("\n".join(text for text in asked if text), row["output"])
    return dialogue_of(messages, where, tools=row.get("tools"))


def _prompt_completion(form: ChatFormat, row: Row, where: str) -> Dialogue:
    prompt, completion = row["prompt"], row["completion"]
    if _is_text(prompt) and _is_text(completion):
        return dialogue_of(_exchange(prompt, completion), where,
                           tools=row.get("tools"))  # fmt: skip
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(
            f"{where}: `prompt` and `completion` should both be texts, or both lists of messages, "
            f"found {kind_of(prompt)} and {kind_of(completion)}"
        )
    return dialogue_of([*prompt, *completion], where, tools=row.get("tools"),
                       learn_from=len(prompt))  # fmt: skip


def with_own_system(dialogue: Dialogue, row: Row, where: str) -> Dialogue:
    """The conversation of `row` with the system prompt in the row's column `system`, if any.

    Raises DataError for one that is no text, and for another one than the conversation brings.
    """
    system = row.get("system")
    if not system:
        return dialogue
    if not _is_text(system):
        raise DataError(f"{where}: `system` should be a text, found {kind_of(system)}")
    first = dialogue.messages[0]
    if first["role"] == "system" and first["content"] != system:
        raise DataError(
            f"{where}: the column `system` has one system prompt, and the first turn another; "
            "leave one of them out"
        )
    return dialogue.with_system(system)


def _exchange(asked: Any, said: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Digits)


_READERS: dict[str, Callable[[ChatFormat, Row, str], Dialogue]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
