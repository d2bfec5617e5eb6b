"""A folder or a file that another library wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import MAX_JSON_BYTES, is_pickle
from ptkit.hub.foreign.pickled import unpickled


@dataclass(frozen=True)
class Source:
    """What is to be imported: a folder, or one file of tensors."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise AdapterError(f"{self.path}: no such file or folder")

    @cached_property
    def names(self) -> list[str]:
        """The files' names, in alphabetical order."""
        if not self.path.is_dir():
            return [self.path.name]
        return sorted(p.name for p in self.path.iterdir() if p.is_file())

    @cached_property
    def folders(self) -> list[str]:
        """The names of the folders directly below it, in alphabetical order."""
        if not self.path.is_dir():
            return []
        return sorted(p.name for p in self.path.iterdir() if p.is_dir() and p.name[0] != ".")

    def below(self, name: str) -> Source:
        """The folder `name` in it."""
        return Source(self.path / name)

    def settings(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`; empty where there is none."""
        path = self.path / name
        if not self.path.is_dir() or not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """The tensors of the first of the files `names` that is there, by name; of nested
        dictionaries the names are joined by dots.

        Pickles are opened by a process of its own, which makes tensors of them and nothing else.
        Raises AdapterError where none is there, or it cannot be read.
        """
        for name in names:
            path = self.path / name if self.path.is_dir() else self.path
            if name in self.names and path.is_file():
                return unpickled(path) if is_pickle(name) else _safe(path)
        raise AdapterError(f"{self.path} lacks {' or '.join(names)}")


def _safe(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{path} is damaged ({error}); fetch it again") from error
