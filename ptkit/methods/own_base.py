"""The base model of adapters, where a command that uses them names none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import base_id, read_config, read_info
from ptkit.methods.base_names import last_part, needs_no_download
from ptkit.runtime.model_names import TINY_EN


def own_base(adapters: Sequence[Path]) -> str:
    """Name of the base that the adapter folders `adapters` were made for: `tiny-en` where none of
    them names one. A folder that cannot be read has no say: whoever loads it tells why.

    Raises AdapterError where their base is not on this machine, or is not the same.
    """
    named: dict[str, str] = {}
    for path in adapters:
        try:
            name = base_id(read_config(path), read_info(path))
        except AdapterError:
            continue
        if name is not None:
            named.setdefault(TINY_EN if last_part(name) == TINY_EN else name, path.name)
    here = [name for name in named if needs_no_download(name)]
    if len(here) == 1 or not named:
        return here[0] if here else TINY_EN
    told = ", ".join(f"`{named[name]}` for `{name}`" for name in here or named)
    if here:
        raise AdapterError(f"the adapters were made for several bases: {told}; choose by --model")
    raise AdapterError(
        f"the base of the adapters is not on this machine: {told}; --model NAME loads it"
    )
