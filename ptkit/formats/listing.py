"""What a folder of adapters holds, told from headers alone: no weights, no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import (
    adapter_folders,
    base_id,
    read_config,
    read_dtypes,
    read_info,
    weights_path,
)


@dataclass(frozen=True)
class Listed:
    """One adapter folder.

    base: id of the base model it names; bytes: of its weights' file; dtypes: of its tensors
    virtual_tokens: None for methods without; fault: why its header cannot be read
    """

    name: str
    path: Path
    method: str
    base: str | None = None
    virtual_tokens: int | None = None
    dtypes: tuple[str, ...] = ()
    bytes: int = 0
    fault: str | None = None


def list_adapters(folder: Path) -> list[Listed]:
    """Every adapter folder directly below `folder`, by name; bad ones with their fault."""
    return [_listed(path) for path in adapter_folders(folder)]


def _listed(path: Path) -> Listed:
    try:
        config, info = read_config(path), read_info(path)
        method = str(config["peft_type"]).lower()
        base = base_id(config, info)
        tokens = config.get("num_virtual_tokens")
        dtypes = tuple(sorted(read_dtypes(path)))
        size = weights_path(path).stat().st_size
    except AdapterError as error:
        return Listed(path.name, path, "?", fault=str(error))
    return Listed(path.name, path, method, base, tokens, dtypes, size)
