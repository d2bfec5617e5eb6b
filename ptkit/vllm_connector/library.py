"""The adapters that a vLLM server knows: name -> files, checked before a request may use them."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.errors import AdapterError, PtkitError, UserError, did_you_mean
from ptkit.formats import atomic
from ptkit.formats.fingerprint import file_stamp
from ptkit.vllm_connector.files import ABOUT, TENSORS, ChatRecord, read_checked, read_record
from ptkit.vllm_connector.hub import fetch_exported
from ptkit.vllm_connector.running import RunningBase

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
#: Kinds of a chat message's parts. vLLM takes an adapter of such a name for every chat with one.
_KINDS = {"text", "thinking", "input", "output", "image", "prompt", "audio", "refusal", "video",
          "file", "tool"}  # fmt: skip
#: Seconds for which a file that was just asked for stays, though no request holds it yet.
_GRACE = 60.0
_TRIES = 3
_NUMBER = (int, float)
#: What a list of adapters tells of `made_from`, and the types that it may have.
_TOLD: Mapping[str, type | tuple[type, ...]] = {
    "method": str, "template": str, "recipe": str, "metric": str, "rows": str, "parameters": int,
    "n": int, "score": _NUMBER, "low": _NUMBER, "high": _NUMBER, "forgetting": _NUMBER,
}  # fmt: skip
#: Bytes that files in use may take.
SPOOL = 4 * 2**30

#: Identity of an adapter's files at one moment; None for one that is missing.
FileStamp = tuple[tuple[int, int, int] | None, ...]


class UnknownAdapterError(UserError):
    """There is no adapter of this name."""


class NotAllowedError(UserError):
    """The server was started without this."""


@dataclass(frozen=True)
class PrefixVersion:
    """An adapter as it was when its files were checked.

    digest: of its tensors' file, 64 hex digits, by which the workers find it
    chat: how it is asked in conversations
    """

    name: str
    digest: str
    virtual_tokens: int
    nbytes: int
    chat: ChatRecord


@dataclass
class _Known:
    """A name's folder, and what was found there; fault: why it cannot be served."""

    folder: Path
    stamp: FileStamp | None = None
    version: PrefixVersion | None = None
    fault: str | None = None


class PrefixLibrary:
    """Adapters below `root`, for the base `running`.

    spool: a folder of this server alone. Each version in use lies there under its digest. The
        workers read it there, so files that change or vanish below `root` reach no running request
    budget: bytes that the spool may take, beyond what running requests use
    read_only: no loading, swapping, unloading or uploading
    allow_hub: exported adapters may also be loaded from the Hub

    `reads` counts how often an adapter's files were read, whatever was found.
    """

    def __init__(
        self,
        root: Path,
        spool: Path,
        running: RunningBase,
        *,
        budget: int = SPOOL,
        read_only: bool = False,
        allow_hub: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root, self.spool, self.running = root.resolve(), spool, running
        self.read_only, self.allow_hub = read_only, allow_hub
        self._budget, self._clock = budget, clock
        self.reads = 0
        self._known: dict[str, _Known] = {}
        self._spooled: OrderedDict[str, tuple[int, float]] = OrderedDict()  # by last use
        self._held: Counter[str] = Counter()
        self._lock = threading.RLock()
        if not self.root.is_dir():
            raise UserError(f"the adapters' folder {root} does not exist")

    def register_all(self) -> list[str]:
        """Know every adapter folder directly below the root, its files unread. Returns faults."""
        faults = []
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(".") or not any(_stamp(folder)):
                continue
            try:
                self._require_name(folder.name)
            except UserError as error:
                faults.append(f"{folder.name}: {error}")
                continue
            self._known[folder.name] = _Known(folder)
        return faults

    def names(self) -> list[str]:
        """Names of all adapters, sorted."""
        with self._lock:
            return sorted(self._known)

    @property
    def spool_bytes(self) -> int:
        """Bytes of keys and values that lie in the spool."""
        with self._lock:
            return sum(size for size, _ in self._spooled.values())

    def version(self, name: str) -> PrefixVersion:
        """The adapter `name` as its files are now; they are read again only when they changed.

        Raises UnknownAdapterError, and AdapterError for files that are missing, damaged or of
        another base.
        """
        with self._lock:
            known = self._of(name)
            if _stamp(known.folder) != known.stamp:
                self._read(name, known)
            if known.fault is not None or known.version is None:
                raise AdapterError(f"the adapter `{name}` cannot be served: {known.fault}")
            version = known.version
            if version.digest not in self._spooled or not self._place(version.digest).is_file():
                known.stamp = None
                self._read(name, known)
                return self.version(name)
            self._touch(version)
            return version

    def card(self, name: str) -> dict[str, Any]:
        """What is known of `name` without its tensors. fault: why its files cannot be served."""
        with self._lock:
            known = self._of(name)
            fault = known.fault if _stamp(known.folder) == known.stamp else None
            try:
                record = read_record(known.folder)
                self.running.require_made_for(record)
            except AdapterError as error:
                return {"name": name, "fault": str(error)}
        return {
            **_told(record.made_from),
            "name": name,
            "fault": fault,
            "virtual_tokens": record.virtual_tokens,
            "bytes": record.nbytes,
            "digest": record.sha256,
            "made_from": record.made_from,
        }

    @contextmanager
    def held(self, version: PrefixVersion) -> Iterator[None]:
        """While it lasts, the file of `version` stays in the spool."""
        with self._lock:
            self._held[version.digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[version.digest] -= 1

    # Changes while the server runs

    def load(
        self, name: str, path: str | None = None, hub: str | None = None, *, replace: bool
    ) -> PrefixVersion:
        """Serve an adapter as `name`, which must be there (`replace`) or not.

        path: of a folder below the root; hub: `user/repo[@revision]`, where allowed

        Nothing changes where its files are bad.
        """
        self._require_changes()
        self._require_name(name)
        if (path is None) == (hub is None):
            raise UserError("expected one of `path` (below the adapters' folder) and `hub`")
        self._require_free(name, replace)
        folder = self._from_hub(hub) if hub is not None else self._below_root(str(path))
        version, stamp = self._check(name, folder)  # others are answered meanwhile
        with self._lock:
            self._require_free(name, replace)
            self._known[name] = _Known(folder, stamp, version)
        return version

    def unload(self, name: str) -> None:
        """Serve `name` no longer. Running requests finish; its files stay."""
        self._require_changes()
        with self._lock:
            self._of(name)
            del self._known[name]

    def upload(self, name: str, files: Mapping[str, bytes]) -> PrefixVersion:
        """Keep `files` as the folder `name` below the root, and serve it in place of what had the
        name. Nothing changes where they are bad."""
        self._require_changes()
        self._require_name(name)
        if set(files) != {ABOUT, TENSORS}:
            found = ", ".join(sorted(files)) or "none"
            raise UserError(
                f"expected the files {ABOUT} and {TENSORS}, which `ptkit export ADAPTER --as vllm` "
                f"writes below adapters/NAME; found {found}"
            )
        folder = self.root / name
        atomic.require_only(folder, (ABOUT, TENSORS), "an adapter")
        with atomic.scratch(folder) as scratch:
            for file, data in files.items():
                (scratch / file).write_bytes(data)
            version, _ = self._check(name, scratch)
            with self._lock:
                atomic.publish(scratch, folder)
                self._known[name] = _Known(folder, _stamp(folder), version)
        return version

    # Within

    def _from_hub(self, hub: str) -> Path:
        if not self.allow_hub:
            raise NotAllowedError(
                "this server loads nothing from the Hub (`ptkit serve --allow-hub`, or `hub` of "
                "the connector's settings, lets it)"
            )
        return fetch_exported(hub)

    def _below_root(self, path: str) -> Path:
        folder = (self.root / path).resolve()
        if not folder.is_relative_to(self.root) or folder == self.root:
            raise UserError("`path` must be a folder below the adapters' folder, relative to it")
        return folder

    def _require_free(self, name: str, replace: bool) -> None:
        """Raise UserError where `name` is served, or (`replace`) where it is not."""
        with self._lock:
            if replace:
                self._of(name)
            elif name in self._known:
                raise UserError(f"`{name}` is served already; swap it, or unload it first")

    def _read(self, name: str, known: _Known) -> None:
        stamp = _stamp(known.folder)
        try:
            known.version, known.stamp = self._check(name, known.folder)
            known.fault = None
        except AdapterError as error:
            known.version, known.stamp, known.fault = None, stamp, str(error)

    def _check(self, name: str, folder: Path) -> tuple[PrefixVersion, FileStamp]:
        """Read and check the files in `folder`, and put them into the spool."""
        with self._lock:
            self.reads += 1
        for left in reversed(range(_TRIES)):
            stamp = _stamp(folder)
            try:
                record = read_record(folder)
                self.running.require_made_for(record)
                data = read_checked(folder, record)
            except AdapterError:
                if left and _stamp(folder) != stamp:  # it was replaced meanwhile
                    continue
                raise
            break
        version = PrefixVersion(
            name, record.sha256, record.virtual_tokens, record.nbytes, record.chat
        )
        self._write(version, data)
        return version, stamp

    def _write(self, version: PrefixVersion, data: bytes) -> None:
        place = self._place(version.digest)
        if not place.is_file():
            try:
                atomic.write_bytes(place, data)
            except OSError as error:
                raise PtkitError(
                    f"`{version.name}` cannot be kept for the workers: {error}"
                ) from None
        with self._lock:
            self._touch(version)
            self._trim()

    def _place(self, digest: str) -> Path:
        return spooled(self.spool, digest)

    def _touch(self, version: PrefixVersion) -> None:
        self._spooled[version.digest] = (version.nbytes, self._clock())
        self._spooled.move_to_end(version.digest)

    def _trim(self) -> None:
        """Delete what was not used for longest, while there is more than the budget."""
        total = sum(size for size, _ in self._spooled.values())
        now = self._clock()
        for digest, (size, used) in [*self._spooled.items()]:
            if total <= self._budget or now - used < _GRACE:
                return
            if not self._held[digest]:
                with suppress(OSError):
                    self._place(digest).unlink()
                del self._spooled[digest]
                total -= size

    def _of(self, name: str) -> _Known:
        if name not in self._known:
            near = did_you_mean(name, [*self._known][:100])
            raise UnknownAdapterError(f"there is no adapter `{name[:130]}`; {near}")
        return self._known[name]

    def _require_changes(self) -> None:
        if self.read_only:
            raise NotAllowedError("this server's adapters are fixed (`read_only`)")

    def _require_name(self, name: str) -> None:
        if re.fullmatch(NAME, name) is None:
            raise UserError(
                f"`{name[:130]}` is no name for an adapter: letters, digits, `.`, `_` and `-`, at "
                "most 128, not beginning with `.` or `-`"
            )
        if name in _KINDS:
            raise UserError(f"`{name}` is a kind of message parts in vLLM; choose another name")


def _told(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of adapters tells of `made_from`; what is missing there is None."""
    told: dict[str, Any] = {
        key: value if isinstance(value := made_from.get(key), kind) else None
        for key, kind in _TOLD.items()
    }
    return told | {"method": told["method"] and told["method"].lower()}


def spooled(spool: Path, digest: str) -> Path:
    """Where the workers find the tensors of `digest`."""
    return spool / f"{digest}.safetensors"


def spool_of(transfer: Any) -> Path:
    """The spool of an engine with these settings (vLLM's `KVTransferConfig`), the same in every
    process of it. It lies in `spool` of the extra settings, or among this machine's temporary
    folders."""
    given = transfer.kv_connector_extra_config.get("spool")
    return Path(given or tempfile.gettempdir()) / f"ptkit-vllm-{transfer.engine_id}"


def _stamp(folder: Path) -> FileStamp:
    return tuple(file_stamp(f"{folder}/{file}") for file in (ABOUT, TENSORS))
