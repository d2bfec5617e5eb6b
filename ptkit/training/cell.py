"""A cell: one method with one seed of a recipe, and the folder that is its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptkit.formats.adapter_folder import read_config, sha256, weights_path
from ptkit.formats.cell_record import RecordedSearch
from ptkit.methods.start import named_adapter
from ptkit.section import MethodSection
from ptkit.training.experiment import Experiment
from ptkit.training.run_folder import open_run_folder

#: What `cell.json` says of a cell since later versions.
ADDED = ("test_rows", "retention_text", "retain_text", "metrics")


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


def open_cell_folder(experiment: Experiment, cell: Cell) -> None:
    """Write what `cell` is to its folder, or raise FolderError when it already is another."""
    recipe = experiment.recipe
    identity = {
        "model": recipe.model.model_dump(exclude=recipe.model.PLACES),
        "base_fingerprint": experiment.base.fingerprint,
        "data_fingerprint": experiment.data_fingerprint(cell.seed),
        "test_rows": experiment.test_fingerprint(),
        "retention_text": experiment.retention_fingerprint(),
        "metrics": experiment.metric_signatures(),
        "retain_text": experiment.retain_fingerprint(),
        "task": recipe.task.model_dump(),
        "train": recipe.train.model_dump(exclude=recipe.train.NOT_OF_RESULT),
        "retention": recipe.retention and recipe.retention.model_dump(),
        "method": cell.method.model_dump(),
        "adapters": named_adapters(cell.method, experiment.folder),
        "seed": cell.seed,
        "start_from": str(cell.start_from) if cell.start_from else None,
    }
    open_run_folder(cell.folder / "cell.json", identity, "run", added=ADDED)


def named_adapters(method: MethodSection, folder: Path) -> dict[str, str]:
    """The adapters a method starts from or mixes in, with the SHA-256 of their weights. A resumed
    run must find those it began with. Raises AdapterError where one is missing."""
    named = [*(getattr(method, "start_adapter", None) or ()), *getattr(method, "adapters", ())]
    found = {}
    for name in named:
        path = named_adapter(name, folder)
        read_config(path)
        found[name] = sha256(weights_path(path))
    return found
