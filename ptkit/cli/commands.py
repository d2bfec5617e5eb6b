"""What all commands have in common: how help is shown, and how options are read.

Help has panels of commands, an example of each, and text as it is written.

Typer reads help as Rich's markup, which takes `[extra]` for a style and drops it. Here every text
is escaped just before it is shown, so that sources and completion have it plain.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

#: Command -> a line that works, shown below its help. Tests parse each.
EXAMPLES = {
    "init": "ptkit init --data tickets.csv",
    "train": "ptkit train quickstart",
    "compare": "ptkit compare message-routing --set train.steps=100",
    "evaluate": "ptkit evaluate -a runs/quickstart/prefix_tuning-seed0",
    "generate": "ptkit generate 'kind[boat], name[Orwick]' -a adapters/facts-prefix",
    "classify": "ptkit classify 'My parcel is late' -a adapters/routing-prefix",
    "chat": "ptkit chat --model smollm2-135m -a runs/chats/prefix_tuning-seed0",
    "serve": "ptkit serve --adapters adapters",
    "export": "ptkit export runs/quickstart/prefix_tuning-seed0 --out adapters/mine",
    "verify": "ptkit verify adapters/mine --score",
    "push": "ptkit push adapters/mine USER/mine",
    "pull": "ptkit pull USER/mine",
    "import": "ptkit import USER/other --out adapters/other",
    "convert": "ptkit convert adapters/mine --to prefix --out adapters/mine-prefix",
    "inspect": "ptkit inspect adapters/facts-prefix",
    "report": "ptkit report comparisons/message-routing",
    "search": "ptkit search openai-community/gpt2",
    "env": "ptkit env",
    "transfer": "ptkit transfer message-routing table-to-text -m prompt_tuning --out maps/two",
    "multitask": "ptkit multitask message-routing table-to-text --out runs/both",
    "distill": "ptkit distill manual.txt --tokens 64 --out runs/manual",
    "search-prompt": "ptkit search-prompt message-routing",
    "recipes list": "ptkit recipes list",
    "recipes show": "ptkit recipes show quickstart",
    "recipes copy": "ptkit recipes copy quickstart mine.yaml",
    "recipes validate": "ptkit recipes validate mine.yaml",
    "recipes schema": "ptkit recipes schema",
    "adapters ls": "ptkit adapters ls",
    "adapters info": "ptkit adapters info adapters/facts-prefix",
    "adapters diff": "ptkit adapters diff adapters/facts-prefix adapters/facts-prompt",
    "adapters rm": "ptkit adapters rm adapters/old --yes",
    "bank ls": "ptkit bank ls adapters",
    "bank load": "ptkit bank load adapters --budget 500MB",
    "bank verify": "ptkit bank verify adapters",
    "models get": "ptkit models get smollm2-135m",
    "models check": "ptkit models check llama -m prefix",
    "models path": "ptkit models path tiny-en",
    "data inspect": "ptkit data inspect chats.jsonl",
    "bench train": "ptkit bench train --model tiny-en --method prefix",
    "bench run": "ptkit bench run --model tiny-en --rows 64",
    "bench quantize": "ptkit bench quantize --precision float32,blocks",
    "bench generate": "ptkit bench generate --model tiny-en",
    "bench infix": "ptkit bench infix --model tiny-en",
    "bench startup": "ptkit bench startup --rounds 2",
    "bench memory": "ptkit bench memory --model tiny-en --method prompt_tuning",
    "bench swap": "ptkit bench swap --model tiny-en",
    "bench mixed": "ptkit bench mixed --model tiny-en --adapters 4",
    "bench traffic": "ptkit bench traffic --model tiny-en --adapters 100 --budget 10",
    "bench together": "ptkit bench together --adapters 4",
    "bench soak": "ptkit bench soak --minutes 1",
    "bench serve": "ptkit bench serve --seconds 30 --against peft",
    "bench all": "ptkit bench all --model tiny-en",
}


class PlainCommand(TyperCommand):
    """A command whose help is shown as it is written, and whose options are read when asked for.

    Typer reads the options of all commands to run one of them or to list them.
    """

    def __init__(self, *args: Any, callback: Any, **settings: Any) -> None:
        super().__init__(*args, callback=callback, **settings)
        self._function: Callable[..., None] = callback.reads_as
        # Those of a function without parameters; `__getattr__` is asked for the right ones.
        del self.params, self.callback

    def __getattr__(self, name: str) -> Any:
        """`params` and `callback` of the command's function."""
        if name not in ("params", "callback"):
            raise AttributeError(name)
        read = get_command_from_info(
            CommandInfo(callback=self._function),
            pretty_exceptions_short=False,
            rich_markup_mode=self.rich_markup_mode,
        )
        self.params, self.callback = read.params, read.callback
        return getattr(self, name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options. One that takes a single value is refused when it is given twice: the
        last would silently replace the others."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(args=[*args])
            for param, times in Counter(given).items():
                if times > 1 and _is_single(param):
                    ctx.fail(
                        f"{param.opts[0]} is given {times} times, and takes one value: leave out "
                        "all but one"
                    )
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _escape(self)
        _escape_options(self)
        super().format_help(ctx, formatter)


def _is_single(param: Any) -> bool:
    """Whether `param` is an option with one value; a flag given twice says the same twice."""
    if param.param_type_name != "option":
        return False
    return not (param.multiple or param.is_flag or param.count)


class PlainGroup(TyperGroup):
    """A group of commands whose help is shown as it is written."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _escape(self)
        _escape_options(self)
        for command in self.commands.values():
            _escape(command)
        super().format_help(ctx, formatter)


def _escape(command: Any) -> None:
    """Make the texts of `command` ones that Rich shows unchanged. It is about to be shown, once."""
    from rich.markup import escape

    for attribute in ("help", "short_help", "epilog"):
        text = getattr(command, attribute)
        if text:
            setattr(command, attribute, escape(_paragraphs(text)))


def _escape_options(command: Any) -> None:
    """The same for the texts of its options."""
    from rich.markup import escape

    for param in command.params:
        if getattr(param, "help", None):
            param.help = escape(param.help)


def _paragraphs(text: str) -> str:
    """`text` with the lines of each paragraph joined: a docstring's width is not the terminal's."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def with_examples(app: typer.Typer, path: str = "") -> None:
    """Show every command of `app` plainly, with its example."""
    for command in app.registered_commands:
        own = f"{path} {_name(command)}".strip()
        command.cls = PlainCommand
        example = EXAMPLES.get(own)
        command.epilog = None if example is None else f"Example: {example}"
        assert command.callback is not None
        command.callback = _read_later(command.callback)
    for group in app.registered_groups:
        group.cls = PlainGroup
        assert group.typer_instance is not None
        with_examples(group.typer_instance, f"{path} {group.name}".strip())


def _read_later(function: Callable[..., None]) -> Callable[..., None]:
    """What stands for `function` until its options are read: see `PlainCommand`."""

    def standing() -> None: ...

    standing.__name__, standing.__doc__ = function.__name__, function.__doc__
    standing.reads_as = function  # type: ignore[attr-defined]
    return standing


def command_names(app: typer.Typer, path: str = "") -> Iterator[str]:
    """The names of all commands, those of groups with the group's before them."""
    for command in app.registered_commands:
        yield f"{path} {_name(command)}".strip()
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from command_names(group.typer_instance, f"{path} {group.name}".strip())


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))
