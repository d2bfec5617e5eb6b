"""Whether a text is JSON, and the same JSON as the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ptkit.errors import UserError
from ptkit.metrics.metric import MeanOverExamples

NAMES = {"text": ["json_valid", "json_equal"]}


class JsonText(MeanOverExamples):
    """Shares of predictions that are one JSON value (RFC 8259), and equal to a reference's.

    Spaces between values and the order of an object's keys do not count; the order of an array
    does. `1` and `1.0` are equal, as numbers; `1` and `true` are not. A key that stands twice in an
    object makes a text invalid, for parsers differ in what they then read.
    """

    def require(self, references: Sequence[Sequence[str]]) -> None:
        if self.name == "json_valid":
            return
        for number, row in enumerate(references, start=1):
            for reference in row:
                if parsed_json(reference) is None:
                    raise UserError(
                        f"`json_equal`: the reference of example {number} is not JSON: "
                        f"{reference[:60]!r}; use `exact_match` for other texts"
                    )

    def value(self, prediction: str, references: Sequence[str]) -> float:
        found = parsed_json(prediction)
        if found is None or self.name == "json_valid":
            return float(found is not None)
        return float(any(found == parsed_json(reference) for reference in references))

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return "Python's json, without NaN, Infinity and repeated keys"


def parsed_json(text: str) -> tuple[Any] | None:
    """The value of `text` in a form whose parts compare as JSON's do; None where it is no JSON."""
    try:
        return (_typed(json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)),)
    except (ValueError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _typed(value: Any) -> Any:
    """`value` with its truth values apart from its numbers, which Python takes for equal."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    return [_typed(inner) for inner in value] if isinstance(value, list) else value


make = JsonText
