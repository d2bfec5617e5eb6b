"""Prompt caches for MLX's `mlx_lm`, on Apple's processors: one file for each adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptkit.formats import atomic
from ptkit.hub.engine_adapters import EngineSource, engine_adapters, engine_prefix, inputs_told
from ptkit.hub.engines import Written
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write `NAME.safetensors` for each of `sources`, as `mlx_lm.cache_prompt` writes a text's.

    Raises AdapterError for what a cache of keys and values cannot hold (see `engine_prefix`).
    """
    tokens, written = 0, []
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            base = adapter.base
            prefix = engine_prefix(source, adapter)
            _save(prefix, base, scratch / f"{source.name}.safetensors")
            tokens += prefix.virtual_tokens
            written.append(source)
        assert base is not None
        atomic.write_text(scratch / "README.md", _readme(base, written))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def _save(prefix: KVPrefix, base: Base, file: Path) -> None:
    """A file that `load_prompt_cache` reads. Its tensors are `LAYER.0`, keys, and `LAYER.1`,
    values, `[1, kv_heads, positions, head_dim]`, and `LAYER.2`, the number of positions. Its
    metadata is a list in parts: what the cache is of, the classes of the layers' caches, and which
    tensors stand for plain numbers."""
    tensors, about = {}, {"0.model": base.id, "0.tokenizer_config": json.dumps({}), "2.0": ""}
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"{layer}.0"] = keys[None].float().cpu().contiguous()
        tensors[f"{layer}.1"] = values[None].float().cpu().contiguous()
        tensors[f"{layer}.2"] = torch.tensor(prefix.virtual_tokens, dtype=torch.int32)
        about[f"1.{layer}"] = "KVCache"
        about |= {f"2.{layer + 1}.0": f"{layer}.2", f"2.{layer + 1}.1": "scalar"}
    save_file(tensors, file, metadata=about)


def _readme(base: Base, sources: Sequence[EngineSource]) -> str:
    return f"""# Adapters of {base.id} for MLX

{inputs_told(sources)}

    pip install mlx-lm
    mlx_lm.generate --model {base.id} --prompt-cache-file {sources[0].name}.safetensors \\
        --ignore-chat-template --prompt "The text"

A file holds keys and values, which `mlx_lm` reads as it reads a cached prompt. Without the option
the model is the base.

Written by `ptkit export --as mlx`.
"""
