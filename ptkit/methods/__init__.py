"""What is learnt: one file per method, found here by being in this folder.

Importing this package registers every method's settings (for recipes) and adapter class.
"""

from importlib import import_module
from pkgutil import iter_modules

from ptkit.methods.adapter import (
    ADAPTERS,
    Adapter,
    Demonstrations,
    adapter_from_files,
    base_of,
    changes_weights,
    compile_files,
    create_adapter,
    load_adapter,
    parts_of,
    require_method_fits,
    require_same_base,
    restored,
    revision_named,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

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
    "parts_of",
    "require_method_fits",
    "require_same_base",
    "restored",
    "revision_named",
]
