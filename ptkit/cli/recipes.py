"""`ptkit recipes`: what ships, and checking one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, RecipeArgument

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")


@app.command("list")
def list_(json_output: JsonOutput = False) -> None:
    """List the recipes that ship with ptkit."""
    from rich.console import Console
    from rich.table import Table

    from ptkit.recipe import load_recipe, shipped_recipes

    recipes = [load_recipe(path).recipe for path in shipped_recipes().values()]
    if json_output:
        rows = [
            {
                "name": r.name,
                "description": r.description,
                "model": r.model.id,
                "task": r.task.kind,
                "methods": [m.title for m in r.methods],
            }
            for r in recipes
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(
        "recipe", "base model", "task", "methods", "what it shows", box=None, pad_edge=False
    )
    for recipe in recipes:
        table.add_row(
            f"[bold]{recipe.name}[/]", recipe.model.id, recipe.task.kind,
            str(len(recipe.methods)), recipe.description,
        )  # fmt: skip
    Console().print(table)


@app.command()
def show(recipe: RecipeArgument) -> None:
    """Print a recipe as it is written."""
    from ptkit.recipe import load_recipe

    typer.echo(load_recipe(recipe).text, nl=False)


@app.command()
def copy(
    recipe: RecipeArgument,
    destination: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(help="File to write; default: RECIPE.yaml here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a shipped recipe to start your own from."""
    from ptkit.errors import UserError
    from ptkit.formats import atomic
    from ptkit.recipe import load_recipe

    loaded = load_recipe(recipe)
    target = destination or Path(f"{loaded.recipe.name}.yaml")
    if target.is_dir():
        target = target / f"{loaded.recipe.name}.yaml"
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name or pass --force to replace it")
    atomic.write_text(target, loaded.text)
    typer.echo(f"{target}")


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Files or names.")],
) -> None:
    """Check recipes and their data; every fault is named with its place (exit code 2).

    Files and built-in sets are read. The command shows what was decided about them, and whether the
    metrics can judge them. Data of the Hub are not fetched.
    """
    from ptkit.data import load_task
    from ptkit.data.summary import data_lines
    from ptkit.errors import RecipeError, UserError
    from ptkit.evaluation.score import require_metrics
    from ptkit.recipe import load_recipe

    faults = []
    for recipe in recipes:
        try:
            loaded = load_recipe(recipe)
        except RecipeError as error:
            faults.append(str(error))
            continue
        task = loaded.recipe.task
        if task.data.hub:
            told = [f"data: `{task.data.hub}` of the Hub, not read here"]
        else:
            try:
                data = load_task(task, loaded.folder)
                require_metrics(task.metrics, [example.references for example in data.test])
                told = data_lines(task, data)
            except UserError as error:
                faults.append(f"{recipe}: {error}")
                continue
        typer.echo(f"{recipe}: valid")
        for line in told:
            typer.echo(f"  {line}")
    if faults:
        raise RecipeError("\n".join(faults))


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema (for editors: `# yaml-language-server: $schema=...`)."""
    from ptkit.recipe.json_schema import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))
