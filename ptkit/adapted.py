"""Adapters in other training loops: transformers' `Trainer`, TRL's `SFTTrainer`, one of one's own.

`trainable_model` puts a fresh adapter on a frozen base and gives a model of transformers, whose
parameters that require gradients are the adapter's. What `ptkit train` does beside the loop is left
to that loop: the learning rate, the schedule, validation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_info import AdapterInfo, MethodInfo
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.prefix import Compiled
from ptkit.runtime.adapted_model import adapted_model
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.given_base import given_base
from ptkit.section import MethodSection
from ptkit.training.adapter_trainer import parameter_groups as groups_of
from ptkit.training.provenance import base_info, versions

#: The name of the adapter among the model's children, which begins the names of its parameters.
CHILD = "adapter"
#: The adapter as a loop resumes from it; PEFT reads `adapter_model.safetensors`.
TRAINED = "model.safetensors"


def trainable_model(
    model: Base | PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "prefix_tuning",
    texts: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> PreTrainedModel:
    """A fresh adapter on a frozen base, as a model of transformers that any loop can train.

    model: the base, loaded or by name; a transformers model is frozen as it is
    tokenizer: its tokenizer, where `model` is a transformers model
    method: one that learns virtual tokens, as in a recipe
    texts: rows of the task, input and answer together: the adapter starts from what the base
        makes of them. Without any it starts from random words, which learns more slowly
    seed: of random numbers, and of the order in which `texts` are taken
    settings: the method's own keys, as in a recipe (`num_virtual_tokens=20`)

    The loop's learning rate is the adapter's. `parameter_groups` gives the groups that ptkit's own
    loop hands to AdamW, with the rates that suit the method. `save_pretrained` writes a folder that
    PEFT and `load_adapter` read.

    Raises UserError for settings that the method does not have, or a method without virtual tokens.
    Raises ModelError for a base that it does not work on.
    """
    base = (
        load_base(model)
        if isinstance(model, str)
        else given_base(model, tokenizer, "trainable_model(model, tokenizer)")
    )
    section = _section(method, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = create_adapter(section, base, Demonstrations(list(texts), seed))
    if adapter.own_compiled() is None:
        raise UserError(f"`{method}` has no virtual tokens; train it with PEFT's `get_peft_model`")

    def compiled() -> Compiled:
        return cast(Compiled, adapter.compiled())

    return adapted_model(
        base.model, compiled, base.pad_token_id,
        parts={CHILD: adapter}, save=lambda folder: _save(adapter, Path(folder)),
    )  # fmt: skip


def parameter_groups(
    model: PreTrainedModel, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """The parameters of a `trainable_model` as groups for AdamW, each with its rate.

    learning_rate: of the values themselves; None: the method's default

    Raises UserError for another model.
    """
    adapter = model._modules.get(CHILD)
    if not isinstance(adapter, Adapter):
        raise UserError("`parameter_groups` is for what `trainable_model` made")
    section: Any = adapter.section
    rate = section.learning_rate if learning_rate is None else learning_rate
    groups = groups_of(adapter, rate, getattr(section, "beta2", 0.999), rate)
    own = {"lr": rate, "betas": (0.9, getattr(section, "beta2", 0.999))}
    return [own | group for group in groups]


def _section(method: str, settings: dict[str, Any]) -> MethodSection:
    """The method's settings. Raises UserError for those that it does not have."""
    if "learning_rate" in settings:
        raise UserError("the learning rate is the loop's: give it to the optimiser")
    try:
        section = method_section({"start": "task", "kind": method} | settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or method
        if first["loc"] == ("start",) and "start" not in settings:
            raise UserError(_no_virtual_tokens(method)) from error
        raise UserError(f"`{method}`: `{key}`: {first['msg']}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if getattr(section, "start", None) == "auto":
        raise UserError("`start: auto` looks before a run of ptkit's own; name a start")
    if ADAPTERS[section.kind].changes_weights:
        raise UserError(_no_virtual_tokens(method))
    return section


def _no_virtual_tokens(method: str) -> str:
    return f"`{method}` is not one virtual prefix; train it with PEFT's `get_peft_model`"


def _save(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into `folder`, each file complete or not at all; others there stay."""
    section, base = adapter.section, adapter.base
    info = AdapterInfo(
        base=base_info(base),
        method=MethodInfo.model_validate(section.model_dump(mode="json")),
        trainable_parameters=adapter.trainable_parameters,
        dtype="float32",
        versions=versions(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.scratch(folder / "adapter") as written:
        whole = written / "adapter"
        write_adapter(whole, replace(adapter.files(), info=info))
        # With what it started from: learnt values are changes of that.
        state = {f"{CHILD}.{n}": t.cpu().contiguous() for n, t in adapter.state_dict().items()}
        save_file(state, whole / TRAINED, metadata={"format": "pt"})
        for file in whole.iterdir():
            os.replace(file, folder / file.name)
