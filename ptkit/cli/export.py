"""`ptkit export`: an adapter folder that plain PEFT loads, or soft prompts for other engines."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_adapters
from ptkit.cli.options import gguf_named
from ptkit.cli.places import require_adapters, require_file, require_free
from ptkit.errors import UserError
from ptkit.formats.sizes import in_bytes
from ptkit.hub.engines import engines, writer


class Dtype(StrEnum):
    """Data types an adapter can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


#: What else than files for an engine can be stored.
_FORMS = {
    "peft": "As it was trained.",
    "kv": "Any method compiled to a prefix, no prompt tokens to read.",
    "parts": "A prefix with LoRA as two adapters, which plain PEFT loads one after the other.",
}


def _form(value: str) -> str:
    known = [*_FORMS, *engines()]
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}")
    return value


def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            autocompletion=complete_adapters,
            help="Finished runs or adapter folders; for an engine as many as are to be served.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, adapters/NAME.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            callback=_form,
            autocompletion=lambda: [*_FORMS, *engines()],
            metavar="FORM",
            help=" ".join(f"`{name}`: {what}" for name, what in {**_FORMS, **engines()}.items()),
        ),
    ] = "peft",
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(
            help="Data type of the stored parameters, default float32. int8 is for ptkit only, and "
            "scored again. With vllm: of keys and values. With llama-cpp: the server's cache type, "
            "default float16."
        ),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
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
    gguf: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="With llama-cpp: the file that llama-server loads, or `smollm2-135m`.",
            callback=gguf_named,
        ),
    ] = None,
    flash_attention: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="With llama-cpp: whether the server uses it; default: it does."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Write a run's trained parameters as safetensors in PEFT's layout, with a card; verify them.

    Reparameterisation is folded in. `PeftModel.from_pretrained(base, OUT)` loads the result.
    """
    require_adapters(*runs)
    require_free(out, *runs, force=force)
    require_file("--gguf", gguf)
    engine_settings = {"dtype": dtype and dtype.value, "gguf": gguf,
                       "flash_attention": flash_attention}  # fmt: skip
    ours = {"recipe": recipe, "license": license, "language": language}
    if form in engines():
        _refuse(form, ours)
        _for_engine(runs, out, form, force, engine_settings)
        return
    _refuse(form, {"gguf": gguf, "flash_attention": flash_attention})
    dtype = dtype or Dtype.float32
    if len(runs) > 1:
        raise UserError(f"--as {form} exports one run at a time, found {len(runs)}")
    if form == "parts":
        _refuse(form, {"dtype int8": dtype == Dtype.int8 or None, **ours})
        _parts(runs[0], out, dtype, force)
        return

    from ptkit.hub.export import export_run

    done = export_run(
        runs[0], out, dtype=dtype.value, format="kv" if form == "kv" else "peft",
        replace_out=force, recipe=recipe, license=license, language=language,
    )  # fmt: skip
    typer.echo(f"{done.path}")
    size = in_bytes(done.bytes)
    notes = [f"{done.parameters:,} values", f"{size}, verified by reloading"]
    if done.trained not in (None, done.parameters):
        notes[0] += f" (folded from {done.trained:,} that were trained)"
    if done.largest_rounding:
        notes.append(f"largest rounding {done.largest_rounding:.2g}")
    notes += [f"{name} {-points:+.2f}" for name, points in (done.lost or {}).items()]
    typer.secho(", ".join(notes), err=True)
    if form == "peft" and dtype != Dtype.int8:
        typer.secho("plain PEFT: PeftModel.from_pretrained(model, PATH)", err=True)
    typer.secho(f"next: ptkit serve --adapters {done.path.parent}", err=True)


def _parts(run: Path, out: Path, dtype: Dtype, force: bool) -> None:
    from ptkit.hub.parts import export_parts

    done = export_parts(run, out, dtype=dtype.value, replace_out=force)  # type: ignore[arg-type]
    for name in done.names:
        typer.echo(f"{done.path / name}")
    typer.secho(f"{done.path / 'README.md'} says how PEFT loads both", err=True)


def _refuse(form: str, options: Mapping[str, object]) -> None:
    """Raise UserError where one of `options` was given, which `form` has no use for."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"--as {form} does not take {', '.join(given)}")


def _for_engine(
    runs: list[Path], out: Path, engine: str, force: bool, settings: Mapping[str, Any]
) -> None:
    write = writer(engine)
    taken = signature(write).parameters
    _refuse(engine, {name: value for name, value in settings.items() if name not in taken})
    given = {name: value for name, value in settings.items() if value is not None}
    done = write(runs, out, replace_out=force, **given)
    typer.echo(f"{done.path}")
    count = "1 adapter" if len(runs) == 1 else f"{len(runs)} adapters"
    notes = f"{count}, {done.virtual_tokens} virtual tokens, {in_bytes(done.bytes)}"
    typer.secho(f"{notes}; README.md there says how to ask for them", err=True)
