"""What modules say of themselves, read from their source: nothing is imported for it."""

from __future__ import annotations

import ast
from pathlib import Path
from pkgutil import iter_modules
from typing import Any


def declared(folder: Path, constant: str) -> dict[str, Any]:
    """The literal that each module of `folder` assigns to `constant`, of those that do, in
    alphabetical order of the modules. `__doc__` stands for the first line of the docstring."""
    found = {}
    for name in sorted(module.name for module in iter_modules([str(folder)])):
        file = folder / f"{name}.py"
        if not file.is_file():
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if constant == "__doc__":
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
        for node in tree.body:
            if isinstance(node, ast.Assign) and constant in {ast.unparse(t) for t in node.targets}:
                found[name] = ast.literal_eval(node.value)
    return found
