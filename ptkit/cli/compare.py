"""`ptkit compare`: every method of a recipe with every seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.options import (
    DryRun,
    Fresh,
    JsonOutput,
    PricePerHour,
    Quiet,
    RecipeArgument,
    Set,
    show_table,
)  # fmt: skip
from ptkit.errors import PtkitError, UserError

if TYPE_CHECKING:
    from ptkit.training.failure import Failure


def compare(
    recipe: RecipeArgument,
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--out", "-o", help="Folder of the comparison; default: comparisons/RECIPE."),
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
    on: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="ray[://HOST:PORT]",
            help="Run the cells as tasks of a Ray cluster; `ray` alone uses this machine.",
        ),
    ] = None,
    cell_cpus: Annotated[float, typer.Option(min=0.1, help="With --on: CPUs of one cell.")] = 1,
    cell_gpus: Annotated[float, typer.Option(min=0, help="With --on: GPUs of one cell.")] = 0,
    dry_run: DryRun = False,
    price_per_hour: PricePerHour = None,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Compare the methods of a recipe: report.html, tables, plots, results.jsonl and results.csv.

    Every method runs with every seed of the recipe; each such run is a cell. Give the same command
    again to go on after a stop: finished cells are kept. A cell that fails is a row with the
    reason. The exit code is then 1, and the same command tries it again.
    """
    from ptkit.recipe.load import load_recipe

    # Before torch is imported, which takes seconds: a slip of the pen is told at once.
    loaded = load_recipe(recipe, set_ or [])

    from ptkit.api import compare as run
    from ptkit.api import plan_comparison
    from ptkit.cli.display import LiveDisplay, price, say_plan, say_price
    from ptkit.comparison.cells import cells
    from ptkit.comparison.table import summary_table
    from ptkit.launched import is_first

    ray = on is not None and (_ray_address(on) or True)
    if dry_run:
        told, measured = plan_comparison(loaded, out=out, fresh=fresh)
        say_plan(told, measured, as_json=json_output, price_per_hour=price_per_hour)
        return
    # Under `accelerate launch` every process trains; the first one speaks and writes.
    silent = quiet or json_output or not is_first()
    shown = LiveDisplay(len(cells(loaded.recipe)), quiet=silent, price_per_hour=price_per_hour)
    with shown as display:
        done = run(
            loaded, out=out, fresh=fresh, ray=ray, cell_cpus=cell_cpus, cell_gpus=cell_gpus,
            observer=display,
        )  # fmt: skip
    if not is_first():
        raise typer.Exit(1 if done.failed else 0)
    if json_output:
        for record in done.records:
            cost = price(record.train_seconds + record.eval_seconds, price_per_hour)
            typer.echo(json.dumps({**record.as_dict(), **cost}, ensure_ascii=False))
        for failure in done.failed:
            typer.echo(json.dumps(failure.as_row(), ensure_ascii=False))
        _require_none(done.failed)
        return
    # Below 100 columns figures would stand in pieces.
    show_table(summary_table(done.summaries, done.failed), least=100)
    say_price(sum(r.train_seconds + r.eval_seconds for r in done.records), price_per_hour)
    typer.echo(str(done.report))
    _require_none(done.failed)


def _require_none(failed: list[Failure]) -> None:
    """Raise PtkitError that names the cells that failed."""
    if failed:
        from ptkit.training.failure import failed_cells

        raise PtkitError(failed_cells(failed))


def _ray_address(on: str) -> str | None:
    """What `--on` names: None for this machine. Raises UserError for anything but Ray."""
    if on == "ray":
        return None
    if not on.startswith("ray://") or len(on) == len("ray://"):
        raise UserError(f"`--on {on}`: expected `ray`, or `ray://HOST:PORT`")
    return on
