"""LoRA adapters beside prefixes: a row of a batch may run with one of each.

PEFT's LoRA layers can already serve a different adapter per row when their forward is told the
rows' names. Here they are told by a context variable, which is per thread, so that generations
of several threads on one model do not see each other's rows.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.lora_files import lora_config
from ptkit.runtime.base_model import Base

#: PEFT's word for a row without any adapter.
_PLAIN = "__base__"

_rows: ContextVar[tuple[str, ...]] = ContextVar("lora_rows", default=())


def _name_rows(_: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Any, Any]:
    """Tell a LoRA layer which adapter each of its rows uses."""
    hidden: Tensor = args[0]
    names = _rows.get() or (_PLAIN,)
    # Beams and several returned sequences repeat every row in place; without names, all are plain.
    repeats = len(hidden) // len(names)
    return args, {**kw, "adapter_names": [name for name in names for _ in range(repeats)]}


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA adapter in the base.

    internal: its name inside PEFT's layers; version: one more with every replacement
    """

    internal: str
    path: Path
    version: int


class LoraRows:
    """LoRA adapters put into one base model, inactive except in rows that name them.

    Putting one in or out replaces modules of the model: it waits until no batch is under way,
    and new batches wait for it.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._change = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._loaded: dict[str, LoadedLora] = {}
        self._numbers = count()
        self._hooks: list[Any] = []

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def __getitem__(self, name: str) -> LoadedLora:
        return self._loaded[name]

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they came."""
        return [*self._loaded]

    def load(
        self, name: str, files: AdapterFiles, path: Path, along: Callable[[], None] | None = None
    ) -> None:
        """Put the LoRA adapter `files` into the base under `name`; nothing runs with it yet.

        along: called in the same moment, while no batch is under way; must not raise

        Raises AdapterError for kinds of LoRA that PEFT cannot mix within a batch, and when the
        tensors do not fit the base; the base is then as it was.
        """
        config = lora_config(files, self.base)
        config.inference_mode = True
        if (
            config.use_dora
            or config.modules_to_save
            or config.bias != "none"
            or config.target_parameters
        ):
            raise AdapterError(
                f"`{name}` uses DoRA, trained biases, `modules_to_save` or `target_parameters` "
                "(fused experts), which cannot differ from row to row; merge it into the base "
                "instead"
            )
        # Asked for now: wrapped layers change the names both are made from.
        self.base.fingerprint, self.base.layout  # noqa: B018
        internal = f"ptkit_{next(self._numbers)}"  # PEFT's names allow no dots
        model: Any = self.base.model
        with self._alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT on there being others, and Conv1D
            inject_adapter_in_model(config, model, adapter_name=internal)
            result: Any = set_peft_model_state_dict(
                model, dict(files.tensors), adapter_name=internal
            )
            model.requires_grad_(False)
            model.eval()
            self._hook_layers()
            if result.unexpected_keys:
                self._remove(internal)
                raise AdapterError(
                    f"`{name}` holds tensors this base has no place for: "
                    f"{result.unexpected_keys[:3]}"
                )
            replaced = self._loaded.get(name)
            version = 1 if replaced is None else replaced.version + 1
            self._loaded[name] = LoadedLora(internal, path, version)
            if along is not None:
                along()
            if replaced is not None:
                self._remove(replaced.internal)

    def unload(self, name: str, along: Callable[[], None] | None = None) -> None:
        """Take the adapter `name` out; the last one leaves the base's own layers behind.

        along: see `load`
        """
        with self._alone():
            self._remove(self._loaded.pop(name).internal)
            if along is not None:
                along()

    def nbytes(self, name: str) -> int:
        """Bytes of the adapter's matrices."""
        internal = self._loaded[name].internal
        return sum(
            p.numel() * p.element_size()
            for n, p in self.base.model.named_parameters()
            if f".{internal}." in n
        )

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within this context (of this thread) row i of a batch runs with `names[i]`."""
        with self._change:
            self._change.wait_for(lambda: not self._waiting)
            self._running += 1
        try:
            token = _rows.set(
                tuple(_PLAIN if name is None else self._loaded[name].internal for name in names)
            )
            try:
                yield
            finally:
                _rows.reset(token)
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within this context no batch is under way. Not to be entered from within `rows`."""
        with self._change:
            self._waiting += 1
            try:
                self._change.wait_for(lambda: not self._running)
                yield
            finally:
                self._waiting -= 1
                self._change.notify_all()

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        return [(n, m) for n, m in self.base.model.named_modules() if isinstance(m, LoraLayer)]

    def _hook_layers(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            layer.register_forward_pre_hook(_name_rows, with_kwargs=True)  # type: ignore[attr-defined]
            for _, layer in self._layers()
        ]

    def _remove(self, internal: str) -> None:
        """Delete an adapter's matrices, and give the base its own layers back after the last."""
        for path, layer in self._layers():
            if internal in layer.lora_A or internal in layer.lora_embedding_A:
                layer.delete_adapter(internal)
            if not layer.lora_A and not layer.lora_embedding_A:
                self.base.model.set_submodule(path, layer.get_base_layer())
        self._hook_layers()
