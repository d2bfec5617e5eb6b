"""One cell or trial that fails: a row that says so, the others as without it, exit code 1."""

from __future__ import annotations

import csv
import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import random_base
from rich.console import Console
from test_cli import ptkit
from test_compare import recipe_file as recipe_file
from test_distributed import recipe_with_base as recipe_with_base

from ptkit.comparison import on_ray
from ptkit.comparison.cells import failures, plan
from ptkit.comparison.grid import run_grid
from ptkit.comparison.merge import merge, read_comparison
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.overview import write_overview
from ptkit.comparison.table import summary_table
from ptkit.errors import AdapterError, FolderError, PtkitError, UserError
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.load import load_recipe
from ptkit.training.cell import Cell
from ptkit.training.failure import FAILED, attempted
from ptkit.training.observer import RunObserver
from ptkit.training.run import fit

#: A rate at which the second step's loss is no number.
DIVERGING = "{kind: lora, label: wild, rank: 1, learning_rate: 1.0e+30}"
GOOD = "{kind: prompt_tuning, num_virtual_tokens: 2}"
METHODS = f"methods=[{{kind: base}}, {DIVERGING}, {GOOD}]"
WILD = ["wild-seed0", "wild-seed1"]


class Told(RunObserver):
    """What a run says of its cells."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.trials: list[str] = []

    def cell_failed(self, failure: Any) -> None:
        self.failed.append(failure.cell)

    def trial_failed(self, failure: Any) -> None:
        self.trials.append(failure.reason)


def test_a_diverging_cell_is_a_row_everywhere_and_the_others_are_as_without_it(
    recipe_file: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe_file, [METHODS])
    told = Told()
    records = run_grid(loaded, tmp_path / "out", base=random_base("llama"), observer=told)
    without = run_grid(
        load_recipe(recipe_file, [f"methods=[{{kind: base}}, {GOOD}]"]),
        tmp_path / "without", base=random_base("llama"),
    )  # fmt: skip
    assert [(r.cell, r.metrics, r.curve) for r in sorted(records, key=lambda r: r.cell)] == [
        (r.cell, r.metrics, r.curve) for r in sorted(without, key=lambda r: r.cell)
    ]
    failed = failures(loaded.recipe, tmp_path / "out")
    assert [f.cell for f in failed] == told.failed == WILD
    kept = json.loads((tmp_path / "out/cells/wild-seed1" / FAILED).read_text())
    assert kept["error"] == "PtkitError"
    assert kept["reason"].startswith("the loss became")
    assert "learning_rate" in kept["reason"]

    summaries = write_outputs(tmp_path / "out", records, loaded.recipe)
    assert [s.title for s in summaries] == ["base", "prompt_tuning"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(summaries, failed))
    out = tmp_path / "out"
    texts = {name: (out / name).read_text() for name in ("report.html", "table.md", "table.tex")}
    for name, text in {**texts, "terminal": " ".join(console.export_text().split())}.items():
        assert "wild, seed 0" in text, name
        assert "wild, seed 1" in text, name
        assert "the loss became" in text, name
    assert "2 cells failed" in texts["report.html"]
    table = texts["table.md"].splitlines()
    assert len({line.count("|") for line in table[:6]}) == 1
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["cell"] for line in lines if "failed" in line] == WILD
    with (out / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert rows["wild-seed0"]["failed"].startswith("the loss became")
    assert not rows["prompt_tuning-seed0"]["failed"]
    write_overview([read_comparison(out)], tmp_path / "all", "All")
    assert "| wild | failed |" in (tmp_path / "all" / "overview.md").read_text()


def test_compare_ends_with_1_and_names_the_cells_and_a_report_says_so(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    recipe, *base = recipe_with_base
    words = [w for a in (*base, METHODS, "seeds=[0]") for w in ("--set", a)]
    for _ in range(2):  # every retry, too
        done = ptkit("compare", recipe, *words, "--out", "out", "--quiet", cwd=tmp_path, code=1)
        assert "1 cell failed" in done.stderr
        assert "wild-seed0: the loss became" in done.stderr
        assert "wild, seed 0" in done.stdout
        assert "report.html" in done.stdout
    lines = ptkit("compare", recipe, *words, "--out", "out", "--json", cwd=tmp_path, code=1).stdout
    assert [json.loads(line)["cell"] for line in lines.splitlines()][-1] == "wild-seed0"
    told = ptkit("report", "out", cwd=tmp_path)
    assert "1 cell is missing (1 failed)" in told.stderr
    assert "wild, seed 0" in told.stdout


def failing_once(monkeypatch: pytest.MonkeyPatch, which: Any) -> list[int]:
    """Let training fail of no memory where `which` says so of the jobs; how often it has."""
    count = [0]

    def fails(jobs: Any) -> Any:
        if which(jobs):
            count[0] += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
        return fit(jobs)

    monkeypatch.setattr("ptkit.training.run.fit", fails)
    return count


def test_a_failed_cell_is_tried_again_and_the_next_success_removes_the_failure(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe_file, [f"methods=[{{kind: base}}, {GOOD}]"])
    with monkeypatch.context() as patch:
        failing_once(patch, lambda jobs: jobs[0].seed == 0)
        records = run_grid(loaded, tmp_path, base=random_base("llama"))
    assert [r.cell for r in records] == ["base-seed0", "prompt_tuning-seed1"]
    (failure,) = failures(loaded.recipe, tmp_path)
    assert failure.reason == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert any("fails" in line for line in failure.traceback)
    (summary,) = write_outputs(tmp_path, records, loaded.recipe)[1:]
    assert len(summary.records) == 1
    again = run_grid(loaded, tmp_path, base=random_base("llama"))
    assert len(again) == 3
    assert not failures(loaded.recipe, tmp_path)
    assert not list(tmp_path.rglob(FAILED))


def test_of_seeds_in_one_batch_only_the_one_that_fails_is_lost(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"methods=[{GOOD}]", "seeds=[0, 1, 2]"]
    alone = run_grid(load_recipe(recipe_file, settings), tmp_path / "a", base=random_base("llama"))
    loaded = load_recipe(recipe_file, [*settings, "train.together=3"])
    count = failing_once(monkeypatch, lambda jobs: any(job.seed == 1 for job in jobs))
    records = run_grid(loaded, tmp_path / "b", base=random_base("llama"))
    assert count == [2]  # together, and alone
    assert [f.cell for f in failures(loaded.recipe, tmp_path / "b")] == ["prompt_tuning-seed1"]
    assert [(r.cell, r.curve) for r in records] == [(r.cell, r.curve) for r in alone if r.seed != 1]


SEARCH = "budget={trials: 5, sampler: SAMPLER, search: {METHOD: {learning_rate: RATES}}}"


def search(method: str, rates: str, sampler: str = "random") -> str:
    return SEARCH.replace("SAMPLER", sampler).replace("RATES", rates).replace("METHOD", method)


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_a_search_goes_on_without_the_trials_that_diverge_and_keeps_what_it_found(
    recipe_file: Path, tmp_path: Path, sampler: str
) -> None:
    pytest.importorskip("optuna")
    space = search("lora", "[0.01, 1.0e+30]", sampler)
    loaded = load_recipe(recipe_file, ["methods=[{kind: lora, rank: 1}]", space, "seeds=[0]"])
    told = Told()
    (record,) = run_grid(loaded, tmp_path, base=random_base("llama"), observer=told)
    assert record.tuned is not None
    assert record.tuned.settings == {"learning_rate": 0.01}
    failed = len(told.trials)
    assert 0 < failed < 5
    assert record.tuned.failed == failed
    write_outputs(tmp_path, [record], loaded.recipe)
    assert f"{failed} of which failed" in (tmp_path / "report.html").read_text()
    assert run_grid(loaded, tmp_path, base=random_base("llama"), observer=told) == [record]
    assert len(told.trials) == failed  # not tried again: later trials followed from it
    assert not told.failed


def test_a_search_of_which_all_fails_fails_its_cells_and_begins_anew(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = search("prompt_tuning", "[0.05, 0.1]")
    loaded = load_recipe(recipe_file, [f"methods=[{{kind: base}}, {GOOD}]", space])
    with monkeypatch.context() as patch:
        count = failing_once(patch, lambda jobs: True)
        records = run_grid(loaded, tmp_path, base=random_base("llama"))
    assert count == [5]  # once, not once per seed
    assert [r.cell for r in records] == ["base-seed0"]
    reasons = {f.reason for f in failures(loaded.recipe, tmp_path)}
    assert reasons == {
        "all 5 trials of the search for `prompt_tuning` failed; the first: RuntimeError: CUDA out "
        "of memory. Tried to allocate 2 GiB"
    }
    assert len(run_grid(loaded, tmp_path, base=random_base("llama"))) == 3
    assert not list(tmp_path.rglob(FAILED))


def test_a_variant_that_cannot_be_made_ready_fails_its_cells_only(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    recipe, model, device = recipe_with_base
    folder = model.partition("=")[2]
    loaded = load_recipe(recipe, [
        model, device, f"methods=[{{kind: base}}, {GOOD}]", "seeds=[0]",
        f"sweep={{model.id: [{folder}, ./nowhere]}}",
    ])  # fmt: skip
    records = run_grid(loaded, tmp_path)
    assert len(records) == 2
    assert all("nowhere" in f.reason for f in failures(loaded.recipe, tmp_path))
    assert len(failures(loaded.recipe, tmp_path)) == 2


def test_what_is_wrong_with_the_recipe_still_ends_all_before_the_first_cell(
    recipe_file: Path, tmp_path: Path
) -> None:
    lost = "{kind: prefix_tuning, label: lost, start: adapter, start_adapter: [not/there]}"
    loaded = load_recipe(recipe_file, [f"methods=[{{kind: base}}, {lost}]"])
    with pytest.raises(AdapterError, match="not/there"):
        run_grid(loaded, tmp_path / "out", base=random_base("llama"))
    sweep = "sweep={methods.prompt_tuning.num_virtual_tokens: [2, 120]}"
    loaded = load_recipe(recipe_file, [f"methods=[{{kind: base}}, {GOOD}]", sweep])
    with pytest.raises(UserError, match="120 virtual tokens"):
        run_grid(loaded, tmp_path / "out", base=random_base("llama"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_and_a_folder_in_use_are_no_failure_of_a_cell(
    recipe_file: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe_file, [f"methods=[{GOOD}]"])
    cell: Cell = plan(loaded.recipe, tmp_path)[0].cells[0]
    for error in (OSError(errno.ENOSPC, "No space left"), FolderError("in use"), KeyboardInterrupt):

        def work(error: Any = error) -> None:
            raise error

        with pytest.raises(BaseException, match=r"No space left|in use|"):
            attempted(cell, work)
    assert not list(tmp_path.iterdir())


def test_failures_are_merged_unless_another_part_has_the_record(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe_file, [f"methods=[{GOOD}]"])
    for name, seed in (("a", 0), ("b", 1)):
        with monkeypatch.context() as patch:
            failing_once(patch, lambda jobs, seed=seed: jobs[0].seed == seed)
            run_grid(loaded, tmp_path / name, base=random_base("llama"))
    parts = [read_comparison(tmp_path / name) for name in "ab"]
    assert merge(parts, tmp_path / "both").missing == 0
    assert not failures(loaded.recipe, tmp_path / "both")
    merge(parts[:1], tmp_path / "one")
    assert [f.cell for f in failures(loaded.recipe, tmp_path / "one")] == ["prompt_tuning-seed0"]


def test_a_task_of_a_cluster_hands_back_failures_and_makes_nothing_twice(
    recipe_with_base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a node does and what is made of it here, without the cluster in between."""
    recipe, *base = recipe_with_base
    methods = f"methods=[{{kind: base}}, {DIVERGING}, {{kind: lora, rank: 1}}]"
    loaded = load_recipe(recipe, [*base, methods, search("lora", "[0.01, 1.0e+30]")])
    out, told = tmp_path / "out", Told()
    groups = plan(loaded.recipe, out)
    trained = failing_once(monkeypatch, lambda jobs: jobs[0].seed == 1)
    for again in (False, True):
        if again:
            monkeypatch.undo()
        for unit in on_ray._units(loaded, out):
            cells = [c for n in unit for c in groups[n].cells if not c.done.exists()]
            known = on_ray._known(groups, unit, out)
            files = on_ray._run(loaded.resolved(), str(loaded.path), unit, known, 1)
            monkeypatch.setattr(on_ray, "_result", lambda *_, files=files: files)
            assert not again or not any("trials/" in name for name in files)
            on_ray._take_over(None, None, cells, out, told)
    assert trained[0]
    records = {c.name: CellRecord.read(c.done) for g in groups for c in g.cells if c.done.exists()}
    assert sorted(records) == ["base-seed0", "lora-seed0", "lora-seed1"]
    assert records["lora-seed1"].tuned == records["lora-seed0"].tuned
    assert told.failed.count("lora-seed1") == 1
    assert [f.cell for f in failures(loaded.recipe, out)] == WILD

    def lost(*_: object) -> None:
        raise PtkitError("a cell could not be run on the cluster: the node died")

    monkeypatch.setattr(on_ray, "_result", lost)
    on_ray._take_over(None, None, groups[1].cells, out, told)
    assert failures(loaded.recipe, out)[0].reason.endswith("the node died")
