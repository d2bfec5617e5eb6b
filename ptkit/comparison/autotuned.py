"""What `start: auto` and `learning_rate: auto` found before the runs of a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ptkit.formats.cell_record import CellRecord, ChosenSettings
from ptkit.recipe.schema import TrainSection

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


def _of_run(chosen: ChosenSettings) -> str:
    parts = []
    if (text := chosen.start_text) is not None:
        parts.append(repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"))
    elif chosen.start is not None:
        parts.append(chosen.start)
    if chosen.learning_rate is not None:
        parts.append(f"rate {chosen.learning_rate:g}")
    return ", ".join(parts)


def starts_tried(records: Sequence[CellRecord]) -> int:
    """The most starts that a run compared; 0 where there was nothing to tell them apart by."""
    return max((len(r.chosen.starts) for r in records if r.chosen is not None), default=0)


def share_read(record: CellRecord, train: TrainSection) -> float:
    """Of the rows that the run's steps read, what finding took. A row that is scored only counts
    half: the base is frozen, so its backward pass costs what its forward does."""
    chosen = record.chosen
    if chosen is None:
        return 0.0
    read = len(chosen.starts) * chosen.start_rows / 2
    if rates := len(chosen.rates):
        read += (1 + rates) * chosen.rate_judged / 2
        read += rates * chosen.rate_steps * chosen.rate_batch
    return read / (train.steps * train.batch_size * train.gradient_accumulation)
