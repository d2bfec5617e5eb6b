"""Importing what other libraries wrote (see `ptkit.hub.foreign`)."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_folder import CARD, CONFIG
from ptkit.formats.hub import fetch_foreign, is_on_hub, missing_here
from ptkit.hub.card import card_text
from ptkit.hub.foreign import Foreign, Format, foreign_below, format_of, recognised
from ptkit.hub.foreign.source import Source
from ptkit.methods import base_of, compile_files, require_same_base
from ptkit.methods.base_names import hub_name, is_local_path
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.gguf_model import is_gguf

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


@dataclass(frozen=True)
class DescribedSource:
    """What a folder, a file or a repository is that is no adapter in PEFT's layout.

    refused: why it is not imported; base: the one it names; command: what reads it
    """

    what: str
    refused: str | None
    base: str | None
    command: str | None


def source_of(place: str | Path, subfolder: str | None = None) -> Source:
    """The folder or file `place`, or the repository on the Hub, fetched with its pickles.

    subfolder: of the folder or repository, where the adapter is

    Raises AdapterError where there is none.
    """
    if is_on_hub(str(place)):
        path = fetch_foreign(str(place), subfolder)
    elif not Path(place).exists():
        raise AdapterError(missing_here(str(place)))
    else:
        path = Path(place)
    return Source(path if subfolder is None else path / subfolder)


def describe_source(place: str | Path, subfolder: str | None = None) -> DescribedSource | None:
    """What `place` is, by names and settings alone: no pickle is opened, no base loaded.

    Returns None where no library known here wrote it. Raises AdapterError where it is not there, or
    holds several adapters.
    """
    source = source_of(place, subfolder)
    if recognised(source) is None and (other := _no_adapter(source, place)) is not None:
        return other
    if recognised(source) is None and not foreign_below(source):
        return None
    form, what = format_of(source)
    refused = form.why_not(source)
    base = _named_base(source)
    words = ["ptkit", "import", str(place), "--out", f"adapters/{Path(str(place)).stem}"]
    if subfolder is not None:
        words += ["--subfolder", subfolder]
    if form.NEEDS_BASE and base is None:
        words += ["--base", "BASE"]
    return DescribedSource(what, refused, base, None if refused else shlex.join(words))


def _no_adapter(source: Source, place: str | Path) -> DescribedSource | None:
    """A model that is taken for an adapter; None where it is none."""
    settings = source.settings("config.json")
    weights = any(name.endswith((".safetensors", ".bin")) for name in source.names)
    if is_gguf(str(source.path)):
        what = "a model as a GGUF file, and no adapter"
    elif weights and isinstance(settings.get("model_type"), str):
        what = f"a model of transformers (`{settings['model_type']}`), and no adapter"
    else:
        return None
    command = shlex.join(["ptkit", "generate", "TEXT", "--model", str(place)])
    return DescribedSource(what, None, None, command)


def import_adapter(
    place: str | Path,
    out: Path,
    *,
    model: str | None = None,
    base: Base | None = None,
    subfolder: str | None = None,
    replace: bool = False,
) -> ImportedAdapter:
    """Write the adapter at `place` to `out` in PEFT's layout.

    place: a folder, a file or a hub id; subfolder: where in it the adapter is
    model: id of the base, default the one that the settings name, in the revision that they name;
        base: a loaded one instead

    The adapter is compiled on the base before it is written, where there is one. Raises
    AdapterError for what is known not to be the same in PEFT's layout, with the reason.
    """
    source = source_of(place, subfolder)
    form, was = format_of(source)
    refused = form.why_not(source)
    if refused is not None:
        raise AdapterError(f"{source.path}: {refused}")
    if form.NEEDS_BASE:
        base = base or _base_for(form, source, model, str(place))
        made = form.read(source, base)
    else:
        made = form.read(source, None)
        base = base or _base_chosen(made, model, str(place))
        if base is not None:
            require_same_base(made.files, base, str(place), chosen=model is not None)
    files = made.files
    if base is not None:
        compile_files(files, base)
    size = sum(t.nbytes for t in files.tensors.values())
    files = dataclasses.replace(files, texts={CARD: card_text(out.name, files, size)})
    write_adapter(out, files, replace=replace)
    return ImportedAdapter(out, was, files.peft_type, made.notes)


def _base_for(form: Format, source: Source, model: str | None, where: str) -> Base:
    """The base `model`, or the one that the settings of `source` name; with the head that its
    adapter brings."""
    tell: Any = getattr(form, "labels", None)  # few formats hold classifiers
    labels = None if tell is None else tell(source)
    if model is not None:
        return load_base(model, labels=labels)
    named = _named_base(source)
    if named is None:
        raise AdapterError(f"{where} names no base model; give it (--base)")
    if is_local_path(named) and not Path(named).expanduser().exists():
        raise AdapterError(
            f"{where} names the base model `{named}`, which is a path that is not here; name the "
            "same model with --base"
        )
    revision = source.settings(CONFIG).get("revision")
    return load_base(named, revision=revision if isinstance(revision, str) else None, labels=labels)


def _base_chosen(made: Foreign, model: str | None, where: str) -> Base | None:
    """The base `model`, with the head that the adapter brings; None where none is chosen."""
    return None if model is None else base_of(made.files, model, where)


def _named_base(source: Source) -> str | None:
    """The base that the settings of `source` name: its id, where they name a place in a cache."""
    for file, key in _BASE_KEYS:
        value = source.settings(file).get(key)
        if isinstance(value, str) and value:
            return value if Path(value).is_dir() else hub_name(value)
    return None
