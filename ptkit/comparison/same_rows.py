"""What is compared was scored on the same rows, of the same content, with the same base."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ptkit.errors import FolderError, UserError
from ptkit.evaluation.prediction import Prediction
from ptkit.formats.cell_record import CellRecord

logger = logging.getLogger(__name__)


def read_predictions(folder: Path) -> list[Prediction]:
    """The rows of `predictions.jsonl` in a cell's folder. Raises FolderError for damaged ones."""
    path, rows = folder / "predictions.jsonl", []
    # By lines of the file: `splitlines` would also end one at a U+2028 or U+0085 within a text.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(Prediction.of_row(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise FolderError(
                    f"{path}, line {number}: not a prediction ({error}); delete the cell's folder "
                    "to run it again"
                ) from error
    return rows


def require_same_rows(cells: Sequence[tuple[Path, CellRecord]]) -> None:
    """Raise UserError, which names both, when two of `cells` (folder, record) that stand beside
    each other cannot be compared. They were scored on unlike test rows or general texts, or made of
    unlike bases. So are cells that learnt from unlike rows, or were scored by unlike metrics.

    Cells of one variant of a sweep stand beside each other. What a record does not hold cannot
    differ. But rows are compared by their written content too, because records of earlier versions
    have no fingerprints.
    """
    seen: dict[tuple[PurePosixPath, str], tuple[Path, Any]] = {}
    for folder, record in cells:
        variant = PurePosixPath(record.cell).parent
        for what, value in _scored(folder, record):
            other, known = seen.setdefault((variant, what), (folder, value))
            if value != known:
                raise UserError(
                    f"{other} and {folder} are not comparable: the {what} of one is not that of "
                    "the other; delete the folder of the wrong one, or all with --fresh, and run "
                    "`ptkit compare` again"
                )


def _scored(folder: Path, record: CellRecord) -> Iterator[tuple[str, Any]]:
    """What a cell's figures depend on, as far as it is known."""
    rows = [(row.input, row.references, row.label) for row in read_predictions(folder)]
    yield "content of the test rows", rows
    fingerprints = {
        "content of the test rows (by its fingerprint)": record.test_rows,
        "general text for retention": record.retention_text,
        "base model": record.base_fingerprint,
        "content of the training and validation rows": record.learnt_rows,
        "meaning of the metrics": record.scored_by,
    }
    yield from ((what, value) for what, value in fingerprints.items() if value is not None)
    if record.retention is not None:
        yield (
            "meaning of forgetting (how many begin-of-text tokens stand before each text, which "
            "earlier versions of ptkit left out)",
            record.retention.lead,
        )


def say_unknown(records: Sequence[CellRecord]) -> None:
    """Warn in one line where records have no fingerprints."""
    without = [r for r in records if r.base_fingerprint is None]
    if without:
        logger.warning(
            "%d of %d records are of an earlier version of ptkit, without fingerprints: that their "
            "base and their text for retention are one is not known", len(without), len(records)
        )  # fmt: skip
