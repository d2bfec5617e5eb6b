"""An adapter on disk, in PEFT's layout: `adapter_model.safetensors` + `adapter_config.json`.

`ptkit.json` beside them records what PEFT has no place for: a fingerprint of the base, the
method, scores, versions. Adapters without it (made by plain PEFT) are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats import atomic

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INFO = "ptkit.json"

#: Serialisations that can run code when read. They are named in the refusal, never opened.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    config: PEFT's `adapter_config.json`
    tensors: the trained parameters only
    info: ptkit's own record, empty for adapters made by plain PEFT
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, `PREFIX_TUNING` for example."""
        return str(self.config.get("peft_type"))

    @property
    def base_id(self) -> str | None:
        """Id of the base model the adapter names."""
        return base_id(self.config, self.info)

    def to(self, dtype: torch.dtype) -> AdapterFiles:
        """The same adapter with floating tensors in `dtype`."""
        tensors = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()
        }
        return AdapterFiles(self.config, tensors, self.info)


def adapter_folders(folder: Path) -> list[Path]:
    """The adapter folders directly below `folder`, by name. Raises AdapterError without it."""
    if not folder.is_dir():
        raise AdapterError(f"no such folder of adapters: {folder}")
    return sorted(path for path in folder.iterdir() if (path / CONFIG).is_file())


def write_adapter(path: Path, files: AdapterFiles, *, replace: bool = False) -> None:
    """Write `files` to the folder `path`; it appears complete or not at all."""
    with atomic.folder(path, replace=replace) as scratch:
        contiguous = {name: t.detach().cpu().contiguous() for name, t in files.tensors.items()}
        save_file(contiguous, scratch / WEIGHTS, metadata={"format": "pt"})
        atomic.write_json(scratch / CONFIG, files.config)
        if files.info:
            atomic.write_json(scratch / INFO, files.info)


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter folder.

    Raises AdapterError when the folder, a file or a field is missing, when the only weights are
    a pickle, and when the safetensors file is damaged or holds values that are not finite.
    """
    if not path.is_dir():
        raise AdapterError(f"{path} is not an adapter folder (no such directory)")
    return AdapterFiles(read_config(path), _read_tensors(path), read_info(path))


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json` in the folder `path`. Raises AdapterError when it is not one."""
    config = _read_json(path / CONFIG)
    if config is None:
        raise AdapterError(
            f"{path / CONFIG} is missing; an adapter folder holds {CONFIG} and {WEIGHTS}"
        )
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path / CONFIG}: `peft_type` is missing; this is not a PEFT adapter")
    return config


def read_info(path: Path) -> dict[str, Any]:
    """ptkit's own record in the folder `path`; empty where there is none."""
    return _read_json(path / INFO) or {}


def base_id(config: dict[str, Any], info: dict[str, Any]) -> str | None:
    """Id of the base model an adapter names: in ptkit's record, else in PEFT's settings."""
    return info.get("base", {}).get("id") or config.get("base_model_name_or_path")


def read_dtypes(path: Path) -> set[str]:
    """Names of the tensors' dtypes (safetensors': `F32`, `BF16`), from the file's header alone.

    Raises AdapterError as `read_adapter` does.
    """
    with _opened(path) as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The folder's safetensors file, open. Raises AdapterError when it is missing or damaged."""
    weights = path / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        if pickles:
            raise AdapterError(
                f"{path} holds only pickled weights ({', '.join(pickles)}), which can run code "
                "when read; ask its author for safetensors, or re-save it with PEFT"
            ) from error
        raise AdapterError(f"{weights} is missing") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(
            f"{weights} is damaged or not a safetensors file ({error}); fetch or export it again"
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = path / WEIGHTS
    if not tensors:
        raise AdapterError(f"{weights} holds no tensors")
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise AdapterError(f"{weights}: `{name}` holds values that are not finite")
    return tensors


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a mask: the extremes of a tensor with NaN are NaN.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
