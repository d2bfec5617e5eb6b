"""The layers of the design: imports point downwards, and the command line starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ptkit

PACKAGE = Path(ptkit.__file__).parent

#: Upper layers first; a module may import from its own layer and from those below.
LAYERS = [
    {"cli"},
    {"api"},
    {"bench", "families", "hub"},
    {"serve"},
    {"comparison"},
    {"training"},
    {"evaluation"},
    {"bank"},
    {"methods"},
    {"runtime"},
    {"prefix"},
    {"data"},
    {"recipe", "formats"},
    {"errors"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def runtime_imports(tree: ast.Module) -> set[str]:
    """Modules a file imports when it runs: those under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def test_imports_point_downwards() -> None:
    checked, wrong = 0, []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 1 and parts[0].startswith("__"):
            continue  # the package's own doors, open to every layer
        for module in runtime_imports(ast.parse(path.read_text())):
            names = module.split(".")
            if names[0] != "ptkit" or len(names) < 2:
                continue
            checked += 1
            if RANK[names[1]] < RANK[parts[0]]:
                wrong.append(f"{'.'.join(parts)} imports {module}")
    assert checked > 50
    assert not wrong


def test_command_line_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, ptkit.cli.main\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pydantic', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_answers_in_under_half_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ptkit", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - started

    # The best of several: other tests share the machine.
    assert min(seconds() for _ in range(5)) < 0.5


def test_public_names_are_real_and_importing_the_package_is_free() -> None:
    assert sorted(ptkit.__all__) == sorted(ptkit._HOMES)
    for name in ptkit.__all__:
        assert getattr(ptkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        ptkit.nothing  # noqa: B018
    code = "import sys, ptkit; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
