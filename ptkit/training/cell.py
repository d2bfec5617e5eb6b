"""A cell: one method with one seed of a recipe, and the folder it lives in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptkit.formats.cell_record import RecordedSearch
from ptkit.section import MethodSection

#: The file in a cell's folder that says what the cell is.
IDENTITY = "cell.json"


def cell_name(method: MethodSection, seed: int) -> str:
    """Name of a cell's folder."""
    return f"{folder_name(method.title)}-seed{seed}"


def folder_name(text: str) -> str:
    """`text` as one folder's name: what a shell would trip over becomes a comma."""
    return re.sub(r"[^\w.=+-]+", ",", text)


@dataclass(frozen=True)
class Cell:
    """One method with one seed of a recipe, and the folder it lives in.

    start_from: an adapter folder to train further instead of a fresh start
    variant, family, sweep, tuned: see `CellRecord`; the folder of the variant, "" for none
    """

    # Its lists (the adapters it starts from) have no hash; the folder tells cells apart.
    method: MethodSection = field(hash=False)
    seed: int
    folder: Path
    start_from: Path | None = None
    variant: str = ""
    family: str | None = None
    sweep: dict[str, Any] = field(default_factory=dict, hash=False)
    tuned: RecordedSearch | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        """The cell's name in tables and logs, and its folder below `cells/`."""
        own = cell_name(self.method, self.seed)
        return f"{self.variant}/{own}" if self.variant else own

    @property
    def done(self) -> Path:
        """The record whose presence means that the cell is finished."""
        return self.folder / "record.json"
