"""The package's docstrings as Markdown: an argument to a line becomes a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

#: `name: what it is`, or several names, at the beginning of a line.
_NAMED = re.compile(r"(?m)^([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


def as_markdown(docstring: str) -> str:
    """`docstring` with each line that names arguments as an item, what is indented below it too."""
    parts = []
    for block in docstring.split("\n\n"):
        first = _NAMED.search(block)
        if first is None:
            parts.append(block)
            continue
        before, named = block[: first.start()].rstrip(), block[first.start() :]
        if before:
            parts.append(before)
        parts.append(_NAMED.sub(lambda found: f"- **{found[1]}**: ", named))
    return "\n\n".join(parts)


class Docstrings(Extension):
    """Changes every docstring that the reference shows."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by Griffe for every object that it read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
