"""The gate of an adapter in its files: two tensors beside the adapter's own.

PEFT reads the adapter and passes over them: for PEFT it is on for every input.
"""

from __future__ import annotations

from dataclasses import replace

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.runtime.base_model import Base
from ptkit.runtime.gate import Gate

_WEIGHT, _BIAS = "ptkit_gate.weight", "ptkit_gate.bias"


def with_gate(files: AdapterFiles, gate: Gate | None) -> AdapterFiles:
    """`files` and `gate`, if there is one."""
    if gate is None:
        return files
    own = {_WEIGHT: gate.weight.detach(), _BIAS: gate.bias.detach()}
    return replace(files, tensors={**files.tensors, **own})


def without_gate(files: AdapterFiles) -> AdapterFiles:
    """`files` as they would be if the adapter were on for every input."""
    kept = {n: t for n, t in files.tensors.items() if n not in (_WEIGHT, _BIAS)}
    return files if len(kept) == len(files.tensors) else replace(files, tensors=kept)


def gate_of(files: AdapterFiles, base: Base) -> Gate | None:
    """The gate in `files`; None where there is none.

    Raises AdapterError when it is damaged or reads other embeddings than those of `base`.
    """
    if not {_WEIGHT, _BIAS} & files.tensors.keys():
        return None
    shapes = {_WEIGHT: [2 * base.embedding.embedding_dim], _BIAS: [1]}
    for name, shape in shapes.items():
        tensor = files.tensors.get(name)
        if tensor is None or not tensor.is_floating_point() or list(tensor.shape) != shape:
            found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise AdapterError(
                f"`{name}` should be {shape} numbers on {base.id}, found {found}: the adapter's "
                "gate is damaged, or was made for another base"
            )
    weight, bias = (files.tensors[name].to(base.model.device, copy=True).float() for name in shapes)
    return Gate(weight, bias, base.embedding)
