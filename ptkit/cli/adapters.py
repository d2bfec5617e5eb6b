"""`ptkit adapters`: the adapters on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptkit.cli.options import AdapterArgument, JsonOutput, Quiet, table
from ptkit.cli.places import require_adapters

if TYPE_CHECKING:
    from ptkit.formats.listing import Listed

app = typer.Typer(help="List, describe, compare and delete adapters.", no_args_is_help=True)


@app.command()
def ls(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder whose direct subfolders are adapters.")
    ] = Path("adapters"),
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """List the adapters: method, base, virtual tokens, size; reads no weights, loads no model."""
    from ptkit.formats.listing import list_adapters
    from ptkit.formats.sizes import in_bytes

    found = list_adapters(folder)
    if json_output:
        rows = [{**asdict(listed), "path": str(listed.path)} for listed in found]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    if quiet:
        for listed in found:
            typer.echo(listed.path)
        return
    titles = ["adapter", "method", "base", "virtual tokens", "dtype", "bytes", "fault"]
    table(titles if any(a.fault for a in found) else titles[:-1], map(_row, found))
    total = sum(a.bytes for a in found)
    count = "1 adapter" if len(found) == 1 else f"{len(found)} adapters"
    typer.echo(f"{count}, {in_bytes(total)} in {folder}")


def _row(a: Listed) -> list[str]:
    tokens = "" if a.virtual_tokens is None else str(a.virtual_tokens)
    return [a.name, a.method, a.base or "", tokens, ", ".join(a.dtypes), f"{a.bytes:,}",
            a.fault or ""]  # fmt: skip


@app.command()
def info(adapter: AdapterArgument, json_output: JsonOutput = False, quiet: Quiet = False) -> None:
    """Show what an adapter's record says: method, base, scores, forgetting; loads no model."""
    require_adapters(adapter, whole=True)

    from ptkit.hub.describe import describe

    facts = describe(adapter)
    if json_output:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    if quiet:
        typer.echo(facts["path"])
        return
    for name, value in facts.items():
        for line in _lines(value):
            typer.secho(f"{name:>15}  ", fg=typer.colors.CYAN, nl=False)
            typer.echo(line)
            name = ""


@app.command()
def diff(
    first: AdapterArgument,
    second: AdapterArgument,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Compare two adapters: settings, scores and trained values that differ."""
    require_adapters(first, second)

    from ptkit.hub.describe import differences

    found = differences(first, second)
    if json_output:
        typer.echo(json.dumps([asdict(d) for d in found], ensure_ascii=False))
        return
    if quiet:
        for difference in found:
            typer.echo(difference.name)
        return
    if not found:
        typer.echo("no difference")
        return
    table(["", first, second], [[d.name, _shown(d.first), _shown(d.second)] for d in found])


@app.command()
def rm(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Adapter folders.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Delete adapter folders. Nothing else is deleted, and runs are not adapters."""
    from ptkit.errors import UserError
    from ptkit.formats import atomic
    from ptkit.formats.adapter_folder import CONFIG

    # One that is named twice, in whatever way, is deleted once, and one within another before it.
    named = {folder.resolve(): folder for folder in folders}
    folders = [named[place] for place in sorted(named, key=lambda p: len(p.parts), reverse=True)]
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not an adapter folder (it has no {CONFIG})")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("no one can be asked without a terminal; give --yes to delete")
        names = ", ".join(map(str, folders))
        if not typer.confirm(f"Delete {names}?", err=True):
            raise UserError("nothing was deleted")
    for folder in folders:
        atomic.remove(folder)
        if json_output:
            typer.echo(json.dumps({"deleted": str(folder)}))
        elif quiet:
            typer.echo(folder)
        else:
            typer.echo(f"deleted {folder}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {_shown(entry)}" for key, entry in value.items()]
    return _shown(value).splitlines() or [""]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
