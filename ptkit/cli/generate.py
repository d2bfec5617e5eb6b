"""`ptkit generate`: answers of the base and of adapters, side by side from one batch."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ptkit.cli.options import (
    AdapterOption,
    DeviceMapOption,
    JsonOutput,
    ModelOption,
    Quiet,
    input_lines,
    is_data_file,
)
from ptkit.cli.places import require_model

if TYPE_CHECKING:
    from ptkit.data.chat_questions import Question


class Ensemble(StrEnum):
    """How several adapters decide on one answer."""

    vote = "vote"
    average = "average"


def generate(
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(help="Inputs. Default: the lines of --input, or of standard input."),
    ] = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    input_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--input",
            "-i",
            help="Text file with one input per line, or CSV, JSONL, JSON or Parquet with the "
            "columns that the adapter's template names; conversations or prompts for one that was "
            "trained on conversations.",
        ),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--base", help="Let the plain base answer too, in the same batch.")
    ] = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Use inputs as they are, not in the adapter's own template."),
    ] = False,
    ensemble: Annotated[
        Optional[Ensemble],  # noqa: UP045
        typer.Option(help="Let all adapters answer as one: by majority, or token by token."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of searching.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of --sample.")] = 0,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Generate with one or several adapters; all rows run in one mixed batch.

    An adapter knows the template it was trained with: give `name[Aurora], ...`, not the template.
    One that was trained on conversations takes an input for a question.
    """
    from ptkit.errors import UserError
    from ptkit.formats.adapter_folder import read_info
    from ptkit.formats.places import find_adapter

    require_model(model)
    table = input_file if is_data_file(prompt, input_file) else None
    if table is not None and raw:
        raise UserError(f"--raw takes inputs as they are, and {table} has rows and columns")
    places: list[Path | None] = [find_adapter(path) for path in adapter or []]
    inputs = [] if table is not None else input_lines(prompt, input_file)
    if ensemble and (len(places) < 2 or with_base):
        raise UserError("--ensemble needs at least two --adapter, and no --base")
    if ensemble is Ensemble.average and (beams > 1 or sample):
        raise UserError(
            "--ensemble average writes one greedy answer: leave out --beams and --sample, or use "
            "--ensemble vote"
        )
    for place in places if not quiet else []:
        task = None if place is None else read_info(place).task
        if task is not None and "classification" in task.kind:
            note = f"{place} was trained to choose a label; `ptkit classify` shows which"
            typer.secho(note, err=True, dim=True)
    # The base gets the first adapter's template: the same text, so that answers compare.
    template = places[0] if places else None
    if with_base or not places:
        places.insert(0, None)

    # Of a data file each adapter reads the columns that its own template names.
    rows = {own: _rows(table, own) for own in {place or template for place in places}
            } if table is not None else {}  # fmt: skip

    import torch

    from ptkit.bank import AdapterBank, name_of
    from ptkit.data.chat_template import ChatTemplate
    from ptkit.evaluation.alone import answers_alone, changes_every_row
    from ptkit.evaluation.evaluate import fill_template
    from ptkit.formats.adapter_folder import read_config
    from ptkit.methods import revision_named
    from ptkit.methods.own_base import own_base
    from ptkit.runtime.base_model import load_base
    from ptkit.runtime.tokenization import own_ends

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": beams,
        "do_sample": sample,
        **({"temperature": temperature, "top_p": top_p} if sample else {}),
    }
    named = [place for place in places if place is not None]
    id = model or own_base(named)
    made_for = {str(place): (read_config(place), read_info(place)) for place in named}
    revision = revision_named(id, made_for)
    if revision is not None and not quiet:
        typer.secho(f"{id} at the revision {revision}, which the adapters name", err=True, dim=True)
    base = load_base(id, revision=revision, device_map=device_map)
    chosen = model is not None
    # Only by itself: what it changes, it changes for every row.
    alone = places[0] if len(places) == 1 and named and changes_every_row(named[0]) else None
    if alone is not None:
        asked_in = [ChatTemplate.of_record(base.tokenizer, read_info(alone).chat)]
    else:
        bank = AdapterBank(base)
        names = [
            None if place is None else bank.load(place, str(place), chosen=chosen)
            for place in places
        ]
        asked_in = [bank.chat_template(name) for name in names]
    ends = {end for chat in asked_in if chat.trained for end in chat.ends}
    if ends and not raw:
        options["eos_token_id"] = sorted({*own_ends(base.model), *ends})

    chats = dict(zip(places, asked_in, strict=True))
    if rows:
        inputs = [row if isinstance(row, str) else row.text for row in rows[template]]

    def filled(number: int, place: Path | None) -> str:
        own = place or template
        if not rows:
            return (
                inputs[number] if raw else fill_template(inputs[number], own, chats[own].tokenizer)
            )
        row = rows[own][number]
        return row if isinstance(row, str) else chats[own].asked(row.messages, row.tools)

    if ensemble:
        texts = [filled(number, template) for number in range(len(inputs))]
        for text, answer in zip(
            inputs, bank.ensemble(texts, names, by=ensemble.value, **options), strict=True
        ):
            _print(text, f"ensemble of {len(places)}", answer, json_output, alone=True)
        return
    asked = [(number, place) for number in range(len(inputs)) for place in places]
    texts = [filled(number, place) for number, place in asked]
    if alone is not None:
        answers = answers_alone(alone, base, texts, chosen=chosen, **options)
    else:
        answers = bank.generate(texts, names * len(inputs), **options)
    for (number, place), answer in zip(asked, answers, strict=True):
        text = inputs[number]
        name = None if place is None else name_of(place)
        if place == places[0] and len(places) > 1 and not json_output:
            typer.secho(text, bold=True)
        _print(text, name, answer, json_output, alone=len(places) == 1)


def _rows(table: Path, adapter: Path | None) -> list[str] | list[Question]:
    """What `adapter` (None: the plain base) is asked for each row of the file `table`."""
    from ptkit.data.chat_questions import holds_turns, read_questions
    from ptkit.data.inputs import table_inputs
    from ptkit.formats.adapter_files import read_info

    info = None if adapter is None else read_info(adapter)
    if holds_turns(table) if info is None else info.chat is not None:
        questions = read_questions(table)
        answered = sum(question.replaced for question in questions)
        if answered:
            told = f"{table}: the last answer of {answered:,} conversations is left out, and asked"
            typer.secho(told, err=True, dim=True)
        return questions
    return table_inputs(table, None if info is None else info.template)


def _print(text: str, name: str | None, answer: str, json_output: bool, *, alone: bool) -> None:
    if json_output:
        line = {"input": text, "adapter": name, "output": answer.strip()}
        typer.echo(json.dumps(line, ensure_ascii=False))
        return
    if not alone:
        typer.secho(f"  {name or 'base'}: ", fg=typer.colors.CYAN, nl=False)
    typer.echo(answer.strip())
