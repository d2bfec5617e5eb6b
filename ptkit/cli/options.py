"""Options that several commands share, and what they mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.errors import UserError

if TYPE_CHECKING:
    from ptkit.recipe.schema import MethodSection, Recipe

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Delete what is in the folder and start over.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Base model: hub id, folder, or `tiny-en`.")
]


def one_method(recipe: Recipe, title: str | None) -> MethodSection:
    """The method a single run is about. Raises UserError when the choice is not clear."""
    if title is not None:
        try:
            return recipe.method(title)
        except KeyError as error:
            raise UserError(str(error.args[0])) from error
    trained = [m for m in recipe.methods if m.trains]
    if len(trained) != 1:
        names = ", ".join(m.title for m in recipe.methods)
        raise UserError(f"the recipe has several methods; choose one with --method: {names}")
    return trained[0]


def start_over(folder: Path) -> None:
    """Delete `folder` if it is a run or comparison of ptkit's. Raises UserError when it is not."""
    if not folder.exists():
        return
    if not any((folder / mark).exists() for mark in ("cell.json", "recipe.yaml")):
        raise UserError(f"{folder} is not a run of ptkit's; --fresh does not delete it")
    shutil.rmtree(folder)
