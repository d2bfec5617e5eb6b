"""What `make site` changes in the pages: links that leave docs/ have nowhere to go in a site."""

from __future__ import annotations

import re
from typing import Any

#: A link, or a picture, whose address begins above docs/.
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
_CODE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def inside(text: str) -> str:
    """The page `text` with links to files outside docs/ as their text and the file's name."""

    def named(link: re.Match[str]) -> str:
        shown, path = link.groups()
        return shown if path in shown.replace("`", "") else f"{shown} (`{path}`)"

    parts = _CODE.split(text)
    return "".join(part if i % 2 else _OUTSIDE.sub(named, part) for i, part in enumerate(parts))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return inside(markdown)
