"""AdapterHub's library `adapters`: prefix tuning of decoders and encoders.

Its keys join those of the text after rotation, and the text's positions begin at 0. In PEFT and
ptkit they begin behind the virtual tokens. So keys are turned by the number of virtual tokens. A
table of positions (GPT-2) has no such way: there the prefix takes no positions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import CONFIG, is_adapterhubs
from ptkit.formats.adapter_info import TaskInfo
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import (
    as_rows,
    by_mlp,
    prefix_files,
    turned_prefix_files,
    with_head,
)
from ptkit.hub.foreign.prediction_head import WEIGHTS as HEAD_WEIGHTS
from ptkit.hub.foreign.prediction_head import head_of
from ptkit.hub.foreign.source import Source
from ptkit.methods.head import with_saved_head
from ptkit.methods.saved_modules import KEY
from ptkit.runtime.architecture import places_in_table
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import sees_everything
from ptkit.runtime.heads import Labels

LIBRARY = "AdapterHub's `adapters`"
NEEDS_BASE = True
WEIGHTS: Final = ("adapter.safetensors", "pytorch_adapter.bin")
FORMATS = [
    (
        "`adapters`, prefix (flat or MLP) of Llama and Mistral",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "prefix tuning",
        "keys turned by the number of virtual tokens",
        "live, kept",
    ),
    (
        "`adapters`, prefix (flat or MLP) of GPT-2",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "ptkit's prefix that takes no positions",
        "its texts begin at position 0, and PEFT's after the prefix",
        "live, kept",
    ),
    (
        "`adapters`, prefix (flat or MLP) of BERT and RoBERTa, with a head that classifies",
        "the same, `head_config.json`, `pytorch_model_head.bin`",
        "ptkit's encoder prefix with a head",
        "positions stay; two layers with a tanh are the pooler and the classifier",
        "live, kept",
    ),
    (
        "`adapters`, prefix of an encoder with another head, or none",
        "the same",
        "refused",
        "no classifier of transformers has such a head",
        "live, kept",
    ),
    (
        "`adapters`, prefix with a gate",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "the gate is a mean over all positions, later ones too",
        "live, kept",
    ),
    (
        "`adapters`, prefix that leaves out layers",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "a prefix in PEFT and ptkit has keys and values for every layer",
        "live, kept",
    ),
    (
        "`adapters`, other methods",
        "`adapter_config.json`, `pytorch_adapter.bin`",
        "refused",
        "bottleneck adapters, LoRA and others of that library are not read",
        "live",
    ),
]
#: Families whose models are encoders, which need a head to answer.
_ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2",
             "albert", "xmod", "mt5-encoder", "modernbert"}  # fmt: skip
#: The tensors of one prefix, behind the name of its layer and of the adapter.
_PART = re.compile(r"prefix_tunings\.(?P<name>.+)\.(?P<place>\w+_prefix)\.(?P<part>.+)$")
_PLACELESS = (
    "its texts begin at position 0, so it is ptkit's PTKIT_PLACELESS_PREFIX: PEFT, and engines as "
    "vLLM and llama.cpp, let a text begin after the virtual tokens and cannot hold it"
)
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


def labels(source: Source) -> Labels | None:
    """The labels of the head that its base is to have; None for a language model."""
    if not _of_encoder(source):
        return None
    head = head_of(source)
    return None if isinstance(head, str) else head.labels


def why_not(source: Source) -> str | None:
    """Why it is refused, as far as its settings tell."""
    settings = source.settings(CONFIG)
    if _architecture(settings) != "prefix_tuning":
        return (
            f"it is a {_architecture(settings)} adapter of AdapterHub's `adapters`; ptkit reads "
            "its prefix tuning"
        )
    if settings["config"].get("use_gating"):
        return (
            "this prefix has a gate, which is a mean over all positions of the text, later ones "
            "too; no prefix is that"
        )
    left_out = settings["config"].get("leave_out")
    if left_out:
        return (
            f"it leaves out the layers {', '.join(map(str, left_out))}, and a prefix here has keys "
            "and values for every layer; train it again with ptkit"
        )
    head = head_of(source) if _of_encoder(source) else None
    return f"{head}; train it again with ptkit" if isinstance(head, str) else None


def _of_encoder(source: Source) -> bool:
    return source.settings(CONFIG).get("model_type") in _ENCODERS


def read(source: Source, base: Base | None) -> Foreign:
    """The prefix as prefix tuning. Raises AdapterError for what is not exactly one."""
    assert base is not None
    where = str(source.path)
    config: dict[str, Any] = source.settings(CONFIG)["config"]
    parts = _parts(source.tensors(*WEIGHTS), where)
    tokens = int(config["prefix_length"])
    if config.get("flat"):
        values = parts["control_trans"]
    else:
        between = _activation(str(config.get("non_linearity", "tanh")), where)
        values = by_mlp(parts, "wte", "control_trans", between)
    flat = as_rows(values, tokens)
    if base.encoder_decoder:
        raise AdapterError(
            f"{where}: prefixes of encoder-decoders are not read; train it again with ptkit"
        )
    if base.head is not None:
        return _of_classifier(source, flat, base)
    _require_own_head(source, base)
    if places_in_table(base.model) is not None:
        return Foreign(prefix_files(flat, base, where, placeless=True), (_SDPA, _PLACELESS))
    if not sees_everything(base.model):
        raise AdapterError(f"{where}: on a base whose layers see a window this was not tried")
    return Foreign(turned_prefix_files(flat, base, where), (_SDPA,))


def _activation(name: str, where: str) -> Callable[[Tensor], Tensor]:
    """The library's `non_linearity`: one of transformers' activations, or one of its own.

    Raises AdapterError for a name that is neither.
    """
    name = name.lower()
    if name == "leakyrelu":
        return torch.nn.functional.leaky_relu
    if name not in ACT2FN:
        raise AdapterError(f"{where}: its MLP has the activation `{name}`, which ptkit lacks")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def _of_classifier(source: Source, flat: Tensor, base: Base) -> Foreign:
    """A prefix of an encoder, with its head."""
    where, head = str(source.path), head_of(source)
    if isinstance(head, str) or not base.encoder:
        raise AdapterError(
            f"{where}: " + (head if isinstance(head, str) else f"{base.id} is no encoder")
        )
    wide = with_saved_head(base, AdapterFiles({KEY: head.modules}, {}))
    tensors = head.tensors(source.tensors(*HEAD_WEIGHTS))
    files = prefix_files(flat, wide, where)
    task = TaskInfo(kind=f"{head.labels.kind}_classification", labels=[*head.labels.names])
    if head.labels.kind == "sequence":
        task = task.updated(input="{text}")
    files = dataclasses.replace(files, info=files.info.updated(task=task))
    return Foreign(with_head(files, tensors, where))


def _require_own_head(source: Source, base: Base) -> None:
    """Raise AdapterError where a decoder's adapter brings a head that is not the base's own."""
    held = [name for name in HEAD_WEIGHTS if name in source.names]
    if not held:
        return
    own = base.model.state_dict()
    for name, tensor in source.tensors(*held).items():
        known = own.get(name)
        if known is None or known.shape != tensor.shape or not torch.allclose(
            known.float().cpu(), tensor.float(), atol=1e-6
        ):  # fmt: skip
            raise AdapterError(
                f"{source.path}: it brings a head (`{name}`) that is not the one of {base.id}, and "
                "no prefix holds a decoder's head"
            )


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
