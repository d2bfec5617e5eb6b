"""`ptkit export`: an adapter folder that plain PEFT loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer


class Dtype(StrEnum):
    """Data types an adapter can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class Format(StrEnum):
    """What is stored."""

    peft = "peft"
    kv = "kv"


def export(
    run: Annotated[Path, typer.Argument(help="A finished run (or an adapter folder).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, adapters/NAME.")],
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Data type of the stored parameters. int8 is for ptkit only, and scored again."
        ),
    ] = Dtype.float32,
    format: Annotated[
        Format,
        typer.Option(help="`kv` stores any method compiled to a prefix: no prompt tokens to read."),
    ] = Format.peft,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="With int8: the recipe to score on; default: the run's own."),
    ] = None,
    license: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Licence for the card: the Hub's identifier, `apache-2.0`."),
    ] = None,
    language: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Language for the card: `en`."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Write a run's trained parameters as safetensors in PEFT's layout, with a card; verify them.

    Reparameterisation is folded in. `PeftModel.from_pretrained(base, OUT)` loads the result.
    """
    from ptkit.hub.export import export_run

    done = export_run(
        run, out, dtype=dtype.value, format=format.value, replace_out=force, recipe=recipe,
        license=license, language=language,
    )  # fmt: skip
    typer.echo(f"{done.path}")
    size = f"{done.bytes / 1000:.1f} KB"
    notes = [f"{done.parameters:,} parameters", f"{size}, verified by reloading"]
    if done.largest_rounding:
        notes.append(f"largest rounding {done.largest_rounding:.2g}")
    notes += [f"{name} {-points:+.2f}" for name, points in (done.lost or {}).items()]
    typer.secho(", ".join(notes), err=True)
