"""Whole modules of the base that an adapter brings trained copies of: PEFT's `modules_to_save`.

The settings name them and the file holds their tensors. Where only one of the two does, something
is lost or, worse, a tensor that nothing names is written into the frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import CONFIG
from ptkit.runtime.base_model import Base

KEY = "modules_to_save"
#: What PEFT puts before a module's name: its wrapper, for LoRA a second one.
_WRAPPERS = ("base_model.model.", "base_model.")


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The names in the settings. Raises AdapterError when they are no list of names."""
    named = config.get(KEY) or []
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise AdapterError(f"the setting `{KEY}` should be a list of modules' names")
    return named


def modules_named(names: list[str], base: Base) -> list[str]:
    """The modules of the base with these names, or with names that end in them, as PEFT takes
    them. A name may stand for none: PEFT adds the usual names of heads."""
    if not names:
        return []
    return [
        module
        for module, found in base.model.named_modules()
        if module.endswith(tuple(names)) and next(found.parameters(), None) is not None
    ]


def require_saved_modules(files: AdapterFiles, base: Base) -> None:
    """Raise AdapterError where the settings name a module that the file holds no tensor of."""
    for module in modules_named(saved_modules(files.config), base):
        starts = tuple(f"{wrapper}{module}." for wrapper in _WRAPPERS)
        if not any(name.startswith(starts) for name in files.tensors):
            raise AdapterError(
                f"the settings say that `{module}` was trained too (`{KEY}`), and the file holds "
                f"no tensor of it: the adapter is not whole; save it again, or take the name out "
                f"of {CONFIG} if it was not trained"
            )


def require_no_others(files: AdapterFiles, base: Base) -> None:
    """Raise AdapterError for tensors of the base's own that no setting names: PEFT would write
    them into the base."""
    kept = tuple(f"{module}." for module in modules_named(saved_modules(files.config), base))
    biases = files.config.get("bias", "none") != "none"
    own = {name for name, _ in base.model.named_parameters(remove_duplicate=False)}
    for name in files.tensors:
        module = name.removeprefix(_WRAPPERS[0])
        if module not in own or module.startswith(kept) or (biases and module.endswith(".bias")):
            continue
        raise AdapterError(
            f"the file holds the base's own `{module}`, which no setting names: it would change "
            f"the base for everybody. If it was trained, name its module in `{KEY}` of {CONFIG}; "
            "else save the adapter without it (`save_embedding_layers=False`)"
        )
