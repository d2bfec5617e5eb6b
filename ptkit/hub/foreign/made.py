"""Adapters in PEFT's layout, made of what another library's file holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.hub.foreign.rotation import turned
from ptkit.methods import ADAPTERS
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.training.provenance import base_info

#: What PEFT puts before the name of a module that it saves whole.
_WRAPPER = "base_model."


def prefix_files(flat: Tensor, base: Base, where: str, *, placeless: bool = False) -> AdapterFiles:
    """A prefix whose values are `flat` `[tokens, layers * 2 * kv_heads * head_dim]`, each token's
    layer by layer, its key before its value.

    placeless: see `KVPrefix.placeless`. Raises AdapterError for a base of another shape.
    """
    _require_finite(flat, where)
    prefix = KVPrefix.from_flat(flat.float(), base.layout)
    prefix = dataclasses.replace(prefix, placeless=placeless)
    return _of_base(PrefixTuning.from_prefix(prefix, base).files(), base)


def turned_prefix_files(flat: Tensor, base: Base, where: str) -> AdapterFiles:
    """As `prefix_files`, of a prefix whose texts begin at position 0: its keys are turned by its
    number of tokens. Raises AdapterError for bases whose keys cannot be turned."""
    prefix = KVPrefix.from_flat(flat.float(), base.layout)
    keys = tuple(turned(k, base, prefix.virtual_tokens) for k in prefix.keys)
    return prefix_files(KVPrefix(keys, prefix.values).flat(), base, where)


def prompt_files(embeddings: Tensor, base: Base, where: str) -> AdapterFiles:
    """A soft prompt `[tokens, hidden]`. Raises AdapterError for a base of another width."""
    _require_finite(embeddings, where)
    width = base.embedding.embedding_dim
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise AdapterError(
            f"{where} is a soft prompt of shape {list(embeddings.shape)}; {base.id} reads "
            f"embeddings of {width} values"
        )
    cls = ADAPTERS["prompt_tuning"]
    section = cls.section_class(kind="prompt_tuning", num_virtual_tokens=len(embeddings))  # type: ignore[call-arg]
    plain = AdapterFiles({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": embeddings.float()})
    return _of_base(cls.from_files(plain, section, base).files(), base)


def with_head(files: AdapterFiles, head: Mapping[str, Tensor], where: str) -> AdapterFiles:
    """`files`, made on a base with a classification head, with the tensors of `head` for it.

    head: by the names that the base has for them. Raises AdapterError where they are not all of the
    head that an adapter keeps, or of other shapes.
    """
    tensors = dict(files.tensors)
    own = {name.removeprefix(_WRAPPER) for name in tensors if name.startswith(_WRAPPER)}
    if own != head.keys():
        raise AdapterError(
            f"{where}: the head has {', '.join(sorted(head))}, and this base keeps "
            f"{', '.join(sorted(own))}"
        )
    for name, tensor in head.items():
        _require_finite(tensor, where)
        expected = tensors[f"{_WRAPPER}{name}"].shape
        if tensor.shape != expected:
            raise AdapterError(
                f"{where}: `{name}` of the head has shape {list(tensor.shape)}, expected "
                f"{list(expected)}"
            )
        tensors[f"{_WRAPPER}{name}"] = tensor.float()
    return dataclasses.replace(files, tensors=tensors)


def by_mlp(
    tensors: dict[str, Tensor],
    wte: str,
    mlp: str,
    between: Callable[[Tensor], Tensor] = torch.tanh,
) -> Tensor:
    """What the MLP of Li & Liang (2021, section 4.3) makes of its embeddings, `[tokens, values]`.

    It has two layers with a tanh between. All libraries took over its names from them.

    wte, mlp: what the names of the embeddings and of the MLP's layers begin with; between: what
    stands between the layers. Raises AdapterError where a part is missing.
    """
    names = [f"{wte}.weight", *(f"{mlp}.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias"))]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise AdapterError(f"the MLP of a prefix lacks {', '.join(missing)}")
    start, first, first_bias, last, last_bias = (tensors[name].double() for name in names)
    return (between(start @ first.T + first_bias) @ last.T + last_bias).float()


def as_rows(values: Tensor, tokens: int) -> Tensor:
    """The vector `values` as `[tokens, values of each]`. Raises AdapterError where it has not as
    many."""
    if tokens < 1 or values.numel() % tokens:
        raise AdapterError(f"{values.numel():,} values are not those of {tokens} virtual tokens")
    return values.reshape(tokens, -1)


def _of_base(files: AdapterFiles, base: Base) -> AdapterFiles:
    return dataclasses.replace(files, info=AdapterInfo(base=base_info(base)))


def _require_finite(values: Tensor, where: str) -> None:
    if not math.isfinite(float(values.float().abs().sum())):
        raise AdapterError(f"{where} holds values that are not finite")
