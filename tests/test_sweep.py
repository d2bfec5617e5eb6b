"""Sweeps, random draws of the data and searches: what is run, with what, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import random_base
from test_cli import ptkit
from test_compare import recipe_file as recipe_file

from ptkit.comparison.cells import cells, plan
from ptkit.comparison.grid import run_grid
from ptkit.comparison.merge import merge, read_comparison
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.search import _optuna, _random
from ptkit.errors import RecipeError, UserError
from ptkit.recipe.expansion import expand, values_of
from ptkit.recipe.load import load_recipe
from ptkit.recipe.values import Range
from ptkit.training.observer import RunObserver

PREFIX = "methods=[{kind: base}, {kind: prefix_tuning, num_virtual_tokens: 4}]"


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, overrides)
    return str(error.value)


def test_every_combination_is_planned_once_in_a_place_of_its_own(recipe_file: Path) -> None:
    loaded = load_recipe(recipe_file, [
        PREFIX, "sweep={task.data.limits.train: [5, 10], methods.*.num_virtual_tokens: [1, 2, 3]}",
    ])  # fmt: skip
    variants = expand(loaded.recipe)
    assert [v.settings for v in variants] == [{"limits.train": 5}, {"limits.train": 10}]
    assert [v.recipe.task.data.limits.train for v in variants] == [5, 10]
    for variant in variants:
        assert [e.family for e in variant.entries] == ["base"] + ["prefix_tuning"] * 3
        assert [e.section.model_dump().get("num_virtual_tokens") for e in variant.entries] == [
            None, 1, 2, 3,
        ]  # fmt: skip
    planned = [cell for group in plan(loaded.recipe, Path("out")) for cell in group.cells]
    assert len(planned) == len(cells(loaded.recipe)) == 2 * (1 + 3 * 2)
    assert len({cell.folder for cell in planned}) == len(planned)
    assert planned[1].folder == Path(
        "out/cells/limits.train=5/prefix_tuning,num_virtual_tokens=1-seed0"
    )
    assert planned[1].sweep == {"limits.train": 5, "num_virtual_tokens": 1}


@pytest.mark.parametrize("sweep", ["{}", "{task.data.limits.train: [5, 10], train.steps: [2, 3]}"])
def test_a_variant_is_its_recipe_but_for_what_is_swept(recipe_file: Path, sweep: str) -> None:
    recipe = load_recipe(recipe_file, [PREFIX, f"sweep={sweep}"]).recipe
    expected = recipe.model_dump(exclude={"sweep"})
    for variant in expand(recipe):
        assert variant.recipe.task.data.splits == recipe.task.data.splits
        if variant.settings:
            expected["task"]["data"]["limits"]["train"] = variant.settings["limits.train"]
            expected["train"]["steps"] = variant.settings["train.steps"]
        assert variant.recipe.model_dump(exclude={"sweep"}) == expected


def test_ranges_give_round_values() -> None:
    assert values_of(Range(low=1, high=512, steps=4, log=True)) == [1, 8, 64, 512]
    assert values_of(Range(low=0.001, high=1.0, steps=4, log=True)) == [0.001, 0.01, 0.1, 1.0]
    assert values_of(Range(low=0, high=10, steps=3)) == [0, 5, 10]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep={train.stepz: [1]}", "`train.stepz`: no key `stepz`; did you mean `steps`?"),
        ("sweep={train.steps: [5, 0]}", "`train.steps` = 0: greater than 0"),
        ("sweep={methods.prefx_tuning.lr: [1]}", "no method `prefx_tuning`; did you mean"),
        ("sweep={methods.*.num_virtual_token: [1]}", "did you mean `num_virtual_tokens`?"),
        ("sweep={methods.prefix_tuning.num_virtual_tokens: [-1]}", "greater than or equal to 1"),
        ("sweep={train.steps: {low: 1, high: 9}}", "needs `steps`"),
        ("sweep={train.steps: {low: 9, high: 1, steps: 2}}", "`low` must be below `high`"),
        ("sweep={train.steps: []}", "at least 1"),
        ("budget={trials: 2, search: {base: {label: [a]}}}", "`base` trains nothing"),
        ("budget={trials: 2, search: {lora: {ranks: [2]}}}", "did you mean `rank`?"),
        ("budget={trials: 2, search: {lorax: {rank: [2]}}}", "did you mean `lora`?"),
        ("budget={trials: 2, search: {lora: {rank: [0]}}}", "greater than"),
        ("evaluate.baseline=ful", "`evaluate.baseline`: no method `ful`; did you mean `full`?"),
        ("task.metrics=[bleu, blue]", "no metric `blue`; did you mean `bleu`?"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(recipe_file, override: str, said: str) -> None:
    message = refusal(recipe_file, override)
    assert said in message
    assert f"--set {override.split('=')[0]}" in message


@pytest.fixture(scope="module")
def swept(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("swept")
    loaded = load_recipe(recipe_file, [
        PREFIX, "sweep={task.data.limits.train: [5, 10], methods.*.num_virtual_tokens: [1, 3]}",
        "task.data.draw=seed", "task.metrics=[exact_match, ter, perplexity]",
        "evaluate.baseline=base",
    ])  # fmt: skip
    records = run_grid(loaded, out, base=random_base("llama"))
    return loaded, out, records, write_outputs(out, records, loaded.recipe)


def test_cells_are_trained_with_their_values(swept) -> None:
    _, _, records, _ = swept
    assert len(records) == 2 * (1 + 2 * 2)
    for record in records:
        assert record.settings.get("num_virtual_tokens") == record.sweep.get("num_virtual_tokens")
        if record.kind != "base":
            assert record.n_train == record.sweep["limits.train"]
            # 3 layers x (keys + values) x 2 heads x 8, and the embeddings' width
            assert record.trainable_parameters == record.sweep["num_virtual_tokens"] * (96 + 32)


def test_summaries_keep_values_apart_and_compare_like_with_like(swept) -> None:
    _, out, _, summaries = swept
    assert [s.family for s in summaries] == ["base"] * 2 + ["prefix_tuning"] * 4
    assert [len(s.records) for s in summaries] == [1] * 2 + [2] * 4
    for summary in summaries:
        assert (summary.against is None) == (summary.family == "base")
    text = (out / "report.html").read_text()
    assert "exact_match over num_virtual_tokens" in text
    assert "exact_match over limits.train" in text
    table = (out / "table.md").read_text().splitlines()
    assert table[0].startswith("| method | limits.train | num_virtual_tokens | exact_match")
    assert len({line.count("|") for line in table[: 2 + len(summaries)]}) == 1
    assert (out / "plots" / "exact-match-over-limits-train.png").stat().st_size > 1000


def test_draws_differ_by_seed_and_repeat(recipe_file: Path) -> None:
    from ptkit.training.experiment import prepare

    loaded = load_recipe(recipe_file, ["task.data.limits.train=6", "task.data.draw=seed"])
    first, again = (prepare(loaded, random_base("llama")) for _ in range(2))
    rows = {seed: [e.input for e in first.training(seed).examples] for seed in (0, 1, 2)}
    assert all(len(set(drawn)) == 6 for drawn in rows.values())
    assert rows[0] != rows[1] != rows[2]
    assert rows == {s: [e.input for e in again.training(s).examples] for s in (0, 1, 2)}
    assert first.data_fingerprint(0) != first.data_fingerprint(1)


class Count(RunObserver):
    def __init__(self) -> None:
        self.trials: list[float] = []

    def trial_finished(self, cell: str, validation_loss: float) -> None:
        self.trials.append(validation_loss)


SEARCH = (
    "budget={trials: 3, search: {prefix_tuning: {learning_rate: {low: 0.001, high: 1.0, "
    "log: true}}}}"
)


def test_search_keeps_the_lowest_validation_loss_and_its_trials(
    recipe_file: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe_file, [PREFIX, SEARCH])
    count = Count()
    records = run_grid(loaded, tmp_path, base=random_base("llama"), observer=count)
    assert len(count.trials) == 3  # once, not once per seed
    tried = [
        json.loads((folder / "trial.json").read_text())["validation_loss"]
        for folder in sorted((tmp_path / "trials" / "prefix_tuning").iterdir())
    ]
    rates = [
        json.loads((folder / "cell.json").read_text())["method"]["learning_rate"]
        for folder in sorted((tmp_path / "trials" / "prefix_tuning").iterdir())
    ]
    assert len(set(rates)) == 3
    best = rates[tried.index(min(tried))]
    tuned = [record for record in records if record.tuned]
    assert [r.seed for r in tuned] == [0, 1]
    for record in tuned:
        assert record.settings["learning_rate"] == best
        assert record.tuned.settings == {"learning_rate": best}
        assert record.tuned.trials == 3
    # No test row was read: trials leave no predictions.
    assert not list((tmp_path / "trials").rglob("predictions.jsonl"))
    assert run_grid(loaded, tmp_path, base=random_base("llama"), observer=count) == records
    assert len(count.trials) == 3
    write_outputs(tmp_path, records, loaded.recipe)
    assert "3 trials (random search)" in (tmp_path / "report.html").read_text()


def test_samplers_suggest_within_the_space_and_repeat() -> None:
    pytest.importorskip("optuna")
    from ptkit.comparison.search import Trial

    space = {"learning_rate": Range(low=1e-3, high=1.0, log=True), "num_virtual_tokens": [1, 5]}
    for sampler in (_random, _optuna):
        before: list[Trial] = []
        for number in range(12):
            settings = sampler(space, 0, before)
            assert settings == sampler(space, 0, before)
            assert 1e-3 <= settings["learning_rate"] <= 1.0
            assert settings["num_virtual_tokens"] in (1, 5)
            before.append(Trial(settings, float(number)))
        assert len({t.settings["learning_rate"] for t in before}) == 12


def test_comparisons_of_several_machines_become_one(recipe_file: Path, tmp_path: Path) -> None:
    settings = {
        "a": [PREFIX, "seeds=[0]"],
        "b": [PREFIX, "seeds=[1]", "train.together=2"],
        "c": ["methods=[{kind: lora, rank: 2}]", "seeds=[0, 1]"],
        "whole": [
            "methods=[{kind: base}, {kind: prefix_tuning, num_virtual_tokens: 4}, "
            "{kind: lora, rank: 2}]", "seeds=[0, 1]",
        ],
    }  # fmt: skip
    for name, overrides in settings.items():
        loaded = load_recipe(recipe_file, overrides)
        run_grid(loaded, tmp_path / name, base=random_base("llama"))
    parts = [read_comparison(tmp_path / name) for name in "abc"]
    merged = merge(parts, tmp_path / "merged")
    whole = read_comparison(tmp_path / "whole")
    assert merged.missing == whole.missing == 0
    assert [r.cell for r in merged.records] == [r.cell for r in whole.records]
    assert [r.metrics for r in merged.records] == [r.metrics for r in whole.records]
    done = ptkit("report", tmp_path / "a", tmp_path / "c", "--out", "both", cwd=tmp_path)
    assert (tmp_path / "both" / "report.html").is_file()
    assert "prefix_tuning" in done.stdout
    assert "lora" in done.stdout
    other = load_recipe(recipe_file, [PREFIX, "train.steps=2", "seeds=[2]"])
    run_grid(other, tmp_path / "other", base=random_base("llama"))
    with pytest.raises(UserError, match="differ in `train`"):
        merge([parts[0], read_comparison(tmp_path / "other")], tmp_path / "wrong")
    assert "give --out" in ptkit("report", "a", "b", cwd=tmp_path, code=2).stderr
    assert "not a comparison" in ptkit("report", "none", cwd=tmp_path, code=2).stderr


def test_unfinished_comparison_is_reported_as_far_as_it_got(recipe_file, tmp_path: Path) -> None:
    loaded = load_recipe(recipe_file, [PREFIX])
    run_grid(loaded, tmp_path / "all", base=random_base("llama"))
    (tmp_path / "all/cells/prefix_tuning-seed1/record.json").unlink()
    done = ptkit("report", "all", cwd=tmp_path)
    assert "1 cell is missing" in done.stderr
    assert (tmp_path / "all" / "report.html").is_file()
