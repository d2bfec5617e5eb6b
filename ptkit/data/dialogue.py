"""Conversations as chat templates take them, checked turn by turn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptkit.data.values import Digits, kind_of, typed
from ptkit.errors import DataError, did_you_mean

#: Roles of a chat template; OpenAI's `developer` is its `system`.
ROLES = ("system", "user", "assistant", "tool")
#: Fields of a message, beside those that only answers have.
_FIELDS = ("role", "content", "name", "tool_call_id", "weight")
_OF_ANSWERS = ("tool_calls", "reasoning_content", "reasoning")

#: A message of a chat template.
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with an answer.

    messages: `role` and `content`, and what else a template reads: `name`, `tool_calls`,
        `tool_call_id`, `reasoning_content`
    learnt: of each message, whether its tokens are learnt; only answers are
    tools: JSON schemas of what the model may call
    where: the place of its row, for messages
    """

    messages: tuple[Message, ...]
    learnt: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]

    def upto(self, last: int) -> Dialogue:
        """The conversation up to its answer `last`, of which that answer alone is learnt."""
        learnt = tuple(i == last for i in range(last + 1))
        return replace(self, messages=self.messages[: last + 1], learnt=learnt)

    def without_first_exchange(self) -> Dialogue | None:
        """The conversation without its first question and all that answers it; None where that is
        all of it. The system prompt stays."""
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if len(asked) < 2:
            return None
        first, second = asked[:2]
        return replace(
            self,
            messages=self.messages[:first] + self.messages[second:],
            learnt=self.learnt[:first] + self.learnt[second:],
        )

    def with_system(self, system: str | None) -> Dialogue:
        """The conversation with a system prompt, where it brings none."""
        if system is None or self.messages[0]["role"] == "system":
            return self
        message = {"role": "system", "content": system}
        return replace(self, messages=(message, *self.messages), learnt=(False, *self.learnt))

    def as_text(self) -> str:
        """The conversation before its last answer, for people: a message a line."""
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages[:-1])

    def answer_text(self) -> str:
        """The last answer; its tool calls as JSON between `<tool_call>` tags."""
        return answer_text(self.messages[-1])


def answer_text(message: Message) -> str:
    """The text of an answer: its content, then its tool calls as JSON between tags."""
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return "\n".join([text for text in (message["content"],) if text] + calls)


def dialogue_of(
    entries: Any, where: str, *, tools: Any = None, learn_from: int = 0, column: str = "messages"
) -> Dialogue:
    """The conversation of messages in OpenAI's form.

    entries: the list of messages as read; column: what it is called
    tools: schemas, or JSON of them; learn_from: answers before this message are not learnt

    Raises DataError naming the row, the turn and what was expected.
    """
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{where}: `{column}` should be a non-empty list of messages, found {_found(entries)}"
        )
    messages, learnt = [], []
    for number, entry in enumerate(entries, start=1):
        turn = f"{where}, turn {number}"
        message, weight = _message(entry, turn)
        messages.append(message)
        learnt.append(message["role"] == "assistant" and weight and number > learn_from)
    _require_order(messages, where)
    if not any(learnt):
        raise DataError(
            f"{where}: every answer has the weight 0, so there is nothing to learn; leave the row "
            "out"
        )
    return Dialogue(tuple(messages), tuple(learnt), _tools(tools, where), where)


def _message(entry: Any, turn: str) -> tuple[dict[str, Any], bool]:
    """A message as templates take it, and whether it counts."""
    if not isinstance(entry, Mapping):
        raise DataError(f"{turn}: expected a message with `role` and `content`, found "
                        f"{_found(entry)}")  # fmt: skip
    given = {str(key): value for key, value in entry.items() if value is not None}
    role = given.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        said = "`role` is missing" if role is None else f"unknown role {json.dumps(role)}"
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else f"known: {', '.join(ROLES)}"
        raise DataError(f"{turn}: {said}; {hint}")
    known = (*_FIELDS, *_OF_ANSWERS) if role == "assistant" else _FIELDS
    for key, value in given.items():
        if key not in known and value not in ([], {}, ""):
            raise DataError(f"{turn} ({role}) has the field `{key}`; {did_you_mean(key, known)}")
    message: dict[str, Any] = {"role": role}
    calls = _calls(given["tool_calls"], turn) if given.get("tool_calls") else []
    message["content"] = _content(given.get("content"), turn, role, optional=bool(calls))
    for key in ("name", "tool_call_id"):
        if key in given:
            message[key] = _text(given[key], key, turn)
    reasoning = given.get("reasoning_content", given.get("reasoning"))
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning, "reasoning_content", turn)
    if calls:
        message["tool_calls"] = calls
    return message, _weight(given.get("weight"), turn, role)


def _content(value: Any, turn: str, role: str, *, optional: bool) -> str:
    """The text of a message; text parts are joined."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, turn) for part in value)
    if not isinstance(value, str) or isinstance(value, Digits):
        raise DataError(
            f"{turn} ({role}): `content` should be a text or a list of text parts, found "
            f"{_found(value)}"
        )
    return value


def _part(part: Any, turn: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return _text(part.get("text"), "text", turn)
    kind = part.get("type") if isinstance(part, Mapping) else None
    told = f"a part of type `{kind}`" if kind is not None else _found(part)
    raise DataError(
        f'{turn}: `content` should have parts `{{"type": "text", "text": ...}}` only, found {told}'
    )


def _text(value: Any, key: str, turn: str) -> str:
    if not isinstance(value, str) or isinstance(value, Digits):
        raise DataError(f"{turn}: `{key}` should be a text, found {_found(value)}")
    return value


def _weight(value: Any, turn: str, role: str) -> bool:
    if value is None:
        return True
    number = typed(value)
    if isinstance(number, bool) or number not in (0, 1):
        raise DataError(f"{turn}: `weight` should be 0 or 1, found {value!r}")
    if role != "assistant" and number:
        raise DataError(f"{turn} ({role}): only answers are learnt; leave `weight` out here")
    return bool(number)


def _calls(value: Any, turn: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, as templates expect them."""
    if not isinstance(value, list):
        raise DataError(f"{turn}: `tool_calls` should be a list, found {_found(value)}")
    calls = []
    for number, entry in enumerate(value, start=1):
        where = f"{turn}: tool call {number}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{where} should be an object, found {_found(entry)}")
        own = entry.get("function", entry)
        if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
            raise DataError(f"{where} should have a `function` with `name` and `arguments`")
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": own["name"], "arguments": _arguments(own, where)},
        }
        if isinstance(entry.get("id"), str):
            call["id"] = entry["id"]
        calls.append(call)
    return calls


def _arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = call.get("arguments")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: `arguments` are not valid JSON ({error})") from error
    value = typed(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: `arguments` should be a JSON object, found {_found(value)}")
    return dict(value)


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas of tools, which columns of one type hold as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: `tools` are not valid JSON ({error})") from error
    value = typed(value)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{where}: `tools` should be a list of JSON schemas, found {_found(value)}")
    return tuple(dict(tool) for tool in value)


def _require_order(messages: Sequence[Message], where: str) -> None:
    """Raise DataError unless questions and answers follow each other, and an answer is the last."""
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        expected = [*_expected(before, messages[number - 2] if before else None)]
        if role not in expected:
            raise DataError(
                f"{where}, turn {number}: found `{role}`, expected {' or '.join(expected)}"
                + (f" after `{before}`" if before else " at the beginning")
            )
        before = role
    if before != "assistant":
        none = not any(m["role"] == "assistant" for m in messages)
        raise DataError(
            f"{where}: no assistant turn, so there is no answer to learn"
            if none
            else f"{where}, turn {len(messages)}: the conversation ends with `{before}`, expected "
            "an answer (`assistant`)"
        )


def _expected(before: str | None, message: Message | None) -> Iterator[str]:
    """The roles that may follow."""
    if before is None:
        yield "system"
    if before in (None, "system"):
        yield "user"
    elif before == "assistant":
        yield "tool" if message and message.get("tool_calls") else "user"
    else:
        yield "assistant"
        if before == "tool":
            yield "tool"


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Digits):
        return f"the number {value}"
    return "an empty list" if value == [] else kind_of(value)
