"""`ptkit data`: what a file of conversations holds, before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_models
from ptkit.cli.options import JsonOutput, Quiet, show_table

if TYPE_CHECKING:
    from ptkit.data.chat_report import ChatReport

app = typer.Typer(no_args_is_help=True, help="Look at files of conversations.")


@app.callback()
def data() -> None:
    """Look at files of conversations."""


@app.command()
def inspect(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSONL, JSON, CSV or Parquet files.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Whose tokenizer reads them: hub id, folder or name.",
            autocompletion=complete_models,
        ),
    ] = "tiny-en",
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="How rows are written: auto, messages, sharegpt, alpaca, prompt_completion.",
        ),
    ] = "auto",
    column: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="The column of the turns; default: messages or conversations."),
    ] = None,
    chat_template: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A Jinja file, chatml or plain; default: the model's own."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="System prompt of conversations that bring none."),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="What is learnt: assistant, last or all.")
    ] = "assistant",
    max_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of one.")] = 1024,
    rows: Annotated[int, typer.Option(min=0, help="How many of the first rows are shown.")] = 2,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show what was recognised, and the first rows as the model reads them.

    Several files are taken for splits, whose duplicates are counted. A file that training would
    refuse is refused here, with the same message.
    """
    from pydantic import ValidationError

    from ptkit.data.chat_report import inspect_chats
    from ptkit.data.chat_template import with_template_read
    from ptkit.errors import UserError
    from ptkit.recipe.tasks import ChatTask
    from ptkit.runtime.tokenization import load_tokenizer

    settings: dict[str, Any] = {
        "kind": "chat", "data": {"files": {"train": str(files[0])}}, "format": form,
        "column": column, "chat_template": chat_template, "system": system, "loss": loss,
        "max_tokens": max_tokens, "max_target_tokens": 1,
    }  # fmt: skip
    try:
        task = ChatTask.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = {"format": "--as"}.get(str(first["loc"][0]), f"--{first['loc'][0]}")
        raise UserError(f"{option}: {first['msg']}, found {first['input']!r}") from error
    task = with_template_read(task, Path.cwd())
    report = inspect_chats(files, load_tokenizer(model), task, rows)
    if json_output:
        typer.echo(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    elif quiet:
        typer.echo(report.form)
    else:
        _show(report)


def _show(report: ChatReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"recognised: {report.form}"))
    table = Table(box=None, pad_edge=False)
    for heading in ("file", "rows", "turns", "roles", "tokens", "cut", "learnt", "in others"):
        table.add_column(heading)
    for split in report.splits:
        table.add_row(
            Text(split.name), f"{split.rows:,}",
            f"{split.turns_median:g}, at most {split.turns_most}",
            ", ".join(f"{role} {count:,}" for role, count in split.roles.items()),
            f"{split.tokens_median:g}, at most {split.tokens_longest:,}",
            f"{split.shortened:,}", f"{split.supervised:.1%}",
            Text(", ".join(f"{count:,} of {name}" for name, count in split.duplicates.items())),
        )  # fmt: skip
    show_table(table)
    for line in (line for split in report.splits for line in split.notes):
        console.print(Text(line))
    for number, row in enumerate(report.shown, start=1):
        console.print(Text(f"\nrow {number}, what is learnt in green", style="bold"))
        # Without colours, brackets tell what is learnt.
        marked = console.is_terminal and not console.no_color
        text = Text()
        for piece, learnt in row:
            shown = piece if marked or not learnt else f"[learnt: {piece}]"
            text.append(shown, style="green" if learnt else "dim")
        console.print(text, soft_wrap=True)
