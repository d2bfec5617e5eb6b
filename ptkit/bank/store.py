"""The prefixes a bank holds: on the device, in host memory, or only as files on disk."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ptkit.bank.cache import PrefixCache
from ptkit.bank.source import CheckedAdapter, Stamp, read_checked, stamp
from ptkit.errors import AdapterError, did_you_mean
from ptkit.formats.adapter_info import Asked
from ptkit.methods import compile_files
from ptkit.prefix import Compiled, KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.locks import lock_of

logger = logging.getLogger(__name__)

Tier = Literal["resident", "host", "disk"]


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a bank.

    version: 0 until first read, then one more with every change of what the name stands for
    virtual_tokens, nbytes: of the compiled prefix, None until first read
    fault: why its files, which have changed since, were refused; the version before stays in use
    """

    name: str
    path: Path | None
    method: str | None
    tier: Tier
    version: int
    virtual_tokens: int | None
    nbytes: int | None
    pinned: bool = False
    fault: str | None = None


@dataclass
class BankCounts:
    """What a bank has done so far.

    hits: uses of a prefix that was on the device
    from_host, from_disk: uses that moved or read it first
    evictions: prefixes that left the device
    reloads: changed files that replaced an adapter
    refusals: changed files that were bad
    """

    hits: int = 0
    from_host: int = 0
    from_disk: int = 0
    evictions: int = 0
    reloads: int = 0
    refusals: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found the prefix on the device."""
        uses = self.hits + self.from_host + self.from_disk
        return self.hits / uses if uses else 1.0


@dataclass
class _Entry:
    """What a name stands for. A swap puts another entry in its place.

    stamp: of the files the prefix in memory was read from; refused: of files found bad
    chosen: the user named the bank's base for it (see `require_same_base`)
    begins_text: see `KVPrefix.begins_text`
    asked: how it is asked, as the files that are in use record it
    """

    name: str
    path: Path | None
    version: int = 0
    method: str | None = None
    stamp: Stamp | None = None
    refused: Stamp | None = None
    fault: str | None = None
    chosen: bool = False
    checked: float = 0.0
    virtual_tokens: int | None = None
    nbytes: int | None = None
    begins_text: bool = False
    asked: Asked = field(default_factory=Asked)
    reading: threading.Lock = field(default_factory=threading.Lock)

    def on_disk(self) -> bool:
        """Whether what is in memory could be read from disk again."""
        return self.path is not None and stamp(self.path) == self.stamp


class PrefixStore:
    """Compiled adapters by name in three tiers; safe to use from several threads.

    A name is looked up under one lock. Files are read, verified and compiled outside of it, one
    thread per adapter. So a slow or bad file delays only those who want it. See `AdapterBank` for
    the parameters.
    """

    def __init__(
        self, base: Base, budget: int | None, host_budget: int | None, check_every: float
    ) -> None:
        self.base = base
        self.check_every = check_every
        self.counts = BankCounts()
        self.resident = PrefixCache(budget)
        self.host = PrefixCache(host_budget)
        self._entries: dict[str, _Entry] = {}
        self._pinned: set[str] = set()
        self._lock = threading.RLock()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names, in the order they came."""
        with self._lock:
            return [*self._entries]

    def status(self, name: str) -> AdapterStatus:
        """Where the adapter `name` is and what is known of it."""
        with self._lock:
            entry = self._entry(name)
            tier: Tier = "disk"
            if name in self.resident:
                tier = "resident"
            elif name in self.host:
                tier = "host"
            return AdapterStatus(
                name, entry.path, entry.method, tier, entry.version, entry.virtual_tokens,
                entry.nbytes, name in self._pinned, entry.fault,
            )  # fmt: skip

    def begins_text(self, name: str) -> bool:
        """Whether `name` stands for a prefix that `begins_text`; false for what is not there."""
        entry = self._entries.get(name)
        return entry is not None and entry.begins_text

    def register(self, name: str, path: Path, *, chosen: bool = False) -> None:
        """Know the files in `path` as `name` (chosen: see `require_same_base`). Raises AdapterError
        when the name is taken."""
        with self._lock:
            if name in self._entries:
                raise AdapterError(f"`{name}` is in the bank already; `swap` replaces it")
            self._entries[name] = _Entry(name, path, chosen=chosen)

    def asked(self, name: str) -> Asked:
        """How `name` is asked. Its files are read where they were not."""
        entry = self._entry(name)
        if not entry.version:
            self.get(name)
        return entry.asked

    def require_room(self, name: str, prefix: Compiled) -> None:
        """Raise AdapterError when `prefix` is larger than all that may be on the device."""
        budget = self.resident.budget
        if budget is not None and prefix.nbytes > budget:
            raise AdapterError(
                f"the adapter `{name}` takes {prefix.nbytes:,} bytes, more than the bank's budget "
                f"of {budget:,}"
            )

    def put(
        self,
        name: str,
        prefix: Compiled,
        method: str,
        path: Path | None,
        read: CheckedAdapter | None,
    ) -> None:
        """Let `name` stand for `prefix` from now on. Raises AdapterError when it is too large."""
        prefix = self.on_device(prefix)
        entry = _Entry(name, path, method=method, checked=time.monotonic())
        entry.stamp = None if read is None else read.stamp
        entry.chosen = read is not None and read.chosen
        entry.begins_text = isinstance(prefix, KVPrefix) and prefix.begins_text
        entry.asked = Asked() if read is None else read.files.info.asked
        with self._lock:
            before = self._entries.get(name)
            entry.version = 1 if before is None else before.version + 1
            self._admit(entry, prefix)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget `name`."""
        with self._lock:
            self._entry(name)
            del self._entries[name]
            self._pinned.discard(name)
            self.resident.pop(name)
            self.host.pop(name)

    def pin(self, name: str, pinned: bool) -> None:
        """Whether `name`, once on the device, stays there whatever the budget."""
        with self._lock:
            self._entry(name)
            (self._pinned.add if pinned else self._pinned.discard)(name)

    def get(self, name: str) -> Compiled:
        """The compiled adapter `name`, on the device.

        Raises AdapterError when there is none, or its files, needed now, are bad.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.path is None or time.monotonic() - entry.checked < self.check_every:
                prefix = self.resident.get(name)
                if prefix is not None:
                    self.counts.hits += 1
                    return prefix
        # One thread reads, the others wait for it. Not one that runs the model: the reader may be
        # waiting to compile, for who waits to change the model. Reading twice gives the same.
        waits = not lock_of(self.base.model).mine
        reads_alone = entry.reading.acquire(blocking=waits)
        try:
            return self._looked_at(entry)
        finally:
            if reads_alone:
                entry.reading.release()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterError(
                f"no adapter `{name}` is loaded; {did_you_mean(name, self._entries)}"
            )
        return entry

    def on_device(self, prefix: Compiled) -> Compiled:
        """`prefix` where, and in the type that, the model computes."""
        return prefix.to(self.base.model.device, self.base.model.dtype)

    def _looked_at(self, entry: _Entry) -> Compiled:
        """The prefix of `entry` after a look at its files: read, moved up, or where it was."""
        with self._lock:
            resident = self.resident.get(entry.name)
            held = resident or self.host.peek(entry.name)
        if entry.path is not None:
            now = stamp(entry.path)
            entry.checked = time.monotonic()
            if held is None or now not in (entry.stamp, entry.refused):
                fresh = self._read(entry, held)
                if fresh is not None:
                    return fresh
        if resident is not None:
            self.counts.hits += 1
            return resident
        assert held is not None  # without one, bad files raise
        self.counts.from_host += 1
        return self._published(entry, self.on_device(held))

    def _read(self, entry: _Entry, held: Compiled | None) -> Compiled | None:
        """Read the files of `entry`; None when they are bad and the version `held` stays."""
        assert entry.path is not None
        now = stamp(entry.path)
        try:
            read = read_checked(entry.path, self.base, chosen=entry.chosen)
            prefix = compile_files(read.files, self.base)
            if prefix is None:
                raise AdapterError(
                    f"{entry.path} is a {read.files.peft_type} adapter, which makes no prefix; "
                    "`load` it before its use"
                )
        except AdapterError as error:
            if held is None:
                raise
            with self._lock:
                self.counts.refusals += 1
                entry.fault, entry.refused = str(error), now
            logger.warning("`%s` stays as it was: %s", entry.name, error)
            return None
        with self._lock:
            self.counts.from_disk += 1
            self.counts.reloads += held is not None
            entry.version += read.stamp != entry.stamp
            entry.stamp, entry.fault, entry.refused = read.stamp, None, None
            entry.method = read.files.peft_type.lower()
            entry.asked = read.files.info.asked
        return self._published(entry, self.on_device(prefix))

    def _published(self, entry: _Entry, prefix: Compiled) -> Compiled:
        """Keep `prefix` on the device, unless its name stands for something else by now."""
        with self._lock:
            if self._entries.get(entry.name) is entry:
                self._admit(entry, prefix)
        return prefix

    def _admit(self, entry: _Entry, prefix: Compiled) -> None:
        """Put `prefix` on the device and move others down a tier until the budgets are kept."""
        self.require_room(entry.name, prefix)
        entry.virtual_tokens, entry.nbytes = prefix.virtual_tokens, prefix.nbytes
        self.host.pop(entry.name)
        self.resident.put(entry.name, prefix)
        for name, leaving in self.resident.overflow({*self._pinned, entry.name}):
            self.counts.evictions += 1
            if self.host.budget != 0 or not self._entries[name].on_disk():
                self.host.put(name, leaving.map(_to_host))
        if self.host.over_budget:
            staying = {n for n in self.host.names() if not self._entries[n].on_disk()}
            for _ in self.host.overflow(staying):
                pass


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in host memory, page-locked where that makes the way back faster."""
    if tensor.device.type == "cpu":
        return tensor
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.cpu()
