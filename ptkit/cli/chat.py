"""`ptkit chat`: a conversation with the base and adapters, changed at any turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ptkit.cli.completion import complete_adapters
from ptkit.cli.options import DeviceMapOption, ModelOption, require_text, standard_input
from ptkit.cli.places import require_model
from ptkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ptkit.bank import AdapterBank
    from ptkit.bank.conversation import Conversation

#: What the plain base is called where an adapter could stand.
BASE = "base"


def chat(
    adapter: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(
            "--adapter",
            "-a",
            help="Who answers first: folder, hub id, or known name.",
            autocompletion=complete_adapters,
        ),
    ] = None,
    adapters: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of adapters to know by name; each is read when first used."),
    ] = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Text before the conversation (the chat template's system message)."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Use texts as they are, not in the adapter's template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of --sample.")] = 0,
) -> None:
    """Talk to the base and to adapters; change who answers with /adapter NAME.

    What was said stays in memory as keys and values, so a turn reads its own tokens only. Lines
    on standard input are answered one by one, without prompts, and a wrong one ends the command.
    """
    from ptkit.formats.adapter_folder import adapter_folders
    from ptkit.formats.places import find_adapter
    from ptkit.methods.own_base import own_base

    require_model(model)
    require_text("--system", system)
    known = [] if adapters is None else adapter_folders(adapters)
    if adapter is not None:  # it answers first, so the others have to fit
        known = [path for path in known if path.name == adapter] or [find_adapter(Path(adapter))]
    id = model or own_base(known)

    import torch

    from ptkit.bank import AdapterBank
    from ptkit.bank.conversation import Conversation
    from ptkit.runtime.base_model import load_base

    torch.manual_seed(seed)
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        **({"temperature": temperature, "top_p": top_p} if sample else {}),
    }
    base = load_base(id, device_map=device_map)
    bank, chosen = AdapterBank(base), model is not None
    if adapters is not None:
        bank.register_all(adapters, chosen=chosen)
    talk = _Chat(Conversation(bank, system=system), options, raw, chosen)
    if adapter is not None:
        talk.adapter(adapter)
    if sys.stdin.isatty():
        talk.interactively(id)
    else:
        for line in standard_input():
            if not talk.take(line.strip()):
                return


class _Chat:
    """The commands of a conversation and how it is shown."""

    def __init__(
        self, conversation: Conversation, options: dict[str, Any], raw: bool, chosen: bool
    ) -> None:
        """chosen: the user named the base (see `AdapterBank.load`)"""
        self._chosen = chosen
        self._conversation = conversation
        self._options = options
        self._raw = raw
        self._last: str | None = None
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "adapter": ("NAME", "let this adapter answer (known name, folder or hub id)",
                        self.adapter),
            "base": ("", "let the plain base answer", lambda _: self.adapter(BASE)),
            "adapters": ("", "list the adapters; > marks who answers", self._list),
            "diff": ("A B [TEXT]", "two answers side by side, to TEXT or to the last text; "
                     "neither is kept", self._diff),
            "reset": ("", "forget what was said", self._reset),
            "help": ("", "show this", self._help),
        }  # fmt: skip

    @property
    def _bank(self) -> AdapterBank:
        return self._conversation.bank

    def interactively(self, model: str) -> None:
        """Read lines from the terminal until the end; mistakes are told and the talk goes on."""
        import readline  # noqa: F401  (gives the prompt its line editing and history)

        typer.secho(f"{model}. /help lists the commands, /quit ends.", dim=True)
        with _keyboard_interrupts():
            while True:
                try:
                    line = input(f"{self._conversation.adapter or BASE}> ").strip()
                except EOFError:
                    typer.echo()
                    return
                except KeyboardInterrupt:  # at the prompt: drop the line, as a shell does
                    typer.echo()
                    continue
                try:
                    if not self.take(line):
                        return
                except UserError as error:
                    typer.secho(str(error), fg=typer.colors.RED, err=True)
                except KeyboardInterrupt:
                    typer.secho("\nstopped; this turn is forgotten", dim=True)

    def take(self, line: str) -> bool:
        """Carry out a command or answer a text. False when the line ends the conversation."""
        if not line:
            return True
        if line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            word, _, argument = line[1:].partition(" ")
            if word == "quit":
                return False
            if word not in self._commands:
                near = did_you_mean(f"/{word}", [f"/{name}" for name in (*self._commands, "quit")])
                raise UserError(f"no command `/{word}`; {near} (// begins a text with a slash)")
            self._commands[word][2](argument.strip())
        else:
            self._answer(line)
        return True

    def adapter(self, name: str) -> None:
        """Let `name` answer from now on."""
        self._conversation.use(self._known(name))

    def _answer(self, text: str) -> None:
        said = self._filled(text, self._conversation.adapter)
        self._conversation.say(
            said, on_text=lambda piece: typer.echo(piece, nl=False), **self._options
        )
        typer.echo()
        self._last = text

    def _known(self, name: str) -> str | None:
        """The bank's name for what the user calls `name`, loaded if need be; None: the base."""
        from ptkit.bank import name_of
        from ptkit.errors import AdapterError
        from ptkit.formats.places import find_adapter

        if not name:
            raise UserError(f"which one? {self._names()}")
        if name == BASE:
            return None
        if name in self._bank:
            return name
        if not Path(name).exists() and "/" not in name:
            raise AdapterError(f"no adapter `{name}` is known, nor a folder of that name; "
                               f"{self._names()}")  # fmt: skip
        path = find_adapter(Path(name))
        short = name_of(path)
        own = name if short in self._bank else short
        return self._bank.load(path, own, chosen=self._chosen)

    def _names(self) -> str:
        return f"known: {', '.join([BASE, *self._bank.list()])}"

    def _filled(self, text: str, name: Any) -> str:
        """`text` in the template of the adapter `name`."""
        from ptkit.evaluation.evaluate import fill_template

        if self._raw or name is None:
            return text
        return fill_template(text, self._bank.status(name).path)

    def _list(self, _: str) -> None:
        from rich import box
        from rich.table import Table

        from ptkit.cli.options import show_table

        table = Table("", "adapter", "method", "virtual tokens", "where", box=box.SIMPLE_HEAD)
        current = self._conversation.adapter
        table.add_row(">" if current is None else "", BASE, "", "", "")
        for name in self._bank.list():
            status = self._bank.status(name)
            tokens = "" if status.virtual_tokens is None else str(status.virtual_tokens)
            mark = ">" if name == current else ""
            table.add_row(mark, name, status.method or "not read yet", tokens, status.tier)
        show_table(table, names=1, markup=False)

    def _diff(self, argument: str) -> None:
        from rich.console import Console
        from rich.table import Table

        first, _, rest = argument.partition(" ")
        second, _, text = rest.strip().partition(" ")
        if not second:
            raise UserError("`/diff` needs two names: /diff A B [TEXT]")
        names = [self._known(first), self._known(second)]
        again = not text.strip()
        asked = self._last if again else text.strip()
        if asked is None:
            raise UserError("nothing was said yet: /diff A B TEXT")
        # The base reads the text in the other's template, so that the answers compare.
        template = next((name for name in names if name is not None), None)
        texts = [self._filled(asked, name or template) for name in names]
        answers = self._conversation.compare(texts, names, instead=again, **self._options)
        table = Table(first, second, expand=True)
        table.add_row(*(answer.strip() for answer in answers))
        Console(markup=False).print(table)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._last = None

    def _help(self, _: str) -> None:
        for name, (argument, what, _run) in self._commands.items():
            typer.echo(f"  {f'/{name} {argument}':<22} {what}")
        typer.echo(f"  {'/quit':<22} end (so does Ctrl-D)")


@contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """Let Ctrl-C stop an answer, not the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
