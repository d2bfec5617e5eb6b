"""`ptkit multitask`: one soft prompt for several tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptkit.cli.options import Fresh, JsonOutput, Quiet, Set

if TYPE_CHECKING:
    from ptkit.training.multitask import Multitask


def _above_zero(value: float) -> float:
    """The option's value. Raises BadParameter where it is not above zero."""
    if value <= 0:
        raise typer.BadParameter(f"{value:g} is not above zero")
    return value


def multitask(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipes of the tasks, two or more.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
    rank: Annotated[int, typer.Option(min=1, max=64, help="Rank of each task's own matrix.")] = 1,
    task_learning_rate: Annotated[
        float,
        typer.Option(callback=_above_zero, help="Peak learning rate of the tasks' matrices."),
    ] = 0.1,
    set_: Set = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Train one soft prompt for several tasks at once, each with a small matrix of its own.

    Model, training and prompt tuning's settings are those of the recipes, which have to agree in
    them. The command writes three things: all tasks as one of PEFT's multi-task prompts, each
    task's prompt, and their mean. A task's prompt is used like any other, and the mean starts
    another task. A stopped run resumes when the same command is given again.
    """
    from ptkit.recipe.load import load_recipe

    loaded = [load_recipe(recipe, set_ or []) for recipe in recipes]

    from ptkit.cli.display import LiveDisplay
    from ptkit.training.multitask import multitask as run

    with LiveDisplay(1, quiet=quiet or json_output) as display:
        done = run(
            loaded,
            out,
            rank=rank,
            task_learning_rate=task_learning_rate,
            fresh=fresh,
            observer=display,
        )
    if json_output:
        typer.echo(json.dumps({"folder": str(done.folder), **done.as_dict()}))
        return
    _show(done)


def _show(done: Multitask) -> None:
    from ptkit.cli.options import table
    from ptkit.comparison import figures

    rows = []
    for name, task in done.tasks.items():
        metric, leading = next(iter(task.metrics.items()))
        scored = f"{task.n_test:,} {task.rows_scored}"
        rows.append((name, metric, figures.score(leading), f"{task.n_train:,}", scored))
    table(("task", "metric", "score [95 %]", "training rows", "scored on"), rows)
    share = done.trainable_parameters / done.base_parameters
    typer.echo(
        f"{len(done.tasks)} tasks in {figures.parameters(done.trainable_parameters, share)} "
        f"parameters; one seed ({done.seed}), interval: bootstrap over the rows scored; best at "
        f"step {done.best_step} of {done.steps}"
    )
    for name in done.tasks:
        typer.echo(f"{done.adapter(name)}")
