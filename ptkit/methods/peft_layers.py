"""What PEFT puts into the base's own layers, and takes out again: LoRA and everything like it.

PEFT does all of it; here is only what makes it an adapter like the others.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict
from ptkit.runtime.base_model import Base
from ptkit.section import MethodSection

#: A module's name, or the end of one. PEFT would take a regular expression, which may never end.
_NAME = re.compile(r"\^?[\w.-]+")
#: Settings of PEFT's that name modules or parameters.
_NAMES = re.compile(r"\w*(modules|modules_to_save|parameters|pattern|tokens)")


def task_type(base: Base) -> str | None:
    """PEFT's name of the task: with one for classifiers it would train a head of its own."""
    if base.head is not None:
        return None
    return "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM"


def head_modules(base: Base) -> list[str] | None:
    """Names of all modules of the base's head: it is trained as a whole."""
    if base.head is None:
        return None
    inside = tuple(f"{name}." for name in base.head.modules)
    return [name for name, _ in base.model.named_modules() if f"{name}.".startswith(inside)]


def read_config(kind: type[PeftConfig], files: AdapterFiles, base: Base) -> PeftConfig:
    """PEFT's settings in `files`, which may be a stranger's.

    Raises AdapterError for what PEFT refuses, and for names that are patterns.
    """
    own = {f.name for f in dataclasses.fields(kind)} - OF_FILE
    said = {key: value for key, value in files.config.items() if key in own}
    for key, value in said.items():
        if _NAMES.fullmatch(key):
            for name in _words(value):
                if not _NAME.fullmatch(name):
                    raise AdapterError(
                        f"the adapter's `{key}` holds {name!r:.80}; only names are read"
                    )
    try:
        return kind(**said, task_type=task_type(base))
    except Exception as error:  # whatever PEFT makes of a stranger's values
        raise AdapterError(f"PEFT refuses the adapter's settings: {error}") from error


#: Settings that say where an adapter comes from, and not what it is.
OF_FILE = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
            "inference_mode", "peft_version", "runtime_config"}  # fmt: skip


def _words(value: Any) -> Iterator[str]:
    """All strings in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (word for pair in value.items() for part in pair for word in _words(part))
    elif isinstance(value, list | tuple | set):
        yield from (word for part in value for word in _words(part))


class PeftLayers(Adapter):
    """Layers of PEFT's inside the base's own."""

    encoder_decoder = True
    changes_weights = True

    def __init__(self, section: MethodSection, base: Base, config: PeftConfig) -> None:
        """Raises what PEFT raises on a base it has no place in; the base is then as it was."""
        super().__init__(section, base)
        training = base.model.training
        # In a tuple, so that the frozen base's modules are no children of the adapter.
        self._own = (_own_modules(base),)
        self._own_biases = _biases_trained(config, base)
        try:
            self.peft_model: PeftModel = get_peft_model(base.model, config)
        except BaseException:
            _take_out(base)
            raise
        self.peft_model.train(training)  # new modules begin in training mode, dropout and all

    @classmethod
    @abstractmethod
    def peft_config(cls, section: Any, base: Base) -> PeftConfig:
        """PEFT's settings of a fresh adapter on `base`. Raises ModelError where there are none."""

    @classmethod
    @abstractmethod
    def config_of_files(cls, files: AdapterFiles, base: Base) -> PeftConfig:
        """PEFT's settings of the adapter in `files`. Raises AdapterError when they are none."""

    @classmethod
    def require_fits(cls, section: Any, base: Base) -> None:
        cls.peft_config(section, base)

    @classmethod
    def create(cls, section: Any, base: Base, demonstrations: Demonstrations) -> Self:
        config = cls.peft_config(section, base)
        try:
            return cls(section, base, config)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"`{section.title}`: PEFT cannot put it into {base.id}: {error}"
            ) from error

    @classmethod
    def from_files(cls, files: AdapterFiles, section: Any, base: Base) -> Self:
        config = cls.config_of_files(files, base)
        _require_room(config, files, base)
        adapter = cls(section, base, config)
        try:
            set_peft_model_state_dict(adapter.peft_model, dict(files.tensors))
        except RuntimeError as error:
            adapter.close()
            raise AdapterError(f"PEFT cannot load this adapter: {error}") from error
        return adapter

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: Any, base: Base) -> None:
        # It makes no prefix, and has to fit all the same.
        _require_room(cls.config_of_files(files, base), files, base)

    def own_files(self) -> AdapterFiles:
        config = self.peft_model.peft_config["default"]
        return AdapterFiles(peft_config_dict(config, self.base), _tensors(self.peft_model))

    def off(self) -> AbstractContextManager[None]:
        return self.peft_model.disable_adapter()

    def close(self) -> None:
        _unload(self.peft_model, self.base, self._own[0])
        for name, bias in self._own_biases.items():
            self.base.model.get_parameter(name).data.copy_(bias)


def _biases_trained(config: PeftConfig, base: Base) -> dict[str, Tensor]:
    """Copies of the base's biases, where the adapter has its own: PEFT writes them over the base's
    and leaves them there."""
    if getattr(config, "bias", "none") == "none":
        return {}
    named = base.model.named_parameters()
    return {name: bias.detach().clone() for name, bias in named if name.endswith("bias")}


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    # By itself PEFT asks the Hub whether the base's vocabulary has grown; ptkit never grows it.
    own = dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    places: set[int] = set()
    for name, tensor in own.items():
        # Layers may share one projection, which files hold once for each, as PEFT writes them.
        if tensor.data_ptr() in places:
            own[name] = tensor.clone()
        places.add(tensor.data_ptr())
    return own


def _own_modules(base: Base) -> dict[str, nn.Module]:
    """The base's modules by name, those of an adapter's layers left out."""
    named = base.model.named_modules(remove_duplicate=False)
    return {n: m for n, m in named if n and not isinstance(m, BaseTunerLayer)}


def _unload(model: PeftModel, base: Base, own: dict[str, nn.Module]) -> None:
    """Take PEFT's layers out. LLaMA-Adapter's are no tuner layers, and have a word of their own.

    own: the base's modules; PEFT leaves copies of some in their place (`modules_to_save`)
    """
    inner: Any = model.base_model
    if isinstance(inner, AdaptionPromptModel):
        inner.delete_adapter("default")
    else:
        model.unload()
    now = dict(base.model.named_modules(remove_duplicate=False))
    for name, module in own.items():
        if name in now and now[name] is not module:
            base.model.set_submodule(name, module)
    base.model.requires_grad_(False)


def _require_room(config: PeftConfig, files: AdapterFiles, base: Base) -> None:
    """Raise AdapterError where the tensors of `files` are not those that `config` has on the base.

    Nothing is allocated for it: the sizes are a stranger's.
    """
    modules = _own_modules(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tried = get_peft_model(base.model, copy.deepcopy(config), low_cpu_mem_usage=True)
    except Exception as error:  # whatever PEFT makes of a stranger's settings
        _take_out(base)
        raise AdapterError(f"PEFT cannot put this adapter into {base.id}: {error}") from error
    try:
        own = _tensors(tried)
    finally:
        _unload(tried, base, modules)
    given = files.tensors
    faults = [f"no place for `{name}`" for name in given.keys() - own.keys()]
    faults += [f"`{name}` is missing" for name in own.keys() - given.keys()]
    faults += [
        f"`{name}` has shape {list(given[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise AdapterError(f"the adapter does not fit: {'; '.join(sorted(faults)[:3])}{more}")


def _take_out(base: Base) -> None:
    """Give the base its own layers back, of which PEFT may have replaced some."""
    layers = [(n, m) for n, m in base.model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        base.model.set_submodule(name, layer.get_base_layer())
    base.model.requires_grad_(False)
