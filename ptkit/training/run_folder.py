"""A folder belongs to one run: what it is stands in a file, which whatever resumes must match."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ptkit.errors import FolderError, UserError
from ptkit.formats import atomic
from ptkit.formats.folder_lock import require_free


def open_run_folder(
    path: Path,
    identity: dict[str, Any],
    what: str,
    *,
    alone: bool = False,
    added: Collection[str] = (),
) -> None:
    """Write `identity` to the file `path`, or raise FolderError when another one is there.

    what: what the folder holds, in words; alone: a folder without the file must be empty
    added: keys that a file of an earlier version may lack; they say nothing there
    """
    folder = path.parent
    if not path.exists():
        if alone and folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise FolderError(f"{folder} holds something else; choose another --out")
        atomic.write_json(path, identity)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    told = [key for key in identity if key in there or key not in added]
    now = json.loads(json.dumps(identity))
    changed = sorted(k for k in told if there.get(k) != now[k])
    if changed:
        keys = [line for k in changed for line in _differences(k, there.get(k), now[k])]
        more = f", and {len(keys) - _MOST} others" if len(keys) > _MOST else ""
        raise FolderError(
            f"{folder} holds a {what} that differs in {', '.join(f'`{k}`' for k in changed)}; "
            f"{', '.join(keys[:_MOST])}{more}; choose another --out, or pass --fresh to start over"
        )


#: Differences that are told, and the letters of a value.
_MOST, _LETTERS = 5, 40


def _differences(key: str, there: Any, now: Any) -> list[str]:
    """The keys from `key` down that differ, each with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for name in dict.fromkeys([*there, *now])
            if there.get(name) != now.get(name)
            for line in _differences(f"{key}.{name}", there.get(name), now.get(name))
        ]
    return [f"`{key}` is {_shown(there)} there and {_shown(now)} here"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 3]}..."


def delete_run_folder(path: Path, what: str) -> None:
    """Delete the folder of the run whose file `path` is. Raises UserError when it is not there."""
    folder = path.parent
    if folder.exists():
        if not path.exists():
            raise UserError(f"{folder} is not a {what}; --fresh does not delete it")
        require_free(folder)
    atomic.remove(folder)  # what a killed call left of it, too
