"""`ptkit data`: what a file of conversations or pairs holds, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from ptkit.cli.completion import complete_models
from ptkit.cli.options import JsonOutput, Quiet, show_table
from ptkit.cli.places import require_model, require_there

if TYPE_CHECKING:
    from rich.console import Console

    from ptkit.data.chat_report import ChatReport
    from ptkit.data.pair_report import PairReport

app = typer.Typer(
    no_args_is_help=True,
    help="Look at files of conversations, or of preferred and rejected answers.",
)


@app.callback()
def data() -> None:
    """Look at files of conversations, or of preferred and rejected answers."""


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
            help="How rows are written: auto, messages, sharegpt, alpaca, prompt_completion, "
            "preference.",
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
    refuse is refused here, with the same message. Columns `chosen` and `rejected` are pairs.
    """
    require_there(*files)
    require_model(model)

    from pydantic import ValidationError

    from ptkit.data.chat_report import inspect_chats
    from ptkit.data.chat_template import with_template_read
    from ptkit.data.pair_report import holds_pairs, inspect_pairs
    from ptkit.errors import UserError
    from ptkit.recipe.tasks import ChatTask, PreferenceTask
    from ptkit.runtime.tokenization import load_tokenizer

    pairs = form == "preference" or (form == "auto" and column is None and holds_pairs(files[0]))
    if pairs and (column is not None or loss != "assistant"):
        raise UserError(
            "`--column` and `--loss` are of conversations; pairs have the columns `chosen` and "
            "`rejected`, and both answers are scored"
        )
    settings: dict[str, Any] = {
        "data": {"files": {"train": str(files[0])}}, "chat_template": chat_template,
        "system": system, "max_tokens": max_tokens,
    }  # fmt: skip
    of_chats = {"format": form, "column": column, "loss": loss, "max_target_tokens": 1}
    task: PreferenceTask | ChatTask
    try:
        if pairs:
            task = PreferenceTask.model_validate({"kind": "preference", **settings})
        else:
            task = ChatTask.model_validate({"kind": "chat", **settings, **of_chats})
    except ValidationError as error:
        first = error.errors()[0]
        option = {"format": "--as"}.get(str(first["loc"][0]), f"--{first['loc'][0]}")
        raise UserError(f"{option}: {first['msg']}, found {first['input']!r}") from error
    task = with_template_read(task, Path.cwd())
    tokenizer = load_tokenizer(model)
    report: PairReport | ChatReport
    if isinstance(task, PreferenceTask):
        report = inspect_pairs(files, tokenizer, task, rows)
    else:
        report = inspect_chats(files, tokenizer, task, rows)
    if json_output:
        typer.echo(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    elif quiet:
        typer.echo(report.form)
    elif isinstance(task, PreferenceTask):
        _show_pairs(cast("PairReport", report))
    else:
        _show_chats(cast("ChatReport", report))


def _console(form: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Console:
    """A terminal on which was shown how files are written, and a line of figures for each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"recognised: {form}"))
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    show_table(table)
    return console


def _in_others(duplicates: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} of {name}" for name, count in duplicates.items())


def _show_pairs(report: PairReport) -> None:
    from rich.text import Text

    def tokens(part: tuple[float, int]) -> str:
        return f"{part[0]:g}, at most {part[1]:,}"

    headings = ("file", "rows", "prompt tokens", "chosen", "rejected", "cut", "in others")
    console = _console(report.form, headings, [
        (split.name, f"{split.rows:,}", tokens(split.prompt), tokens(split.chosen),
         tokens(split.rejected), f"{split.shortened:,}", _in_others(split.duplicates))
        for split in report.splits
    ])  # fmt: skip
    for line in (line for split in report.splits for line in split.notes):
        console.print(Text(line))
    for number, (prompt, chosen, rejected) in enumerate(report.shown, start=1):
        console.print(Text(f"\nrow {number}", style="bold"))
        console.print(Text(prompt, style="dim"), soft_wrap=True)
        console.print(Text(f"chosen: {chosen}", style="green"), soft_wrap=True)
        console.print(Text(f"rejected: {rejected}", style="red"), soft_wrap=True)


def _show_chats(report: ChatReport) -> None:
    from rich.text import Text

    headings = ("file", "rows", "turns", "roles", "tokens", "cut", "learnt", "in others")
    console = _console(report.form, headings, [
        (split.name, f"{split.rows:,}",
         f"{split.turns_median:g}, at most {split.turns_most}",
         ", ".join(f"{role} {count:,}" for role, count in split.roles.items()),
         f"{split.tokens_median:g}, at most {split.tokens_longest:,}",
         f"{split.shortened:,}", f"{split.supervised:.1%}", _in_others(split.duplicates))
        for split in report.splits
    ])  # fmt: skip
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
