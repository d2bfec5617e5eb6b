"""litgpt's adapter (v1, LLaMA-Adapter), which is refused: it is a second softmax."""

from __future__ import annotations

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "litgpt"
NEEDS_BASE = False
FORMATS = [
    (
        "litgpt, adapter v1",
        "`lit_model.pth.adapter`",
        "refused",
        "a second softmax with a gate; ptkit trains it as `adaption_prompt`",
    ),
]
_SUFFIX = ".pth.adapter"


def found(source: Source) -> str | None:
    """What `source` is, where litgpt wrote it."""
    if any(name.endswith(_SUFFIX) for name in source.names):
        return "an adapter (v1) of litgpt"
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """Raises AdapterError with the reason."""
    raise AdapterError(
        f"{source.path} adds a second softmax over its prompt, weighed by a gate, to the "
        "attention's own. Keys and values in one softmax cannot be that; train `adaption_prompt` "
        "with ptkit, which is the same method"
    )
