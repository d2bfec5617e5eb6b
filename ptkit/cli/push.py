"""`ptkit push`: an adapter to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import JsonOutput, Quiet
from ptkit.cli.places import require_adapters


def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter or run folder, or an export for vLLM.")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="Made if not there.")],
    private: Annotated[
        Optional[bool],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--private/--public", help="Of a new repository; default: the account's."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Branch to commit to; made if not there."),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose the commit as a pull request.")
    ] = False,
    message: Annotated[Optional[str], typer.Option(help="Commit message.")] = None,  # noqa: UP045
    base_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="USER/NAME",
            help="The base on the Hub, where the adapter names a folder of this machine.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the files; send nothing.")
    ] = False,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Upload an adapter with its card and record, in one commit; prints the commit's address.

    The adapter is checked first. Log in once with `hf auth login`; huggingface_hub's settings
    (HF_TOKEN, HF_ENDPOINT, HF_HOME) are honoured.
    """
    from ptkit.formats.hub_repository import HubId

    HubId.read(repository)
    if not (adapter / "prefix.safetensors").is_file():  # of an export for vLLM
        require_adapters(adapter)

    from ptkit.hub.transfer import push as run

    done = run(
        adapter, repository, private=private, revision=revision, create_pr=create_pr,
        dry_run=dry_run, message=message, base_model=base_model,
    )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(vars(done)))
        return
    if not quiet:
        for name, size in done.files.items():
            typer.secho(f"{size:>10,}  {name}", err=True, dim=True)
    if done.url is None:
        typer.secho(f"nothing was sent to {done.repository} (dry run)", err=True)
    else:
        typer.echo(done.url)
