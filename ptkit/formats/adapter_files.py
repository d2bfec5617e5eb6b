"""An adapter on disk, in PEFT's layout: `adapter_model.safetensors` + `adapter_config.json`.

`ptkit.json` beside them records what PEFT has no place for: a fingerprint of the base, the
method, scores, versions (`ptkit.formats.adapter_info`). `recipe.yaml` is how it was made, and
`README.md` its card. Adapters without them (made by plain PEFT) are read as well.

Files come from strangers: only regular files of bounded size are opened, and every fault of
their contents is an AdapterError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats import atomic
from ptkit.formats.adapter_folder import (
    CONFIG,
    INFO,
    INT8_WEIGHTS,
    WEIGHTS,
    base_id,
    opened,
    read_config,
    read_info,
    sha256,
    weights_path,
)
from ptkit.formats.adapter_info import ADAPTER_INFO, AdapterInfo, WeightsInfo
from ptkit.formats.int8 import dequantised, quantised

#: safetensors' names of floats that share a byte; torch has no arithmetic for them.
_PACKED = ("F4", "F6")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    config: PEFT's `adapter_config.json`
    tensors: the trained parameters only
    info: what `ptkit.json` says, nothing for adapters made by plain PEFT
    texts: other files by name: the recipe, the card
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    info: AdapterInfo = field(default_factory=AdapterInfo)
    texts: Mapping[str, str] = field(default_factory=dict)

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
        return replace(self, tensors=tensors)


def write_adapter(
    path: Path, files: AdapterFiles, *, replace: bool = False, int8: bool = False
) -> None:
    """Write `files` to the folder `path`; it appears complete or not at all.

    int8: store the weights as 8-bit integers, which ptkit reads and PEFT does not
    """
    tensors = quantised(files.tensors) if int8 else files.tensors
    name = INT8_WEIGHTS if int8 else WEIGHTS
    with atomic.folder(path, replace=replace) as scratch:
        contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(contiguous, scratch / name, metadata={"format": "pt"})
        atomic.write_json(scratch / CONFIG, files.config)
        if not files.info.empty:
            digest = WeightsInfo(file=name, sha256=sha256(scratch / name))
            info = files.info.updated(weights=digest)
            atomic.write_json(scratch / INFO, ADAPTER_INFO.as_file(info))
        for text_name, text in files.texts.items():
            atomic.write_text(scratch / text_name, text)


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter folder.

    Raises AdapterError when the folder, a file or a field is missing, or the only weights are a
    pickle. Raises it, too, when the safetensors file is damaged or a value is not finite.
    """
    atomic.settle(path)
    if not path.is_dir():
        raise AdapterError(f"{path} is not an adapter folder (no such directory)")
    return AdapterFiles(read_config(path), _read_tensors(path), read_info(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    weights = weights_path(path)
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind.startswith(_PACKED):
                raise AdapterError(
                    f"{weights}: `{name}` holds {kind} values, floats of less than a byte, which "
                    "ptkit does not read; store it as F16 or F32"
                )
        # Copies: what is checked here must not change with the file below it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise AdapterError(f"{weights} holds no tensors")
    if weights.name == INT8_WEIGHTS:
        tensors = dequantised(tensors)
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise AdapterError(f"{weights}: `{name}` holds values that are not finite")
    return tensors


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() < 2:  # 8-bit floats have no arithmetic
        tensor = tensor.float()
    # One pass without a mask: the extremes of a tensor with NaN are NaN.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
