"""Slot files for llama.cpp's server, and a client that restores and asks for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal

from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines import Written
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.slot_file import (
    STATE_VERSION,
    CacheLayout,
    cache_layout,
    placeholders,
    slot_file,
)

CLIENT = "client.py"
#: What the client needs to know of the adapters.
ADAPTERS = "adapters.json"


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
    layout = cache_layout(gguf, dtype, flash_attention)
    if base is None:
        base = load_base(id=str(gguf))
    tokens = 0
    about: dict[str, Any] = {}
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            prefix = engine_prefix(source, adapter)
            ids = placeholders(prefix, base)
            (scratch / f"{source.name}.bin").write_bytes(slot_file(prefix, ids, layout))
            tokens += prefix.virtual_tokens
            about[source.name] = {"placeholders": ids, "template": source.template}
        atomic.write_json(scratch / ADAPTERS, about)
        client = package_files("ptkit.hub") / "llama_cpp_client.py"
        atomic.write_text(scratch / CLIENT, client.read_text(encoding="utf-8"))
        atomic.write_text(scratch / "README.md", _readme(gguf, about, layout))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def _readme(gguf: Path, about: dict[str, Any], layout: CacheLayout) -> str:
    cache = layout.cache_name
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
