"""Importing what other libraries wrote (see `ptkit.hub.foreign`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.formats.adapter_folder import CARD, CONFIG
from ptkit.formats.hub import fetch_foreign, is_on_hub, missing_here
from ptkit.hub.card import card_text
from ptkit.hub.foreign import format_of
from ptkit.hub.foreign.source import Source
from ptkit.methods import base_of, compile_files, require_same_base
from ptkit.runtime.base_model import Base

#: What libraries call the base in their settings, and in which file.
_BASE_KEYS = (
    (CONFIG, "model_name"),
    (CONFIG, "base_model_name_or_path"),
    ("config.json", "backbone_checkpoint_name"),
)


@dataclass(frozen=True)
class ImportedAdapter:
    """What was written. was: what the source is; notes: what to know of it, a sentence each."""

    path: Path
    was: str
    method: str
    notes: tuple[str, ...]


def source_of(place: str | Path) -> Source:
    """The folder or file `place`, or the repository on the Hub, fetched with its pickles.

    Raises AdapterError where there is none.
    """
    if is_on_hub(str(place)):
        return Source(fetch_foreign(str(place)))
    if not Path(place).exists():
        raise AdapterError(missing_here(str(place)))
    return Source(Path(place))


def import_adapter(
    place: str | Path,
    out: Path,
    *,
    model: str | None = None,
    base: Base | None = None,
    replace: bool = False,
) -> ImportedAdapter:
    """Write the adapter at `place` to `out` in PEFT's layout.

    place: a folder, a file or a hub id
    model: id of the base, default the one that the settings name; base: a loaded one instead

    The adapter is compiled on the base before it is written, where there is one. Raises
    AdapterError for what is known not to be the same in PEFT's layout, with the reason.
    """
    source = source_of(place)
    form, was = format_of(source)
    if base is None and (form.NEEDS_BASE or model is not None):
        named = model or _named_base(source)
        base = base_of(AdapterFiles({}, {}), named, str(place))
    made = form.read(source, base)
    files = made.files
    if base is not None:
        if not form.NEEDS_BASE:
            require_same_base(files, base, str(place), chosen=model is not None)
        compile_files(files, base)
    size = sum(t.nbytes for t in files.tensors.values())
    files = dataclasses.replace(files, texts={CARD: card_text(out.name, files, size)})
    write_adapter(out, files, replace=replace)
    return ImportedAdapter(out, was, files.peft_type, made.notes)


def _named_base(source: Source) -> str | None:
    for file, key in _BASE_KEYS:
        value = source.settings(file).get(key)
        if isinstance(value, str) and value:
            return value
    return None
