"""`ptkit import`: adapters of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.completion import complete_models
from ptkit.cli.places import require_free, require_model, require_something


def import_(
    source: Annotated[
        str, typer.Argument(help="Folder, file or hub id of an adapter that another library wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(
            "--base",
            "--model",
            help="Base model; default: the one the adapter names.",
            autocompletion=complete_models,
        ),
    ] = None,
    subfolder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where in the folder or repository the adapter is."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Read another library's adapter and write it in PEFT's layout, exactly or not at all.

    AdapterHub's `adapters`, OpenDelta, OpenPrompt, and PEFT's pickled weights; docs/foreign.md says
    what becomes of each. `ptkit inspect SOURCE` names what a folder is. Pickles are opened by a
    process that builds tensors and runs nothing.
    """
    require_something(source)
    require_free(out, source, force=force)
    require_model(model)

    from ptkit.hub.imports import import_adapter

    done = import_adapter(source, out, model=model, subfolder=subfolder, replace=force)
    typer.echo(done.path)
    typer.secho(f"{source} is {done.was}; written as {done.method}", err=True)
    for note in done.notes:
        typer.secho(note, err=True)
