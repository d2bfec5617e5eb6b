"""The score over seconds and over supervised tokens, as a comparison draws it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptkit import api
from ptkit.evaluation.predict import predict
from ptkit.evaluation.score import corpus_score
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.cell_record import CellRecord
from ptkit.methods import adapter_from_files
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import EvaluateSection
from ptkit.training import run as training_run
from ptkit.training.cell import Cell
from ptkit.training.experiment import Experiment, prepare

#: One pass over the rows, validated and scored twice.
SMALL = [
    "train.steps=6", "train.batch_size=4", "train.eval_every=3", "task.max_target_tokens=8",
    "task.data.limits={train: 24, validation: 6, test: 4}", "retention=null", "seeds=[0]",
]  # fmt: skip
METHODS = "methods=[{kind: base}, {kind: prefix_tuning, start: task}, {kind: prompt_tuning}]"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    api.compare("table-to-text", out=out, overrides=[*SMALL, METHODS, "evaluate.curve_rows=5"])
    return out


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return prepare(load_recipe("table-to-text", [*SMALL, "evaluate.curve_rows=5"]))


def read_records(out: Path) -> list[CellRecord]:
    return [CellRecord.read(path) for path in (out / "cells").glob("*/record.json")]


def record_of(out: Path, cell: str) -> CellRecord:
    return CellRecord.read(out / "cells" / cell / "record.json")


def test_a_point_tells_what_it_took_and_how_good_it_is(
    compared: Path, experiment: Experiment
) -> None:
    record = record_of(compared, "prefix_tuning-seed0")
    first, last = record.scored
    assert [first.step, last.step] == [3, 6] == [point.step for point in record.curve]
    assert 0 < first.seconds < last.seconds == pytest.approx(record.train_seconds)
    learnt = experiment.training(0).encoded
    assert last.supervised_tokens == sum(len(row.target_ids) for row in learnt)
    assert 0 < first.supervised_tokens < last.supervised_tokens
    assert record.best_step == last.step, "the adapter on disk is the one that was scored last"
    files = read_adapter(compared / "cells/prefix_tuning-seed0/adapter")
    rows = experiment.data.validation[:5]
    predictions = predict(
        adapter_from_files(files, experiment.base), rows, experiment.recipe.task, 64
    )
    assert last.score == pytest.approx(corpus_score(predictions, "bleu"), abs=1e-6)
    (base,) = (record for record in read_records(compared) if record.kind == "base")
    assert not base.scored


def test_it_is_drawn_where_every_method_that_learns_has_it(compared: Path, tmp_path: Path) -> None:
    names = {path.name for path in (compared / "plots").glob("*.svg")}
    assert {"bleu-over-seconds.svg", "bleu-over-supervised-tokens.svg"} <= names
    assert "evaluate.curve_rows" in (compared / "report.html").read_text()
    api.compare("table-to-text", out=tmp_path, overrides=[*SMALL, METHODS])
    assert not [*(tmp_path / "plots").glob("*over-seconds*")]


def test_scoring_changes_nothing_about_the_run(compared: Path, tmp_path: Path) -> None:
    api.compare("table-to-text", out=tmp_path, overrides=[*SMALL, METHODS])
    for cell in ("prefix_tuning-seed0", "prompt_tuning-seed0"):
        plain, scored = record_of(tmp_path, cell), record_of(compared, cell)
        assert (plain.curve, plain.metrics) == (scored.curve, scored.metrics)
        file = f"cells/{cell}/adapter/adapter_model.safetensors"
        for name, value in load_file(tmp_path / file).items():
            assert torch.equal(value, load_file(compared / file)[name])


def test_a_run_that_was_killed_keeps_the_points_from_before(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(experiment.recipe.methods[2], 0, tmp_path / "cell")
    scored: list[float] = []

    def score(*_: object) -> float:
        scored.append(7.0 + len(scored))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return scored[-1]

    monkeypatch.setattr(training_run, "validation_score", score)
    settings = experiment.recipe.train.model_copy(update={"save_every": 3})
    recipe = experiment.recipe.model_copy(update={"train": settings})
    changed = replace(experiment, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        training_run.run_cells(changed, [cell])
    (record,) = training_run.run_cells(changed, [cell])
    assert [(point.step, point.score) for point in record.scored] == [(3, 7.0), (6, 9.0)]


def test_trials_of_a_search_are_not_scored(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "validation_score", lambda *_: pytest.fail("a trial"))
    cell = Cell(experiment.recipe.methods[2], 0, tmp_path / "trial")
    assert training_run.run_trial(experiment, cell) > 0


def test_comparisons_of_earlier_versions_go_on() -> None:
    assert "curve_rows" not in EvaluateSection().model_dump()
    assert EvaluateSection(curve_rows=5).model_dump()["curve_rows"] == 5
