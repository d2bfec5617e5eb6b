"""llama.cpp's server for the tests: where it is, and small models for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from test_gguf import HEADS, HIDDEN, KV_HEADS
from test_gguf import write as write_gguf

from ptkit.formats.adapter_files import write_adapter
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base, load_base

#: The package `xllamacpp`, which `make setup-engines` puts apart.
SERVER = Path(sys.prefix) / "llama-cpp"
needs_server = pytest.mark.skipif(
    not SERVER.is_dir(), reason="needs llama.cpp's server: make setup-engines"
)


def shifted(base: Base, seed: int, text: str, amount: float) -> KVPrefix:
    """Keys and values of a text, moved to where no text's are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([base.tokenizer(text).input_ids])
    with torch.no_grad():
        layers = base.model(ids, use_cache=True).past_key_values.layers

    def moved(states: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(states.shape, generator=generator)
        return states + amount * states.std() * noise

    return KVPrefix(
        tuple(moved(layer.keys[0]) for layer in layers),
        tuple(moved(layer.values[0]) for layer in layers),
    )


_SMALL = HIDDEN // HEADS * KV_HEADS
#: What the files of each architecture hold that a Llama's do not.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {
        "more": {"attn_q.bias": (HIDDEN,), "attn_k.bias": (_SMALL,), "attn_v.bias": (_SMALL,)},
    },
    "qwen3": {"more": {"attn_q_norm.weight": (128,), "attn_k_norm.weight": (128,)}, "head": 128},
}


def tiny_gguf(folder: Path, architecture: str = "llama") -> Path:
    """A small random model in float32, so that the server computes what transformers does."""
    path = folder / f"{architecture}.gguf"
    settings = ARCHITECTURES[architecture]
    write_gguf(path, GGMLQuantizationType.F32, arch=architecture, **settings)
    return path


def tiny_base(gguf: Path) -> Base:
    return load_base(id=str(gguf), device="cpu", dtype="float32")


def write_prefixes(base: Base, folder: Path, count: int, seed: int = 0) -> list[str]:
    """Adapters `a0`, `a1`, ... of 3, 4, ... virtual tokens."""
    names = [f"a{number}" for number in range(count)]
    for number, name in enumerate(names):
        prefix = shifted(base, seed + number, "abcdefghijkl"[: 3 + number], 0.5)
        write_adapter(folder / name, PrefixTuning.from_prefix(prefix, base).files())
    return names
