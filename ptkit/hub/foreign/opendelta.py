"""OpenDelta: soft prompts, and prefixes of GPT-2."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import as_rows, by_mlp, prefix_files, prompt_files
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
        "live, kept",
    ),
    (
        "OpenDelta, soft prompt of T5",
        "`config.json`, `pytorch_model.bin`",
        "ptkit's encoder prompt",
        "the same embeddings before what the encoder reads",
        "live, kept",
    ),
    (
        "OpenDelta, prefix of GPT-2",
        "`config.json`, `pytorch_model.bin`",
        "ptkit's prefix that takes no positions",
        "its texts begin at position 0, and PEFT's after the prefix",
        "live, kept",
    ),
    (
        "OpenDelta, prefix of T5",
        "`config.json`, `pytorch_model.bin`",
        "refused",
        "it has none for the cross-attention, which ptkit's has",
        "live, kept",
    ),
    (
        "OpenDelta, other deltas",
        "`config.json`, `pytorch_model.bin`",
        "refused",
        "adapters, LoRA and others of that library are not read",
        "live",
    ),
]
_SETTINGS, _WEIGHTS = "config.json", "pytorch_model.bin"
_EMBEDDINGS = "soft_prompt_layer.soft_embeds"
#: A tensor of a prefix, by its layer; one MLP makes the values of all layers.
_LAYER = re.compile(
    r"(?:transformer\.)?h\.(?P<layer>\d+)\.attn\.(?P<part>prefix|reparams)\.(?P<rest>.+)"
)


def found(source: Source) -> str | None:
    """What `source` is, where OpenDelta wrote it."""
    settings = source.settings(_SETTINGS)
    kind = settings.get("delta_type")
    return f"a `{kind}` delta of OpenDelta" if "opendelta_version" in settings and kind else None


def why_not(source: Source) -> str | None:
    """Why another delta than a soft prompt or a prefix is refused."""
    kind = source.settings(_SETTINGS)["delta_type"]
    if kind in ("soft_prompt", "prefix"):
        return None
    return f"it is a `{kind}` delta; ptkit reads OpenDelta's soft prompts and prefixes"


def read(source: Source, base: Base | None) -> Foreign:
    """The soft prompt as prompt tuning, the prefix as one that takes no positions. Raises
    AdapterError for a prefix of another base than GPT-2, with the reason."""
    assert base is not None
    where, kind = str(source.path), source.settings(_SETTINGS)["delta_type"]
    tensors = source.tensors(_WEIGHTS)
    if kind == "prefix":
        return Foreign(prefix_files(_prefix(tensors, base, where), base, where, placeless=True))
    names = [name for name in tensors if name.endswith(_EMBEDDINGS)]
    if len(names) != 1 or len(tensors) != 1:
        raise AdapterError(f"{where} holds {', '.join(tensors)}, and a soft prompt has one tensor")
    return Foreign(prompt_files(tensors[names[0]], base, where))


def _prefix(tensors: dict[str, Tensor], base: Base, where: str) -> Tensor:
    """`[tokens, layers * 2 * kv_heads * head_dim]`, each layer's key before its value."""
    if base.encoder_decoder:
        raise AdapterError(
            f"{where}: it has prefixes for the encoder and the decoder, but none for what joins "
            "them; train it again with ptkit"
        )
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise AdapterError(f"{where}: `{name}` is no part of a prefix of GPT-2")
        parts.setdefault((match["part"], int(match["layer"])), {})[match["rest"]] = tensor
    layers = range(len(base.layout))
    if parts.keys() == {("reparams", 0)}:
        made = by_mlp(parts["reparams", 0], "wte", "control_trans")
        return as_rows(made, len(made))
    if parts.keys() != {("prefix", layer) for layer in layers}:
        raise AdapterError(f"{where}: its layers are not the {len(layers)} of {base.id}")
    rows = [parts["prefix", layer] for layer in layers]
    missing = [layer for layer in layers if rows[layer].keys() != {"past_key", "past_value"}]
    if missing:
        raise AdapterError(f"{where}: layer {missing[0]} lacks its keys or its values")
    return torch.cat([row[side] for row in rows for side in ("past_key", "past_value")], dim=1)
