"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Optional

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Delete what is in the folder and start over.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Base model: hub id, folder, or `tiny-en`.")
]


class OutputFormat(StrEnum):
    """How commands about adapters and the Hub answer, as the `hf` command does."""

    human = "human"
    json = "json"
    quiet = "quiet"


FormatOption = Annotated[
    OutputFormat,
    typer.Option("--format", help="Answer for people, as JSON, or the bare names, line by line."),
]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Adapter or run folder, or USER/REPO[@REVISION].")
]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their titles; values are shown as they are, without markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*titles, box=box.SIMPLE_HEAD)
    for row in rows:
        shown.add_row(*row[: len(titles)])
    Console(markup=False, highlight=False).print(shown)
