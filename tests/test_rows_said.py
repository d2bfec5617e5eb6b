"""Wherever a score is shown it is said which rows it is on: rows that chose are no test rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import ptkit
from test_compare import recipe_file as recipe_file
from test_distributed import recipe_with_base as recipe_with_base
from test_multitask import NAMES, QUICK

from ptkit.bank import AdapterBank
from ptkit.formats.adapter_folder import INFO
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
CHOSE = "validation rows, which also chose the checkpoint"


@pytest.fixture
def chosen_on(tmp_path: Path) -> Path:
    """A shipped adapter whose scores are on the rows that chose its checkpoint."""
    folder = tmp_path / "adapters" / "mine"
    shutil.copytree(SHIPPED / "facts-prefix", folder)
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps({**info, "test_chose": True}))
    return folder


def test_inspect_says_which_rows(chosen_on: Path, tmp_path: Path) -> None:
    assert CHOSE in " ".join(ptkit("inspect", chosen_on, cwd=tmp_path).stdout.split())
    assert json.loads(ptkit("inspect", chosen_on, "--json", cwd=tmp_path).stdout)["test_chose"]
    shipped = " ".join(ptkit("inspect", SHIPPED / "facts-prefix", cwd=tmp_path).stdout.split())
    assert "test rows" in shipped
    assert CHOSE not in shipped


def test_the_playground_is_told_which_rows(chosen_on: Path) -> None:
    bank = AdapterBank(load_base(TINY_EN, device="cpu"))
    engine = Engine(bank, max_rows=1)
    try:
        library = Library(engine, chosen_on.parent, base_name=TINY_EN)
        library.register_all()
        assert library.card("mine").rows == CHOSE
    finally:
        engine.close()
    page = (Path(__file__).parents[1] / "ptkit/playground/page.html").read_text()
    assert "card.rows" in page


def test_evaluate_says_which_rows(recipe_with_base: list[str], tmp_path: Path) -> None:
    recipe, *base = recipe_with_base
    words = [w for a in (*base, "task.data.splits.test=null") for w in ("--set", a)]
    assert f"n=5 {CHOSE}" in ptkit("evaluate", recipe, *words, cwd=tmp_path).stdout
    told = json.loads(ptkit("evaluate", recipe, *words, "--json", cwd=tmp_path).stdout)
    assert told["test_chose"]
    with_test = ptkit("evaluate", recipe, *words[:4], cwd=tmp_path).stdout
    assert "n=7 test rows" in with_test


def test_multitask_says_which_rows(tmp_path: Path) -> None:
    settings = [
        part for value in (*QUICK, "task.data.splits.test=null") for part in ("--set", value)
    ]
    shown = ptkit("multitask", *NAMES, *settings, "--out", "both", cwd=tmp_path).stdout
    assert "scored on" in shown
    assert "test rows" not in shown
    record = json.loads((tmp_path / "both" / "record.json").read_text())
    for name in NAMES:
        assert record["tasks"][name]["test_chose"]
        info = json.loads((tmp_path / "both/tasks" / name / "adapter" / INFO).read_text())
        assert info["test_chose"]
        assert info["test_split"] == "validation"
