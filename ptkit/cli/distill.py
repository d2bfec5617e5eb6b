"""`ptkit distill`: a long text into a short prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.options import Fresh, JsonOutput, Quiet, Set
from ptkit.cli.places import require_file, require_model
from ptkit.options import SEEDS

if TYPE_CHECKING:
    from ptkit.training.distill import Distilled


def distill(
    text: Annotated[Path, typer.Argument(metavar="TEXT_FILE", help="The text, UTF-8.")],
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Virtual tokens of the prefix.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")],
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Base model: hub id, folder; default: the recipe's, or `tiny-en`."),
    ] = None,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of inputs, one a line, that the studied texts begin with."),
    ] = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Recipe whose task's inputs the studied texts begin with."),
    ] = None,
    set_: Set = None,
    sink: Annotated[
        bool, typer.Option(help="Read the text after the begin-of-text token, and keep it frozen.")
    ] = True,
    chunk_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens of the text in view at a time; default: all that fit."),
    ] = None,
    texts: Annotated[int, typer.Option(min=4, help="Studied texts to learn from.")] = 256,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, at most.")] = 48,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="In units of the start's size, as prefix tuning's.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, max=SEEDS - 1, help="Seed of the texts and their order.")
    ] = 0,
    fresh: Fresh = False,
    quiet: Quiet = False,
    json_output: JsonOutput = False,
) -> None:
    """Distill a long text (a prompt, a document) into a short prefix that stands for it.

    The base reads the text, writes short texts with it in view, and the prefix learns to make the
    same predictions for them. A text longer than the base's positions is read in chunks.
    A run that was stopped goes on when the same command is given again.
    """
    from ptkit.errors import UserError
    from ptkit.recipe.load import load_recipe

    require_file("the text to distill:", text)
    require_file("--inputs", inputs)
    require_model(model)
    if set_ and recipe is None:
        raise UserError("--set changes a recipe; give it with --recipe")
    loaded = None if recipe is None else load_recipe(recipe, set_ or [])

    from ptkit.cli.display import LiveDisplay
    from ptkit.cli.options import input_lines
    from ptkit.data.general_text import read_text
    from ptkit.training.distill import distill as run

    document = read_text(text, "the text to distill")
    with LiveDisplay(1, quiet=quiet or json_output) as display:
        done = run(
            document, tokens=tokens, out=out, model=model,
            inputs=None if inputs is None else input_lines(None, inputs),
            recipe=loaded,
            sink=sink, chunk_tokens=chunk_tokens, texts=texts, text_tokens=text_tokens,
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
            fresh=fresh, observer=display,
        )  # fmt: skip
    if json_output:
        typer.echo(json.dumps({"folder": str(done.folder), **done.as_dict()}))
        return
    _show(done)


def _show(done: Distilled) -> None:
    from ptkit.cli.options import table
    from ptkit.formats.sizes import in_bytes
    from ptkit.training.distill import NOTHING

    chunks = f" in {done.chunks} chunks" if done.chunks > 1 else ""
    typer.echo(
        f"text: {done.document_tokens:,} tokens{chunks}, {in_bytes(done.document_bytes)} of "
        f"keys and values; prefix: {done.tokens} tokens, {in_bytes(done.bytes)}, "
        f"{done.ratio:.1f} times less"
    )
    rows = []
    for name, found in done.figures.items():
        kl, same = found.kl, found.agreement
        rows.append((
            name if name != NOTHING else "nothing (the base)",
            kl.written(".4f"),
            same.written(".1%"),
        ))  # fmt: skip
    table(("before the texts", "KL per token [95 %]", "same next token [95 %]"), rows)
    judged = next(iter(done.figures.values()))
    over = ", interval: bootstrap over texts" if done.texts["test"] > 1 else ""
    typer.echo(
        f"against the base with the text in view, nats; n = {done.texts['test']} held-out texts "
        f"({judged.tokens:,} tokens){over}; best at step "
        f"{done.best_step} of {done.steps}"
    )
    typer.echo(f"{done.adapter}")
