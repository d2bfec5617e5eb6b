"""OpenDelta: soft prompts, and prefixes that are refused."""

from __future__ import annotations

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import prompt_files
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "OpenDelta"
NEEDS_BASE = True
FORMATS = [
    (
        "OpenDelta, soft prompt of a decoder",
        "`config.json`, `pytorch_model.bin`",
        "prompt tuning",
        "the same embeddings before the text",
    ),
    (
        "OpenDelta, soft prompt of T5",
        "`config.json`, `pytorch_model.bin`",
        "ptkit's encoder prompt",
        "the same embeddings before what the encoder reads",
    ),
    (
        "OpenDelta, prefix of GPT-2",
        "`config.json`, `pytorch_model.bin`",
        "refused",
        "its texts begin at position 0 of a table, which keys cannot be moved in",
    ),
    (
        "OpenDelta, prefix of T5",
        "`config.json`, `pytorch_model.bin`",
        "refused",
        "it has none for the cross-attention, which ptkit's has",
    ),
]
_SETTINGS, _WEIGHTS = "config.json", "pytorch_model.bin"
_EMBEDDINGS = "soft_prompt_layer.soft_embeds"


def found(source: Source) -> str | None:
    """What `source` is, where OpenDelta wrote it."""
    settings = source.settings(_SETTINGS)
    kind = settings.get("delta_type")
    return f"a `{kind}` delta of OpenDelta" if "opendelta_version" in settings and kind else None


def read(source: Source, base: Base | None) -> Foreign:
    """The soft prompt as prompt tuning. Raises AdapterError for other deltas, with the reason."""
    assert base is not None
    where, kind = str(source.path), source.settings(_SETTINGS)["delta_type"]
    if kind == "prefix":
        why = (
            "it has prefixes for the encoder and the decoder, but none for what joins them"
            if base.encoder_decoder
            else "its texts begin at position 0, and those behind a prefix of PEFT or ptkit begin "
            "after it, so on a base with a table of positions its keys cannot be moved"
        )
        raise AdapterError(f"{where}: {why}; train it again with ptkit")
    if kind != "soft_prompt":
        raise AdapterError(f"{where} is a `{kind}` delta; ptkit reads OpenDelta's soft prompts")
    tensors = source.tensors(_WEIGHTS)
    names = [name for name in tensors if name.endswith(_EMBEDDINGS)]
    if len(names) != 1 or len(tensors) != 1:
        raise AdapterError(f"{where} holds {', '.join(tensors)}, and a soft prompt has one tensor")
    return Foreign(prompt_files(tensors[names[0]], base, where))
