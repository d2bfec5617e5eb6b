"""What a command loads before its work begins: no library that its work takes nothing of."""

from __future__ import annotations

import ast
import functools
import io
from pathlib import Path

import pytest
from rich.console import Console

import ptkit
from ptkit.cli.display import LiveDisplay
from ptkit.data import table
from ptkit.training.forecast import Forecast

PACKAGE = Path(ptkit.__file__).parent


def loaded_with(module: str) -> set[str]:
    """`module` and all that is imported when it is, below functions and `TYPE_CHECKING`, and the
    packages around them: dotted names."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += [name.rpartition(".")[0]] if "." in name else []
        path = PACKAGE.parent.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name.split(".")[0] == "ptkit" and file.exists():
            todo += read_at_once(file)
    return found


@functools.cache
def read_at_once(file: Path) -> list[str]:
    return at_once(ast.parse(file.read_text()).body)


def at_once(body: list[ast.stmt]) -> list[str]:
    """What the statements import when they run."""
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            names += at_once(node.body)
    return names


def test_what_is_imported_at_once_is_seen() -> None:
    assert {"peft", "ptkit.methods.peft_layers", "torch"} <= loaded_with(
        "ptkit.methods.lora.adapter"
    )
    assert {"datasets", "pandas"} <= loaded_with("ptkit.data.hub_rows")


@pytest.mark.parametrize("module", [
    "ptkit.bank.bank", "ptkit.bank.lora_rows", "ptkit.evaluation.evaluate",
    "ptkit.evaluation.alone", "ptkit.methods.own_base", "ptkit.methods.prefix_tuning.adapter",
    "ptkit.methods.prompt_tuning.adapter", "ptkit.methods.p_tuning.adapter",
])  # fmt: skip
def test_answering_with_a_prefix_loads_neither_peft_nor_libraries_of_tables(module: str) -> None:
    assert not loaded_with(module) & {"peft", "datasets", "pandas"}


def test_training_from_files_of_json_loads_no_library_of_tables() -> None:
    assert not loaded_with("ptkit.api") & {"datasets", "pandas"}
    assert not loaded_with("ptkit.drafting.draft") & {"datasets", "pandas"}


def test_a_class_of_a_library_that_nobody_loaded_has_no_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pandas

    assert table.is_of(pandas.DataFrame(), "pandas.DataFrame")
    assert not table.is_of([], "pandas.DataFrame")
    monkeypatch.delitem(table.sys.modules, "pandas")
    assert not table.is_of([], "pandas.DataFrame")


@pytest.mark.parametrize(("cells", "price", "told"), [
    (1, None, False), (1, 2.0, True), (2, None, True),
])  # fmt: skip
def test_a_single_run_begins_at_once_and_is_measured_for_its_price_only(
    cells: int, price: float | None, told: bool
) -> None:
    display, out = LiveDisplay(cells, price_per_hour=price), io.StringIO()
    display.console = Console(file=out)
    display.planned(lambda: Forecast(cells, 0, 60.0, None, {}, ()))
    assert ("to go: about" in out.getvalue()) is told
