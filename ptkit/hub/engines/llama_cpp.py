"""Slot files for llama.cpp's server, and a client that restores and asks for them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from torch import Tensor

from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines import Written
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base, load_base

CLIENT = "client.py"
#: What the client needs to know of the adapters.
ADAPTERS = "adapters.json"
#: Of a sequence's state (`LLAMA_STATE_SEQ_VERSION`); a server of another one refuses the file.
STATE_VERSION = 4
_STATE_MAGIC = 0x67677371
#: Around the token ids of a slot: a marker, its version, their number, and no media behind them.
_SLOT_MARKER, _SLOT_VERSION, _NO_MEDIA = -1, 1, 0
#: Architecture of a file -> whether its rotary pairs are neighbours, so that the rows of its query
#: and key weights are permuted. Only those that were compared with the server are written.
_NEIGHBOURS = {"llama": True}
#: What a server keeps keys and values in, and what `--dtype` calls it.
_CACHES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "int8": GGMLQuantizationType.Q8_0,
}
#: The server turns what it rounds to eight bits by a Hadamard matrix of so many columns.
_TURNED = 64


@dataclass(frozen=True)
class _Layout:
    """How a server keeps keys and values. flash_attention: values lie in rows, one per token;
    without it in columns."""

    neighbours: bool
    cache: GGMLQuantizationType
    flash_attention: bool


def write(
    sources: Sequence[Path],
    out: Path,
    *,
    base: Base | None = None,
    replace_out: bool = False,
    gguf: Path | None = None,
    dtype: Literal["float32", "float16", "int8"] = "float16",
    flash_attention: bool = True,
) -> Written:
    """Write `NAME.bin` for each of `sources`, `adapters.json` and `client.py`.

    gguf: the file that the server loads; base: it, loaded
    dtype: the server's `--cache-type-k` and `--cache-type-v`: f32, f16, or q8_0 for int8
    flash_attention: whether the server uses it

    Raises UserError without `gguf` and for an architecture that was not tried. Raises AdapterError
    for an adapter of another model and for what is more than a KV prefix (see `engine_prefix`).
    """
    if gguf is None:
        raise UserError("--as llama-cpp needs --gguf FILE, the file that llama-server loads")
    if dtype not in _CACHES:
        raise UserError(
            f"--dtype {dtype}: llama-server's cache takes float32, float16 or int8 (its q8_0)"
        )
    layout = _Layout(_permuted(gguf), _CACHES[dtype], flash_attention)
    if base is None:
        base = load_base(id=str(gguf))
    tokens = 0
    about: dict[str, Any] = {}
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            prefix = engine_prefix(source, adapter)
            ids = _placeholders(prefix, base)
            (scratch / f"{source.name}.bin").write_bytes(slot_file(prefix, ids, layout))
            tokens += prefix.virtual_tokens
            about[source.name] = {"placeholders": ids, "template": source.template}
        atomic.write_json(scratch / ADAPTERS, about)
        client = package_files("ptkit.hub") / "llama_cpp_client.py"
        atomic.write_text(scratch / CLIENT, client.read_text(encoding="utf-8"))
        atomic.write_text(scratch / "README.md", _readme(gguf, about, layout))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def slot_file(prefix: KVPrefix, ids: Sequence[int], layout: _Layout) -> bytes:
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


def _placeholders(prefix: KVPrefix, base: Base) -> list[int]:
    """Token ids that stand for the virtual tokens in a prompt.

    The server never reads them, but compares them: two prompts that begin alike share what is in
    its cache. So they are drawn by the adapter's own values, and no two adapters have the same.
    """
    digest = hashlib.sha256()
    for tensor in prefix.tensors:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    special = set(base.tokenizer.all_special_ids)
    usable = [i for i in range(len(base.tokenizer)) if i not in special]
    draw = np.random.default_rng(int.from_bytes(digest.digest(), "big"))
    return [usable[i] for i in draw.integers(len(usable), size=prefix.virtual_tokens)]


def _permuted(gguf: Path) -> bool:
    """Whether the rows of the file's query and key weights are permuted."""
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    field = GGUFReader(gguf).get_field("general.architecture")
    architecture = field.contents() if field else None
    if architecture not in _NEIGHBOURS:
        known = ", ".join(_NEIGHBOURS)
        raise UserError(
            f"{gguf} is of the architecture {architecture!r}; slot files are written for {known}, "
            "which was compared with the server; others were not tried"
        )
    return _NEIGHBOURS[architecture]


def _readme(gguf: Path, about: dict[str, Any], layout: _Layout) -> str:
    cache = layout.cache.name.lower()
    flash = "on" if layout.flash_attention else "off"
    first = next(iter(about))
    shown = "\n".join(
        f"- `{name}`: {len(entry['placeholders'])} virtual tokens, trained on inputs written as "
        f"{json.dumps(entry['template'] or '{text}')}"
        for name, entry in about.items()
    )
    return f"""# Adapters of {gguf.name} for llama.cpp

{shown}

    llama-server -m {gguf.name} --slot-save-path . --parallel 1 \\
        --flash-attn {flash} --cache-type-k {cache} --cache-type-v {cache}
    python {CLIENT} {first} "The text"

Start the server in this folder. With more slots, add `--kv-unified`: the files hold one stream of
cells. `{CLIENT}` restores an adapter into a slot, unless it is there already, and sends the text
behind the adapter's placeholders (`{ADAPTERS}`), which the server does not read. A text without
them is answered by the plain model.

The files are of llama.cpp's sequence state, version {STATE_VERSION}. A server of another version
refuses them.

Written by `ptkit export --as llama-cpp`.
"""
