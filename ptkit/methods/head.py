"""The classification head that is trained with every method: each adapter has a copy of its own.

PEFT calls this `modules_to_save`, and so do the files. The copy has all that the checkpoint had no
weights for, and all that is not its backbone. PEFT's own list, `classifier` and `score`, leaves
DeBERTa's pooler at random values for ever.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.catalogue import file_type
from ptkit.methods.saved_modules import KEY, modules_named, saved_modules
from ptkit.runtime.architecture import HeadKind
from ptkit.runtime.base_model import Base
from ptkit.runtime.heads import Labels

#: PEFT's names of the tasks.
TASK_TYPES: dict[HeadKind, str] = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


class TrainedHead(nn.Module):
    """A trainable copy of a base's head, and a view of the base that uses it.

    Modules without weights in the checkpoint start anew, as their family starts them, from
    torch's global seed; the others start from the checkpoint's.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        assert base.head is not None
        self.names = base.head.modules
        copies = []
        for name in self.names:
            module = copy.deepcopy(base.model.get_submodule(name)).float()
            if name in base.head.fresh:
                module.apply(base.model._init_weights)
            # It is trained in float32, whatever type the frozen backbone computes in.
            module.register_forward_pre_hook(_in_own_type)
            copies.append(module.requires_grad_(True))
        self.copies = nn.ModuleList(copies)
        # In a tuple, so that the frozen backbone is not registered as a child of the head.
        self._view = (_with_modules(base.model, dict(zip(self.names, copies, strict=True))),)

    @property
    def view(self) -> PreTrainedModel:
        """The base's own frozen modules, with this head in place of the base's."""
        return self._view[0]

    def added_to(self, files: AdapterFiles, base: Base) -> AdapterFiles:
        """`files` of a prompt method or of LoRA, with the head as PEFT stores it."""
        assert base.head is not None
        prefix = _prefix(files)
        own = {
            f"{prefix}{name}.{parameter}": value.detach()
            for name, module in zip(self.names, self.copies, strict=True)
            for parameter, value in module.state_dict().items()
        }
        config = {
            **files.config,
            "task_type": TASK_TYPES[base.head.kind],
            KEY: [*self.names],
        }
        return replace(files, config=config, tensors={**files.tensors, **own})

    def load(self, files: AdapterFiles) -> None:
        """Take over the head in `files`. Raises AdapterError when it is missing or does not fit."""
        prefix = _prefix(files)
        for name, module in zip(self.names, self.copies, strict=True):
            expected: dict[str, Any] = module.state_dict()
            for parameter, value in expected.items():
                key = f"{prefix}{name}.{parameter}"
                found = files.tensors.get(key)
                if found is None or found.shape != value.shape:
                    shape = "is missing" if found is None else f"has shape {list(found.shape)}"
                    raise AdapterError(
                        f"the trained head does not fit this base: `{key}` {shape}, expected "
                        f"{list(value.shape)}"
                    )
                with torch.no_grad():
                    value.copy_(found)


def _in_own_type(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn the hidden states `module` is given into the type of its weights (a hook before it)."""
    own = next(module.parameters()).dtype
    return tuple(
        a.to(own) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def labels_of_files(files: AdapterFiles) -> Labels | None:
    """The labels of the head in `files`; None for an adapter of a language model.

    Those ptkit's record names; else as many as PEFT's head has outputs, named as transformers
    names labels it knows nothing of.
    """
    task = files.config.get("task_type")
    kind = next((kind for kind, name in TASK_TYPES.items() if name == task), None)
    if kind is None:
        return None
    if files.info.task is not None and files.info.task.labels:
        return Labels(kind, tuple(files.info.task.labels))
    outputs = [t.shape[0] for name, t in files.tensors.items()
               if name.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
               and ".lora_" not in name and t.ndim == 2]  # fmt: skip
    if not outputs:
        raise AdapterError(f"the adapter is for {task}, but holds no trained head")
    return Labels(kind, tuple(f"LABEL_{i}" for i in range(outputs[-1])))


def with_saved_head(base: Base, files: AdapterFiles) -> Base:
    """`base`, where its head takes in the pooler, if `files` bring a trained copy of it. Most
    checkpoints have one, which then is no part of a new head."""
    kind = file_type(files.peft_type)
    if base.head is None or (kind is not None and kind.in_layers):
        return base  # PEFT keeps those of layers itself
    inside = tuple(f"{name}." for name in base.head.modules)
    known = {
        name for name, _ in base.model.named_modules() if name.rpartition(".")[2] == "pooler"
    }  # fmt: skip
    more = {name for name in saved_modules(files.config) if name in known
            and not f"{name}.".startswith(inside)}  # fmt: skip
    if not more:
        return base
    modules = tuple(sorted({*base.head.modules, *more}))
    return replace(base, head=replace(base.head, modules=modules))


def without_head(files: AdapterFiles, base: Base) -> AdapterFiles:
    """`files` as they would be if the adapter had been made for a language model."""
    assert base.head is not None
    inside = tuple(f"{name}." for name in base.head.modules)
    starts = tuple(f"{_prefix(files)}{start}" for start in inside)
    tensors = {n: t for n, t in files.tensors.items() if not n.startswith(starts)}
    others = [
        module for module in modules_named(saved_modules(files.config), base)
        if not f"{module}.".startswith(inside)
    ]  # fmt: skip
    config = {**files.config, KEY: others or None, "task_type": None}
    return replace(files, config=config, tensors=tensors)


def _prefix(files: AdapterFiles) -> str:
    """What PEFT puts before a module's name: its wrapper, and for layers as LoRA's a second."""
    kind = file_type(files.peft_type)
    return "base_model.model." if kind is not None and kind.in_layers else "base_model."


def _with_modules(model: PreTrainedModel, modules: dict[str, nn.Module]) -> PreTrainedModel:
    """A model that shares everything with `model` but `modules`, by their dotted names."""
    view = _shallow(model)
    for name, module in modules.items():
        *parents, last = name.split(".")
        holder: nn.Module = view
        for parent in parents:
            own = holder._modules[parent]
            assert own is not None
            if own is model.get_submodule(".".join(parents[: parents.index(parent) + 1])):
                own = _shallow(own)
                holder._modules[parent] = own
            holder = own
        holder._modules[last] = module
    return view


def _shallow(module: Any) -> Any:
    """A copy of `module` that holds the same children, parameters and buffers."""
    view = copy.copy(module)
    # Each its own dictionaries: what is put into the view must not appear in the original.
    view.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v
                     for k, v in module.__dict__.items()}  # fmt: skip
    return view
