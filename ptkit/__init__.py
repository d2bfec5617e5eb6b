"""Prompt tuning, prefix tuning and P-tuning on a frozen language model.

The names below are loaded when first used, so that importing ptkit costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptkit.adapted import parameter_groups, trainable_model
    from ptkit.api import Comparison, Run, compare, train
    from ptkit.bank import AdapterBank, Conversation
    from ptkit.drafting.draft import draft_recipe
    from ptkit.evaluation.classify import classifier
    from ptkit.hub.export import export_run
    from ptkit.hub.transfer import pull, push
    from ptkit.hub.verify import verify
    from ptkit.loaded_adapter import LoadedAdapter, load_adapter
    from ptkit.prefix import KVPrefix
    from ptkit.recipe.load import load_recipe
    from ptkit.runtime.base_model import load_base
    from ptkit.training.distill import distill
    from ptkit.training.multitask import multitask

__all__ = [
    "AdapterBank",
    "Comparison",
    "Conversation",
    "KVPrefix",
    "LoadedAdapter",
    "Run",
    "classifier",
    "compare",
    "distill",
    "draft_recipe",
    "export_run",
    "load_adapter",
    "load_base",
    "load_recipe",
    "multitask",
    "parameter_groups",
    "pull",
    "push",
    "train",
    "trainable_model",
    "verify",
]

_HOMES = {
    "Comparison": "ptkit.api",
    "LoadedAdapter": "ptkit.loaded_adapter",
    "Run": "ptkit.api",
    "compare": "ptkit.api",
    "load_adapter": "ptkit.loaded_adapter",
    "train": "ptkit.api",
    "parameter_groups": "ptkit.adapted",
    "trainable_model": "ptkit.adapted",
    "classifier": "ptkit.evaluation.classify",
    "distill": "ptkit.training.distill",
    "draft_recipe": "ptkit.drafting.draft",
    "multitask": "ptkit.training.multitask",
    "export_run": "ptkit.hub.export",
    "pull": "ptkit.hub.transfer",
    "push": "ptkit.hub.transfer",
    "verify": "ptkit.hub.verify",
    "AdapterBank": "ptkit.bank",
    "Conversation": "ptkit.bank",
    "KVPrefix": "ptkit.prefix",
    "load_base": "ptkit.runtime.base_model",
    "load_recipe": "ptkit.recipe.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `ptkit` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
