"""Files and folders that appear complete or not at all: write, fsync, rename. Folders go so too.

A folder is replaced by letting it and the new one trade names. Where the system cannot do that in
one step, the old one is moved aside first. A kill between the two steps leaves both beside the
place, complete, and `settle` finishes what was begun.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ptkit.errors import UserError
from ptkit.formats.exchange import exchange

#: Names beside `NAME`: `.NAME.RANDOM.tmp` is being written, `.NAME.RANDOM.old` is being replaced
#: by the `.tmp` of the same RANDOM, which is then complete.
_WRITTEN, _RETIRED = ".tmp", ".old"
#: `.NAME.RANDOM.gone` is being deleted; nobody needs it, so that anybody may go on deleting it.
_GONE = ".gone"


def _sync(path: Path) -> None:
    """Let what is in a file, or which names are in a folder, reach the disk."""
    if path.is_dir():
        if os.name == "nt":  # Windows opens no folders; it writes their names down by itself
            return
        flags = os.O_RDONLY
    else:
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)  # Windows syncs only what may be written
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to; it replaces `path` when the block ends without an error.

    Readers see the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_WRITTEN)
    try:
        with os.fdopen(handle, "wb") as written:
            yield written
            written.flush()
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; readers see the old file or the new one, never a part."""
    with file(path) as written:
        written.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_free(path: Path, *, replace: bool) -> None:
    """Raise UserError when `path` exists and `replace` is False, or it is the folder that the
    process works in, or one above."""
    settle(path)
    if path.exists() and not replace:
        raise UserError(f"{path} exists; choose another place or pass --force to replace it")
    here = Path.cwd()
    if path.is_dir() and path.resolve() in (here, *here.parents):
        raise UserError(
            f"{path} is the current folder, or one above it, and is not replaced as a whole; "
            "choose another place"
        )


def require_only(path: Path, names: Collection[str], what: str) -> None:
    """For callers who replace only what is theirs: raise UserError where `path` is a file, or a
    folder that holds anything but `names`.

    what: such a folder in a word or two, with its article
    """
    if not path.exists():
        return
    others = sorted(p.name for p in path.iterdir() if p.name not in names) if path.is_dir() else []
    if others or not path.is_dir():
        found = f"holds `{others[0]}`" if others else "is a file"
        raise UserError(
            f"{path.name} is there, and {found}, which is no part of {what}; nothing is replaced: "
            "take another name, or move it away"
        )


@contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends without an error.

    Raises UserError when `path` exists and `replace` is False. When replacing, the old folder
    stays until the new one is complete.
    """
    require_free(path, replace=replace)
    with scratch(path) as written:
        yield written
        publish(written, path)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, for `publish`; deleted at the end if it is still there.

    Readers never look into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_WRITTEN))
    try:
        yield written
    finally:
        shutil.rmtree(written, ignore_errors=True)


def publish(written: Path, path: Path) -> None:
    """Let the folder `written`, made by `scratch`, become `path`, in place of what was there.

    At every moment `path` is the old folder or the new one. Only where the system has no exchange,
    `settle` makes it one of them. On an error it is the old one.
    """
    for found in written.rglob("*"):
        if found.is_file():
            os.chmod(found, 0o644)  # some writers make files nobody else can read
        _sync(found)
    os.chmod(written, 0o755)
    _sync(written)
    settle(path)
    if not path.exists():
        os.replace(written, path)
    elif not exchange(written, path):
        _replace_in_two_steps(written, path)
    _sync(path.parent)


def _replace_in_two_steps(written: Path, path: Path) -> None:
    retired = written.with_suffix(_RETIRED)
    os.replace(path, retired)
    try:
        os.replace(written, path)
    except BaseException:
        if not path.exists():
            os.replace(retired, path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete the folder `path`, which is there as a whole or not at all.

    Deleting file by file takes a while, and a kill would leave a part that looks like the folder.
    What a kill leaves, the next call for this path deletes, and `remove_leftovers`. Does nothing
    more where there is no `path`. Raises UserError for a link.
    """
    if path.name in ("", ".."):  # it has no name of its own, and is no link
        path = path.resolve()
    if path.is_symlink():
        raise UserError(f"{path} is a link to a folder; delete both yourself, or use another place")
    going = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_GONE}")
    if path.exists():
        os.replace(path, going)
        _sync(path.parent)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_GONE}"):
        shutil.rmtree(left, ignore_errors=left != going)


def settle(path: Path) -> None:
    """Finish a replacement of the folder `path` that was cut off between its two steps.

    Does nothing where `path` is there.
    """
    if path.exists() or not path.parent.is_dir():
        return
    for retired in path.parent.glob(f".{glob.escape(path.name)}.*{_RETIRED}"):
        written = retired.with_suffix(_WRITTEN)
        try:  # the new one was complete before the old one was moved
            os.replace(written if written.is_dir() else retired, path)
        except OSError:
            if not path.exists():  # else somebody else has settled it, or goes on writing
                raise
        _sync(path.parent)
        return


def settle_all(path: Path) -> None:
    """`settle` every folder below `path`."""
    for retired in path.glob(f".*{_RETIRED}"):
        settle(path / retired.name[1:].removesuffix(_RETIRED).rpartition(".")[0])


def remove_leftovers(path: Path) -> None:
    """Delete what writers that were killed left in the folder `path` (hidden, never read).

    What is the only copy of a folder becomes that folder. Only where no other process is writing.
    """
    settle_all(path)
    for left in [p for end in (_WRITTEN, _RETIRED, _GONE) for p in path.glob(f".*{end}")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
