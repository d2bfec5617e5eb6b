"""`ptkit.train(data=...)` trains what `ptkit train --data` does, whatever form the rows have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import ptkit as command
from test_drafting import csv_file
from test_drafting import tickets as tickets

import ptkit
from ptkit.drafting.base_facts import BaseFacts
from ptkit.drafting.draft import draft_recipe
from ptkit.drafting.files import read_splits
from ptkit.drafting.lengths import Lengths
from ptkit.drafting.plan import planned
from ptkit.drafting.written import scalar
from ptkit.errors import DataError, RecipeError, UserError
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.yaml_source import parse_yaml
from ptkit.runtime.base_model import Base, load_base
from ptkit.training import experiment
from ptkit.training.autotune import finds_rate

METHOD = {"num_virtual_tokens": 3, "start": "task", "learning_rate": 0.05}
TRAIN = {"steps": 3, "batch_size": 4, "save_every": 3}
NO_RETENTION = ["retention=null"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny-en")


def rows_of(path: Path) -> list[dict[str, Any]]:
    frame: list[dict[str, Any]] = pd.read_csv(path).to_dict("records")
    return frame


FORMS: dict[str, Any] = {
    "path": str,
    "list": rows_of,
    "dataset": lambda path: Dataset.from_list(rows_of(path)),
    "splits": lambda path: DatasetDict(train=Dataset.from_csv(str(path))),
    "frame": pd.read_csv,
}


def test_every_form_of_the_rows_trains_what_the_command_does(
    tickets: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tickets.parent)
    method = "methods=[{kind: prefix_tuning, num_virtual_tokens: 3, start: task}]"
    settings = [method, "methods.0.learning_rate=0.05", *NO_RETENTION]
    settings += [f"train.{key}={value}" for key, value in TRAIN.items()]
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ("--data", "tickets.csv", "--seed", "1", "--out", "by-command")
    command("train", *arguments, *sets, cwd=tickets.parent)
    wanted = load_file("by-command/adapter/" + WEIGHTS)
    monkeypatch.setattr(experiment, "load_base", None)  # the base that is given is the one
    assert len(FORMS) == 5
    for name, form in FORMS.items():
        run = ptkit.train(
            data=form(tickets), model=base, method="prefix_tuning", seed=1, out=name,
            overrides=NO_RETENTION, **METHOD, **TRAIN,
        )  # fmt: skip
        found = load_file(run.adapter / WEIGHTS)
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert run.recipe.recipe.train.steps == 3
        assert "num_virtual_tokens: 3" in run.recipe.text


def test_a_model_of_transformers_is_taken_with_its_tokenizer(
    tickets: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tickets.parent)
    run = ptkit.train(
        data=tickets, model=base.model, tokenizer=base.tokenizer, method="prompt_tuning",
        overrides=NO_RETENTION, steps=1, start="task", num_virtual_tokens=2,
    )  # fmt: skip
    assert run.folder == Path("runs/tickets/prompt_tuning-seed0")
    with pytest.raises(UserError, match=r"give the tokenizer too: train\(model=model"):
        ptkit.train(data=tickets, model=base.model)


def test_settings_are_part_of_the_recipe_that_is_drafted(tickets: Path, base: Base) -> None:
    settings = {"learning_rate": 1e-7 / 3, "retain": {"by": "gate"}, "batch_size": 2, "steps": 7}
    draft = draft_recipe(tickets, model=base, method="p_tuning", settings=settings)
    recipe = draft.loaded.recipe
    assert (draft.method, recipe.train.steps, recipe.train.batch_size) == ("p_tuning", 7, 2)
    method: Any = recipe.method("p_tuning")
    assert method.learning_rate == 1e-7 / 3
    assert recipe.train.retain is not None
    assert "7 steps of 2 rows read the data 0.5 times" in draft.loaded.text
    assert "the call gave `learning_rate`" in draft.loaded.text


def test_a_run_too_short_to_test_rates_has_the_default_one(tickets: Path) -> None:
    """On a base whose rate was not measured, a draft finds it only where a run can."""
    facts = BaseFacts("somebody/else", "decoder", 512, 10**6)
    lengths = Lengths(16, 16, "")
    for rows, held_out, settings, found in (
        (2_000, None, {}, True), (30, None, {}, True), (30, 40, {}, False),
        (2_000, None, {"steps": 1}, False), (30, 40, {"learning_rate": "auto"}, True),
    ):  # fmt: skip
        plan = planned(facts, "generation", rows, lengths, None, settings, held_out)
        assert (plan.methods[-1].get("learning_rate") == "auto") == found
        train = TrainSection.model_validate(plan.train)
        said = "the run is too short to test it" in plan.reasons[0]
        assert said != found
        assert settings or found == finds_rate(train, held_out or rows // 10)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans())
def test_a_number_is_written_as_yaml_that_reads_the_same(value: float) -> None:
    read = parse_yaml(f"x: {scalar(value)}\n", "x").data["x"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("method", ["base", "text_prompt"])
def test_a_method_that_trains_nothing_can_be_asked_for(method: str, tickets: Path) -> None:
    draft = draft_recipe(tickets, method=method)
    assert draft.method == method
    assert [m.kind for m in draft.loaded.recipe.methods].count(method) == 1


def test_splits_are_taken_by_the_names_they_go_by(tickets: Path) -> None:
    rows = rows_of(tickets)
    own = {"train": rows[:20], "dev": rows[20:25], "test": rows[25:], "unsupervised": rows}
    assert {s: len(t) for s, t in read_splits(own).tables.items()} == {
        "train": 20, "validation": 5, "test": 5,
    }  # fmt: skip
    few = csv_file(tickets.with_name("few.csv"), [("text", "label"), ("a b", "billing")])
    mixed = read_splits(rows, test=few)
    assert (len(mixed.tables["test"]), mixed.paths) == (1, {})
    recipe = draft_recipe(own).loaded.recipe
    assert recipe.task.data.memory
    kept = draft_recipe(rows).loaded.recipe.task.data.splits
    assert (kept.validation, kept.test) == (None, None)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({}, "give a recipe, or `data=`"),
        ({"recipe": "quickstart", "steps": 3}, r'overrides=\["train.steps=..."\]'),
        ({"recipe": "quickstart", "num_virtual_tokens": 3}, "methods.N.num_virtual_tokens"),
        ({"recipe": "quickstart", "model": "tiny-en"}, "model.id=..."),
        ({"recipe": "quickstart", "overides": []}, "did you mean `overrides`"),
        ({"recipe": "quickstart", "data": "x.csv"}, "hand rows to a recipe with `dataset=`"),
        ({"data": "x.csv", "dataset": []}, "leave `dataset=` out"),
        ({"data": "x.csv"}, "no such data file: x.csv"),
        ({"data": 7}, "the split `train` is a int"),
        ({"data": {"text": ["a"]}}, r"Dataset.from_dict"),
        ({"data": [{"text": "a b"}]}, "the split `train` has one row"),
        ({"data": pd.DataFrame({"a": [object()]})}, "Arrow cannot hold"),
        ({"num_virtual_token": 3}, "did you mean `num_virtual_tokens`"),
        ({"method": "prefix"}, "no method `prefix`"),
        ({"steps": "many"}, "`steps`: Input should be a valid integer"),
        ({"num_virtual_tokens": 0}, "expected greater than or equal to 1, found 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_fix(
    call: dict[str, Any], why: str, tickets: Path
) -> None:
    arguments = call if {"data", "recipe"} & call.keys() or not call else {"data": tickets, **call}
    with pytest.raises((UserError, DataError, RecipeError), match=why):
        ptkit.train(**arguments)
