"""Answers of an adapter that changes the base for every row of a batch at once, as LLaMA-Adapter.

A bank has no place for it, as its rows choose their adapters. By itself it answers like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import read_config
from ptkit.methods import changes_weights, load_adapter, mixes_in_batch, parts_of
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import rows_for
from ptkit.runtime.generation import generate


def changes_every_row(path: Path) -> bool:
    """Whether the adapter in the folder `path` changes the base for all rows of a batch.

    Raises AdapterError where it is damaged.
    """
    if not changes_weights(str(read_config(path)["peft_type"])):
        return False
    parts = parts_of(read_adapter(path))
    return not any(mixes_in_batch(part.peft_type) for part in parts)


def answers_alone(
    path: Path, base: Base, texts: Sequence[str], *, chosen: bool = False, **options: Any
) -> list[str]:
    """Answers to `texts` of the adapter in the folder `path`, which is in `base` meanwhile.

    chosen: see `load_adapter`; options: transformers' own (`max_new_tokens`, ...)

    Raises AdapterError when it is damaged, unsafe or for another base.
    """
    adapter = load_adapter(path, base, chosen=chosen)
    try:
        prompts = [adapter.behind(ids) for ids in base.encode(texts)]
        compiled = adapter.compiled()
        tokens = generate(
            adapter.model, prompts,
            rows_for(None if compiled is None else compiled.detach(), prompts),
            pad_token_id=base.pad_token_id, **options,
        )  # fmt: skip
        return base.decode(tokens)
    finally:
        adapter.close()
