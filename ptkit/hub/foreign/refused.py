"""Formats that are named and refused, each with the reason: a second softmax, and what could not be
tried."""

from __future__ import annotations

from typing import NoReturn

from ptkit.errors import AdapterError
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "litgpt, NeMo"
NEEDS_BASE = False
FORMATS = [
    (
        "litgpt, adapter v1",
        "`lit_model.pth.adapter`",
        "refused",
        "a second softmax with a gate per head; `adaption_prompt`'s has one per layer",
        "live, kept",
    ),
    (
        "NeMo, p-tuning",
        "one `.nemo` file",
        "refused",
        "its package needs a training framework of many gigabytes",
        "not tried",
    ),
]
#: What file names end in -> what such a file is, and why it is not read.
_REFUSED = {
    ".pth.adapter": (
        "an adapter (v1) of litgpt",
        "it adds a second softmax over its prompt, weighed by a gate for each head, to the "
        "attention's own. Keys and values in one softmax cannot be that, and PEFT's "
        "ADAPTION_PROMPT has one gate per layer; train `adaption_prompt` with ptkit, which is the "
        "nearest method",
    ),
    ".nemo": (
        "an archive of NeMo",
        "ptkit does not read it; export its values in PEFT's layout with the library that wrote it",
    ),
}


def found(source: Source) -> str | None:
    """What `source` is, where one of these libraries wrote it."""
    known = _known(source)
    return None if known is None else known[0]


def why_not(source: Source) -> str | None:
    """Why it is refused: always."""
    known = _known(source)
    return None if known is None else known[1]


def read(source: Source, base: Base | None) -> NoReturn:
    """Raises AdapterError with the reason."""
    raise AdapterError(f"{source.path}: {why_not(source)}")


def _known(source: Source) -> tuple[str, str] | None:
    return next(
        (known for end, known in _REFUSED.items() if any(n.endswith(end) for n in source.names)),
        None,
    )
