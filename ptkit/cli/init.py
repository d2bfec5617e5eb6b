"""`ptkit init`: a recipe of one's own, from a data file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.drafted import (
    DataOption,
    DraftGoal,
    DraftModelOption,
    GoalOption,
    LabelOption,
    MethodOption,
    TargetOption,
    TestOption,
    TextOption,
    ValidationOption,
    say_draft,
)
from ptkit.cli.options import JsonOutput, Quiet
from ptkit.cli.places import require_model, require_there
from ptkit.errors import UserError

if TYPE_CHECKING:
    from ptkit.drafting.draft import Draft


def init(
    data: DataOption = None,
    model: DraftModelOption = None,
    goal: GoalOption = DraftGoal.auto,
    label: LabelOption = None,
    text: TextOption = None,
    target: TargetOption = None,
    test: TestOption = None,
    validation: ValidationOption = None,
    method: MethodOption = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--out", "-o", help="Recipe to write; default: NAME.yaml here."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask no questions; use what fits.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Write a commented recipe for a data file, with the reasons and the command to run next.

    In a terminal, it asks for what the options leave out. It reads the file's columns, labels and
    lengths, and only the settings and the tokenizer of the model.
    """
    asks = not yes and not quiet and not json_output and sys.stdin.isatty()
    if data is None and asks:
        data = Path(
            typer.prompt("File with the training rows (CSV, JSONL, JSON, Parquet)", err=True)
        )
    require_there(data, validation, test)
    if data is None:
        raise UserError("nothing to draft a recipe from: give --data FILE")
    if model is None:
        model = typer.prompt("Base model", default="tiny-en", err=True) if asks else "tiny-en"
    require_model(model)
    from ptkit.drafting.draft import draft_recipe
    from ptkit.formats import atomic

    if asks:
        goal, label, target = _asked(data, goal, label, text or [], target)
    draft = draft_recipe(
        data, out, model=model, goal=goal.value, label=label, text=text or (), target=target,
        validation=validation, test=test, method=method,
    )  # fmt: skip
    path = out or Path(f"{draft.loaded.recipe.name}.yaml")
    if path.exists() and not force:
        raise UserError(f"{path} exists; choose another name with --out, or pass --force")
    if asks:
        say_draft(draft)
        if not typer.confirm(f"Write {path}?", default=True, err=True):
            raise UserError("nothing was written")
    atomic.write_text(path, draft.loaded.text)
    _told(draft, path, quiet=quiet or asks, as_json=json_output)


_GOALS = ", ".join(goal for goal in DraftGoal if goal is not DraftGoal.auto)


def _asked(
    data: Path, goal: DraftGoal, label: str | None, text: list[str], target: str | None
) -> tuple[DraftGoal, str | None, str | None]:
    """The goal and its column, asked for where they were not given."""
    from ptkit.drafting.columns import columns_of, listed_columns
    from ptkit.drafting.files import read_splits
    from ptkit.drafting.goal import choose
    from ptkit.errors import DataError

    table = read_splits(data).train
    typer.echo(f"{len(table):,} rows: {listed_columns(columns_of(table))}", err=True)
    if goal is not DraftGoal.auto or label is not None or target is not None:
        return goal, label, target
    try:
        found = choose(table, text=text)
    except DataError:
        found = None
    suggested = DraftGoal.classification.value if found is None else found.goal
    named = typer.prompt(f"What is to be learnt ({_GOALS})", default=suggested, err=True)
    if named not in (*DraftGoal,):
        raise UserError(f"no goal `{named}`; known: {_GOALS}")
    goal = DraftGoal(named)
    if goal in (DraftGoal.chat, DraftGoal.preference) or (
        found is not None and goal.value == found.goal and found.in_list
    ):
        return goal, None, None
    likely = found.target.name if found and found.target and found.goal == named else None
    if goal in (DraftGoal.classification, DraftGoal.token_classification):
        return goal, typer.prompt("Column with the label", default=likely, err=True), None
    return goal, None, typer.prompt("Column with the text to write", default=likely, err=True)


def _told(draft: Draft, path: Path, *, quiet: bool, as_json: bool) -> None:
    recipe = draft.loaded.recipe
    following = [f"ptkit train {path}", f"ptkit compare {path}"]
    if as_json:
        told = {
            "recipe": str(path), "task": recipe.task.kind, "model": recipe.model.id,
            "methods": [method.title for method in recipe.methods],
            "reasons": draft.reasons, "data": draft.told, "next": following,
        }  # fmt: skip
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    if not quiet:
        say_draft(draft)
    typer.echo(f"{path}")
    typer.secho(f"next: {following[0]}   (or every method: {following[1]})", err=True)
