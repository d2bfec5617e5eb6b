"""`ptkit verify`: is an adapter what it says?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ptkit.cli.options import AdapterArgument, JsonOutput, OwnModelOption, Quiet, gguf_named
from ptkit.cli.places import require_adapters, require_file, require_model
from ptkit.errors import PtkitError, UserError

_ENGINE = "With --engine"
_MARKS = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("?   ", "yellow")}


def verify(
    adapter: AdapterArgument,
    model: OwnModelOption = None,
    score: Annotated[
        bool, typer.Option("--score", help="Run its recipe's test again: are the scores true?")
    ] = False,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --score: this recipe instead of the adapter's own."),
    ] = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Compare this engine's greedy answers with transformers': vllm or llama-cpp.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    gguf: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="With llama-cpp: the model's file, or `smollm2-135m`.",
            rich_help_panel=_ENGINE,
            callback=gguf_named,
        ),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of the engine's cache: float32, float16, int8; default: float32.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    llama_server: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="llama-server, or a folder with the package xllamacpp; default: what is found.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    engine_python: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="With vllm: the Python of its environment; default: this one.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="File of inputs, one per line, or rows; default: the test of its recipe.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Inputs to compare.", rich_help_panel=_ENGINE)
    ] = 20,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_ENGINE)
    ] = 32,
    at_least: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            rich_help_panel=_ENGINE,
            help="Exit code 1 when a smaller share of the answers is equal.",
        ),
    ] = 1.0,
) -> None:
    """Check an adapter: files, base, shapes and values; with --score, its claimed scores too.

    Exit code 2 when a check fails. `?` marks what cannot be checked, and why. With --engine the
    engine's answers are compared instead.
    """
    require_adapters(adapter, whole=True)
    require_model(model)
    require_file("--gguf", gguf)
    if recipe is not None:
        from ptkit.recipe.load import find_recipe

        find_recipe(recipe)
    require_file("--prompts", prompts)
    if engine is not None:
        settings = {
            "gguf": gguf, "dtype": dtype, "llama_server": llama_server,
            "engine_python": engine_python,
        }  # fmt: skip
        given = {name: value for name, value in settings.items() if value is not None}
        if score:
            raise UserError("--engine compares answers, not scores; leave --score out")
        asked = {"file": prompts, "recipe": recipe, "count": rows}
        _compare(adapter, model, engine, given, asked, max_new_tokens, at_least, json_output, quiet)
        return
    for name, value in {"gguf": gguf, "dtype": dtype, "prompts": prompts}.items():
        if value is not None:
            raise UserError(f"--{name} needs --engine")

    from ptkit.errors import AdapterError
    from ptkit.hub.verify import verify as run

    found = run(adapter, model=model, score=score, recipe=recipe)
    if json_output:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    elif quiet:
        for check in found.checks:
            if check.passed is False:
                typer.echo(check.name)
    else:
        for check in found.checks:
            mark, color = _MARKS[check.passed]
            typer.secho(mark, fg=color, nl=False)
            typer.echo(f"  {check.name:<18} {check.detail}")
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if check.passed is False)
        raise AdapterError(f"{adapter} does not pass: {failed}")


def _compare(
    adapter: str,
    model: str | None,
    engine: str,
    settings: dict[str, Any],
    asked: dict[str, Any],
    max_new_tokens: int,
    at_least: float,
    json_output: bool,
    quiet: bool,
) -> None:
    """Print how many of an engine's answers are transformers'. Raises PtkitError when fewer than
    the share `at_least` are."""
    from inspect import signature

    from ptkit.hub.engine_runs import engines_that_run, greedy_of

    if engine not in engines_that_run():
        raise UserError(f"--engine {engine}: expected {', '.join(engines_that_run())}")

    from ptkit.hub.engine_agreement import agreement, prompts_of

    taken = signature(greedy_of(engine)).parameters
    for name in settings.keys() - taken.keys():
        raise UserError(f"--engine {engine} does not take --{name.replace('_', '-')}")
    source = Path(adapter)
    texts = prompts_of(source, **asked)

    from ptkit.formats.adapter_files import read_adapter
    from ptkit.formats.places import find_adapter
    from ptkit.methods import base_of
    from ptkit.runtime.base_model import load_base

    if model is None and "gguf" in settings:
        base = load_base(id=str(settings["gguf"]))
    else:
        base = base_of(read_adapter(find_adapter(source)), model, adapter)
    found = agreement(source, base, engine, texts, max_new_tokens=max_new_tokens, **settings)
    if json_output:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    elif quiet:
        typer.echo(f"{found.share:.4f}")
    else:
        typer.echo(f"{found.equal} of {found.prompts} answers are equal to transformers'")
        for one in found.differences:
            ours, theirs = (
                "the end" if id is None else repr(base.tokenizer.decode([id]))
                for id in (one.ours, one.theirs)
            )
            typer.echo(
                f"  input {one.prompt + 1}, token {one.place + 1}: {ours} here, {theirs} there; "
                f"our two likeliest are {one.gap:.3f} apart"
            )
    if found.share < at_least:
        raise PtkitError(
            f"{found.share:.1%} of the answers are equal, --at-least asks for {at_least:.1%}"
        )
