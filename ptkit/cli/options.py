"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_adapters, complete_models, complete_recipes

if TYPE_CHECKING:
    from rich.table import Table

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe (`ptkit recipes list`).",
        autocompletion=complete_recipes,
    ),
]
AdapterOption = Annotated[
    Optional[list[Path]],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option(
        "--adapter", "-a", help="Adapter or run folder, or hub id; repeatable.",
        autocompletion=complete_adapters,
    ),
]  # fmt: skip
Set = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a recipe key for this run; repeatable."
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Delete earlier results in the output folder first.")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Results only: no progress, no notes; of lists, the names."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Report the time and memory it needs, from a few steps, and stop."
    ),
]


def _amount(value: float | None) -> float | None:
    if value is not None and not (0 <= value < float("inf")):
        raise typer.BadParameter(f"{value} is no price of an hour; write a number such as 1.2")
    return value


PricePerHour = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--price-per-hour", metavar="NUMBER", envvar="PTKIT_PRICE_PER_HOUR", callback=_amount,
        help="What an hour of the machine costs, in any currency; times are told with their price.",
    ),
]  # fmt: skip


def gguf_named(given: Path | None) -> Path | None:
    """A GGUF file, where a name of ptkit's stands for one too. Raises ModelError for a name whose
    model was not fetched."""
    from ptkit.runtime.model_names import WHEELS

    if given is None or str(given) not in WHEELS:
        return given
    from ptkit.runtime.named_models import gguf_of

    return gguf_of(str(given))


JsonOutput = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
ModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model",
        help="Base model: hub id, folder, GGUF file or name. Default: the one that the adapters "
        "name, if it is on this machine; `tiny-en` without adapters. Give it, too, where adapters "
        "have another name for the same model.",
        autocompletion=complete_models,
    ),
]
DeviceMapOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--device-map",
        metavar="WORD",
        help="Spread a large base over devices: auto, balanced, balanced_low_0, sequential.",
    ),
]


OwnModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model",
        help="Base model; default: the one the adapter names.",
        autocompletion=complete_models,
    ),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter or run folder, or USER/REPO[@REVISION].",
        autocompletion=complete_adapters,
    ),
]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their titles; values are shown as they are, without markup."""
    from rich import box
    from rich.table import Table

    shown = Table(*titles, box=box.SIMPLE_HEAD)
    for row in rows:
        shown.add_row(*row[: len(titles)])
    show_table(shown, markup=False)


def show_table(shown: Table, *, names: int = 0, markup: bool = True, least: int = 0) -> None:
    """Print a table whose names are never cut; without a terminal, nothing is.

    names: the column that holds them; least: columns of letters there are, whatever the terminal
    """
    from rich.console import Console

    console = Console(markup=markup, highlight=False)
    # A pipe has no width of its own.
    console.width = max(console.width, least) if console.is_terminal else 10_000
    for column in shown.columns:
        column.overflow = "fold"
    column = shown.columns[names]
    column.no_wrap = True
    column.min_width = max((console.measure(cell).maximum for cell in column.cells), default=0)
    console.print(shown)


def is_data_file(prompts: list[str] | None, file: Path | None) -> bool:
    """Whether the inputs are the rows of a file of columns. Raises UserError where inputs are given
    twice."""
    from ptkit.cli.places import require_there
    from ptkit.errors import UserError
    from ptkit.formats.places import ROW_FILES

    if prompts and file:
        raise UserError("give inputs either as arguments or with --input, not both")
    if file is None or file.suffix.lower() not in ROW_FILES:
        return False
    require_there(file)
    return True


def standard_input() -> Iterator[str]:
    """The lines of standard input, without their ends, each as soon as it is there.

    They are UTF-8, whatever the terminal's own encoding. Raises UserError where they are not.
    """
    import sys

    # What stands in for standard input in tests and notebooks may be a stream of text alone.
    stream: Any = getattr(sys.stdin, "buffer", sys.stdin)
    at = 0
    for line in stream or ():
        if isinstance(line, str):
            yield line.removesuffix("\n")
            continue
        yield from _decoded(line, "standard input", at).removesuffix("\n").split("\n")
        at += len(line)


def require_text(what: str, text: str | None) -> None:
    """Raise UserError where an argument of the command is not UTF-8: Python has kept its bytes as
    halves of characters, which no tokenizer reads."""
    from ptkit.errors import UserError

    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8 text (character {error.start})") from error


def _decoded(data: bytes, what: str, at: int = 0) -> str:
    """The text of `data`, with line ends as `"\\n"`. Raises UserError where it is not UTF-8.

    what: where the data is from; at: bytes before it there
    """
    from ptkit.errors import UserError

    try:
        text = data.decode("utf-8" if at else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text (byte {at + error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def input_lines(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Inputs given as arguments, else the lines of `file` or of standard input that say something.

    Raises UserError when there is none, or when two of these are given. It also raises it for a
    file of rows and columns, and for one that is not UTF-8.
    """
    from ptkit.errors import UserError
    from ptkit.formats.places import ROW_FILES

    if prompts and file:
        raise UserError("give inputs either as arguments or with --input, not both")
    if prompts:
        for number, prompt in enumerate(prompts, start=1):
            require_text("the prompt" if len(prompts) == 1 else f"prompt {number}", prompt)
        return prompts
    if file is not None:
        if not file.is_file():
            raise UserError(f"no such input file: {file}")
        if file.suffix.lower() in ROW_FILES:
            raise UserError(
                f"{file} has rows and columns, and --input is a text file with one input per line; "
                "write the inputs like that, or score the file with `ptkit evaluate RECIPE`"
            )
        text = _decoded(file.read_bytes(), str(file))
    else:
        text = "\n".join(standard_input())
    found = [line for line in text.split("\n") if line.strip()]
    if not found:
        raise UserError("no input: give a prompt, --input FILE, or lines on standard input")
    return found
