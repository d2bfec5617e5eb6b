"""LoRA adapters beside prefixes: a row of a batch may run with one of each.

PEFT's LoRA layers can already serve a different adapter per row when their forward is told the
rows' names. Here they are told by `ptkit.runtime.row_adapters`. PEFT is loaded with the first LoRA:
to serve prefixes alone takes none of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ptkit.bank.source import CheckedAdapter, Stamp
from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_info import Asked
from ptkit.runtime.base_model import Base
from ptkit.runtime.locks import lock_of, running
from ptkit.runtime.row_adapters import row_adapters, rows_run_with

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

#: PEFT's word for a row without any adapter.
_PLAIN = "__base__"


def _name_rows(_: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Any, Any]:
    """Tell a LoRA layer which adapter each of its rows uses."""
    hidden: Tensor = args[0]
    names = row_adapters() or (_PLAIN,)
    # Beams and several returned sequences repeat every row in place; without names, all are plain.
    repeats = len(hidden) // len(names)
    return args, {**kw, "adapter_names": [name for name in names for _ in range(repeats)]}


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA adapter in the base.

    internal: its name inside PEFT's layers; version: one more with every replacement
    asked: how it is asked, as its files record it; stamp: of those files
    """

    internal: str
    path: Path
    version: int
    asked: Asked
    stamp: Stamp


class LoraRows:
    """LoRA adapters put into one base model, inactive except in rows that name them.

    Adding or removing one replaces modules of the model. It waits for its turn, until no batch
    runs, and new batches wait for it.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
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
        self,
        name: str,
        files: AdapterFiles,
        path: Path,
        read: CheckedAdapter,
        along: Callable[[], Path] | None = None,
    ) -> None:
        """Put the LoRA adapter `files` into the base under `name`; nothing runs with it yet.

        read: what `files` are, or are a part of
        along: called in the same moment, when all else has succeeded, while no batch runs. It
            returns where the files are from now on, instead of `path`

        Raises AdapterError for kinds of LoRA that PEFT cannot mix within a batch, and when the
        tensors do not fit the base. Whatever is raised, by `along` too, the base is as it was.
        """
        from ptkit.methods.lora.files import lora_config

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
        self.base.remember()
        internal = f"ptkit_{next(self._numbers)}"  # PEFT's names allow no dots
        with self._alone():
            try:
                self._inject(name, files, config, internal)
                path = path if along is None else along()
            except BaseException:
                self._remove(internal)
                raise
            replaced = self._loaded.get(name)
            version = 1 if replaced is None else replaced.version + 1
            self._loaded[name] = LoadedLora(
                internal, path, version, read.files.info.asked, read.stamp
            )
            if replaced is not None:
                self._remove(replaced.internal)

    def _inject(self, name: str, files: AdapterFiles, config: LoraConfig, internal: str) -> None:
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        model: Any = self.base.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT on there being others, and Conv1D
            inject_adapter_in_model(config, model, adapter_name=internal)
            try:
                result: Any = set_peft_model_state_dict(
                    model, dict(files.tensors), adapter_name=internal
                )
            except RuntimeError as error:  # torch's, on a tensor of another shape
                reason = str(error).splitlines()[-1].strip()
                raise AdapterError(f"`{name}` does not fit this base: {reason}") from error
        model.requires_grad_(False)
        model.eval()
        self._hook_layers()
        if result.unexpected_keys:
            raise AdapterError(
                f"`{name}` holds tensors this base has no place for: {result.unexpected_keys[:3]}"
            )

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
        """Within this context row i of a batch of this thread's runs with `names[i]`. No LoRA
        comes or goes meanwhile."""
        with running(self.base.model):
            internal = [_PLAIN if name is None else self._loaded[name].internal for name in names]
            with rows_run_with(tuple(internal)):
                yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within this context no batch is under way. Not to be entered from within `rows`."""
        if row_adapters():
            raise RuntimeError("LoRA adapters cannot be changed within a batch that runs with them")
        with lock_of(self.base.model):
            yield

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        from peft.tuners.lora import LoraLayer

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
