"""What `start: auto` and `learning_rate: auto` found before the runs of a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ptkit.recipe.schema import TrainSection
from ptkit.training.record import CellRecord

#: Characters shown of a text that was found.
SHOWN = 32


def autotuned(records: Sequence[CellRecord]) -> str | None:
    """The start (and rate) of a method's runs, the most frequent first; with how many of the runs
    where they differ. None where the recipe left nothing open."""
    chosen = [_of_run(record.chosen) for record in records if record.chosen is not None]
    if not chosen:
        return None
    counted = Counter(chosen).most_common()
    if len(counted) == 1:
        return counted[0][0]
    return "; ".join(f"{what} ({n} of {len(chosen)} runs)" for what, n in counted)


def _of_run(chosen: dict[str, Any]) -> str:
    parts = []
    if (start := chosen.get("start")) is not None:
        text = chosen.get("start_text")
        if text is not None:
            start = repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")
        parts.append(start)
    if "rates" in chosen:
        parts.append(f"rate {chosen['learning_rate']:g}")
    return ", ".join(parts)


def starts_tried(records: Sequence[CellRecord]) -> int:
    """The most starts that a run compared; 0 where there was nothing to tell them apart by."""
    return max((len((r.chosen or {}).get("starts", ())) for r in records), default=0)


def share_read(record: CellRecord, train: TrainSection) -> float:
    """Of the rows that the run's steps read, what finding took. A row that is scored only counts
    half: the base is frozen, so its backward pass costs what its forward does."""
    chosen = record.chosen or {}
    read = len(chosen.get("starts", ())) * chosen.get("start_rows", 0) / 2
    if "rates" in chosen:
        rates = len(chosen["rates"])
        read += (1 + rates) * chosen["rate_judged"] / 2
        read += rates * chosen["rate_steps"] * chosen["rate_batch"]
    return read / (train.steps * train.batch_size * train.gradient_accumulation)
