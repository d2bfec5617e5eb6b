"""Where ptkit keeps what it can make again: token ids, and models in transformers' format."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$PTKIT_CACHE`, else `ptkit` in `$XDG_CACHE_HOME`, else `~/.cache/ptkit`."""
    own = os.environ.get("PTKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "ptkit").expanduser()
