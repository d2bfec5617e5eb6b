"""PEFT 0.2 to 0.6, which pickled its weights."""

from __future__ import annotations

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "PEFT's pickled weights"
NEEDS_BASE = False
FORMATS = [
    (
        "PEFT 0.2 to 0.6, all methods",
        "`adapter_config.json`, `adapter_model.bin`",
        "the same, as safetensors",
        "the tensors are copied",
    ),
]


def found(source: Source) -> str | None:
    """What `source` is, where PEFT pickled it."""
    kind = source.settings(CONFIG).get("peft_type")
    if PICKLED_WEIGHTS not in source.names or WEIGHTS in source.names or not isinstance(kind, str):
        return None
    return f"a {kind} adapter of PEFT with pickled weights"


def why_not(source: Source) -> str | None:
    """None: names and settings do not tell."""
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """The adapter with its settings as they are, and its tensors."""
    files = AdapterFiles(source.settings(CONFIG), source.tensors(PICKLED_WEIGHTS))
    return Foreign(files)
