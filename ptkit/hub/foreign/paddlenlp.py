"""PaddleNLP's prefixes and NeMo's prompts, which are named and refused: none could be tried."""

from __future__ import annotations

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "PaddleNLP or NeMo"
NEEDS_BASE = False
FORMATS = [
    (
        "PaddleNLP, prefix",
        "`prefix_config.json`, `prefix_model_state.pdparams`",
        "refused",
        "not tried: its files are pickles of another framework",
    ),
    (
        "NeMo, p-tuning",
        "one `.nemo` file",
        "refused",
        "not tried: an archive with a whole training's settings",
    ),
]


def found(source: Source) -> str | None:
    """What `source` is, where one of them wrote it."""
    if any(name.endswith(".pdparams") for name in source.names):
        return "a prefix of PaddleNLP"
    if any(name.endswith(".nemo") for name in source.names):
        return "an archive of NeMo"
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """Raises AdapterError with the reason."""
    raise AdapterError(
        f"{source.path} is {found(source)}, which ptkit does not read; export its values in "
        "PEFT's layout with the library that wrote it"
    )
