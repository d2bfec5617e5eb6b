"""A few values of every tensor of a checkpoint, without reading the checkpoint.

safetensors names each tensor's place in its file (https://huggingface.co/docs/safetensors). So
single values are read, as fast for a large model as for a small one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Values read of a tensor. A sample still tells checkpoints of one architecture apart (training
#: moves every weight).
SAMPLES = 256

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
          "BOOL": np.uint8}  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """A tensor's name and shape, and `SAMPLES` of its values from first to last (all, of a smaller
    one), in bfloat16."""

    name: str
    shape: tuple[int, ...]
    values: Tensor


def of_model(model: PreTrainedModel, without: Iterable[str] = ()) -> list[Sampled]:
    """The tensors that `model` would be saved as, sorted by name.

    without: names of modules that are left out
    """
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = []
    for name, value in model.state_dict().items():
        if _within(name, without):
            continue
        place = (value.data_ptr(), tuple(value.shape))
        if place[0] and place in seen:  # tied to another, and saved once
            continue
        seen.add(place)
        found.append(Sampled(name, tuple(value.shape), sample(value)))
    return sorted(found, key=lambda tensor: tensor.name)


def of_files(
    source: str, revision: str | None, without: Iterable[str] = ()
) -> list[Sampled] | None:
    """The tensors of the checkpoint that transformers loads from `source`, sorted by name. None
    where its files are not on this machine, or hold types that have no floating values here.

    source: folder or hub id; without: names of modules that are left out
    """
    files = _files(source, revision)
    if not files:
        return None
    found: list[Sampled] = []
    for file in files:
        for tensor in _sampled(file):
            if tensor is None:
                return None
            if not _within(tensor.name, without):
                found.append(tensor)
    return sorted(found, key=lambda tensor: tensor.name)


def sample(value: Tensor) -> Tensor:
    """`SAMPLES` values of a tensor, in bfloat16."""
    flat = value.detach().reshape(-1)
    return flat[sample_places(flat.numel()).to(flat.device)].to(torch.bfloat16).cpu()


def sample_places(count: int) -> Tensor:
    """Where the values of a sample lie in a tensor of `count` values."""
    taken = min(SAMPLES, count)
    # In integers: float32 cannot tell the positions of a large embedding apart.
    return torch.arange(taken) * (count - 1) // max(1, taken - 1)


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _files(source: str, revision: str | None) -> list[Path]:
    def local(name: str) -> Path | None:
        path = cached_file(
            source, name, revision=revision, local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        return None if path is None else Path(path)

    if (whole := local(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := local(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    parts = [local(name) for name in names]
    return [] if None in parts else [part for part in parts if part is not None]


def _sampled(file: Path) -> Iterator[Sampled | None]:
    # Read, not mapped: pages of a map would count as the process's memory.
    with file.open("rb", buffering=0) as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind = _NUMPY.get(entry["dtype"])
            if kind is None:
                yield None
                return
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            size = np.dtype(kind).itemsize
            taken = bytearray()
            for place in sample_places((last - first) // size).tolist():
                opened.seek(first + place * size)
                taken += opened.read(size)
            values = torch.from_numpy(np.frombuffer(taken, kind))
            if entry["dtype"] == "BF16":
                values = values.view(torch.bfloat16)
            yield Sampled(name, tuple(entry["shape"]), values.to(torch.bfloat16))
