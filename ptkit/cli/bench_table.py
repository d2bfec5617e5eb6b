"""The figures of a benchmark as a table in the terminal, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from ptkit.cli.options import show_table
from ptkit.formats.sizes import in_bytes

if TYPE_CHECKING:
    from ptkit.bench.result import BenchResult, Figure


def printed(result: BenchResult, json_output: bool) -> bool:
    """Print the result; returns whether a target is missed, or candidates disagree."""
    if json_output:
        typer.echo(json.dumps(result.as_dict()))
    else:
        _print(result)
    return bool(result.disagreed) or any(figure.met is False for figure in result.figures)


def _print(result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    table = Table(title=f"ptkit bench {result.name}: {settings}", box=None, title_justify="left")
    for name in ("", "measured", "quartiles", "target", ""):
        table.add_column(name, justify="left" if not name else "right")
    for figure in result.figures:
        spread = ""
        if figure.low is not None and figure.high is not None:
            spread = f"{_value(figure, figure.low)} to {_value(figure, figure.high)}"
        mark = {True: "met", False: "missed", None: ""}[figure.met]
        table.add_row(figure.what, _value(figure, figure.value), spread, _target(figure), mark)
    for what in result.left_out:
        table.add_row(what, "not available")
    console = Console()
    show_table(table, least=100)
    for what, why in result.left_out.items():
        console.print(f"{what}: not available: {why}.", markup=False, highlight=False)
    for what, how in result.disagreed.items():
        console.print(f"{what}: not reported: {how}.", markup=False, highlight=False)
    console.print(f"Checked first: {result.parity}.", markup=False, highlight=False)


def _target(figure: Figure) -> str:
    if figure.at_least is not None:
        return f"≥ {_value(figure, figure.at_least)}"
    return "" if figure.at_most is None else f"≤ {_value(figure, figure.at_most)}"


def _value(figure: Figure, value: float) -> str:
    if figure.unit == "bytes":
        return in_bytes(value)
    if figure.unit == "":
        return f"{value:,.0f}"
    digits = 1 if figure.unit in ("us", "%") else 2
    return f"{value:,.{digits}f} {figure.unit.replace('us', 'µs').replace('x', '×')}"


def show(result: BenchResult, json_output: bool) -> None:
    """Print the result; exit code 1 where a target is missed or candidates disagree, so that
    scripts notice."""
    if printed(result, json_output):
        raise typer.Exit(1)
