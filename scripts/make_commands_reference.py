"""Writes the list of commands in docs/first-hour.md from the command line itself.

python scripts/make_commands_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptkit.cli.commands import EXAMPLES
from ptkit.cli.main import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first-hour.md"
BEGIN, END = "<!-- made by scripts/make_commands_reference.py -->", "<!-- end -->"


def commands() -> Iterator[tuple[str, str, str]]:
    """(panel, name, what it does) of every command, in the order of the help."""
    for command in app.registered_commands:
        yield str(command.rich_help_panel), str(command.name), _first_line(command)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            callback: Any = command.callback
            name = command.name or callback.__name__.replace("_", "-")
            yield str(group.rich_help_panel), f"{group.name} {name}", _first_line(command)


def _first_line(command: Any) -> str:
    return " ".join(command.callback.__doc__.strip().split("\n\n")[0].split())


def reference() -> str:
    """The page with its list made anew."""
    panels: dict[str, list[str]] = {}
    for panel, name, what in commands():
        panels.setdefault(panel, []).append(f"| `{name}` | {what} | `{EXAMPLES[name]}` |")
    tables = [
        f"### {panel}\n\n| command | what | example |\n|---|---|---|\n" + "\n".join(rows)
        for panel, rows in panels.items()
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
