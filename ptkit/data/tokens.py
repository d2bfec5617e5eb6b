"""What is one text, where several may be given."""

from __future__ import annotations

from typing import Any


def listed(entries: Any) -> list[Any]:
    """`entries` as a list. A str (or None, the plain base as a row's name) is one entry, and not
    a sequence of letters."""
    return [entries] if entries is None or isinstance(entries, str) else list(entries)
