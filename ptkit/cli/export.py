"""`ptkit export`: an adapter folder that plain PEFT loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Data types an adapter can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Annotated[Path, typer.Argument(help="A finished run (or an adapter folder).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, adapters/NAME.")],
    dtype: Annotated[Dtype, typer.Option(help="Data type of the stored parameters.")] = (
        Dtype.float32
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Write a run's trained parameters as safetensors in PEFT's layout, and verify them.

    Reparameterisation is folded in. `PeftModel.from_pretrained(base, OUT)` loads the result.
    """
    from ptkit.train.export import export_run

    done = export_run(run, out, dtype=dtype.value, replace=force)
    typer.echo(f"{done.path}")
    typer.secho(
        f"{done.parameters:,} parameters, {done.bytes / 1000:.1f} KB, verified by reloading"
        + (f"; largest rounding {done.largest_rounding:.2g}" if done.largest_rounding else ""),
        err=True,
    )
