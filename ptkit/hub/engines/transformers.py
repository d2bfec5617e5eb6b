"""Keys and values, and a client that hands them to plain transformers, without PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from ptkit.errors import PtkitError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import (
    EngineSource,
    engine_adapters,
    engine_prefix,
    inputs_told,
    prefix_tensors,
)
from ptkit.hub.engines import Written
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import generate

CLIENT = "client.py"
#: Tokens that the client and ptkit are compared on.
_COMPARED = 8
#: Around the source of `answer`.
_CLIENT = '''"""An adapter of {base} on plain transformers: python client.py NAME "The text"."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


{answer}

if __name__ == "__main__":
    name, text = sys.argv[1:3]
    base = {base!r}
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    ids = tokenizer(text, return_tensors="pt").input_ids
    file = Path(__file__).with_name(name + ".safetensors")
    answered = answer(model, ids, file, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(answered, skip_special_tokens=True))
'''


def answer(model, ids, prefix, **options):  # type: ignore[no-untyped-def]
    """Generate after `ids` `[1, tokens]` behind the keys and values of the file `prefix`."""
    tensors = load_file(prefix, device=str(model.device))
    cache = DynamicCache(config=model.config)
    for layer in range(len(tensors) // 2):
        keys, values = tensors[f"keys.{layer}"], tensors[f"values.{layer}"]
        cache.update(keys[None].to(model.dtype), values[None].to(model.dtype), layer)
    # One id for each virtual token: the cache knows them already, so they are never read.
    ids = torch.cat([ids[:, :1].expand(1, cache.get_seq_length()), ids], dim=1)
    seen = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=seen, past_key_values=cache, **options)
    return written[0, ids.shape[1] :].tolist()


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write the keys and values of `sources` as `NAME.safetensors` and `client.py` beside them.

    Tensors are `keys.LAYER` and `values.LAYER`, `[kv_heads, virtual_tokens, head_dim]`, keys as
    their positions turned them. The client is run on each of them and compared with ptkit.

    Raises AdapterError for what a cache of keys and values cannot hold (see `engine_prefix`).
    """
    tokens = 0
    written: list[EngineSource] = []
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            base = adapter.base
            prefix = engine_prefix(source, adapter)
            save_file(prefix_tensors(prefix), scratch / f"{source.name}.safetensors")
            tokens += prefix.virtual_tokens
            written.append(source)
            _require_same(base, prefix, scratch / f"{source.name}.safetensors")
        assert base is not None
        shown = getsource(answer).replace("  # type: ignore[no-untyped-def]", "")
        atomic.write_text(scratch / CLIENT, _CLIENT.format(base=base.id, answer=shown))
        atomic.write_text(scratch / "README.md", _readme(base, written))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def _require_same(base: Base, prefix: KVPrefix, file: Path) -> None:
    """Raise PtkitError unless the client generates from `file` what ptkit does."""
    (ids,) = base.encode(["The quick brown fox, 1984."])
    ids = ids or [0]
    options: dict[str, Any] = {
        "max_new_tokens": _COMPARED,
        "min_new_tokens": _COMPARED,
        "do_sample": False,
    }
    pad = base.tokenizer.pad_token_id
    options |= {"pad_token_id": 0 if pad is None else pad}
    (expected,) = generate(base.model, [ids], PrefixBatch.shared(prefix, 1), **options)
    given = torch.tensor([ids], device=base.model.device)
    with torch.no_grad():
        found = answer(base.model, given, file, **options)
    if found != expected:
        raise PtkitError(
            f"{file.stem}: plain transformers generates other tokens from these keys and values on "
            f"{type(base.model).__name__}; use `ptkit serve`"
        )


def _readme(base: Base, sources: Sequence[EngineSource]) -> str:
    return f"""# Adapters of {base.id} for plain transformers

{inputs_told(sources)}

    pip install torch transformers safetensors
    python {CLIENT} {sources[0].name} "The text"

`{CLIENT}` puts an adapter's keys and values into a `DynamicCache` and lets `generate` go on from
there. Neither PEFT nor ptkit is needed. Without them the model is the base: its weights are the
same.

Written by `ptkit export --as transformers`.
"""
