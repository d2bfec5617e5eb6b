"""The layers of the design: imports point downwards, and the command line starts light."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import forked
import pytest

import ptkit

PACKAGE = Path(ptkit.__file__).parent

#: Upper layers first; a module may import from its own layer and from those below. A name stands
#: for everything in it that no longer name stands for; `*` is any one part of a name.
LAYERS = [
    {"cli"},
    {"api", "adapted", "loaded_adapter"},
    {"bench", "families", "hub"},
    {"serve"},
    {"vllm_connector"},
    {"comparison"},
    {"drafting"},
    {"training"},
    {"evaluation"},
    {"metrics.*"},
    {"bank"},
    {"methods"},
    {"runtime"},
    {"prefix", "prefix_batch"},
    {"data"},
    {"recipe", "formats"},
    {"methods.catalogue", "metrics"},
    {"methods.*.settings", "methods.prompt_settings"},
    {"section", "options", "plugins", "extras", "declared", "launched", "playground"},
    {"errors"},
]
#: Free of every layer: the package's own doors, which load what is asked of them.
DOORS = {"ptkit", "ptkit.__main__"}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements right within `node`, and what holds some: none is within an expression."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        yield from (inner for inner in getattr(node, name, ()) if isinstance(inner, ast.AST))


@functools.cache
def rank(module: str) -> int:
    """The layer of a module, the uppermost being 0."""
    parts = module.split(".")[1:]
    fitting = [
        (name.count("."), layer)
        for layer, names in enumerate(LAYERS)
        for name in names
        if all(n in ("*", p) for n, p in zip(name.split("."), parts, strict=False))
        and name.count(".") < len(parts)
    ]
    return max(fitting)[1]


@functools.cache
def imported(tree: ast.Module) -> set[str]:
    """Names that a file imports when it runs, within functions and by `import_module` too; those
    under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                found.add(str(name.value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if name.split(".")[0] == "ptkit"}


@functools.cache
def homes(module: str) -> dict[str, str]:
    """What a package's `__init__` loads when it is asked for: name -> module."""
    for node in parsed(MODULES[module]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return dict(ast.literal_eval(node.value))
    return {}


def module_of(name: str) -> str:
    """The module that `name`, a module or something in one, comes from."""
    if name in MODULES:
        return name
    module, _, own = name.rpartition(".")
    assert module in MODULES, f"{name} is nowhere"
    return homes(module).get(own, module)


@functools.cache
def uses(module: str, tree: ast.Module) -> set[str]:
    """The modules that `module` needs loaded, with the packages that those lie in."""
    needed = {module_of(name) for name in imported(tree)}
    for name in [*needed]:
        parts = name.split(".")
        packages = {".".join(parts[:i]) for i in range(1, len(parts))}
        needed |= {p for p in packages if not f"{module}.".startswith(f"{p}.")}
    return needed - {module}


def test_imports_point_downwards() -> None:
    checked, wrong = 0, []
    for module, path in MODULES.items():
        if module in DOORS:
            continue
        for name in imported(parsed(path)):
            needed = module_of(name)
            if needed in DOORS:
                continue
            checked += 1
            if rank(needed) < rank(module):
                wrong.append(f"{module} imports {needed}")
    assert checked > 500
    assert not wrong


def test_no_module_needs_itself_by_way_of_others() -> None:
    needs = {m: uses(m, parsed(path)) - DOORS for m, path in MODULES.items()}
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


#: What measures the package, and the commands for it.
MEASURING = ("ptkit.bench", "ptkit.families")
COMMANDS_THAT_MEASURE = {"ptkit.cli.main", "ptkit.cli.bench", "ptkit.cli.models"}


def test_what_measures_the_package_is_needed_by_none_of_it() -> None:
    checked = 0
    for module, path in MODULES.items():
        if module.startswith(MEASURING) or module in COMMANDS_THAT_MEASURE:
            continue
        checked += 1
        needed = uses(module, parsed(path))
        assert not [name for name in needed if name.startswith(MEASURING)], module
    assert checked > 200


def test_the_package_and_its_commands_load_nothing_that_measures_it() -> None:
    code = (
        "import sys, ptkit, ptkit.cli.main\n"
        "[getattr(ptkit, name) for name in ptkit.__all__]\n"
        f"measuring = [m for m in sys.modules if m.startswith({MEASURING})]\n"
        "sys.exit(f'loaded {measuring}' if measuring else 0)"
    )
    without = {**os.environ, forked.WITHOUT_PTKIT: "1"}
    forked.run([sys.executable, "-c", code], env=without, check=True)


#: Lines of a module beyond which its docstring says why it is one.
LONGEST = 400


def test_long_modules_say_why() -> None:
    assert MODULES
    for module, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        told = ast.get_docstring(parsed(path)) or ""
        assert lines <= LONGEST or "lines, because" in told, f"{module} has {lines} lines"


def test_imports_within_functions_and_by_name_are_seen() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ptkit.cli import main
def late():
    import importlib
    from ptkit.bank import AdapterBank
    importlib.import_module("ptkit.methods.registry")
    importlib.import_module("numpy")
"""
    found = imported(ast.parse(source))
    assert {module_of(name) for name in found} == {"ptkit.bank", "ptkit.methods.registry"}
    assert module_of("ptkit.methods.ADAPTERS") == "ptkit.methods.registry"
    assert rank("ptkit.methods.lora.settings") > rank("ptkit.recipe.schema")
    assert rank("ptkit.recipe.schema") > rank("ptkit.methods.lora.adapter")


#: What no recipe needs.
TENSOR_LIBRARIES = {
    "torch", "transformers", "peft", "datasets", "accelerate", "numpy", "pandas", "pyarrow",
    "scipy", "sklearn", "safetensors", "huggingface_hub",
}  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "from ptkit.recipe.load import load_recipe, shipped_recipes\n"
        "for path in shipped_recipes().values(): load_recipe(path)",
        "from ptkit.recipe.json_schema import recipe_json_schema\nrecipe_json_schema()",
        "run('recipes', 'list')",
        "run('recipes', 'show', 'quickstart')",
        "run('recipes', 'copy', 'quickstart', '{tmp}/recipe.yaml')",
        "run('recipes', 'schema')",
        "run('--help')",
    ],
)
def test_recipes_are_read_without_a_tensor_library(code: str, tmp_path: Path) -> None:
    harness = (
        "def run(*words):\n"
        "    from typer.testing import CliRunner\n"
        "    from ptkit.cli.main import app\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        f"{code.format(tmp=tmp_path)}"
    )
    require_light(harness, TENSOR_LIBRARIES)


def require_light(code: str, heavy: set[str]) -> None:
    """Run `code` in a process of its own, in which nothing of `heavy` may be loaded then."""
    told = f"found = {heavy} & set(sys.modules)\nsys.exit(f'loaded {{found}}' if found else 0)"
    subprocess.run([sys.executable, "-c", f"import sys\n{code}\n{told}"], check=True)


def test_a_report_is_made_without_what_models_need() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate"}
    require_light("from ptkit.comparison import merge, outputs, overview", heavy)


def test_settings_of_a_method_are_read_without_its_adapter() -> None:
    code = (
        "import sys\n"
        "from ptkit.methods.catalogue import method_sections\n"
        "assert 'lora' in method_sections()\n"
        "sys.exit(str([m for m in sys.modules if m.endswith('.adapter')] or ''))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not told.stderr.strip()


def test_command_line_help_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "pydantic", "numpy"}
    require_light("import ptkit.cli.main", heavy)


def test_help_answers_in_under_half_a_second() -> None:
    """On a machine that loads Typer itself in a fifth of one; a slower one is given more."""

    def seconds(*words: str) -> float:
        """Of the processor: other tests share the machine, and what they take is not ours."""
        before = os.times()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return (after.children_user + after.children_system) - (
            before.children_user + before.children_system
        )

    bare = min(seconds("-c", "import typer.main, typer.rich_utils") for _ in range(3))
    assert min(seconds("-m", "ptkit", "--help") for _ in range(3)) < max(0.5, 2.5 * bare)


def test_public_names_are_real_and_importing_the_package_is_free() -> None:
    assert sorted(ptkit.__all__) == sorted(ptkit._HOMES)
    for name in ptkit.__all__:
        assert getattr(ptkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        ptkit.nothing  # noqa: B018
    code = "import sys, ptkit; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
