"""`ptkit pull`: an adapter from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, Quiet


def pull(
    source: Annotated[str, typer.Argument(metavar="USER/REPO[@REVISION]", help="What to get.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--out", "-o", help="Folder to write; default: adapters/REPO."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Download an adapter to a folder, checked; only the files ptkit reads are asked for."""
    from ptkit.hub.transfer import pull as run

    done = run(source, out, force=force)
    if json_output:
        checks = [vars(check) for check in done.checks]
        typer.echo(json.dumps({"path": str(done.path), "checks": checks}, ensure_ascii=False))
        return
    if not quiet:
        for check in done.checks:
            typer.secho(f"{check.name}: {check.detail}", err=True, dim=True)
        typer.secho(f"`ptkit verify {done.path}` checks it on its base", err=True, dim=True)
    typer.echo(done.path)
