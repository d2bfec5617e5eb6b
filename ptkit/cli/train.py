"""`ptkit train`: one method, one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import DryRun, Fresh, JsonOutput, Quiet, RecipeArgument, Set


def train(
    recipe: RecipeArgument,
    method: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--method", "-m", help="Which of the recipe's methods (its label or kind)."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seed of this run; default: the recipe's first."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Run folder; default: runs/RECIPE/METHOD-seedN."),
    ] = None,
    start_from: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", help="Train further from this adapter folder."),
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Train one method of a recipe and measure it.

    A stopped run (Ctrl-C, kill, power) resumes where it last saved when the same command is given
    again. It ends with the same weights.
    """
    from ptkit.api import one_method, plan_training, run_folder, start_over
    from ptkit.api import train as run
    from ptkit.cli.display import LiveDisplay, say_plan
    from ptkit.comparison.autotuned import autotuned
    from ptkit.recipe import load_recipe
    from ptkit.runtime.devices import resolve_device
    from ptkit.training.processes import processes
    from ptkit.training.ready import require_supported

    loaded = load_recipe(recipe, set_ or [])
    section = one_method(loaded.recipe, method)
    used_seed = loaded.recipe.seeds[0] if seed is None else seed
    folder = run_folder(loaded.recipe, section, used_seed, out)
    if dry_run:
        told, measured = plan_training(
            loaded, method=section.title, seed=used_seed, out=folder, start_from=start_from
        )
        say_plan(told, measured, as_json=json_output)
        return
    require_supported(loaded.recipe, [section])  # before anything is deleted
    # Under `accelerate launch` every process trains; the first one speaks and writes.
    state = processes(resolve_device(loaded.recipe.model.device))
    if fresh and state.is_main_process:
        start_over(folder)
    state.wait_for_everyone()
    silent = quiet or json_output or not state.is_main_process
    with LiveDisplay(1, quiet=silent) as display:
        record = run(
            loaded, method=section.title, seed=used_seed, out=folder, start_from=start_from,
            observer=display,
        ).record  # fmt: skip
    if not state.is_main_process:
        return
    if json_output:
        typer.echo(json.dumps({**record.as_dict(), "folder": str(folder)}))
        return
    metrics = "  ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
    typer.echo(f"{metrics}  (n={record.n_test} {record.rows_scored}, seed {record.seed})")
    typer.echo(
        f"trained {record.trainable_parameters:,} parameters "
        f"({record.trainable_parameters / record.base_parameters:.3%} of the base), "
        f"best at step {record.best_step} of {record.train_steps}"
    )
    if (chosen := autotuned([record])) is not None:
        typer.echo(f"auto found: {chosen}")
    if record.retention is not None:
        typer.echo(f"forgetting {record.retention['forgetting']:+.3f} nats per token, adapter on")
    typer.echo(f"{folder}")
