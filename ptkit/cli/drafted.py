"""Options from which a recipe is drafted, for `ptkit init` and `ptkit train --data`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.completion import complete_models

if TYPE_CHECKING:
    from ptkit.drafting.draft import Draft


class DraftGoal(StrEnum):
    """What is to be learnt from a file."""

    auto = "auto"
    classification = "classification"
    token_classification = "token_classification"
    generation = "generation"
    chat = "chat"
    preference = "preference"


PANEL = "Drafting a recipe from a data file"
DataOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option(
        "--data", "-d", rich_help_panel=PANEL,
        help="File with the training rows: CSV, JSONL, JSON or Parquet; or its folder.",
    ),
]  # fmt: skip
DraftModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model", rich_help_panel=PANEL, autocompletion=complete_models,
        help="Base model: hub id, folder, GGUF file or name; default: `tiny-en`.",
    ),
]  # fmt: skip
MethodOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--method", "-m",
        help="Method to train: its kind (`prefix_tuning`) or its label in the recipe. Default: the "
        "only one that the recipe trains; with --data, the one that fits.",
    ),
]  # fmt: skip
GoalOption = Annotated[
    DraftGoal,
    typer.Option(
        "--goal", rich_help_panel=PANEL, help="What the model learns; auto: by the columns."
    ),
]
LabelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--label", rich_help_panel=PANEL, help="Column with the label to choose."),
]
TextOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--text", rich_help_panel=PANEL, help="Column that the model reads; repeatable."),
]
TargetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--target", rich_help_panel=PANEL, help="Column that the model learns to write."),
]
TestOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--test", rich_help_panel=PANEL,
        help="File with test rows; default: one beside the data whose name has `test`.",
    ),
]  # fmt: skip
ValidationOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--validation", rich_help_panel=PANEL,
        help="File with validation rows; default: one beside the data, or a tenth of them.",
    ),
]  # fmt: skip


def say_draft(draft: Draft) -> None:
    """Tell what was decided, and why, on the error stream."""
    for line in (*draft.reasons, *draft.told):
        typer.secho(f"  {line}", err=True, dim=True)
