"""What is compared was scored on the same rows, with the same base; else it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import random_base
from test_cli import ptkit
from test_compare import recipe_file as recipe_file

from ptkit.comparison.grid import run_grid
from ptkit.comparison.merge import merge, read_comparison
from ptkit.comparison.outputs import write_outputs
from ptkit.errors import FolderError, UserError
from ptkit.evaluation.retention import LanguageModelling, Retention
from ptkit.recipe.load import load_recipe
from ptkit.training.experiment import prepare
from ptkit.training.observer import RunObserver
from ptkit.training.run_folder import open_run_folder

GOOD = "methods=[{kind: base}, {kind: prompt_tuning, num_virtual_tokens: 2}]"


@pytest.fixture
def data(recipe_file: Path, tmp_path: Path) -> Path:
    """A recipe of its own, whose files may be changed."""
    shutil.copytree(recipe_file.parent, tmp_path / "data")
    return tmp_path / "data" / "recipe.yaml"


def reverse(path: Path) -> None:
    """Put the lines of a file in the other order: as many, of the same kind."""
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def reverse_words(path: Path) -> None:
    path.write_text(" ".join(reversed(path.read_text().split())))


CHANGES = [
    ("test.jsonl", reverse, "test_rows"),
    ("general.txt", reverse_words, "retention_text"),
    ("train.jsonl", reverse, "data_fingerprint"),
]


class StopAfter(RunObserver):
    def cell_finished(self, record: object, reused: bool) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("file", "change", "said"), CHANGES)
def test_a_comparison_does_not_go_on_with_other_rows_or_texts(
    data: Path, tmp_path: Path, file: str, change, said: str
) -> None:
    loaded = load_recipe(data, [GOOD])
    with pytest.raises(KeyboardInterrupt):
        run_grid(loaded, tmp_path / "out", base=random_base("llama"), observer=StopAfter())
    change(data.parent / file)
    with pytest.raises(FolderError, match=f"differs in `{said}`"):
        run_grid(loaded, tmp_path / "out", base=random_base("llama"))
    assert len(list((tmp_path / "out").rglob("record.json"))) == 1


def test_fingerprints_are_of_all_that_is_scored(data: Path) -> None:
    base, loaded = random_base("llama"), load_recipe(data, [GOOD])
    first = prepare(loaded, base)
    rows = [json.loads(line) for line in (data.parent / "test.jsonl").read_text().splitlines()]
    seen = {first.test_fingerprint()}
    for key, value in (("words", "w1 w2"), ("answer", "w3"), ("references", ["w4"])):
        changed = [{**rows[0], key: value}, *rows[1:]]
        (data.parent / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
        seen.add(prepare(loaded, base).test_fingerprint())
    assert len(seen) == 4
    assert first.retention_fingerprint() == prepare(loaded, base).retention_fingerprint()


@pytest.fixture(scope="module")
def parts(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons of two seeds: as they should be, of other test rows, texts and bases."""
    home = tmp_path_factory.mktemp("parts")
    shutil.copytree(recipe_file.parent, home / "data")

    def run(name: str, seed: int, base_seed: int = 0) -> None:
        loaded = load_recipe(home / "data/recipe.yaml", [GOOD, f"seeds=[{seed}]"])
        run_grid(loaded, home / name, base=random_base("llama", base_seed))

    run("here", 0)
    run("same", 1)
    run("base", 1, base_seed=1)
    reverse(home / "data" / "test.jsonl")
    run("test", 1)
    reverse(home / "data" / "test.jsonl")
    reverse_words(home / "data" / "general.txt")
    run("general", 1)
    reverse_words(home / "data" / "general.txt")
    reverse(home / "data" / "train.jsonl")
    run("train", 1)
    reverse(home / "data" / "train.jsonl")
    shutil.copytree(home / "same", home / "metric")
    for path in (home / "metric").rglob("record.json"):  # as another release of a library
        values = json.loads(path.read_text())
        values["scored_by"] = {name: f"{text}!" for name, text in values["scored_by"].items()}
        path.write_text(json.dumps(values))
    return home


WRONG = {
    "test": "test rows", "general": "general text for retention", "base": "base model",
    "train": "training and validation rows", "metric": "meaning of the metrics",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_cells_of_other_rows_texts_or_bases_are_not_merged(
    parts: Path, tmp_path: Path, wrong: str
) -> None:
    both = [read_comparison(parts / "here"), read_comparison(parts / wrong)]
    with pytest.raises(UserError, match=WRONG[wrong]) as error:
        merge(both, tmp_path / "out")
    assert str(parts / "here") in str(error.value)
    assert str(parts / wrong) in str(error.value)
    assert not (tmp_path / "out").exists()
    assert len(merge([both[0], read_comparison(parts / "same")], tmp_path / "good").records) == 3


@pytest.mark.parametrize("wrong", WRONG)
def test_no_report_is_made_of_cells_that_are_not_comparable(
    parts: Path, tmp_path: Path, wrong: str
) -> None:
    shutil.copytree(parts / "here", tmp_path / "out")
    recipe = (tmp_path / "out/recipe.yaml").read_text()
    (tmp_path / "out/recipe.yaml").write_text(recipe.replace("seeds:\n- 0", "seeds:\n- 0\n- 1"))
    cell = "prompt_tuning-seed1"
    shutil.copytree(parts / wrong / "cells" / cell, tmp_path / "out/cells" / cell)
    told = ptkit("report", "out", cwd=tmp_path, code=2).stderr
    assert "not comparable" in told
    assert WRONG[wrong] in told
    assert cell in told


def without_fingerprints(folder: Path) -> None:
    """As an earlier version wrote the records and claims in `folder`."""
    for path in [*folder.rglob("record.json"), *folder.rglob("cell.json")]:
        values = json.loads(path.read_text())
        for key in ("format", "test_rows", "retention_text", "retain_text"):
            values.pop(key, None)
        if path.name == "cell.json":
            del values["metrics"]
        if path.name == "record.json":
            for key in ("base_fingerprint", "learnt_rows", "scored_by", "test_repeats"):
                del values[key]
        path.write_text(json.dumps(values))


def test_records_without_fingerprints_are_read_and_said_to_be_unknown_in_one_line(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("here", "same", "test"):
        shutil.copytree(parts / name, tmp_path / name)
        without_fingerprints(tmp_path / name)
    loaded = load_recipe(parts / "data/recipe.yaml", [GOOD, "seeds=[0]"])
    records = list(read_comparison(tmp_path / "here").records)
    assert [r.test_rows for r in records] == [None, None]
    write_outputs(tmp_path / "here", records, loaded.recipe)
    merged = merge([read_comparison(tmp_path / name) for name in ("here", "same")], tmp_path / "m")
    assert len(merged.records) == 3
    (line,) = [r.getMessage() for r in caplog.records if "earlier version" in r.getMessage()]
    assert line.startswith("2 of 2 records")
    # What was written of the rows tells them apart all the same.
    with pytest.raises(UserError, match="test rows"):
        merge([read_comparison(tmp_path / name) for name in ("here", "test")], tmp_path / "n")


def test_a_comparison_of_an_earlier_version_goes_on(data: Path, tmp_path: Path) -> None:
    loaded = load_recipe(data, [GOOD])
    with pytest.raises(KeyboardInterrupt):
        run_grid(loaded, tmp_path / "out", base=random_base("llama"), observer=StopAfter())
    without_fingerprints(tmp_path / "out")
    records = run_grid(loaded, tmp_path / "out", base=random_base("llama"))
    assert [r.test_rows is None for r in records] == [True, False, False]
    write_outputs(tmp_path / "out", records, loaded.recipe)


@pytest.mark.parametrize("lead", [0, 1])
def test_forgetting_of_an_earlier_version_is_not_compared_where_its_meaning_changed(
    parts: Path, tmp_path: Path, lead: int
) -> None:
    """Earlier versions put no begin-of-text token before a text, and did not say so."""
    for name in ("here", "same"):
        shutil.copytree(parts / name, tmp_path / name)
        for path in (tmp_path / name).rglob("record.json"):
            values = json.loads(path.read_text())
            assert values.pop("format") == 2
            assert values["retention"].pop("lead") == 0
            if name == "here":
                values["retention"]["lead"] = lead
            path.write_text(json.dumps(values))
    both = [read_comparison(tmp_path / name) for name in ("here", "same")]
    if not lead:
        assert len(merge(both, tmp_path / "out").records) == 3
        return
    with pytest.raises(UserError, match=r"meaning of forgetting \(how many begin-of-text tokens"):
        merge(both, tmp_path / "out")


@pytest.mark.parametrize("after", [0.0, 0.25])
def test_no_share_is_kept_of_a_base_that_predicts_no_token(
    after: float, tmp_path: Path, parts: Path
) -> None:
    base, adapter = (LanguageModelling(4.0, a, 100) for a in (0.0, after))
    found = Retention({"text": base}, {"text": adapter}, 0.0, 100).as_dict()
    assert found["retention"] is None
    assert found["domains"]["text"]["retention"] is None
    assert found["forgetting"] == 0.0
    shutil.copytree(parts / "here", tmp_path / "out")
    for path in (tmp_path / "out").rglob("record.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"retention": found}))
    whole = read_comparison(tmp_path / "out")
    write_outputs(tmp_path / "out", list(whole.records), whole.loaded.recipe)
    assert (tmp_path / "out/report.html").is_file()


def test_what_differs_is_told_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    method = {"kind": "prefix_tuning", "num_virtual_tokens": 10, "start": "task"}
    open_run_folder(path, {"method": method, "seed": 0}, "run")
    open_run_folder(path, {"method": method, "seed": 0}, "run")
    changed = {**method, "num_virtual_tokens": 5, "start_text": "x" * 100}
    with pytest.raises(FolderError) as refused:
        open_run_folder(path, {"method": changed, "seed": 0}, "run")
    assert "differs in `method`; `method.num_virtual_tokens` is 10 there and 5 here, " in str(
        refused.value
    )
    assert f'`method.start_text` is null there and "{"x" * 36}... here' in str(refused.value)
