"""General text, on which is measured how much of the base model an adapter leaves."""

from __future__ import annotations

from pathlib import Path

from ptkit.data.sources import BUILTIN
from ptkit.errors import DataError
from ptkit.section import resolve_path

#: Name of the text that ships with ptkit.
GENERAL_EN = "general-en"


def general_texts(names: str | list[str], folder: Path) -> dict[str, str]:
    """Name -> text of every domain in `names`, by file name without its ending.

    Raises DataError as `general_text` does, and for two domains of one name.
    """
    listed = [names] if isinstance(names, str) else names
    found: dict[str, str] = {}
    for name in listed:
        short = Path(name).stem
        if short in found:
            raise DataError(f"`retention.text`: two texts are called `{short}`; rename one file")
        found[short] = general_text(name, folder)
    return found


def general_text(name_or_path: str, folder: Path) -> str:
    """The text called `general-en`, or the UTF-8 file `name_or_path` (from `folder` on).

    Raises DataError when it is missing, empty or not UTF-8.
    """
    own = name_or_path == GENERAL_EN
    path = BUILTIN / "general-en.txt" if own else resolve_path(name_or_path, folder)
    if not path.is_file():
        raise DataError(f"`retention.text`: no such file: {path} (`{GENERAL_EN}` ships with ptkit)")
    return read_text(path, "`retention.text`")


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text in the file `path`; `what` is what it was given as.

    Raises DataError when it is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{what}: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what}: {path} is not UTF-8 text") from error
    if not text.strip():
        raise DataError(f"{what}: {path} is empty")
    return text
