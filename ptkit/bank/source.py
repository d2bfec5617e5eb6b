"""Where an adapter comes from, and whether it is still what was read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import (
    CONFIG,
    INFO,
    INT8_WEIGHTS,
    WEIGHTS,
    adapters_below,
    read_config,
)
from ptkit.formats.fingerprint import file_stamp
from ptkit.formats.hub import fetch_adapter, is_on_hub
from ptkit.methods import require_same_base
from ptkit.runtime.base_model import Base

#: Identity of an adapter's files at one moment; None for one that is missing.
Stamp = tuple[tuple[int, int, int] | None, ...]


def locate(source: str | Path) -> Path:
    """The folder of the adapter `source`: a folder, or a hub id `user/repo[@revision]`.

    Raises AdapterError when it is neither, or the Hub does not hand it out.
    """
    path = Path(source).expanduser()
    if isinstance(source, str) and is_on_hub(source):
        return fetch_adapter(source)
    return path


def stamp(path: Path) -> Stamp:
    """What a change of the adapter's files on disk would change: inode, size, time of writing."""
    return tuple(file_stamp(f"{path}/{file}") for file in (WEIGHTS, INT8_WEIGHTS, CONFIG, INFO))


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter's files and the stamp they had before they were read."""

    files: AdapterFiles
    stamp: Stamp
    chosen: bool = False


def read_checked(path: Path, base: Base, *, chosen: bool = False) -> CheckedAdapter:
    """Read the adapter folder `path` for `base` (chosen: see `require_same_base`).

    Raises AdapterError when it is damaged, unsafe, not finite or for another base.
    """
    before = stamp(path)
    files = read_adapter(path)
    require_same_base(files, base, str(path), chosen=chosen)
    return CheckedAdapter(files, before, chosen)


def require_files(path: Path) -> None:
    """Raise AdapterError unless `path` looks like an adapter folder. Of one that does, nothing is
    opened."""
    weights, int8, config, _ = stamp(path)
    no_weights = weights is None and int8 is None
    if no_weights or config is None:
        if config is None and (below := adapters_below(path)):
            names = ", ".join(f"`{path / folder}`" for folder in below)
            raise AdapterError(f"{path} holds several adapters, name one: {names}")
        if config is not None:
            read_config(path)  # it may say whose folder this is
        missing = path if not path.is_dir() else path / (WEIGHTS if no_weights else CONFIG)
        raise AdapterError(f"{missing} is missing; an adapter folder holds {CONFIG} and {WEIGHTS}")


def name_of(path: Path) -> str:
    """A readable name for the adapter in `path`: its folder's, its run's, or its repository's."""
    path = path.resolve()
    if path.parent.name == "snapshots":  # the Hub's cache: models--user--repo/snapshots/COMMIT
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.parent.name if path.name == "adapter" else path.name
