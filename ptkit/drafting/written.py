"""A recipe as YAML with a comment on what was decided."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

#: Words that YAML reads as what they look like.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*([./-][A-Za-z0-9_]+)*")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_WIDTH = 96

#: Keys from the top down -> what is said of them, above their line.
Comments = Mapping[str, str]


def yaml_with_comments(values: Mapping[str, Any], comments: Comments) -> str:
    """`values` as YAML. comments: `task.input` -> the comment above that key; `methods.` (with a
    point) -> lines below the last entry of `methods`, kept as they are"""
    return "\n".join(_section(values, comments, "", 0)) + "\n"


def commented(text: str, indent: int = 0) -> list[str]:
    """`text` as comment lines."""
    mark = " " * indent + "# "
    lines = []
    for paragraph in text.split("\n"):
        below = " " * (len(paragraph) - len(paragraph.lstrip(" -")))
        lines += textwrap.wrap(
            paragraph, _WIDTH - indent, subsequent_indent=below, break_long_words=False,
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return [(mark + line).rstrip() for line in lines]


def _section(values: Mapping[str, Any], comments: Comments, path: str, indent: int) -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        place = f"{path}{key}"
        if indent == 0 and lines:
            lines.append("")
        if place in comments:
            lines += commented(comments[place], indent)
        head = " " * indent + f"{scalar(key)}:"
        if isinstance(value, Mapping):
            lines += [head, *_section(value, comments, f"{place}.", indent + 2)]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines.append(head)
            for entry in value:
                inner = _section(entry, comments, f"{place}.{entry.get('kind')}.", indent + 4)
                told = comments.get(f"{place}.{entry.get('kind')}")
                lines += commented(told, indent + 2) if told else []
                lines += [" " * (indent + 2) + "- " + inner[0].lstrip(), *inner[1:]]
            lines += comments.get(f"{place}.", "").splitlines()
        else:
            lines.append(f"{head} {scalar(value)}")
    return lines


def scalar(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return repr(float(value) if isinstance(value, float) else int(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    return '"' + "".join(map(_letter, text)) + '"'


def _letter(letter: str) -> str:
    """A letter within double quotes."""
    if letter in '"\\':
        return f"\\{letter}"
    if letter == "\n":
        return "\\n"
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
