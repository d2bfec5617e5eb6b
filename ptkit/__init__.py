"""Prompt tuning, prefix tuning and P-tuning on a frozen language model.

The names below are loaded when first used, so that importing ptkit costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptkit.bank import AdapterBank, Conversation
    from ptkit.prefix import KVPrefix
    from ptkit.recipe import load_recipe
    from ptkit.recipe.schema import ModelSection
    from ptkit.runtime.base_model import load_base

__all__ = ["AdapterBank", "Conversation", "KVPrefix", "ModelSection", "load_base", "load_recipe"]

_HOMES = {
    "AdapterBank": "ptkit.bank",
    "Conversation": "ptkit.bank",
    "KVPrefix": "ptkit.prefix",
    "ModelSection": "ptkit.recipe.schema",
    "load_base": "ptkit.runtime.base_model",
    "load_recipe": "ptkit.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `ptkit` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
