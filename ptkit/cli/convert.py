"""`ptkit convert`: between soft prompts and KV prefixes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import AdapterArgument, OwnModelOption
from ptkit.cli.places import require_adapters, require_free, require_model


class ConvertedKind(StrEnum):
    """What an adapter becomes."""

    prefix = "prefix"
    prompt = "prompt"


def convert(
    adapter: AdapterArgument,
    to: Annotated[ConvertedKind, typer.Option(help="A KV prefix, or a soft prompt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    task: Annotated[
        Optional[int],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(min=0, help="Which task of a multi-task prompt, from 0."),
    ] = None,
    model: OwnModelOption = None,
    max_error: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a prefix a soft prompt may miss."),
    ] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Turn a soft prompt into a KV prefix (exact), or a prefix into a soft prompt (a fit).

    Takes PEFT's prompt tuning, P-tuning, prefix tuning, CPT, cartridge and multi-task adapters.
    """
    require_adapters(adapter)
    require_free(out, adapter, force=force)
    require_model(model)

    from ptkit.hub.convert import convert_adapter

    done = convert_adapter(
        adapter, out, to=to.value, task=task, model=model, max_error=max_error, replace=force
    )
    typer.echo(done.path)
    note = "exact" if done.error == 0 else f"a fit: {done.error:.2%} of the prefix is missed"
    typer.secho(f"{done.virtual_tokens} virtual tokens, {note}", err=True)
