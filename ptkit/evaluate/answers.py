"""Answers of the base and of saved adapters, all from one mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptkit.bank import AdapterBank
from ptkit.runtime.base_model import Base


def answers(base: Base, rows: Sequence[tuple[str, Path | None]], **options: Any) -> list[str]:
    """One answer per (text, adapter folder or None for the base), in order.

    options: anything transformers' `generate` takes. LoRA adapters share the batch too; the base
    is left as it was.
    """
    bank = AdapterBank(base)
    for place in dict.fromkeys(place for _, place in rows if place is not None):
        bank.load(place, str(place))
    texts = [text for text, _ in rows]
    names = [None if place is None else str(place) for _, place in rows]
    try:
        return bank.generate(texts, names, **options)
    finally:
        for name in bank.list():
            bank.unload(name)
