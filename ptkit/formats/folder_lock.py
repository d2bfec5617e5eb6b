"""One process at a time works in a folder.

The operating system holds the lock, so the lock of a killed process is free at once. A file beside
it names its owner, for the message to the next one.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ptkit.errors import FolderError
from ptkit.formats import atomic
from ptkit.launched import is_first

_LOCK, _HOLDER = ".lock", ".lock.json"
_ATTEMPTS = 50


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this context no other process, nor another call in this one, works in `folder`, which
    is made if need be. What it made is gone afterwards, unless something was put into it.

    Of the processes of one distributed run, the first one has the lock for all. Raises FolderError
    that names who works there.
    """
    if not is_first():
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    lock = _acquired(folder)
    try:
        for left in folder.glob(f".{_HOLDER}.*"):  # of one that was killed while it wrote that
            left.unlink(missing_ok=True)
        atomic.write_json(folder / _HOLDER, {
            "pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        })  # fmt: skip
        yield
    finally:
        for name in (_HOLDER, _LOCK):
            with suppress(OSError):  # Windows deletes no open file; an old lock file is harmless
                (folder / name).unlink()
        lock.release()
        for path in made:
            with suppress(OSError):  # something was put into it
                path.rmdir()


def require_free(folder: Path) -> None:
    """Raise FolderError when a process works in `folder`."""
    if folder.exists():
        with held(folder):
            pass


def _acquired(folder: Path) -> FileLock:
    """The lock of `folder`, had. Raises FolderError when another has it."""
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            break
        except (FileExistsError, FileNotFoundError):
            if folder.exists() and not folder.is_dir():
                raise
            continue  # who had made the folder has just taken it away
        return lock
    raise FolderError(
        f"{folder} is in use by {_holder(folder)}; wait until it is done, or choose another --out"
    )


def _holder(folder: Path) -> str:
    try:
        who = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} (`{who['command']}`, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just beginning, or ending
        return "another process"
