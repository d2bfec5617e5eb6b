"""What was learnt from is not measured on, or every figure says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import random_base
from hypothesis import given
from hypothesis import strategies as st
from test_cli import ptkit
from test_compare import recipe_file as recipe_file
from test_distributed import recipe_with_base as recipe_with_base

from ptkit.data.leaks import LONG, require_unlearnt
from ptkit.errors import DataError
from ptkit.formats.cell_record import CELL_RECORD
from ptkit.formats.figures import scored_rows
from ptkit.metrics.registry import metric
from ptkit.recipe.load import load_recipe
from ptkit.training.experiment import prepare
from ptkit.training.own_recipe import with_test_rows

GOOD = "methods=[{kind: base}, {kind: prompt_tuning, num_virtual_tokens: 2}]"


@pytest.fixture
def data(recipe_file: Path, tmp_path: Path) -> Path:
    """A recipe of its own, whose files may be changed."""
    shutil.copytree(recipe_file.parent, tmp_path / "data")
    return tmp_path / "data" / "recipe.yaml"


def copy_rows(source: Path, target: Path, count: int) -> None:
    """Put the first rows of `source` into `target`, too."""
    rows = source.read_text().splitlines(keepends=True)[:count]
    target.write_text("".join(rows) + target.read_text())


def test_test_rows_of_other_splits_are_counted_by_their_content(data: Path) -> None:
    base, loaded = random_base("llama"), load_recipe(data, [GOOD])
    assert prepare(loaded, base).data.test_repeats == {}
    folder = data.parent
    copy_rows(folder / "test.jsonl", folder / "validation.jsonl", 2)
    copy_rows(folder / "test.jsonl", folder / "train.jsonl", 1)
    experiment = prepare(loaded, base)
    assert experiment.data.test_repeats == {"train": 1, "validation": 2}
    other = prepare(with_test_rows(loaded, folder / "test.jsonl"), base)
    assert other.data.test_repeats == {}, "rows to score alone are in no other split"
    warnings = [line for line in experiment.data_lines() if "rows too" in line]
    assert [line.split(":")[0] for line in warnings] == ["warning", "warning"]


def test_every_caption_names_test_rows_that_are_validation_rows(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    recipe, *base = recipe_with_base
    folder = tmp_path / "data"
    shutil.copytree(Path(recipe).parent, folder)
    copy_rows(folder / "test.jsonl", folder / "validation.jsonl", 3)
    words = [w for a in base for w in ("--set", a)]
    recipe = str(folder / Path(recipe).name)
    said = "test rows, of which 3 are validation rows too"
    assert said in ptkit("evaluate", recipe, *words, cwd=tmp_path).stdout
    told = json.loads(ptkit("evaluate", recipe, *words, "--json", cwd=tmp_path).stdout)
    assert told["test_repeats"] == {"validation": 3}
    settings = ["--set", "methods=[{kind: base}]", "--set", "seeds=[0]", "--out", "out"]
    ptkit("compare", recipe, *words, *settings, cwd=tmp_path)
    for name in ("table.md", "table.tex", "report.html"):
        assert said in (tmp_path / "out" / name).read_text(), name


def test_rows_in_words() -> None:
    assert scored_rows("test", False, {}) == "test rows"
    both = scored_rows("dev", False, {"train": 1200, "validation": 3})
    assert both == (
        "test rows (the source's split `dev`), of which 1,200 are training rows too and 3 are "
        "validation rows too"
    )


def test_a_record_without_counts_is_brought_up_to_date() -> None:
    fields = {name: None for name, f in CELL_RECORD.model.model_fields.items() if f.is_required()}
    migrated = {**fields, "format": 1}
    for step in CELL_RECORD.migrations[1:]:
        migrated = step(migrated)
    assert migrated["test_repeats"] == {}
    assert migrated["scored_by"] is None
    assert migrated["learnt_rows"] is None


LINE = "the quick brown fox jumps over the lazy dog again"


@pytest.mark.parametrize("where", ["train.retain.text", "the training rows"])
def test_text_that_is_learnt_is_not_measured_on_whatever_its_file_is_called(
    data: Path, where: str
) -> None:
    folder, sets = data.parent, [GOOD]
    general = (folder / "general.txt").read_text()
    if where == "the training rows":
        row = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
        line = json.dumps({**row, "words": f"{row['words']}\n{LINE}\nw1"})
        (folder / "train.jsonl").write_text(line + "\n" + (folder / "train.jsonl").read_text())
        (folder / "general.txt").write_text(f"{general}\n  {LINE} \n")
    else:
        (folder / "copy.txt").write_text(f"{general}\n")
        sets.append("train.retain={text: copy.txt}")
    with pytest.raises(DataError, match=where) as error:
        prepare(load_recipe(data, sets), random_base("llama"))
    assert "`general`" in str(error.value)


def test_the_text_that_ships_is_not_learnt_under_another_name(data: Path) -> None:
    from ptkit.data.general_text import GENERAL_EN, general_text

    (data.parent / "mine.txt").write_text(general_text(GENERAL_EN, data.parent))
    with pytest.raises(DataError, match="general-en"):
        prepare(load_recipe(data, [GOOD, "train.retain={text: mine.txt}"]), random_base("llama"))


WORD = st.text("abcdefgh", min_size=1, max_size=9)
LINES = st.lists(st.lists(WORD, min_size=12, max_size=14).map(" ".join), min_size=1, max_size=5)


@given(LINES, LINES)
def test_text_is_refused_exactly_where_long_lines_are_shared(
    one: list[str], two: list[str]
) -> None:
    shared = {line for line in one if len(line) >= LONG} & {*two}
    whole = not any(len(line) >= LONG for line in one) and " ".join(one) == " ".join(two)
    texts = "\n".join(one), "\n".join(f" {line}  " for line in two)
    if shared or whole:
        with pytest.raises(DataError, match="also"):
            require_unlearnt({"also": texts[0]}, [texts[1]], "training")
    else:
        require_unlearnt({"also": texts[0]}, [texts[1]], "training")


def test_a_heading_in_both_texts_is_no_leak() -> None:
    heading = "Copyright of all of the following, by its authors"
    measured = "\n".join([heading, *(f"{i} {LINE} and one more time" for i in range(100))])
    require_unlearnt({"a": measured}, [f"{heading}\nand {LINE}"], "training")


def test_your_own_metrics_source_is_part_of_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    said = set()
    for number, body in enumerate(("return 1.0", "return 2.0", "return 1.0")):
        name = f"measure_{number}"
        (tmp_path / f"{name}.py").write_text(f"def mine(prediction, references):\n    {body}\n")
        said.add(metric(f"{name}:mine").signature([["a"]]).split("source ")[1])
        sys.modules.pop(name)
    assert len(said) == 2
