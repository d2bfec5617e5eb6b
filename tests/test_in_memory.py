"""Rows that a program hands over train what the same rows in files train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_base
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from test_compare import recipe_file as recipe_file

import ptkit
from ptkit.data.in_memory import table_of, with_rows
from ptkit.data.task import load_task
from ptkit.drafting.columns import columns_of
from ptkit.drafting.draft import draft_recipe
from ptkit.errors import DataError, UserError
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.recipe.load import load_recipe

SHORT = ["train.steps=2", "train.eval_every=2", "retention=null"]


def splits(recipe: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (recipe.parent / f"{split}.jsonl").open()]
        for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize(
    "form",
    [dict, lambda rows: DatasetDict({s: Dataset.from_list(own) for s, own in rows.items()})],
    ids=["lists", "datasets"],
)
def test_rows_in_memory_train_the_adapter_that_their_files_do(
    form: Any, recipe_file: Path, tmp_path: Path
) -> None:
    found = []
    for name, dataset in (("files", None), ("memory", form(splits(recipe_file)))):
        torch.manual_seed(0)
        run = ptkit.train(
            recipe_file, method="prefix_tuning", seed=0, out=tmp_path / name, overrides=SHORT,
            dataset=dataset, base=random_base("llama"),
        )  # fmt: skip
        found.append((load_file(run.adapter / WEIGHTS), run.record.metrics, run.record.test_rows))
    (files, *told), (memory, *told_too) = found
    assert files.keys() == memory.keys()
    assert all(torch.equal(files[n], memory[n]) for n in files)
    assert told == told_too


def test_overrides_of_a_recipe_that_is_loaded_are_refused(recipe_file: Path) -> None:
    loaded = load_recipe(recipe_file)
    for run in (ptkit.train, ptkit.compare):
        with pytest.raises(UserError, match="give `overrides` to `load_recipe`"):
            run(loaded, overrides=SHORT)


@pytest.mark.parametrize("seed", [-1, 2**32, True, "0", 0.5])
def test_what_is_no_seed_is_refused_before_a_folder_is_made(
    seed: Any, recipe_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="whole number from 0 to 4294967295"):
        ptkit.train(
            recipe_file,
            method="prefix_tuning",
            seed=seed,
            out=tmp_path / "run",
            base=random_base("llama"),
        )
    assert not (tmp_path / "run").exists()


def test_a_seed_may_be_numpys(recipe_file: Path, tmp_path: Path) -> None:
    run = ptkit.train(
        recipe_file, method="prefix_tuning", seed=np.int64(3), out=tmp_path / "run",
        overrides=SHORT, base=random_base("llama"),
    )  # fmt: skip
    assert run.record.seed == 3


def test_one_list_is_the_training_rows_and_a_tenth_is_held_out(recipe_file: Path) -> None:
    loaded = with_rows(load_recipe(recipe_file), splits(recipe_file)["train"])
    data = load_task(loaded.recipe.task, loaded.folder, loaded.given)
    assert (len(data.train), len(data.validation), data.test_chose) == (18, 2, True)


def test_a_recipe_that_was_kept_says_that_its_rows_are_not(recipe_file: Path) -> None:
    loaded = with_rows(load_recipe(recipe_file), splits(recipe_file)["train"])
    assert "memory: true" in loaded.resolved()
    with pytest.raises(DataError, match="handed over by a program, and are not kept"):
        load_task(loaded.recipe.task, loaded.folder)


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("rows.jsonl", "the split `train` is a str"),
        ([{"words": "w1"}, "w2"], "train row 2 is a str"),
        ({"test": []}, "one must be called `train`"),
        ({"train": Dataset.from_list([{"a": "1"}]).to_iterable_dataset()}, "is streamed"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset: Any, why: str, recipe_file: Path) -> None:
    with pytest.raises(DataError, match=why):
        with_rows(load_recipe(recipe_file), dataset)


def test_a_cluster_cannot_be_handed_rows(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read their data themselves"):
        ptkit.compare(recipe_file, dataset=splits(recipe_file), ray=True, out=tmp_path / "out")


NUMBERED = {"text": [f"message {i} of many" for i in range(20)], "label": [0, 1] * 10}


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow", "columns"])
def test_a_format_of_a_data_set_changes_nothing(form: str) -> None:
    plain = Dataset.from_dict(NUMBERED)
    other = plain.with_format(columns=["text"]) if form == "columns" else plain.with_format(form)
    assert [*table_of("train", other)] == [*table_of("train", plain)]
    assert draft_recipe(other).loaded.recipe == draft_recipe(plain).loaded.recipe


def test_a_transform_of_a_data_set_is_refused() -> None:
    """It gives rows only as they are read, and columns that the data set does not name."""
    with pytest.raises(DataError, match=r"write them with `Dataset.map`"):
        table_of("train", Dataset.from_dict(NUMBERED).with_transform(lambda batch: batch))


def test_values_of_numpy_torch_and_pandas_are_those_of_python() -> None:
    row = {
        "int": np.int64(3), "bool": np.bool_(True), "short": np.float32(0.1), "word": np.str_("a"),
        "list": np.array(["a", "b"]), "tensor": torch.tensor(4), "nan": np.nan, "na": pd.NA,
        "nat": pd.NaT, "turns": np.array([{"role": "user"}], dtype=object), 0: ("x",),
    }  # fmt: skip
    table = table_of("train", [row])
    assert [*table] == [{
        "int": "3", "bool": "true", "short": "0.1", "word": "a", "list": ["a", "b"],
        "tensor": "4", "nan": None, "na": None, "nat": None, "turns": [{"role": "user"}],
        "0": ["x"],
    }]  # fmt: skip
    # Conversations are read without that change.
    assert table.rows[0]["turns"] == [{"role": "user"}]
    assert table.rows[0]["bool"] is True


def test_labels_of_numpy_and_columns_with_numbers_for_names_are_drafted() -> None:
    rows = [{0: text, 1: np.int64(n)} for text, n in zip(*NUMBERED.values(), strict=True)]
    assert [c.kind for c in columns_of(table_of("train", rows))] == ["text", "label"]
    assert draft_recipe(rows).loaded.recipe.task.kind == "classification"
