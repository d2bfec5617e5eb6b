"""`ptkit verify`: is an adapter what it says?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import AdapterArgument, FormatOption, OutputFormat

_MARKS = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("?   ", "yellow")}


def verify(
    adapter: AdapterArgument,
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--model", help="Base to check it on; default: the one it names."),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Run its recipe's test again: are the scores true?")
    ] = False,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --score: this recipe instead of the adapter's own."),
    ] = None,
    format: FormatOption = OutputFormat.human,
) -> None:
    """Check an adapter: files, base, shapes and values; with --score, its claimed scores too.

    Exit code 2 when a check fails. `?` marks what cannot be checked, and why.
    """
    from ptkit.errors import AdapterError
    from ptkit.hub.verify import verify as run

    found = run(adapter, model=model, score=score, recipe=recipe)
    if format is OutputFormat.json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    elif format is OutputFormat.quiet:
        for check in found.checks:
            if check.passed is False:
                typer.echo(check.name)
    else:
        for check in found.checks:
            mark, color = _MARKS[check.passed]
            typer.secho(mark, fg=color, nl=False)
            typer.echo(f"  {check.name:<18} {check.detail}")
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if check.passed is False)
        raise AdapterError(f"{adapter} does not pass: {failed}")
