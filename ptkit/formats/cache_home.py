"""Where ptkit keeps what it can make again: token ids, and models in transformers' format."""

from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path


def cache_home() -> Path:
    """`$PTKIT_CACHE`, else `ptkit` in `$XDG_CACHE_HOME`, else `~/.cache/ptkit`."""
    own = os.environ.get("PTKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "ptkit").expanduser()


def make_room(path: Path, most_bytes: int) -> None:
    """Delete the least recently used files of `path`'s folder and ending that, with the later
    ones, take more than `most_bytes`. `path` itself stays."""
    found = sorted(path.parent.glob(f"*{path.suffix}"), key=_used, reverse=True)
    sizes = accumulate(file.stat().st_size for file in found)
    for file, upto in zip(found, sizes, strict=True):
        if upto > most_bytes and file != path:
            file.unlink(missing_ok=True)


def _used(file: Path) -> float:
    return file.stat().st_mtime
