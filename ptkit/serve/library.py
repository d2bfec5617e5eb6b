"""The adapters a server knows: by name for requests, from one folder on disk, changed while it
runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.constants import HF_HUB_CACHE

from ptkit.bank import AdapterBank
from ptkit.data.chat_template import ChatTemplate
from ptkit.errors import AdapterError, UserError, no_such_model
from ptkit.formats import atomic
from ptkit.formats.adapter_folder import (
    ADAPTER_FILES,
    adapter_folders,
    base_id,
    read_config,
    read_info,
    weights_path,
)
from ptkit.formats.adapter_info import AdapterInfo, TaskInfo
from ptkit.formats.hub import fetch_adapter
from ptkit.formats.hub_repository import HubId
from ptkit.methods import changes_weights, refused_base
from ptkit.methods.base_names import is_local_path, same_name
from ptkit.serve.answer import RequestAdapter
from ptkit.serve.engine import Engine

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
#: Of an upload: those that an adapter of this version has.
SENT_FILES = ("adapter_config.json", "adapter_model.safetensors", "ptkit.json")
#: Between the names of adapters that answer together.
ENSEMBLE = ","
#: Names, and bases, that a line about adapters of other bases holds.
_TOLD = 5

Result = TypeVar("Result")


class UnknownModelError(UserError):
    """No base or adapter of this name is served."""


class NotAllowedError(UserError):
    """The server was started without this."""


@dataclass(frozen=True)
class Card:
    """What is known of an adapter, as the playground shows it.

    score: the first metric its record claims, with its interval; n: rows it was measured on, which
    `rows` says what they are
    forgetting: nats per token on general text; template: what its inputs were written in
    fault: why its files on disk cannot be used as they are now
    """

    name: str
    method: str | None
    tier: str
    version: int
    virtual_tokens: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    recipe: str | None = None
    metric: str | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    rows: str | None = None
    forgetting: float | None = None
    template: str | None = None
    fault: str | None = None


class Library:
    """Names for requests, over a bank and its engine.

    base_name, base_aliases: what requests call the base; it is listed by the first
    root: the folder adapters are read from and uploaded to; None: only the base is served
    allow_hub: adapters may also be loaded from the Hub
    allow_changes: adapters may be loaded, swapped, unloaded and uploaded while the server runs
    chosen: whoever started the server named its base; that is the base of adapters below the root
        that know theirs by another name only. Those that clients send, or load from the Hub, need
        the right name.
    """

    def __init__(
        self,
        engine: Engine,
        root: Path | None,
        *,
        base_name: str,
        base_aliases: Collection[str] = (),
        allow_hub: bool = False,
        allow_changes: bool = True,
        chosen: bool = False,
    ) -> None:
        self.chosen = chosen
        self.engine = engine
        self.bank: AdapterBank = engine.bank
        self.base_name = base_name
        self._base_names = {base_name, *base_aliases}
        self.root = None if root is None else root.resolve()
        self.allow_hub = allow_hub
        self.allow_changes = allow_changes
        #: Adapters in the root that are of another base: name -> the reason, and that base.
        self._left_out: dict[str, tuple[str, str]] = {}

    def register_all(self) -> list[str]:
        """Know every adapter folder directly below the root. Prefixes are read when first used;
        those with LoRA, which becomes a part of the model, now. Returns faults, one line each.

        Adapters that say that they are of another base are left out, and told in one line. Who asks
        for one gets the reason.
        """
        faults = []
        for path in [] if self.root is None else adapter_folders(self.root):
            try:
                self._require_name(path.name)
                config = read_config(path)
                if self._is_left_out(path, config):
                    continue
                if changes_weights(config["peft_type"]):
                    self.bank.load(path, path.name, chosen=self.chosen)
                else:
                    self.bank.register(path, path.name, chosen=self.chosen)
            except UserError as error:
                faults.append(f"{path.name}: {error}")
        return [*faults, *self._told_left_out()]

    def public(self, message: str) -> str:
        """`message` for a client: places on this machine's disk are called by the names of what
        lies there, as a client would call them."""
        if self.root is not None:
            below = re.escape(f"{self.root}{os.sep}")
            # An upload is checked beside its place: `.NAME.RANDOM.tmp`.
            message = re.sub(rf"{below}\.({NAME})\.[A-Za-z0-9_]+\.tmp\b", r"\1", message)
            message = re.sub(below, "", message).replace(str(self.root), "the adapters' folder")
        cached = rf"{re.escape(HF_HUB_CACHE)}[\\/]models--([^\\/]+)[\\/]snapshots[\\/]\w+"
        message = re.sub(cached, lambda found: found[1].replace("--", "/", 1), message)
        base = self.bank.base.id
        return message.replace(base, self.base_name) if is_local_path(base) else message

    # For requests

    def is_base(self, model: str) -> bool:
        """Whether `model` is a name of the base."""
        return model in self._base_names

    def adapters(self, model: str) -> tuple[RequestAdapter, ...]:
        """What answers as `model`: the base, an adapter, or several (`A,B,C`) together.

        Raises UnknownModelError, and AdapterError when files needed now are bad.
        """
        if self.is_base(model):
            return (RequestAdapter(self.base_name, None),)
        names = [name.strip() for name in model.split(ENSEMBLE)]
        if len(set(names)) < len(names):
            raise UserError(f"`{model}` names an adapter twice")
        base = next((name for name in names if self.is_base(name)), None)
        if base is not None:
            raise UserError(
                f"`{base}` is the base, which cannot answer together with adapters; name adapters "
                "only, or the base alone"
            )
        return tuple(self._adapter(name) for name in names)

    def names(self) -> list[str]:
        """Names of all adapters, sorted."""
        return sorted(self.bank.list())

    def path(self, name: str) -> Path | None:
        """Where the adapter `name` was read from."""
        return self._known(name, lambda: self.bank.status(name).path)

    def template(self, model: str) -> str | None:
        """The template of the inputs that `model`, or the first adapter of several, was trained
        on; None where none is known."""
        first = model.split(ENSEMBLE)[0].strip()
        if self.is_base(first):
            return None
        return self._known(first, lambda: self.bank.asked(first).template)

    def task(self, name: str) -> TaskInfo | None:
        """What the adapter `name` was trained for; None where that is not known."""
        return self._known(name, lambda: self.bank.asked(name).task)

    def chat_template(self, model: str) -> ChatTemplate:
        """The template in which `model` is asked (see `AdapterBank.chat_template`)."""
        if self.is_base(model):
            return self.bank.chat_template(None)
        names = [name.strip() for name in model.split(ENSEMBLE)]
        return self._known(names[0], lambda: self.bank.chat_template(names))

    def card(self, name: str) -> Card:
        """What is known of the adapter `name`."""
        status = self._known(name, lambda: self.bank.status(name))
        fault, info, method, size = status.fault, AdapterInfo(), status.method, status.nbytes
        tokens = status.virtual_tokens
        if status.path is not None:
            try:
                config, info = read_config(status.path), read_info(status.path)
                method = str(config["peft_type"]).lower()
                tokens = tokens or config.get("num_virtual_tokens")
                size = weights_path(status.path).stat().st_size
            except (AdapterError, OSError) as error:
                fault = fault or str(error)
        fault = fault and self.public(fault)
        return Card(
            name, method, status.tier, status.version, tokens, bytes=size, fault=fault,
            template=info.template, **info.figures,
        )  # fmt: skip

    # Changes while the server runs

    def load(self, name: str, *, path: str | None, hub: str | None, replace: bool) -> None:
        """Read an adapter and serve it as `name`.

        path: of a folder below the root; hub: `user/repo[@revision]`, where allowed
        replace: `name` must be there and is replaced; otherwise it must not be
        """
        self._require_changes()
        self._require_name(name)
        if replace:
            self._known(name, lambda: None)
        elif name in self.bank:
            raise UserError(f"`{name}` is served already; swap it, or unload it first")
        if (path is None) == (hub is None):
            raise UserError("expected one of `path` (below the adapters' folder) and `hub`")
        folder = self._from_hub(hub) if hub is not None else self._below_root(str(path))
        with self._changing(name, folder):
            self.bank.load(folder, name, chosen=self.chosen and hub is None)
        self._left_out.pop(name, None)

    def unload(self, name: str) -> None:
        """Serve `name` no longer; running rows finish. Its files stay."""
        self._require_changes()
        self._known(name, lambda: None)
        with self._changing(name, None):
            self.bank.unload(name)

    def upload(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Keep an adapter's files as the folder `name` below the root, and serve it, in place of
        what had the name. Returns whether the name is new.

        files: by name, of those an adapter consists of. Raises AdapterError, leaving everything
        as it was, when they are not a sound adapter for this base. Raises UserError where the
        folder holds anything but an adapter's files: it is somebody's own.
        """
        self._require_changes()
        self._require_name(name)
        if self.root is None:
            raise NotAllowedError("the server has no folder of adapters (--adapters)")
        unknown = sorted(files.keys() - set(ADAPTER_FILES))
        if unknown:
            raise UserError(
                f"`{unknown[0]}` is no file of an adapter; those are {', '.join(ADAPTER_FILES)}"
            )
        new = name not in self.bank
        folder = self.root / name
        atomic.require_only(folder, ADAPTER_FILES, "an adapter")
        with atomic.scratch(folder) as scratch:
            for file, content in files.items():
                (scratch / file).write_bytes(content)

            def publish() -> Path:
                atomic.publish(scratch, folder)
                return folder

            # The folder is replaced last: when all is checked, and no answer uses the old one.
            with self._changing(name, scratch):
                self.bank.load(scratch, name, publish=publish)
        self._left_out.pop(name, None)
        return new

    def _is_left_out(self, path: Path, config: Mapping[str, Any]) -> bool:
        """Whether the adapter in `path` says that it is of another base; that is then known."""
        try:
            info = read_info(path)
        except AdapterError:  # damaged: told where it is asked for, by when it may be mended
            return False
        why = refused_base(config, info, self.bank.base, str(path), chosen=self.chosen)
        if why is not None:
            named = base_id(config, info) or "unknown"
            other = " with other weights" if same_name(named, self.bank.base) else ""
            self._left_out[path.name] = (why, f"`{named}`{other}")
        return why is not None

    def _told_left_out(self) -> list[str]:
        """A line about the adapters of other bases; none without any."""
        if not self._left_out:
            return []
        of_base: dict[str, list[str]] = {}
        for name, (_, base) in self._left_out.items():
            of_base.setdefault(base, []).append(name)
        told = "; ".join(
            f"{', '.join(names[:_TOLD])}"
            + (f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else "")
            + f" (made for {base})"
            for base, names in [*of_base.items()][:_TOLD]
        )
        count = len(self._left_out)
        what = "1 adapter" if count == 1 else f"{count:,} adapters"
        return [f"{what} of another base than `{self.base_name}`: {told}"]

    def _adapter(self, name: str) -> RequestAdapter:
        prefix, lora = self._known(name, lambda: self.bank.parts(name))
        return RequestAdapter(name, prefix, lora)

    def _known(self, name: str, look: Callable[[], Result]) -> Result:
        """`look()`, or UnknownModelError when there is no adapter `name`."""
        if name in self.bank:
            try:
                return look()
            except AdapterError:
                if name in self.bank:  # it was not taken out just now: its files are bad
                    raise
        if name in self._left_out:
            raise AdapterError(self._left_out[name][0])
        raise UnknownModelError(no_such_model(name, [self.base_name, *self.names()]))

    def _changing(self, name: str, folder: Path | None) -> Any:
        """The context in which `name` may change: adapters with LoRA must not be in use."""
        new = None if folder is None else read_config(folder)["peft_type"]
        old = self.bank.status(name).method if name in self.bank else None
        if any(changes_weights(str(kind).upper()) for kind in (new, old)):
            return self.engine.changing(name)
        return nullcontext()

    def _require_changes(self) -> None:
        if not self.allow_changes:
            raise NotAllowedError("this server's adapters are fixed (it runs with --read-only)")

    def _from_hub(self, hub: str) -> Path:
        if not self.allow_hub:
            raise NotAllowedError("this server loads nothing from the Hub (--allow-hub lets it)")
        HubId.read(hub)
        return fetch_adapter(hub)

    def _below_root(self, path: str) -> Path:
        if self.root is None:
            raise NotAllowedError("the server has no folder of adapters (--adapters)")
        folder = (self.root / path).resolve()
        if not folder.is_relative_to(self.root) or folder == self.root:
            raise UserError("`path` must be a folder below the adapters' folder, relative to it")
        return folder

    def _require_name(self, name: str) -> None:
        if re.fullmatch(NAME, name) is None:
            raise UserError(
                f"`{name[:130]}` is no name for an adapter: letters, digits, `.`, `_` and `-`, at "
                "most 128, not beginning with `.` or `-`"
            )
        if self.is_base(name):
            raise UserError(f"`{name}` is the name of the base model")
