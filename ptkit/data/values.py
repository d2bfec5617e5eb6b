"""Values as files write them, and what they are called in messages. Loads no library of tables."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any


class Digits(str):
    """A JSON number as it is written: a text, like every value, that knows it was no text."""

    __slots__ = ()


#: Half of a character as JSON may write it: `\\ud83d`. No encoding has a text with one half.
_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def json_value(text: str) -> Any:
    """The value of a JSON text, its numbers as `Digits`. Raises JSONDecodeError."""
    # Numbers stay as written: 1 and 2.5 of one column, 3.10, identifiers of twenty digits.
    try:
        value = json.loads(
            text,
            parse_int=Digits,
            parse_float=Digits,
            parse_constant=lambda name: None if name == "NaN" else name,
        )
    except RecursionError as error:
        raise json.JSONDecodeError("lists or objects nested too deeply", text, 0) from error
    half = _HALF.search(text)
    if half is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            told = f"`{half[0]}` is half of a character, and its other half is not there"
            raise json.JSONDecodeError(told, text, half.start()) from error
    return value


def json_of(value: Any) -> str:
    """The JSON text of what `json_value` reads, with its numbers as they were written."""
    if isinstance(value, Digits):
        return str(value)
    if isinstance(value, dict):
        inner = (f"{json.dumps(k, ensure_ascii=False)}: {json_of(v)}" for k, v in value.items())
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def typed(value: Any) -> Any:
    """`value` with its `Digits` as Python's numbers, for whoever needs JSON's types."""
    if isinstance(value, Digits):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    return [typed(inner) for inner in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """What a value is, for an error message: `a list of mappings (role, content)`."""
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    if isinstance(value, list | tuple):
        first = next((entry for entry in value if entry is not None), None)
        if isinstance(first, Mapping):
            return f"a list of mappings ({', '.join(map(str, first))})"
        if first is None or isinstance(first, str):
            return "a list"
        return (
            "a list of lists" if isinstance(first, list | tuple) else f"a list with {_type(first)}"
        )
    return "a text" if isinstance(value, str) else _type(value)


def _type(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        return "a timestamp, which has no one text"
    return f"a value of type `{type(value).__name__}`"
