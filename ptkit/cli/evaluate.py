"""`ptkit evaluate`: measure a saved adapter on a recipe's test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, RecipeArgument, Set


def evaluate(
    recipe: RecipeArgument,
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--adapter", "-a", help="Adapter or run folder; repeatable. None: the base."),
    ] = None,
    set_: Set = None,
    predictions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the predictions to this JSONL file (one adapter only)."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Score saved adapters (or the base) on the test rows of a recipe, with 95 % intervals."""
    from ptkit.errors import UserError
    from ptkit.evaluation.saved import evaluate_saved
    from ptkit.formats import atomic
    from ptkit.recipe import load_recipe
    from ptkit.training.experiment import prepare

    places: list[Path | None] = [*adapter] if adapter else [None]
    if predictions is not None and len(places) > 1:
        raise UserError("--predictions takes the rows of one adapter; give a single --adapter")
    experiment = prepare(load_recipe(recipe, set_ or []))
    for place in places:
        result = evaluate_saved(experiment, place)
        if predictions is not None:
            rows = [json.dumps(p.as_dict(), ensure_ascii=False) for p in result.predictions]
            atomic.write_text(predictions, "\n".join(rows) + "\n")
        if json_output:
            typer.echo(json.dumps(result.as_dict()))
            continue
        typer.echo(f"{result.name}  (n={len(result.predictions)})")
        for name, interval in result.metrics.items():
            typer.echo(
                f"  {name:12} {interval.mean:6.2f}  [{interval.low:.2f}, {interval.high:.2f}]"
            )
        if result.retention is not None:
            overall = result.retention.overall
            typer.echo(
                f"  {'forgetting':12} {overall['forgetting']:+6.3f}  nats per token, "
                f"n={overall['tokens']:,} tokens; retention {overall['retention']:.1%}; "
                f"drift {result.retention.drift:.3f}"
            )
