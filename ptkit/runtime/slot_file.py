"""Slot files of llama.cpp's server: a KV prefix in the form that the server saves and restores.

A slot is what the server keeps of one sequence: its token ids, and their keys and values. The
server restores a slot from a file, and evaluates of a prompt only what the slot does not hold.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from torch import Tensor

from ptkit.errors import AdapterError, UserError
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base

#: Of a sequence's state (`LLAMA_STATE_SEQ_VERSION`); a server of another one refuses the file.
STATE_VERSION = 4
_STATE_MAGIC = 0x67677371
#: Around the token ids of a slot: a marker, its version, their number, and no media behind them.
_SLOT_MARKER, _SLOT_VERSION, _NO_MEDIA = -1, 1, 0
#: Architecture of a file -> whether its rotary pairs are neighbours, so that the rows of its query
#: and key weights are permuted. Only those that were compared with the server are written.
NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
CacheType = Literal["float32", "float16", "int8"]
#: What a server keeps keys and values in, and what `--dtype` calls it.
CACHES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "int8": GGMLQuantizationType.Q8_0,
}
#: The server turns what it rounds to eight bits by a Hadamard matrix of so many columns.
_TURNED = 64


@dataclass(frozen=True)
class CacheLayout:
    """How a server keeps keys and values.

    neighbours: rotary pairs are neighbours; otherwise halves apart
    cache: the type of both; flash_attention: values lie in rows, one per token; without it in
        columns
    """

    neighbours: bool
    cache: GGMLQuantizationType
    flash_attention: bool = True

    @property
    def cache_name(self) -> str:
        """What the server's `--cache-type-k` calls the type: `f32`, `f16`, `q8_0`."""
        return self.cache.name.lower()


def cache_layout(gguf: Path, dtype: str, flash_attention: bool = True) -> CacheLayout:
    """The layout of a server that loads `gguf`. Raises UserError for what was not tried."""
    if dtype not in CACHES:
        raise UserError(
            f"--dtype {dtype}: llama-server's cache takes float32, float16 or int8 (its q8_0)"
        )
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    try:
        field = GGUFReader(gguf).get_field("general.architecture")
    except (ValueError, OSError) as error:
        raise UserError(f"{gguf} cannot be read as a GGUF file: {error}") from error
    architecture = field.contents() if field else None
    if architecture not in NEIGHBOURS:
        known = ", ".join(NEIGHBOURS)
        raise UserError(
            f"{gguf} is of the architecture {architecture!r}; slot files are written for {known}, "
            "which were compared with the server; others were not tried"
        )
    if dtype == "int8" and not flash_attention:
        raise UserError("a cache of eight bits needs flash attention, in llama.cpp too")
    return CacheLayout(NEIGHBOURS[architecture], CACHES[dtype], flash_attention)


def slot_file(prefix: KVPrefix, ids: Sequence[int], layout: CacheLayout) -> bytes:
    """A slot that has read `ids` and holds the keys and values of `prefix`.

    ids: one for each virtual token. The parts are those that llama.cpp's server writes itself.
    First are the slot's tokens, and a cell for each with its position and sequence. Then follow the
    keys of every layer and the values of every layer, each with type and size.
    """
    count = prefix.virtual_tokens
    packed = [_SLOT_MARKER, _SLOT_VERSION, count, *ids, _NO_MEDIA]
    parts = [struct.pack(f"<3I{len(packed)}i", _STATE_MAGIC, STATE_VERSION, len(packed), *packed)]
    cells = [word for position in range(count) for word in (position, 1, 0)]
    parts.append(struct.pack(f"<2I{len(cells)}i", 1, count, *cells))  # one stream of cells
    turned = _TURNED if layout.cache is GGMLQuantizationType.Q8_0 else 0
    by_column = not layout.flash_attention
    parts.append(struct.pack("<4I", by_column, len(prefix.keys), turned, turned))
    for keys in prefix.keys:
        parts.append(_rows(_permute(keys) if layout.neighbours else keys, layout.cache))
    for values in prefix.values:
        parts.append((_columns if by_column else _rows)(values, layout.cache))
    return b"".join(parts)


def _permute(keys: Tensor) -> Tensor:
    """Keys whose rotary pairs are halves apart, `[..., head_dim]`, as neighbours."""
    first, second = keys.chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def _rows(states: Tensor, cache: GGMLQuantizationType) -> bytes:
    """A record of one row per token, all heads in it, of states `[kv_heads, tokens, head_dim]`."""
    rows = states.float().cpu().transpose(0, 1)
    if cache is GGMLQuantizationType.Q8_0:
        if rows.shape[-1] != _TURNED:
            raise AdapterError(
                f"heads of {rows.shape[-1]} values in a cache of eight bits were not tried; "
                "use --dtype float16"
            )
        rows = rows @ _hadamard(_TURNED)
    data = _encoded(rows.flatten(1).numpy(), cache)
    return struct.pack("<iQ", int(cache), data.nbytes // len(data)) + data.tobytes()


def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, normalised: its own inverse."""
    turn = torch.ones(1, 1)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn / size**0.5


def _columns(states: Tensor, cache: GGMLQuantizationType) -> bytes:
    """A record of one run of tokens for each value of a row."""
    if cache is GGMLQuantizationType.Q8_0:
        raise UserError("a cache of eight bits needs flash attention, in llama.cpp too")
    columns = _encoded(states.float().cpu().transpose(1, 2).flatten(0, 1).numpy(), cache)
    return struct.pack("<i2I", int(cache), columns.itemsize, len(columns)) + columns.tobytes()


def _encoded(values: Any, cache: GGMLQuantizationType) -> Any:
    data = np.ascontiguousarray(values, dtype=np.float32)
    return data if cache is GGMLQuantizationType.F32 else quants.quantize(data, cache)


def placeholders(prefix: KVPrefix, base: Base) -> list[int]:
    """Token ids that stand for the virtual tokens in a prompt.

    The server never reads them, but compares them: two prompts that begin alike share what is in
    its cache. So they are drawn by the adapter's own values, and no two adapters have the same.
    """
    digest = hashlib.sha256()
    for tensor in prefix.tensors:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    special = set(base.tokenizer.all_special_ids)
    # A tokenizer may know more tokens than the model; the server refuses those.
    known = min(len(base.tokenizer), base.embedding.num_embeddings)
    usable = [i for i in range(known) if i not in special]
    draw = np.random.default_rng(int.from_bytes(digest.digest(), "big"))
    return [usable[i] for i in draw.integers(len(usable), size=prefix.virtual_tokens)]
