"""`ptkit transfer`: which task's adapter is a good start for which other task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import Fresh, JsonOutput, Quiet, Set


def transfer(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipes to take adapters from.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the map.")],
    method: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--method", "-m", help="Method with virtual tokens (its label or kind)."),
    ] = None,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="RECIPE", help="Recipe to train from them; default: each of them."),
    ] = None,
    set_: Set = None,
    target_set: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="KEY=VALUE",
            help="Override a recipe key for the targets only: `task.data.limits.train=32`, say.",
        ),
    ] = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Map which task's adapter is a good start for which other task (SPoT).

    The method is trained once per recipe. Then every target is trained from each of these adapters
    and from its own start, with its seeds. The files matrix.md, matrix.json and matrix.png show the
    differences and how alike the adapters are. Interrupted, the same command resumes.
    """
    from ptkit.recipe.load import load_recipe

    shared = set_ or []
    sources = [load_recipe(recipe, shared) for recipe in recipes]
    targets = [load_recipe(r, [*shared, *(target_set or [])]) for r in target or recipes]

    from ptkit.cli.display import LiveDisplay
    from ptkit.comparison.transfer import as_markdown, plan, run_transfer, start_over
    from ptkit.training.checked import checked

    planned = plan(sources, targets, method)
    if fresh:
        for loaded in (*planned.sources, *planned.targets):
            checked(loaded)  # before anything is deleted
        start_over(out)
    with LiveDisplay(planned.cells, quiet=quiet or json_output) as display:
        done = run_transfer(planned, out, observer=display)
    if json_output:
        typer.echo(json.dumps({"folder": str(done.folder), **done.as_dict()}))
        return
    typer.echo(as_markdown(done))
    typer.echo(str(done.folder / "matrix.png"))
