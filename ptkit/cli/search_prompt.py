"""`ptkit search-prompt`: the best words to write before the input, for comparison."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, Quiet, RecipeArgument, Set
from ptkit.options import SEEDS


def search_prompt(
    recipe: RecipeArgument,
    text: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Text to begin with; default: the words of the recipe's template."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every position is tried.")] = 2,
    candidates: Annotated[int, typer.Option(min=1, help="Words tried at a position.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Training rows they are scored on.")] = 32,
    seed: Annotated[
        int, typer.Option(min=0, max=SEEDS - 1, help="Seed of the rows and the order.")
    ] = 0,
    set_: Set = None,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Search for a text prompt word by word, as the baseline of what is learnt.

    Nothing is trained. The text goes into a recipe as a text_prompt's `instruction`.
    """
    from dataclasses import asdict

    from ptkit.errors import UserError
    from ptkit.recipe.load import load_recipe
    from ptkit.recipe.tasks import HeadedTask, PreferenceTask

    loaded = load_recipe(recipe, [*(set_ or []), "retention=null"])
    task = loaded.recipe.task
    if isinstance(task, HeadedTask):
        raise UserError(
            f"a prompt is searched for models that answer in words; {recipe} has a task of `kind: "
            f"{task.kind}`"
        )
    if isinstance(task, PreferenceTask):
        raise UserError(
            f"a prompt is searched by the loss of targets; {recipe} has a task of `kind: "
            "preference`, whose loss is of pairs"
        )

    from ptkit.data.task import task_words
    from ptkit.training.experiment import prepare
    from ptkit.training.search_prompt import search_prompt as run

    experiment = prepare(loaded)

    def report(found: str, loss: float) -> None:
        if not quiet and not json_output:
            typer.echo(f"{loss:.4f}  {found!r}", err=True)

    found = run(
        experiment.base, experiment.training(seed).encoded, experiment.validation,
        text or task_words(task), rounds=rounds, candidates=candidates,
        rows=rows, seed=seed, report=report,
    )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    typer.echo(
        f"{found.scored} prompts scored; loss per target token {found.losses[0]:.4f} -> "
        f"{found.loss:.4f} on {found.rows} training rows, {found.validation_loss:.4f} on validation"
    )
    instruction = json.dumps(found.text, ensure_ascii=False)
    typer.echo(f'- kind: text_prompt\n  instruction: {instruction}\n  separator: ""\n  examples: 0')
