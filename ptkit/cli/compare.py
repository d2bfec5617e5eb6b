"""`ptkit compare`: every method of a recipe with every seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import Fresh, JsonOutput, Quiet, RecipeArgument, Set


def compare(
    recipe: RecipeArgument,
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--out", "-o", help="Folder of the comparison; default: comparisons/RECIPE."),
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Compare the methods of a recipe: table, report.html, results.jsonl and results.csv.

    Interrupted comparisons go on when the same command is given again; finished cells are kept.
    """
    from rich.console import Console

    from ptkit.cli.display import LiveDisplay
    from ptkit.cli.options import start_over
    from ptkit.compare.grid import cells, run_grid
    from ptkit.compare.outputs import write_outputs
    from ptkit.compare.table import summary_table
    from ptkit.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    folder = out or Path("comparisons") / loaded.recipe.name
    if fresh:
        start_over(folder)
    with LiveDisplay(len(cells(loaded.recipe)), quiet=quiet or json_output) as display:
        records = run_grid(loaded, folder, observer=display)
    summaries = write_outputs(folder, records, loaded.recipe)
    if json_output:
        for record in records:
            typer.echo(record.as_line())
        return
    console = Console()
    # Piped output has no width of its own; below 100 columns figures would be cut.
    console.width = max(console.width, 100)
    console.print(summary_table(summaries))
    typer.echo(f"{folder / 'report.html'}")
