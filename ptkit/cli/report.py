"""`ptkit report`: the outputs of comparisons, made again, merged, or side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.errors import UserError
from ptkit.extras import require


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Comparison folders.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--out", "-o", help="Folder of the merged comparison, or of the overview."),
    ] = None,
    overview: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TITLE", help="Put comparisons of different tasks side by side on one page."
        ),
    ] = None,
) -> None:
    """Make a comparison's tables, plots and report again, or those of several merged into one.

    Comparisons of one recipe that were run with other seeds or methods, on other machines say,
    become one comparison in --out. Comparisons of different tasks become overview.html and
    overview.md with --overview TITLE. Unfinished ones are reported as far as they got.
    """
    require("report", "`ptkit report`")

    from ptkit.formats.places import comparison_recipe

    for folder in folders:
        comparison_recipe(folder)

    from ptkit.cli.options import show_table
    from ptkit.comparison.cells import failures
    from ptkit.comparison.merge import merge, read_comparison
    from ptkit.comparison.outputs import write_outputs
    from ptkit.comparison.overview import write_overview
    from ptkit.comparison.table import summary_table

    if out is None and (len(folders) > 1 or overview is not None):
        raise UserError("several comparisons become one in a new folder: give --out")
    parts = [read_comparison(folder) for folder in folders]
    if overview is not None:
        assert out is not None
        write_overview(parts, out, overview)
        typer.echo(f"{out / 'overview.html'}")
        return
    whole = parts[0] if out is None else merge(parts, out)
    summaries = write_outputs(whole.folder, whole.records, whole.loaded.recipe)
    failed = failures(whole.loaded.recipe, whole.folder)
    show_table(summary_table(summaries, failed), least=100)
    if whole.missing:
        typer.echo(
            (f"{whole.missing} cells are missing" if whole.missing > 1 else "1 cell is missing")
            + (f" ({len(failed)} failed)" if failed else "")
            + f"; `ptkit compare {whole.folder / 'recipe.yaml'} "
            f"--out {whole.folder}` runs {'them' if whole.missing > 1 else 'it'}",
            err=True,
        )
    typer.echo(f"{whole.folder / 'report.html'}")
