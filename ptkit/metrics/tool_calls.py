"""Whether an answer calls the tools that its reference calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ptkit.metrics.json_text import parsed_json
from ptkit.metrics.metric import MeanOverExamples

NAMES = {"text": ["tool_calls_valid", "tool_calls_equal"]}

#: How families write a call: between tags (Hermes, Qwen, SmolLM), or behind a mark (Mistral).
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MARK = "[TOOL_CALLS]"
#: Llama's name of the arguments.
_ARGUMENTS = ("arguments", "parameters")


class ToolCalls(MeanOverExamples):
    """Shares of answers whose tool calls are JSON with a name, and those of a reference.

    A call is JSON between `<tool_call>` tags or behind `[TOOL_CALLS]`, or the whole answer where
    that is an object with `name` and `arguments`. Names and arguments count, and the order of
    calls; spaces, the order of keys and the text beside calls do not. An answer without calls is
    valid, and equal where the reference has none either.
    """

    def value(self, prediction: str, references: Sequence[str]) -> float:
        found = tool_calls(prediction)
        if found is None or self.name == "tool_calls_valid":
            return float(found is not None)
        return float(any(found == tool_calls(reference) for reference in references))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "names and arguments of the calls in their order, as JSON"


def tool_calls(text: str) -> list[Any] | None:
    """The calls in `text` in a form that compares as JSON does; None where one is broken."""
    pieces = _TAGGED.findall(text)
    if _MARK in text:
        pieces = [text.partition(_MARK)[2]]
    elif not pieces:
        return [own] if (own := _call(text)) is not None else []
    calls: list[Any] = []
    for piece in pieces:
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError):
            return None
        for entry in value if isinstance(value, list) else [value]:
            call = _call(json.dumps(entry))
            if call is None:
                return None
            calls.append(call)
    return calls


def _call(text: str) -> Any:
    """The call that `text` is; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = [value[key] for key in _ARGUMENTS if key in value]
    if len(arguments) != 1 or not isinstance(arguments[0], dict):
        return None
    return value["name"], parsed_json(json.dumps(arguments[0]))


make = ToolCalls
