"""The adapters of a base that are resident by name: how they are loaded, swapped and unloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ptkit.bank.lora_rows import LoraRows
from ptkit.bank.source import locate, name_of, read_checked, require_files, stamp
from ptkit.bank.store import AdapterStatus, BankCounts, PrefixStore
from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_folder import adapter_folders
from ptkit.methods import Adapter, compile_files, mixes_in_batch, parts_of
from ptkit.prefix import Compiled, KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.locks import running

#: What one row of a batch uses: an adapter, several at once, or None for the plain base.
RowNames = str | Sequence[str] | None


class ResidentAdapters:
    """Compiled adapters by name, without what is asked of them (see `AdapterBank`)."""

    def __init__(
        self,
        base: Base,
        *,
        budget: int | None = None,
        host_budget: int | Literal["auto"] | None = "auto",
        check_every: float = 1.0,
    ) -> None:
        if base.head is not None:
            raise ModelError(
                f"{base.id} is loaded as a {base.head.kind} classifier, whose every adapter has "
                "a head of its own, for which a mixed batch has no place; open one at a time with "
                "`ptkit.classifier`"
            )
        self.base = base
        if host_budget == "auto":
            host_budget = 0 if base.model.device.type == "cpu" else None
        self._store = PrefixStore(base, budget, host_budget, check_every)
        self._lora = LoraRows(base)

    # Coming and going

    def add(self, name: str, adapter: Adapter | KVPrefix) -> None:
        """Keep `adapter`, made in this process, as `name`, in place of what had that name.

        With no file to read it from again, it stays in memory until it is unloaded. Raises
        AdapterError for methods that change weights instead of making a prefix, and for prefixes
        of another base.
        """
        prefix, method = (adapter, "prefix") if isinstance(adapter, KVPrefix) else (
            None if adapter.changes_weights else adapter.compiled(), adapter.section.kind
        )  # fmt: skip
        if prefix is None:
            raise AdapterError(
                f"`{name}` is a {method} adapter, which changes the base's weights; only adapters "
                "that compile to a KV prefix can be added (`load` takes saved adapters with LoRA)"
            )
        if prefix.layout != self.base.layout:
            raise AdapterError(f"the prefix `{name}` was made for another base model")
        self._require_kind(name, prefix=True, lora=False)
        self._store.put(name, prefix.detach(), method, None, None)

    def register(self, source: str | Path, name: str | None = None, *, chosen: bool = False) -> str:
        """Know the adapter in `source` as `name` without reading it yet: the disk tier (chosen: see
        `load`).

        It is read, verified and compiled when first used. Returns the name (default: the
        folder's). Raises AdapterError when the files are not there or the name is taken.
        """
        path = locate(source)
        require_files(path)
        name = name or name_of(path)
        self._require_kind(name, prefix=True, lora=False)
        self._store.register(name, path, chosen=chosen)
        return name

    def register_all(self, folder: Path, *, chosen: bool = False) -> list[str]:
        """Register every adapter folder directly below `folder`, by its own name, sorted."""
        folders = adapter_folders(folder)
        return [self.register(path, path.name, chosen=chosen) for path in folders]

    def load(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        publish: Callable[[], Path] | None = None,
        chosen: bool = False,
    ) -> str:
        """Read the adapter `source` now and keep it as `name`, in place of what had that name.

        source: an adapter folder, or a hub id `user/repo[@revision]`
        publish: moves the folder to its own place and returns that; called when all has been
            checked, right before `name` stands for the adapter
        chosen: the user named this base for it. That decides where the adapter knows its base by
            another name only, with a warning

        Returns the name (default: the folder's). Raises AdapterError when it is damaged, unsafe or
        for another base, and changes nothing then. LoRA adapters are taken too. They make no
        prefix, but a row may name one beside its prefix (see `rows`). They stay on the device,
        outside the budget. An adapter that is a prefix and a LoRA is both under one name.
        """
        path = locate(source)
        name = name or name_of(path)
        read = read_checked(path, self.base, chosen=chosen)
        method = read.files.peft_type.lower()
        parts = {part.peft_type: part for part in parts_of(read.files)}
        lora = next((p for name, p in parts.items() if mixes_in_batch(name)), None)
        prefix = None
        for part in parts.values():
            if part is not lora:  # at most one
                prefix = compile_files(part, self.base)
        if prefix is None and lora is None:
            raise AdapterError(
                f"{path} is a {read.files.peft_type} adapter, which changes the base for every row "
                "of a batch at once; a bank takes what makes a prefix, and LoRA. "
                "`ptkit.methods.load_adapter` puts it into the base"
            )
        self._require_kind(name, prefix=prefix is not None, lora=lora is not None)
        if prefix is not None:
            self._store.require_room(name, prefix)
            prefix = self._store.on_device(prefix)
        if lora is None:
            assert prefix is not None
            place = path if publish is None else publish()
            self._store.put(name, prefix, method, place, read)
            return name

        def along() -> Path:
            place = path if publish is None else publish()
            if prefix is not None:
                # Not of a path of its own: its file is never read again without the LoRA's.
                self._store.put(name, prefix, method, None, None)
            return place

        self._lora.load(name, lora, path, read, along)
        return name

    def swap(self, name: str, source: str | Path) -> None:
        """Replace the adapter `name` by the one in `source`; running rows keep the old one.

        Raises AdapterError, leaving the old one in use, when the new one cannot be loaded.
        """
        self.status(name)
        self.load(source, name)

    def unload(self, name: str) -> None:
        """Forget the adapter `name`."""
        if name not in self._lora:
            self._store.remove(name)
        elif name not in self._store:
            self._lora.unload(name)
        else:
            self._lora.unload(name, lambda: self._store.remove(name))

    def pin(self, name: str) -> None:
        """Keep the adapter `name` on the device, whatever the budget, from its next use on."""
        self._store.pin(name, True)

    def unpin(self, name: str) -> None:
        """Let the adapter `name` leave the device again."""
        self._store.pin(name, False)

    def compose(
        self,
        name: str,
        parts: Sequence[str],
        *,
        how: Literal["concatenate", "average"] = "concatenate",
        weights: Sequence[float] | None = None,
    ) -> None:
        """Keep a new adapter `name` made of others: a style before a task, or their mean.

        weights: for `average`, one per part, adding up to 1; default: equal. Raises AdapterError
        when the parts cannot be combined.
        """
        prefixes = [self.prefix(part) for part in parts]
        if how == "concatenate":
            self.add(name, KVPrefix.concatenated(prefixes))
        else:
            self.add(name, KVPrefix.averaged(prefixes, weights))

    # For rows

    def prefix(self, name: str) -> KVPrefix:
        """The compiled adapter `name`, on the device; fetched from its tier if need be.

        Raises AdapterError when there is none, and when its files are needed now and are bad. The
        same holds when the prefix is not all of it, and when every input has another.
        """
        if name in self._lora and name in self._store:
            raise AdapterError(
                f"`{name}` is a prefix and a LoRA, and the prefix by itself is not it; name it in "
                "a row, which runs with both (`generate`, `rows` within `weights`)"
            )
        return _one(name, self._store.get(name))

    def parts(self, name: str) -> tuple[Compiled | None, str | None]:
        """What gives a row its prefix, and the name of the LoRA adapter, that `name` stands for at
        this moment."""
        compiled = self._compiled(name)
        return (compiled[0][1] if compiled else None), self._lora_of(name)

    def depends_on_input(self, row: RowNames) -> bool:
        """Whether what `row` stands for gives every input a prefix of its own."""
        return any(not isinstance(found, KVPrefix) for _, found in self._compiled(row))

    def prefixes(
        self, names: Sequence[RowNames], inputs: Sequence[Sequence[int]] | None = None
    ) -> list[KVPrefix | None]:
        """The prefix of each row of a batch whose row i uses `names[i]`; None is the plain base.
        Rows with the same adapters have the same object; where it depends on the input, those with
        the same input, too.

        inputs, and what is raised: see `rows`
        """
        read = [None] * len(names) if inputs is None else inputs
        made: dict[object, KVPrefix] = {}
        return [self._row(row, ids, made) for row, ids in zip(names, read, strict=True)]

    def rows(
        self, names: Sequence[RowNames], inputs: Sequence[Sequence[int]] | None = None
    ) -> PrefixBatch:
        """The prefixes of a batch whose row i uses `names[i]`, side by side for one forward pass;
        None is the plain base.

        inputs: token ids of what each row reads; needed where an adapter's prefix depends on it

        A sequence of names concatenates their prefixes in that order. LoRA adapters among them add
        no virtual tokens (run the model within `weights(names)` for their part). Raises
        AdapterError as `prefix` does, and when inputs are needed and not given.
        """
        prefixes = self.prefixes(names, inputs)
        first = prefixes[0] if prefixes else None
        if first is not None and len(prefixes) == 1:
            return first.alone
        if first is not None and all(prefix is first for prefix in prefixes):
            return PrefixBatch.shared(first, len(prefixes))
        return PrefixBatch.gathered(prefixes, self.base.layout)

    @contextmanager
    def weights(self, names: Sequence[RowNames]) -> Iterator[None]:
        """Within this context, row i of a batch runs with the LoRA adapter among `names[i]`.

        Other threads' batches run beside it; LoRA adapters are added and removed when it has ended.
        """
        # Names are looked up while no LoRA adapter comes or goes.
        with running(self.base.model), self._lora.rows([self._lora_of(row) for row in names]):
            yield

    def versions(self, row: RowNames) -> tuple[object, ...]:
        """What `row` stands for at this moment, one object per name; equal to what it was before
        only while no adapter of it has changed."""
        found: list[object] = []
        for name in parts_of_row(row):
            if name in self._lora:
                found.append(self._lora[name])
            if name in self._store or name not in self._lora:
                found.append(self._store.get(name))
        return tuple(found)

    # What is there

    def __contains__(self, name: str) -> bool:
        return name in self._store or name in self._lora

    def status(self, name: str) -> AdapterStatus:
        """Where the adapter `name` is and what is known of it."""
        if name not in self._lora:
            return self._store.status(name)
        lora, size = self._lora[name], self._lora.nbytes(name)
        # Unlike a prefix, it cannot be exchanged under the rows that run with it.
        changed = stamp(lora.path) != lora.stamp
        fault = f"the files of `{name}` have changed; `swap` loads them" if changed else None
        if name not in self._store:
            return AdapterStatus(
                name, lora.path, "lora", "resident", lora.version, 0, size, True, fault
            )
        prefix = self._store.status(name)
        return replace(
            prefix, path=lora.path, version=lora.version, nbytes=size + (prefix.nbytes or 0),
            fault=fault,
        )  # fmt: skip

    @property
    def counts(self) -> BankCounts:
        """Hits, reads, evictions so far."""
        return self._store.counts

    @property
    def resident_bytes(self) -> int:
        """Bytes of the prefixes on the device."""
        return self._store.resident.bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the prefixes in host memory."""
        return self._store.host.bytes

    def _require_kind(self, name: str, *, prefix: bool, lora: bool) -> None:
        """Raise AdapterError when `name` already stands for another kind of adapter."""
        there = (name in self._store, name in self._lora)
        if any(there) and there != (prefix, lora):
            kinds = [kind for kind, is_it in zip(("a prefix", "a LoRA"), there, strict=True)
                     if is_it]  # fmt: skip
            raise AdapterError(
                f"`{name}` is {' and '.join(kinds)} in this bank; unload it first, or take another "
                "name"
            )

    def _compiled(self, row: RowNames) -> list[tuple[str, Compiled]]:
        """Those of `row` that have virtual tokens, by name, in their order."""
        return [
            (name, self._store.get(name))
            for name in parts_of_row(row)
            if name in self._store or name not in self._lora
        ]

    def _row(
        self, row: RowNames, ids: Sequence[int] | None, made: dict[object, KVPrefix]
    ) -> KVPrefix | None:
        """made: the prefixes that rows of the batch so far were made for their inputs, and of
        several adapters"""
        prefixes: list[KVPrefix] = []
        for name, found in self._compiled(row):
            if isinstance(found, KVPrefix) or ids is None:
                prefixes.append(_one(name, found))
                continue
            key = found, tuple(ids)
            if key not in made:
                made[key] = found.for_input(ids)
            prefixes.append(made[key])
        if len(prefixes) < 2:
            return prefixes[0] if prefixes else None
        together = tuple(prefixes)
        if together not in made:
            made[together] = KVPrefix.concatenated(together)
        return made[together]

    def _lora_of(self, row: RowNames) -> str | None:
        named = [name for name in parts_of_row(row) if name in self._lora]
        if len(named) > 1:
            raise AdapterError(f"a row takes one LoRA adapter, found {', '.join(named)}")
        return named[0] if named else None

    def list(self) -> list[str]:
        """Names of all adapters, in the order they came; LoRA adapters last."""
        return list(dict.fromkeys([*self._store.names(), *self._lora.names]))


def _one(name: str, compiled: Compiled) -> KVPrefix:
    """`compiled` where it is one prefix for all inputs. Raises AdapterError where it is not."""
    if not isinstance(compiled, KVPrefix):
        raise AdapterError(
            f"`{name}` makes its prefix of each row's input, so it is no one prefix; give the "
            "inputs too: `rows(names, inputs)`, `generate`, `classify`"
        )
    return compiled


def parts_of_row(row: RowNames) -> Sequence[str]:
    if row is None:
        return ()
    return (row,) if isinstance(row, str) else row
