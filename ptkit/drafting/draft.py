"""A recipe for a data file: the task, the lengths, the metrics and the method that fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.data.tokens import listed
from ptkit.drafting.base_facts import BaseFacts, base_facts
from ptkit.drafting.columns import columns_of, names_like_values
from ptkit.drafting.files import DraftRows, Source, read_splits
from ptkit.drafting.goal import Goal, choose
from ptkit.drafting.plan import Plan, planned
from ptkit.drafting.tasks import DraftTask, drafted_task
from ptkit.drafting.written import commented, yaml_with_comments
from ptkit.errors import RecipeError
from ptkit.recipe.faults import recipe_faults
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.yaml_source import parse_yaml
from ptkit.runtime.base_model import Base
from ptkit.training.checked import checked


@dataclass(frozen=True)
class Draft:
    """A recipe that was made for rows, and checked.

    reasons: why it is so, in lines; told: what was decided about the rows, as a run tells it
    """

    loaded: LoadedRecipe
    reasons: tuple[str, ...]
    told: tuple[str, ...]

    @property
    def method(self) -> str:
        """The method to train; the others are for a comparison."""
        return self.loaded.recipe.methods[-1].title


def draft_recipe(
    data: Source,
    out: Path | None = None,
    *,
    model: str | Path | Base = "tiny-en",
    goal: Goal = "auto",
    label: str | None = None,
    text: str | Sequence[str] = (),
    target: str | None = None,
    validation: Source | None = None,
    test: Source | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Draft:
    """A recipe that fits the rows of `data`. Nothing is written.

    data: a file (CSV, JSONL, JSON or Parquet) or its folder; or rows of a program. Those are a
        `datasets.Dataset`, a data frame, a list of mappings, or a mapping from splits to these
    out: where the recipe will lie, from which its paths are relative; default: NAME.yaml in the
        current folder
    model: the base, by name or loaded; only its settings and tokenizer are read
    goal, label, text, target: what is to be learnt, where the columns do not tell
    validation, test: rows of the other splits; default: the files that lie beside `data`
    method: kind of the method to train; default: by the number of rows and the base
    settings: keys of that method and of `train`, in place of those that would fit
    overrides: `key.path=value` assignments to the recipe

    Raises DataError for rows that training would refuse, and ModelError for a base that is not
    here. Raises UserError for a method, or a setting of it, that there is not.
    """
    rows = read_splits(data, validation=validation, test=test)
    chosen = choose(rows.train, goal, label=label, text=listed(text), target=target)
    base = base_facts(model if isinstance(model, Base) else str(model))
    name = _name(rows.paths["train"]) if rows.paths else "mine"
    out = out or Path(f"{name}.yaml")
    task = drafted_task(chosen, rows, base, rows.as_written(out.parent))
    kind = task.settings["kind"]
    held_out = len(rows.tables["validation"]) if "validation" in rows.tables else None
    plan = planned(base, kind, len(rows.train), task.lengths, method, settings, held_out)
    reasons = (
        *chosen.reasons, *_names_told(rows), *task.warnings, *_splits_told(rows),
        task.lengths.told, *plan.reasons,
    )  # fmt: skip
    recipe_text = _text(name, out, rows, base, task, plan, reasons)
    source = parse_yaml(recipe_text, str(out))
    for assignment in overrides:
        source.set(assignment)
    recipe, faults = recipe_faults(source)
    if recipe is None:
        raise RecipeError("the recipe that was drafted is not valid:\n" + "\n".join(faults))
    given = None if rows.paths else rows.tables
    loaded = LoadedRecipe(recipe, out.resolve(), recipe_text, given)
    told = checked(loaded, None if base.loaded is None else base.tokenizer)
    return Draft(loaded, reasons, tuple(told))


def _name(data: Path) -> str:
    """A recipe's name from the name of its file; of `train.csv`, from its folder's."""
    stem = data.stem
    if re.fullmatch(r"(train|training|data)", stem, re.IGNORECASE):
        stem = data.resolve().parent.name or stem
    slug = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")
    return slug or "mine"


def _names_told(rows: DraftRows) -> list[str]:
    path = rows.paths.get("train")
    if path is None or path.suffix not in (".csv", ".tsv"):
        return []
    return [
        f"warning: the first line of {path.name} is taken for the names of columns, and `{name}` "
        "looks like a value; put a line of names before it"
        for name in names_like_values(columns_of(rows.train))[:1]
    ]


def _splits_told(rows: DraftRows) -> list[str]:
    told = [
        f"`{rows.paths[split].name}` lies beside the file and is the {split} split"
        for split in rows.found if rows.paths
    ]  # fmt: skip
    if "test" not in rows.tables:
        told.append(
            "there is no test file, so the validation rows are scored, which also choose the "
            "checkpoint; rows of their own (`test:`) give an honest score"
        )
    return told


def _text(
    name: str,
    out: Path,
    rows: DraftRows,
    base: BaseFacts,
    task: DraftTask,
    plan: Plan,
    reasons: Sequence[str],
) -> str:
    head = [f"Made for {rows.title} by `ptkit init`. Every line may be changed.", ""]
    for what, command in (
        ("check", "recipes validate"),
        ("train", "train"),
        ("compare", "compare"),
    ):
        head.append(f"  {what + ':':<10}ptkit {command} {out.name}")
    head.append("")
    if not rows.paths:
        head = ["Made for rows of a program, which hands them over again: `dataset=`.", ""]
    head += ["Why it is so:", *(f"  - {reason}" for reason in reasons)]
    values = {
        "name": name, "description": f"Drafted from {rows.title}.", "model": base.section,
        "task": task.settings, "methods": plan.methods, "seeds": [0], "train": plan.train,
    }  # fmt: skip
    comments = {
        "name": "Names the output folder runs/NAME.",
        "model": "The frozen base model: a Hub id, a folder, a GGUF file or a name of ptkit's.",
        "task": "What is learnt, from which data.",
        "task.data": "CSV, JSONL, JSON or Parquet; paths start at this file's folder."
        if rows.paths else "The rows are in memory.",
        "seeds": "One run per method and seed; three or more show the spread.",
        **task.comments, **plan.comments,
    }  # fmt: skip
    return (
        "\n".join(line for part in head for line in commented(part))
        + "\n\n"
        + (yaml_with_comments(values, comments))
    )
