"""`ptkit bank`: what a folder of adapters holds, and whether a base can use it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptkit.cli import adapters
from ptkit.cli.options import JsonOutput, ModelOption, Quiet, table
from ptkit.cli.places import require_model
from ptkit.errors import UserError
from ptkit.formats.sizes import in_bytes, read_bytes

app = typer.Typer(help="List, load and verify a folder of adapters.", no_args_is_help=True)

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder whose direct subfolders are adapters.")
]


@app.command()
def ls(folder: FolderArgument, json_output: JsonOutput = False, quiet: Quiet = False) -> None:
    """List the adapters: method, base, virtual tokens, size; reads no weights, loads no model."""
    _adapters(folder)
    adapters.ls(folder, json_output=json_output, quiet=quiet)


@app.command()
def load(
    folder: FolderArgument,
    model: ModelOption = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Device memory for prefixes, `500MB` say. Default: no limit."),
    ] = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Load every adapter into a bank: what it takes, how long, and where each one ends up."""
    limit = None if budget is None else read_bytes(budget)
    paths = _adapters(folder)
    require_model(model)

    from ptkit.bank import AdapterBank
    from ptkit.methods.own_base import own_base
    from ptkit.runtime.base_model import load_base

    base = load_base(model or own_base(paths))
    base.remember()  # its time is no adapter's
    bank = AdapterBank(base, budget=limit)
    started = time.perf_counter()
    for path in paths:
        bank.load(path, chosen=model is not None)
    seconds = time.perf_counter() - started
    statuses = [bank.status(name) for name in bank.list()]
    summary: dict[str, Any] = {
        "adapters": len(statuses), "seconds": seconds, "budget": limit,
        "resident_bytes": bank.resident_bytes, "host_bytes": bank.host_bytes,
        "evictions": bank.counts.evictions,
    }  # fmt: skip
    if json_output:
        shown = [{**asdict(s), "path": str(s.path)} for s in statuses]
        typer.echo(json.dumps({**summary, "loaded": shown}))
        return
    if quiet:
        for status in statuses:
            typer.echo(status.name)
        return
    table(
        ["adapter", "method", "virtual tokens", "bytes", "where"],
        [[s.name, str(s.method), str(s.virtual_tokens), f"{s.nbytes or 0:,}", s.tier]
         for s in statuses],
    )  # fmt: skip
    count = "1 adapter" if len(statuses) == 1 else f"{len(statuses)} adapters"
    typer.echo(
        f"{count} in {seconds * 1e3:,.1f} ms; "
        f"{in_bytes(bank.resident_bytes)} of prefixes on the device"
        + ("" if limit is None else f", of {in_bytes(limit)}")
    )


@app.command()
def verify(
    folder: FolderArgument,
    model: ModelOption = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Read, check and compile every adapter for the base; exit code 2 when one is refused.

    Checked: files complete and safe, values finite, shapes and fingerprint those of the base.
    """
    paths = _adapters(folder)
    require_model(model)

    from ptkit.bank import AdapterBank
    from ptkit.errors import AdapterError
    from ptkit.methods.own_base import own_base
    from ptkit.runtime.base_model import load_base

    bank = AdapterBank(load_base(model or own_base(paths)))
    refused = 0
    for path in paths:
        fault = None
        try:
            bank.unload(bank.load(path, chosen=model is not None))
        except AdapterError as error:
            fault, refused = str(error), refused + 1
        if json_output:
            typer.echo(json.dumps({"adapter": path.name, "ok": fault is None, "fault": fault}))
        elif quiet:
            if fault is not None:
                typer.echo(path.name)
        else:
            mark, color = ("ok     ", "green") if fault is None else ("refused", "red")
            typer.secho(mark, fg=color, nl=False)
            typer.echo(f" {path.name}" + ("" if fault is None else f": {fault}"))
    if refused:
        raise UserError(f"{refused} of the adapters in {folder} cannot be used with {bank.base.id}")


def _adapters(folder: Path) -> list[Path]:
    """The adapter folders below `folder`. Raises UserError when there are none."""
    from ptkit.formats.adapter_folder import CONFIG, adapter_folders

    found = adapter_folders(folder)
    if not found:
        raise UserError(f"{folder} holds no adapters (folders with an {CONFIG})")
    return found
