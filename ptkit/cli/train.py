"""`ptkit train`: one method, one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_adapters, complete_recipes
from ptkit.cli.drafted import (
    DataOption,
    DraftGoal,
    DraftModelOption,
    GoalOption,
    LabelOption,
    MethodOption,
    TargetOption,
    TestOption,
    TextOption,
    ValidationOption,
)
from ptkit.cli.options import DryRun, Fresh, JsonOutput, PricePerHour, Quiet, Set
from ptkit.cli.places import require_adapters, require_model, require_there
from ptkit.errors import UserError
from ptkit.options import SEEDS


def train(
    recipe: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe file, or the name of a shipped recipe; none with --data.",
            autocompletion=complete_recipes,
        ),
    ] = None,
    method: MethodOption = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=SEEDS - 1, help="Seed of this run; default: the recipe's first."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="Run folder; default: runs/RECIPE/METHOD-seedN."),
    ] = None,
    start_from: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from",
            help="Adapter or run folder to go on training from.",
            autocompletion=complete_adapters,
        ),
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    price_per_hour: PricePerHour = None,
    data: DataOption = None,
    model: DraftModelOption = None,
    goal: GoalOption = DraftGoal.auto,
    label: LabelOption = None,
    text: TextOption = None,
    target: TargetOption = None,
    test: TestOption = None,
    validation: ValidationOption = None,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Train one method of a recipe and measure it.

    Without a recipe, --data FILE drafts one for that file, as `ptkit init` does, and prints it.

    A stopped run (Ctrl-C, kill, power) resumes where it last saved when the same command is given
    again. It ends with the same weights.
    """
    columns: dict[str, Any] = {
        "data": data, "model": model, "label": label, "text": text, "target": target,
        "test": test, "validation": validation,
    }  # fmt: skip
    if goal is not DraftGoal.auto:
        columns["goal"] = goal.value
    given = {name: value for name, value in columns.items() if value is not None}
    _require_one_source(recipe, given)
    require_there(data, validation, test)
    require_model(model)

    from ptkit.recipe.load import load_recipe
    from ptkit.recipe.one_method import one_method

    # Before torch is imported, which takes seconds: a slip of the pen is told at once.
    loaded = None if recipe is None else load_recipe(recipe, set_ or [])
    if loaded is not None:
        one_method(loaded.recipe, method)
    require_adapters(start_from)

    from ptkit.api import plan_training, run_folder
    from ptkit.api import train as run
    from ptkit.cli.display import LiveDisplay, price, say_plan, say_price
    from ptkit.comparison.autotuned import autotuned
    from ptkit.runtime.devices import resolve_device
    from ptkit.training.processes import processes

    if loaded is None:
        from ptkit.drafting.draft import draft_recipe

        draft = draft_recipe(**given, method=method, overrides=set_ or [])
        loaded, method = draft.loaded, draft.method
        if not (quiet or json_output):
            typer.echo(loaded.text, err=True)
            for assignment in set_ or []:
                typer.echo(f"# --set {assignment}", err=True)
    section = one_method(loaded.recipe, method)
    used_seed = loaded.recipe.seeds[0] if seed is None else seed
    folder = run_folder(loaded.recipe, section, used_seed, out)
    if dry_run:
        told, measured = plan_training(
            loaded, method=section.title, seed=used_seed, out=folder, start_from=start_from,
            fresh=fresh,
        )  # fmt: skip
        say_plan(told, measured, as_json=json_output, price_per_hour=price_per_hour)
        return
    # Under `accelerate launch` every process trains; the first one speaks and writes.
    state = processes(resolve_device(loaded.recipe.model.device))
    silent = quiet or json_output or not state.is_main_process
    with LiveDisplay(1, quiet=silent, price_per_hour=price_per_hour) as display:
        record = run(
            loaded, method=section.title, seed=used_seed, out=folder, start_from=start_from,
            fresh=fresh, observer=display,
        ).record  # fmt: skip
    if not state.is_main_process:
        return
    took = record.train_seconds + record.eval_seconds
    if json_output:
        cost = price(took, price_per_hour)
        typer.echo(json.dumps({**record.as_dict(), "folder": str(folder), **cost}))
        return
    metrics = "  ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
    typer.echo(f"{metrics}  (n={record.n_test} {record.rows_scored}, seed {record.seed})")
    typer.echo(
        f"trained {record.trainable_parameters:,} parameters "
        f"({record.trainable_parameters / record.base_parameters:.3%} of the base), "
        f"best at step {record.best_step} of {record.train_steps}"
    )
    say_price(took, price_per_hour)
    if (chosen := autotuned([record])) is not None:
        typer.echo(f"the start (and rate) that `auto` chose: {chosen}")
    if record.retention is not None:
        typer.echo(
            f"forgetting {record.retention.forgetting:+.3f} nats per token of general text, with "
            "the adapter on; none with it off"
        )
        if record.retention.forgetting > _MUCH and not quiet:
            typer.secho(
                "      a third of the learning rate, or `train.retain`, mostly forgets less "
                "(docs/comparisons.md)", err=True,
            )  # fmt: skip
    typer.echo(f"{folder}")
    if not quiet:
        for line in _next(folder, record.adapter_path, loaded.recipe.task.kind):
            typer.secho(line, err=True)


#: Nats per token of forgetting that is worth a hint.
_MUCH = 1.0


def _require_one_source(recipe: str | None, given: dict[str, Any]) -> None:
    """Raise UserError unless there is either a recipe or a data file."""
    if recipe is None and "data" not in given:
        raise UserError(
            "nothing to train: give a recipe (`ptkit recipes list` shows those that ship), or "
            "--data FILE"
        )
    if recipe is not None and given:
        key = {"model": "model.id", "label": "task.label"}.get(next(iter(given)), "task")
        raise UserError(
            f"--{next(iter(given))} drafts a recipe, and {recipe} is one: change it there, or for "
            f"this run with --set {key}=..."
        )


def _next(folder: Path, adapter: str | None, kind: str) -> list[str]:
    """The commands that make sense after a run."""
    if adapter != "adapter":
        return []
    use = f'ptkit {"classify" if "classification" in kind else "generate"} "..." -a {folder}'
    if kind == "chat":
        use = f"ptkit chat -a {folder}"
    return [
        f"next: {use}",
        f"      ptkit evaluate -a {folder}   (beside the base, with intervals)",
        f"      ptkit export {folder} --out adapters/NAME, then ptkit serve --adapters adapters",
    ]
