"""Many adapters resident on one frozen base; every row of a batch picks its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptkit.errors import AdapterError, did_you_mean
from ptkit.methods import Adapter, load_adapter
from ptkit.prefix import KVPrefix, PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import generate


class AdapterBank:
    """Compiled adapters by name, for one base model.

    Each adapter is compiled once, when it is loaded; at request time no encoder, MLP or prompt
    token runs. An adapter that cannot be read or belongs to another base changes nothing.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._prefixes: dict[str, KVPrefix] = {}

    def add(self, name: str, adapter: Adapter) -> None:
        """Compile `adapter` and keep it as `name`, replacing what had that name.

        Raises AdapterError for methods that change weights instead of making a prefix.
        """
        prefix = adapter.prefix()
        if prefix is None:
            raise AdapterError(
                f"`{name}` is a {adapter.section.kind} adapter, which changes the base's weights; "
                "only adapters that compile to a KV prefix share a batch"
            )
        device, dtype = self.base.model.device, self.base.model.dtype
        self._prefixes[name] = prefix.detach().to(device, dtype)

    def load(self, path: Path, name: str | None = None) -> str:
        """Read the adapter folder `path` and keep it under `name` (default: the folder's name).

        Returns the name. Raises AdapterError when it is damaged, unsafe or for another base.
        """
        name = name or path.resolve().name
        adapter = load_adapter(path, self.base)
        try:
            self.add(name, adapter)
        finally:
            adapter.close()
        return name

    def swap(self, name: str, path: Path) -> None:
        """Replace the adapter `name` by the one in `path`; rows under way keep the old one."""
        self._require(name)
        self.load(path, name)

    def unload(self, name: str) -> None:
        """Forget the adapter `name`."""
        self._require(name)
        del self._prefixes[name]

    def prefix(self, name: str) -> KVPrefix:
        """The compiled adapter `name`. Raises AdapterError when there is none."""
        self._require(name)
        return self._prefixes[name]

    def rows(self, names: Sequence[str | None]) -> PrefixBatch:
        """The prefixes of a batch whose row i uses adapter `names[i]`, None for the plain base."""
        prefixes = [None if name is None else self.prefix(name) for name in names]
        return PrefixBatch.gathered(prefixes, self.base.layout)

    def generate(
        self, texts: Sequence[str], names: Sequence[str | None], **options: Any
    ) -> list[str]:
        """Answers to `texts`, row i under adapter `names[i]`, all in one batch.

        options: anything transformers' `generate` takes. Greedy rows get the tokens they get
        alone.
        """
        if not texts:
            return []
        batch = self.rows(names)
        prompts = self.base.tokenizer(list(texts))["input_ids"]
        answers = generate(
            self.base.model, prompts, batch, pad_token_id=self.base.pad_token_id, **options
        )
        return self.base.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _require(self, name: str) -> None:
        if name not in self._prefixes:
            raise AdapterError(
                f"no adapter `{name}` is loaded; {did_you_mean(name, self._prefixes)}"
            )

    def list(self) -> list[str]:
        """Names of the resident adapters, in the order they were loaded."""
        return [*self._prefixes]
