"""What is learnt: one folder per method, found by being here.

The names below are loaded when first used. The settings of methods are in this package too, and
reading a recipe loads no tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptkit.methods.adapter import Adapter, Demonstrations
    from ptkit.methods.of_base import (
        base_of,
        load_adapter,
        refused_base,
        require_same_base,
        revision_named,
    )
    from ptkit.methods.registry import (
        ADAPTERS,
        adapter_from_files,
        changes_weights,
        compile_files,
        create_adapter,
        mixes_in_batch,
        parts_of,
        require_method_fits,
        restored,
    )

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Demonstrations",
    "adapter_from_files",
    "base_of",
    "changes_weights",
    "compile_files",
    "create_adapter",
    "load_adapter",
    "mixes_in_batch",
    "parts_of",
    "refused_base",
    "require_method_fits",
    "require_same_base",
    "restored",
    "revision_named",
]

_HOMES = {
    "Adapter": "ptkit.methods.adapter",
    "Demonstrations": "ptkit.methods.adapter",
    "ADAPTERS": "ptkit.methods.registry",
    "adapter_from_files": "ptkit.methods.registry",
    "changes_weights": "ptkit.methods.registry",
    "compile_files": "ptkit.methods.registry",
    "create_adapter": "ptkit.methods.registry",
    "mixes_in_batch": "ptkit.methods.registry",
    "parts_of": "ptkit.methods.registry",
    "require_method_fits": "ptkit.methods.registry",
    "restored": "ptkit.methods.registry",
    "base_of": "ptkit.methods.of_base",
    "load_adapter": "ptkit.methods.of_base",
    "refused_base": "ptkit.methods.of_base",
    "require_same_base": "ptkit.methods.of_base",
    "revision_named": "ptkit.methods.of_base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `ptkit.methods` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
