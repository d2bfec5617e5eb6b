"""A cell's folder says what the cell is, and holds no other."""

from __future__ import annotations

from pathlib import Path

from ptkit.formats.adapter_folder import read_config, sha256, weights_path
from ptkit.methods.start import named_adapter
from ptkit.section import MethodSection
from ptkit.training.cell import IDENTITY, Cell
from ptkit.training.experiment import Experiment
from ptkit.training.run_folder import open_run_folder

#: What `cell.json` says of a cell since later versions.
ADDED = ("test_rows", "retention_text", "retain_text", "metrics", "start_weights")


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
        "start_weights": sha256(weights_path(cell.start_from)) if cell.start_from else None,
    }
    open_run_folder(cell.folder / IDENTITY, identity, "run", added=ADDED)


def leave_unstarted(cell: Cell) -> None:
    """Forget what `cell` was to be, where nothing else of it was written. It was refused, and the
    next one in its folder may be another."""
    there = {p.name for p in cell.folder.iterdir() if not p.name.startswith(".")}
    if there == {IDENTITY}:
        (cell.folder / IDENTITY).unlink(missing_ok=True)


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
