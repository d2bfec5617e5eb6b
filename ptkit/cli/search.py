"""`ptkit search`: adapters on the Hub for a base model."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, Quiet, table


def search(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Base model: its hub id.")],
    text: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(help="Words in the repository's name."),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--method", "-m", help="As in a recipe: prefix_tuning, lora, ..."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Find adapters of a base model on the Hub, most downloaded first."""
    from ptkit.hub.search import search as run

    found = run(base, method=method, text=text, limit=limit)
    if json_output:
        typer.echo(json.dumps([vars(f) for f in found]))
        return
    if quiet:
        for each in found:
            typer.echo(each.id)
        return
    if not found:
        typer.secho(f"no adapters of {base} that name it as their base", err=True)
        return
    table(
        ["adapter", "method", "downloads", "likes", "updated", "record"],
        [[f.id, f.method or "", f"{f.downloads:,}", str(f.likes), f.updated,
          "ptkit" if f.by_ptkit else ""] for f in found],
    )  # fmt: skip
    typer.secho(f"`ptkit pull {found[0].id}` gets the first", err=True, dim=True)
