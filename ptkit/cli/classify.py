"""`ptkit classify`: the labels an adapter gives to texts, or to the words of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.completion import complete_adapters
from ptkit.cli.options import JsonOutput, OwnModelOption, Quiet, input_lines, is_data_file
from ptkit.cli.places import require_adapters, require_model
from ptkit.errors import UserError


def classify(
    text: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(help="Texts. Default: the lines of --input, or of standard input."),
    ] = None,
    adapter: Annotated[
        Path,
        typer.Option(
            "--adapter",
            "-a",
            help="Adapter or run folder, or hub id.",
            autocompletion=complete_adapters,
        ),
    ] = ...,  # type: ignore[assignment]
    model: OwnModelOption = None,
    input_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--input",
            "-i",
            help="Text file with one text per line, or CSV, JSONL, JSON or Parquet with the "
            "columns that the adapter's template names.",
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Use texts as they are, not in the adapter's own template."),
    ] = False,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Label texts with an adapter that was trained to classify.

    An adapter that labels words splits its sentences at spaces.
    """
    require_adapters(adapter)
    require_model(model)
    table = input_file if is_data_file(text, input_file) else None
    if table is not None and raw:
        raise UserError(f"--raw takes texts as they are, and {table} has rows and columns")
    texts = [] if table is not None else input_lines(text, input_file)

    from ptkit.data.inputs import table_inputs, table_sentences
    from ptkit.evaluation.classify import classifier
    from ptkit.recipe.tasks import TokenClassificationTask

    with classifier(adapter, model) as loaded:
        if isinstance(loaded.task, TokenClassificationTask):
            sentences = [line.split() for line in texts]
            if table is not None:
                sentences = table_sentences(table, loaded.task.words)
            for words, labels in zip(sentences, loaded.words(sentences), strict=True):
                if json_output:
                    typer.echo(json.dumps({"words": words, "labels": labels}, ensure_ascii=False))
                else:
                    typer.echo(" ".join(f"{w}/{t}" for w, t in zip(words, labels, strict=True)))
            return
        if table is not None:  # in the template, now
            texts, raw = table_inputs(table, loaded.task.input), True
        for line, shares in zip(texts, loaded.probabilities(texts, raw=raw), strict=True):
            best = max(shares, key=shares.__getitem__)
            if json_output:
                found = {"input": line, "label": best, "probabilities": shares}
                typer.echo(json.dumps(found, ensure_ascii=False))
            elif quiet:
                typer.echo(best)
            elif len(texts) > 1:
                told = " ".join(line.split())  # one text, one line
                typer.echo(f"{best}  {shares[best]:.1%}  {told}")
            else:  # there is room for all of them
                for label in sorted(shares, key=shares.__getitem__, reverse=True):
                    typer.echo(f"{label}  {shares[label]:.1%}")
