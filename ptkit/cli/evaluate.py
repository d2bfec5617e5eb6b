"""`ptkit evaluate`: measure saved adapters on a recipe's test rows, or on standard tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_adapters
from ptkit.cli.options import JsonOutput, Quiet, Set
from ptkit.cli.places import require_adapters, require_model, require_there, require_writable
from ptkit.errors import UserError
from ptkit.extras import require

if TYPE_CHECKING:
    from ptkit.evaluation.evaluate import Evaluation
    from ptkit.recipe.load import LoadedRecipe


def evaluate(
    recipe: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(metavar="[RECIPE]", help="A recipe file, or the name of a shipped recipe."),
    ] = None,
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--adapter",
            "-a",
            help="Adapter or run folder; repeatable. None: the base.",
            autocompletion=complete_adapters,
        ),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--data",
            "-d",
            help="File of rows to score on in place of the recipe's: CSV, JSONL, "
            "JSON or Parquet with the recipe's columns.",
        ),
    ] = None,
    with_base: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--base/--no-base",
            help="Score the plain base beside the adapters; default: it is, where it answers in "
            "words.",
        ),
    ] = None,
    set_: Set = None,
    precision: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="float32, bfloat16, float16, blocks, nf4 or int8 in place of the recipe's; "
            "repeatable: all scores in one table."
        ),
    ] = None,
    predictions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the predictions to this JSONL file (one adapter only)."),
    ] = None,
    harness: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas; no RECIPE then."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --harness: base model; default: the one the adapter names."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --harness: only so many examples of each task."),
    ] = None,
    shots: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="With --harness: demonstrations; default: the task's own."),
    ] = None,
    include: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --harness: a folder with tasks of your own."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="With --harness: ask in the chat template and with the system prompt of the "
            "adapter, or in the model's own template.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="With --harness: rows at a time.")] = 16,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Score saved adapters beside the base on the test rows of a recipe, with 95 % intervals.

    Without RECIPE it is the recipe that the first adapter was trained by. With --data the rows of a
    file are scored instead.

    With --harness, on standard tasks (needs `pip install -e ".[harness]"`).
    """
    places: list[Path | None] = [*adapter] if adapter else [None]
    require_adapters(*places, whole=recipe is None and harness is None)
    require_there(data)
    require_writable("--predictions", predictions)
    if harness is not None:
        if recipe is not None:
            raise UserError("--harness has tasks of its own; give either a recipe or --harness")
        options = {"limit": limit, "shots": shots, "batch_size": batch_size}
        _standard_tasks(harness, include, places, model, json_output, options, chat=chat)
        return
    if chat:
        raise UserError("--chat is for --harness: a recipe's task says how its rows are asked")
    if recipe is None and adapter is None:
        raise UserError("nothing to evaluate: give an adapter (-a), a recipe, or --harness TASKS")
    if predictions is not None and len(places) * len(precision or [None]) > 1:
        raise UserError(
            "--predictions takes the rows of one adapter in one precision; give a single --adapter"
        )
    _recipe_rows(
        recipe, set_ or [], places, [*precision] if precision else [None],
        _Asked(data, with_base, predictions, json_output, quiet),
    )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """How scores are asked for: on which rows, and how they are shown."""

    data: Path | None
    with_base: bool | None
    predictions: Path | None
    json_output: bool
    quiet: bool


def _recipe_rows(
    recipe: str | None,
    overrides: list[str],
    places: list[Path | None],
    precisions: list[str | None],
    asked: _Asked,
) -> None:
    from ptkit.recipe.load import load_recipe

    if recipe is not None:
        loaded = load_recipe(recipe, overrides)

    from ptkit.evaluation.evaluate import asked_alike, evaluate_saved
    from ptkit.formats import atomic
    from ptkit.formats.places import find_adapter
    from ptkit.recipe.tasks import HeadedTask
    from ptkit.training.experiment import prepare
    from ptkit.training.own_recipe import own_recipe, with_test_rows

    if recipe is None:
        assert places[0] is not None
        loaded = own_recipe(find_adapter(places[0], whole=True), overrides, data=asked.data)
    if asked.data is not None:
        loaded = with_test_rows(loaded, asked.data)
    # A head is part of an adapter: the base's own is a new one, or of other labels.
    beside = not isinstance(loaded.recipe.task, HeadedTask)
    shown = [*places]
    if None not in shown and (beside if asked.with_base is None else asked.with_base):
        shown.insert(0, None)
    alike = asked_alike([place for place in shown if place is not None]) if None in shown else None
    recipes = [_in_precision(loaded, name) for name in precisions]  # all checked before any runs
    table: list[tuple[str, Evaluation]] = []
    for name, chosen in zip(precisions, recipes, strict=True):
        experiment = prepare(chosen)
        head = experiment.base.head
        speaks = experiment.parallel.state.is_main_process
        if (
            speaks and not asked.quiet and head is not None and head.told and None in shown
        ):  # an adapter has a head of its own
            typer.echo(head.told, err=True)
        for place in shown:
            result = evaluate_saved(experiment, place, chat=alike)
            if not speaks:  # the first one speaks and writes
                continue
            if asked.predictions is not None and (place is not None or len(shown) == 1):
                rows = [json.dumps(p.as_dict(), ensure_ascii=False) for p in result.predictions]
                atomic.write_text(asked.predictions, "\n".join(rows) + "\n")
            found = experiment.base.precision
            if asked.json_output:
                typer.echo(json.dumps({**result.as_dict(), "precision": found}))
            elif len(recipes) > 1:
                # A GGUF file's values are of its own precision, however they are kept.
                named = found if name == found else f"{name} ({found})"
                table.append((named, result))
            else:
                _show(result)
    if table:
        _show_table(table)


def _in_precision(loaded: LoadedRecipe, name: str | None) -> LoadedRecipe:
    if name is None:
        return loaded
    model = loaded.recipe.model.in_precision(name)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"model": model}))


def _show(result: Evaluation) -> None:
    from ptkit.formats.figures import bracketed

    typer.echo(f"{result.name}  (n={len(result.predictions)} {result.rows_scored})")
    for name, interval in result.metrics.items():
        spread = bracketed(interval.low, interval.high, ".2f")
        typer.echo(f"  {name:12} {interval.mean:6.2f} {spread}".rstrip())
    if result.retention is not None:
        overall = result.retention.overall
        kept = overall.retention
        share = "none to keep" if kept is None else f"{kept:.1%}"
        typer.echo(
            f"  {'forgetting':12} {overall.forgetting:+6.3f}  nats per token, "
            f"n={overall.tokens:,} tokens; retention {share}; "
            f"drift {result.retention.drift:.3f}"
        )


def _show_table(results: list[tuple[str, Evaluation]]) -> None:
    from rich.table import Table

    from ptkit.cli.options import show_table

    first = results[0][1]
    over = ", 95 % intervals over rows alone" if len(first.predictions) > 1 else ""
    table = Table(
        "precision", "adapter", *first.metrics,
        caption=f"n={len(first.predictions)} {first.rows_scored}{over}",
    )  # fmt: skip
    for precision, result in results:
        scores = [interval.written(".2f") for interval in result.metrics.values()]
        table.add_row(precision, result.name, *scores)
    show_table(table, names=1)


def _standard_tasks(
    names: str,
    include: Path | None,
    places: list[Path | None],
    model: str | None,
    json_output: bool,
    options: dict[str, Any],
    *,
    chat: bool,
) -> None:
    require("harness", "`ptkit evaluate --harness`")
    require_model(model)
    from ptkit.data.chat_template import ChatTemplate
    from ptkit.evaluation.evaluate import adapter_at
    from ptkit.evaluation.harness import evaluate_tasks, known_tasks
    from ptkit.formats.adapter_files import read_info
    from ptkit.formats.places import find_adapter
    from ptkit.runtime.base_model import Base

    tasks = known_tasks([name.strip() for name in names.split(",") if name.strip()], include)
    base: Base | None = None
    for place in places:
        with adapter_at(place, model, base) as loaded:
            base = loaded.base
            info = None if place is None else read_info(find_adapter(place))
            own = ChatTemplate.of_record(base.tokenizer, info.chat if info else None)
            found = evaluate_tasks(loaded, tasks, **options, chat=own if chat else None)
        title = str(place) if place else "base"
        if json_output:
            typer.echo(json.dumps({"adapter": title, "tasks": found}))
            continue
        typer.echo(title)
        for task, values in found.items():
            for name, value in values.items():
                metric, _, filtered = name.partition(",")
                if metric.endswith("_stderr") or name == "n":
                    continue
                error = values.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {error:.4f}" if error is not None else ""
                typer.echo(f"  {task:20} {metric:16} {value:.4f}{spread}  (n={values['n']})")
