"""`ptkit`: the commands, and what happens when one fails."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from ptkit.cli import (
    adapters,
    bank,
    bench,
    chat,
    classify,
    compare,
    convert,
    data,
    distill,
    environment,
    evaluate,
    export,
    generate,
    import_,
    init,
    inspect,
    models,
    multitask,
    pull,
    push,
    recipes,
    report,
    search,
    search_prompt,
    serve,
    train,
    transfer,
    verify,
)
from ptkit.cli.commands import PlainGroup, with_examples
from ptkit.errors import PtkitError

app = typer.Typer(
    name="ptkit",
    cls=PlainGroup,
    help="Prompt tuning, prefix tuning and P-tuning on a frozen language model: train, compare, "
    "export, swap.\n\nStart with your own data: `ptkit init --data FILE`. Or see it work first: "
    "`ptkit train quickstart`.",
    epilog="Documentation: docs/README.md of the repository; docs/first-hour.md is the first page.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
#: Panel of the help -> its commands, in the order in which they are first needed.
_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Train and use": {
        "init": init.init, "train": train.train, "compare": compare.compare,
        "evaluate": evaluate.evaluate, "generate": generate.generate,
        "classify": classify.classify, "chat": chat.chat, "serve": serve.serve,
    },
    "Ship": {
        "export": export.export, "verify": verify.verify, "push": push.push, "pull": pull.pull,
        "import": import_.import_, "convert": convert.convert,
    },
    "Look": {
        "inspect": inspect.inspect, "report": report.report, "search": search.search,
        "env": environment.env,
    },
    "Research": {
        "transfer": transfer.transfer, "multitask": multitask.multitask,
        "distill": distill.distill, "search-prompt": search_prompt.search_prompt,
    },
}  # fmt: skip
for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
for _name, _group in (
    ("recipes", recipes), ("adapters", adapters), ("models", models), ("data", data),
    ("bank", bank),
):  # fmt: skip
    app.add_typer(_group.app, name=_name, rich_help_panel="Look")
app.add_typer(bench.app, name="bench", rich_help_panel="Research")
with_examples(app)


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        typer.echo(f"ptkit {version('ptkit')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure (works anywhere).")
    ] = False,
) -> None:
    """Options of every command."""


class _Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which the command framework turns into a bare "Aborted"."""


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise _Interrupted


def run() -> None:
    """Entry point: run a command and turn its failure into one clear message and exit code.

    2 for what the user can mend (input, paths, a full disk, Ctrl-C), 1 for everything else.
    """
    # Accepted at any place in the line, where people add it: at its end, after a failure.
    debug = "--debug" in sys.argv
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        # Libraries announcing each other's deprecations are of no use to who runs a command.
        warnings.filterwarnings("ignore", category=FutureWarning)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except _Interrupted:
        _end("interrupted; what was saved is kept, run the same command again to go on", 2)
    except PtkitError as error:
        if debug:
            raise
        _end(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(f"the disk is full while writing {error.filename or 'a file'}; free space and "
                 "run the same command again", 2)  # fmt: skip
        if error.errno in _OF_PLACES and error.filename is not None:
            told = _OF_PLACES[error.errno] or (error.strerror or str(error)).lower()
            _end(f"{_as_given(os.fsdecode(error.filename))}: {told}", 2)
        _end(str(error), 2 if error.errno in _OF_PLACES else 1)
    except Exception as error:
        if debug:
            raise
        _end(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1)


#: Errors of the system about a place that the user has named, in words that say what to do.
_OF_PLACES: dict[int | None, str | None] = {
    errno.ENOENT: None,
    errno.EACCES: None,
    errno.EPERM: None,
    errno.EROFS: None,
    errno.ENOTDIR: "a part of this path is a file, not a folder; name another place",
    errno.EEXIST: "a file is in the way; name another place",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ELOOP: "these links lead to each other",
}


def _as_given(place: str) -> str:
    """The path in the command's words that `place` is, or lies in or beside; else `place`."""
    words = [word.partition("=")[2] or word for word in sys.argv[1:]]
    whole = os.path.abspath(place)
    for word in sorted(words, key=len, reverse=True):
        own = os.path.abspath(word)
        if whole == own or whole.startswith((own + os.sep, f"{_hidden(own)}.")):
            return word
    return place


def _hidden(place: str) -> str:
    """How the names of files begin that become `place` when they are complete."""
    return os.path.join(os.path.dirname(place), f".{os.path.basename(place)}")


def _end(message: str, code: int) -> None:
    lines = message.splitlines() or [""]
    typer.secho("Error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo("\n".join(lines), err=True)
    raise SystemExit(code)
