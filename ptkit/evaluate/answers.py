"""Answers of the base and of saved adapters, as many as possible from one mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptkit.bank import AdapterBank
from ptkit.methods import load_adapter
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import generate


def answers(base: Base, rows: Sequence[tuple[str, Path | None]], **options: Any) -> list[str]:
    """One answer per (text, adapter folder or None for the base), in order.

    Adapters that compile to a KV prefix, and the base, run in one mixed batch. Those that change
    weights (LoRA) cannot share it: each has a batch of its own, and leaves the base as it was.
    options: anything transformers' `generate` takes.
    """
    bank = AdapterBank(base)
    changing: list[Path] = []
    for place in dict.fromkeys(place for _, place in rows if place is not None):
        adapter = load_adapter(place, base)
        try:
            if adapter.prefix() is None:
                changing.append(place)
            else:
                bank.add(str(place), adapter)
        finally:
            adapter.close()
    mixed = [i for i, (_, place) in enumerate(rows) if place not in changing]
    texts = [rows[i][0] for i in mixed]
    names = [None if rows[i][1] is None else str(rows[i][1]) for i in mixed]
    found = dict(zip(mixed, bank.generate(texts, names, **options), strict=True))
    for place in changing:
        own = [i for i, (_, p) in enumerate(rows) if p == place]
        prompts = base.tokenizer([rows[i][0] for i in own])["input_ids"]
        adapter = load_adapter(place, base)
        try:
            tokens = generate(
                adapter.model, prompts, None, pad_token_id=base.pad_token_id, **options
            )
        finally:
            adapter.close()
        texts = base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found |= dict(zip(own, texts, strict=True))
    return [found[i] for i in range(len(rows))]
