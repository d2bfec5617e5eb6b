"""Adapters on the Hugging Face Hub, by id: which texts mean one, and their downloads."""

from __future__ import annotations

from pathlib import Path

from ptkit.errors import AdapterError, nearest
from ptkit.formats.adapter_folder import (
    ADAPTER_FILES,
    ADAPTERHUBS,
    CONFIG,
    INFO,
    INT8_WEIGHTS,
    PICKLED_WEIGHTS,
    PICKLES,
    WEIGHTS,
    conversion,
    is_adapterhubs,
    is_pickle,
)
from ptkit.formats.hub_repository import HubId, downloaded, hub_files, is_hub_id

#: Tensors of other libraries, beside pickles.
_TENSORS = (".safetensors", ".npy", ".adapter")


def is_on_hub(text: str) -> bool:
    """Whether `text` means a repository on the Hub, and not a place on this machine.

    What exists here is never looked for there. Nor is `adapters/NAME` where there is a folder
    `adapters`: it is a mistyped path, and is not sent anywhere. `adapters/NAME@main` is on the Hub.
    """
    if not is_hub_id(text) or Path(text).exists():
        return False
    return "@" in text or not Path(text).parent.is_dir()


def missing_here(text: str) -> str:
    """What is wrong with `text`, which is not there, and the nearest names that are."""
    path = Path(text)
    message = f"no such adapter or run: {text}"
    if path.parent == path:
        return message
    if not path.parent.is_dir():  # the first part that is not there may be misspelt
        missing = next(p for p in reversed(path.parents) if not p.is_dir())
        return message + _meant(missing, path.relative_to(missing))
    message += _meant(path)
    if is_hub_id(text):
        message += f" (`{text}@main` is the repository on the Hub)"
    return message


def _meant(missing: Path, below: Path = Path()) -> str:
    """A clause that names the folder beside `missing` that is likely meant, with `below` in it."""
    folders = [p.name for p in missing.parent.iterdir() if p.is_dir()]
    close = nearest(missing.name, [name for name in folders if not name.startswith(".")])
    return f"; did you mean `{missing.parent / close / below}`?" if close else ""


def fetch_adapter(hub_id: str, *, whole: bool = False) -> Path:
    """Download the adapter `user/repo[@revision]` and return its folder in the Hub's cache.

    whole: with the recipe and the card

    Only files ptkit reads are asked for; whatever else the repository holds stays there. Raises
    AdapterError when the repository, revision or files are missing, only pickled, or not public for
    the token in use. It raises it too for files larger than the limit (see `DOWNLOAD_LIMIT`), and
    then downloads nothing. Raises HubError when the Hub fails, and AdapterError when it cannot be
    reached and nothing is cached.
    """
    source = HubId.read(hub_id)
    wanted = list(ADAPTER_FILES if whole else (CONFIG, WEIGHTS, INT8_WEIGHTS, INFO))
    folder = downloaded(source, wanted)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{hub_id} is on the Hub but holds no adapter ({CONFIG} is missing)")
    if not any((folder / name).is_file() for name in (WEIGHTS, INT8_WEIGHTS)):
        if is_adapterhubs(folder):
            raise AdapterError(f"{hub_id} {ADAPTERHUBS}")
        pickles = [name for name in hub_files(source) if is_pickle(name)]
        found = f"only pickled weights ({', '.join(pickles)}), which can run code when read"
        way = "ask its author for safetensors"
        if PICKLED_WEIGHTS in pickles:
            way = f"this fetches and converts them without running any:\n{conversion(hub_id)}"
        raise AdapterError(f"{hub_id} holds {found if pickles else 'no weights'}; {way}")
    return folder


def fetch_foreign(hub_id: str, subfolder: str | None = None) -> Path:
    """Download the repository `user/repo[@revision]`, of whatever library, pickles included, and
    return its folder in the Hub's cache. Nothing is opened. Raises as `fetch_adapter` does.

    subfolder: download what is in it only
    """
    source = HubId.read(hub_id)
    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    wanted = [
        name for name in hub_files(source)
        if name.endswith((".json", *PICKLES, *_TENSORS)) and name.startswith(inside)
    ]  # fmt: skip
    if subfolder is not None and not wanted:
        raise AdapterError(f"{hub_id} holds nothing in `{subfolder}`")
    return downloaded(source, wanted)
