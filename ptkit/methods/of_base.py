"""Whether an adapter was made for a base, and the base that it was made for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import base_id, base_revision
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo
from ptkit.formats.fingerprint import is_same_model
from ptkit.methods.adapter import Adapter
from ptkit.methods.base_names import hub_name, same_name
from ptkit.methods.catalogue import file_type
from ptkit.methods.head import labels_of_files
from ptkit.methods.registry import adapter_from_files
from ptkit.runtime.base_model import Base, load_base

logger = logging.getLogger(__name__)


def require_same_base(files: AdapterFiles, base: Base, where: str, *, chosen: bool = False) -> None:
    """Raise AdapterError when `files` were made for another base than `base`.

    chosen: the user named this base for this adapter; that settles it where the adapter has no
        fingerprint, and a warning names both

    ptkit's own files have a fingerprint of the weights. Files of plain PEFT have only the name of
    the base. Its last part is compared: `gpt2` is `openai-community/gpt2`. The same model in
    another precision is warned of, once. It is refused for types that one precision alone can
    read (`FileType.one_precision`).
    """
    refusal = refused_base(files.config, files.info, base, where, chosen=chosen)
    if refusal is not None:
        raise AdapterError(refusal)
    made_for, name = files.info.base, files.base_id
    if made_for.fingerprint:
        trained_in = made_for.precision or base.precision
        if trained_in != base.precision:
            warnings.warn(
                f"trained on `{name}` in {trained_in}, used on `{base.id}` in {base.precision}: "
                "the same model, whose answers differ a little",
                stacklevel=2,
            )
        return
    kind = file_type(files.peft_type)
    if kind is not None and kind.one_precision:
        logger.warning(
            "%s does not say in which precision it was trained; PEFT computes a part of %s from "
            "the base's weights, which comes out otherwise in another", where, kind.name
        )  # fmt: skip
    if not name or same_name(name, base):
        return
    logger.warning(
        "%s names the base model `%s`; it is used on `%s`, as chosen: it has no fingerprint to "
        "tell whether they are the same", where, name, base.id
    )  # fmt: skip


def refused_base(
    config: Mapping[str, Any], info: AdapterInfo, base: Base, where: str, *, chosen: bool = False
) -> str | None:
    """Why an adapter with these settings and this record is not for `base`; None where it is, and
    where they name no base. No tensor is read. See `require_same_base`."""
    made_for, name = info.base, base_id(config, info)
    if made_for.fingerprint:
        if _is_made_for(made_for, base):
            return _refused_precision(config, made_for, base, where)
        if same_name(name or "", base):
            return (
                f"{where} was made for `{name}` with other weights than the one that is loaded "
                f"({_differences(made_for, base)}); load the one it was made for"
            )
        return (
            f"{where} was made for the base model `{name}`, not for `{base.id}` "
            f"({_differences(made_for, base)}); load it on `{name}`"
        )
    if chosen or not name or same_name(name, base):
        return None
    return (
        f"{where} was made for the base model `{name}`, not for `{base.id}`; load it on "
        f"`{hub_name(name)}`, or choose the base for it with --model where that is the same "
        "model by another name"
    )


def _refused_precision(
    config: Mapping[str, Any], made_for: BaseInfo, base: Base, where: str
) -> str | None:
    """Why an adapter of this base is not for the precision it is loaded in, if it is not."""
    kind = file_type(str(config.get("peft_type")))
    if kind is None or not kind.one_precision or made_for.precision in (None, base.precision):
        return None
    return (
        f"{where} was trained in {made_for.precision}, and `{base.id}` is loaded in "
        f"{base.precision}: PEFT computes a part of {kind.name} from the base's weights, which "
        f"comes out otherwise there; load the base in {made_for.precision}"
    )


def _differences(made_for: BaseInfo, base: Base) -> str:
    """What an adapter's record says of its base, and `base` is not: each key with both values."""
    here = {
        "revision": base.revision, "parameters": base.parameters,
        "tokenizer": base.tokenizer_fingerprint, "fingerprint": base.fingerprint,
    }  # fmt: skip
    told = [(key, getattr(made_for, key), value) for key, value in here.items()]
    return ", ".join(
        f"`{key}`: {_shown(there)}, here {_shown(value)}"
        for key, there, value in told
        if there is not None and value is not None and there != value
    )


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_made_for(made_for: BaseInfo, base: Base) -> bool:
    """Whether an adapter's record of its base is of the model `base` is, in whatever precision."""
    if made_for.fingerprint == base.fingerprint:
        return True
    if made_for.sketch is None:  # an earlier version's
        return made_for.fingerprint == base.legacy_fingerprint
    return is_same_model(
        made_for.sketch, made_for.precision or "", base.identity.sketch, base.precision
    )


def base_of(files: AdapterFiles, model: str | None, where: str) -> Base:
    """Load the base `model`, or the one `files` name, in the revision they were made on.

    where: what the files are called. Raises AdapterError when neither names one.
    """
    labels = labels_of_files(files)
    if model is not None:
        return load_base(model, labels=labels)
    if files.base_id is None:
        raise AdapterError(f"{where} names no base model; give it (--model)")
    revision = base_revision(files.config, files.info)
    id = files.base_id if Path(files.base_id).is_dir() else hub_name(files.base_id)
    return load_base(id, revision=revision, labels=labels)


def revision_named(
    id: str, adapters: Mapping[str, tuple[dict[str, Any], AdapterInfo]]
) -> str | None:
    """The revision of the base `id` that `adapters` were made on; None where none of them says.

    adapters: what they are called -> their settings and ptkit's record (`read_config`, `read_info`)

    Raises AdapterError where they were made on different ones: one base is loaded for all.
    """
    named = {
        where: base_revision(config, info)
        for where, (config, info) in adapters.items()
        if hub_name(base_id(config, info) or "") == id
    }
    if len({*named.values()}) > 1:
        told = ", ".join(f"{where} on {revision or 'main'}" for where, revision in named.items())
        raise AdapterError(
            f"these adapters were made on different revisions of `{id}` ({told}); use them one "
            "at a time"
        )
    return next(iter(named.values()), None)


def load_adapter(path: Path, base: Base, *, chosen: bool = False) -> Adapter:
    """The adapter in the folder `path`, checked against `base` (chosen: see `require_same_base`).

    Raises AdapterError when it is damaged, unsafe, of an unknown type or for another base.
    """
    files = read_adapter(path)
    require_same_base(files, base, str(path), chosen=chosen)
    return adapter_from_files(files, base)
