"""AdapterHub's library `adapters`: prefix tuning of decoders and encoders.

Its keys join those of the text after rotation, and the text's positions begin at 0. In PEFT and
ptkit they begin behind the virtual tokens. So keys are turned by the number of virtual tokens.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import CONFIG, is_adapterhubs
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import as_rows, by_mlp, prefix_files
from ptkit.hub.foreign.rotation import turned
from ptkit.hub.foreign.source import Source
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import sees_everything

LIBRARY = "AdapterHub's `adapters`"
NEEDS_BASE = True
WEIGHTS: Final = ("adapter.safetensors", "pytorch_adapter.bin")
FORMATS = [
    (
        "`adapters`, prefix (flat or MLP) of Llama and Mistral",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "prefix tuning",
        "keys turned by the number of virtual tokens",
    ),
    (
        "`adapters`, prefix (flat or MLP) of BERT",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "it works with a head, which that library keeps in a form of its own",
    ),
    (
        "`adapters`, prefix of GPT-2",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "its texts begin at position 0 of a table, which keys cannot be moved in",
    ),
    (
        "`adapters`, prefix with a gate",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "the gate is a mean over all positions, later ones too",
    ),
    (
        "`adapters`, other methods",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "bottleneck adapters, LoRA and others of that library are not read",
    ),
]
#: The tensors of one prefix, behind the name of its layer and of the adapter.
_PART = re.compile(r"prefix_tunings\.(?P<name>.+)\.(?P<place>\w+_prefix)\.(?P<part>.+)$")
_SDPA = (
    "its library ignores or misplaces a decoder's prefix under transformers' default attention "
    "(`sdpa`); what was read is what it computes with `eager`"
)


def found(source: Source) -> str | None:
    """What `source` is, where AdapterHub's library wrote it."""
    if not source.path.is_dir() or not is_adapterhubs(source.path):
        return None
    settings = source.settings(CONFIG)
    return f"a {_architecture(settings)} adapter of AdapterHub's `adapters`"


def _architecture(settings: dict[str, Any]) -> str:
    config = settings["config"]
    return str(config.get("architecture") or "bottleneck") if isinstance(config, dict) else config


def read(source: Source, base: Base | None) -> Foreign:
    """The prefix as prefix tuning. Raises AdapterError for what is not exactly one."""
    assert base is not None
    settings, where = source.settings(CONFIG), str(source.path)
    if _architecture(settings) != "prefix_tuning":
        raise AdapterError(
            f"{where} is a {_architecture(settings)} adapter of AdapterHub's `adapters`; ptkit "
            "reads its prefix tuning"
        )
    config: dict[str, Any] = settings["config"]
    if config.get("use_gating"):
        raise AdapterError(
            f"{where}: this prefix has a gate, which is a mean over all positions of the text, "
            "later ones too; no prefix is that"
        )
    parts = _parts(source.tensors(*WEIGHTS), where)
    tokens = int(config["prefix_length"])
    values = parts["control_trans"] if config.get("flat") else by_mlp(parts, "wte", "control_trans")
    flat = as_rows(values, tokens)
    _require_movable(base, where)
    prefix = KVPrefix.from_flat(flat.float(), base.layout)
    keys = tuple(turned(k, base, tokens) for k in prefix.keys)
    own = KVPrefix(keys, prefix.values)
    return Foreign(prefix_files(own.flat(), base, where), (_SDPA,))


def _require_movable(base: Base, where: str) -> None:
    if base.encoder or base.head is not None:
        raise AdapterError(
            f"{where}: a prefix of an encoder works with a head, which AdapterHub's library keeps "
            "in a form of its own; train both again with ptkit"
        )
    if base.encoder_decoder:
        raise AdapterError(
            f"{where}: prefixes of encoder-decoders are not read; train it again with ptkit"
        )
    if not hasattr(base.model.base_model, "rotary_emb"):
        raise AdapterError(
            f"{where}: the texts of this prefix begin at position 0, and those behind a prefix of "
            f"PEFT or ptkit begin after it. {type(base.model).__name__} takes positions from a "
            "table, so its keys cannot be moved; train it again with ptkit"
        )
    if not sees_everything(base.model):
        raise AdapterError(f"{where}: on a base whose layers see a window this was not tried")


def _parts(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of the one prefix, by their last names: the library writes a copy for each
    layer. Raises AdapterError where copies differ, or several prefixes are there."""
    parts: dict[str, Tensor] = {}
    owners = set()
    for name, tensor in tensors.items():
        match = _PART.search(name)
        if match is None:
            raise AdapterError(f"{where}: `{name}` is no part of a prefix")
        owners.add((match["name"], match["place"]))
        kept = parts.setdefault(match["part"], tensor)
        if not torch.equal(kept, tensor):
            raise AdapterError(f"{where}: the copies of `{match['part']}` differ")
    if len(owners) != 1:
        raise AdapterError(
            f"{where} holds {len(owners)} prefixes ({', '.join(sorted(p for _, p in owners))}), "
            "and ptkit reads those with one"
        )
    return parts
