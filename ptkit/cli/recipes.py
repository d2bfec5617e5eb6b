"""`ptkit recipes`: what ships, and checking one's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.completion import complete_recipes
from ptkit.cli.options import JsonOutput, Quiet, RecipeArgument, table

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")


@app.command("list")
def list_(json_output: JsonOutput = False, quiet: Quiet = False) -> None:
    """List the recipes that ship with ptkit."""
    from ptkit.recipe.shipped import recipe_summaries

    found = recipe_summaries()
    if json_output:
        typer.echo(json.dumps([asdict(summary) for summary in found], indent=2))
        return
    if quiet:
        for summary in found:
            typer.echo(summary.name)
        return
    # Those of the embedded base run anywhere, in minutes.
    found.sort(key=lambda summary: (summary.model != "tiny-en", summary.name))
    table(
        ["recipe", "base model", "task", "what it shows"],
        [[s.name, s.model, s.task, s.description] for s in found],
    )
    typer.secho(
        "your own data: `ptkit init --data FILE`, or `ptkit recipes copy NAME mine.yaml`", err=True
    )


@app.command()
def show(recipe: RecipeArgument) -> None:
    """Print a recipe as it is written."""
    from ptkit.recipe.load import load_recipe

    typer.echo(load_recipe(recipe).text, nl=False)


@app.command()
def copy(
    recipe: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe's name, or a file.",
            autocompletion=complete_recipes,
        ),
    ] = None,
    destination: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="File to write; default: RECIPE.yaml here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Copy a shipped recipe to start your own from. The copy has a name of its own."""
    from ptkit.errors import UserError
    from ptkit.formats import atomic
    from ptkit.recipe.load import load_recipe
    from ptkit.recipe.shipped import renamed

    if recipe is None:
        raise UserError("no recipe to copy; `ptkit recipes list` shows those that ship")
    loaded = load_recipe(recipe)
    target = destination or Path(f"{loaded.recipe.name}.yaml")
    if target.is_dir():
        target = target / f"{loaded.recipe.name}.yaml"
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name or pass --force to replace it")
    atomic.write_text(target, renamed(loaded, target))
    typer.echo(f"{target}")
    if not quiet:
        typer.secho(
            f"next: edit `task.data`, then `ptkit recipes validate {target}` and "
            f"`ptkit train {target}`", err=True,
        )  # fmt: skip


@app.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...", help="Files or names.", autocompletion=complete_recipes
        ),
    ],
    quiet: Quiet = False,
) -> None:
    """Check recipes and their data; every fault is named with its place (exit code 2).

    All is checked that a run checks before its base is loaded: columns, labels, templates, metrics,
    lengths, adapters to start from. Data of the Hub are not fetched.
    """
    from ptkit.errors import RecipeError, UserError
    from ptkit.recipe.load import load_recipe

    faults = []
    for recipe in recipes:
        try:
            loaded = load_recipe(recipe)
        except RecipeError as error:
            faults.append(str(error))
            continue
        from ptkit.training.checked import checked  # slow to import: not for what is no recipe

        try:
            told = checked(loaded)
        except UserError as error:
            faults.append(f"{recipe}: {error}")
            continue
        typer.echo(f"{recipe}: valid")
        for line in () if quiet else told:
            typer.echo(f"  {line}")
    if faults:
        raise RecipeError("\n".join(faults))


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema (for editors: `# yaml-language-server: $schema=...`)."""
    from ptkit.recipe.json_schema import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))
