"""The cells of a comparison as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptkit.comparison.cells import Group, open_output_folder, plan
from ptkit.comparison.grid import Experiments, run_group, supported_groups
from ptkit.comparison.search import Searches, trials_folder
from ptkit.errors import PtkitError, UserError
from ptkit.extras import extra
from ptkit.formats import atomic
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.training.cell import IDENTITY, Cell
from ptkit.training.failure import FAILED, Failure
from ptkit.training.observer import RunObserver

#: How often a task is given to another node after its own was lost.
RETRIES = 10


def run_on_ray(
    loaded: LoadedRecipe,
    out: Path,
    address: str | None,
    *,
    cpus: float,
    gpus: float,
    observer: RunObserver | None = None,
) -> list[CellRecord]:
    """Run the cells that are not finished yet on a Ray cluster and return the records of all that
    are now. A cell that fails leaves the others alone, as in `ptkit.comparison.grid.run_grid`.

    address: `ray://HOST:PORT`, `HOST:PORT` or `auto`; None starts Ray on this machine
    cpus, gpus: what one cell needs; a cell uses as many threads as it has CPUs

    Nodes need the same ptkit, and the files the recipe names (model, data) in the same places;
    results travel as bytes and are written here. A cell whose node is lost runs again on another.
    Raises MissingExtraError when Ray is not installed, UserError when the cluster cannot be
    reached.
    """
    with extra("ray", "`ptkit compare --on ray`"):
        import ray
    observer = observer or RunObserver()
    groups = supported_groups(loaded, out)
    open_output_folder(loaded, out)
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    try:
        for group in groups:
            for cell in group.cells:
                if cell.done.exists():
                    observer.cell_finished(CellRecord.read(cell.done), reused=True)
        remote: Any = ray.remote(_run).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False
        )
        todo = [
            unit for unit in _units(loaded, out)
            if not all(cell.done.exists() for number in unit for cell in groups[number].cells)
        ]  # fmt: skip
        source, threads = (loaded.resolved(), str(loaded.path)), max(1, round(cpus))
        waiting = {
            remote.remote(*source, unit, _known(groups, unit, out), threads): unit for unit in todo
        }
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            unit = waiting.pop(done)
            own = [cell for number in unit for cell in groups[number].cells]
            _take_over(ray, done, [c for c in own if not c.done.exists()], out, observer)
    finally:
        if started:
            ray.shutdown()
    finished = [cell for group in groups for cell in group.cells if cell.done.exists()]
    return [CellRecord.read(cell.done) for cell in finished]


def _known(groups: Sequence[Group], unit: Sequence[int], out: Path) -> dict[str, bytes]:
    """Files that a task goes on from: the records of cells and the results of trials."""
    found: set[Path] = set()
    for cell in (cell for number in unit for cell in groups[number].cells):
        if cell.done.exists():
            found |= {cell.folder / IDENTITY, cell.done}
        for trial in trials_folder(out, cell).glob("trial*"):
            if (trial / "trial.json").exists() or (trial / FAILED).exists():
                found |= {*trial.glob("*.json")}
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def _take_over(
    ray: Any, done: Any, cells: Sequence[Cell], out: Path, observer: RunObserver
) -> None:
    """Write the files of the task `done`, which ran `cells`, and tell what came of each."""
    try:
        files = _result(ray, done)
    except UserError:  # nothing that a cell could be trained without
        raise
    except Exception as error:  # the task as a whole; what fails within it is in its files
        for cell in cells:
            failure = Failure.of(cell, error)
            failure.write(cell.folder)
            observer.cell_failed(failure)
        return
    # Records last: they say that a cell is finished.
    for name, content in sorted(files.items(), key=lambda file: file[0].endswith("record.json")):
        atomic.write_bytes(out / name, content)
        if name.endswith(("/record.json", "/trial.json")):
            ((out / name).parent / FAILED).unlink(missing_ok=True)
    for cell in cells:
        if cell.done.exists():
            observer.cell_finished(CellRecord.read(cell.done), reused=False)
        else:
            observer.cell_failed(Failure.read(cell.folder))


def _units(loaded: LoadedRecipe, out: Path) -> list[list[int]]:
    """Numbers of the groups that run in one task: all seeds of a method whose settings are
    searched for, so that the search is made once; otherwise one group each."""
    searched = set(loaded.recipe.budget.search) if loaded.recipe.budget else set()
    units: dict[Any, list[int]] = {}
    for number, group in enumerate(plan(loaded.recipe, out)):
        cell = group.cells[0]
        key = trials_folder(out, cell) if cell.family in searched else number
        units.setdefault(key, []).append(number)
    return list(units.values())


def _result(ray: Any, done: Any) -> dict[str, bytes]:
    """A task's files. Raises what it raised, or PtkitError when its node was lost too often."""
    try:
        return dict(ray.get(done))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise PtkitError(f"a cell could not be run on the cluster: {reason}") from error


@lru_cache(maxsize=1)
def _experiments(recipe: str, path: str) -> tuple[LoadedRecipe, Experiments]:
    """The recipe made ready to run, once per worker process."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(recipe)
        file.flush()
        read = load_recipe(file.name)
    loaded = LoadedRecipe(read.recipe, Path(path), recipe)
    return loaded, Experiments(loaded)


def _run(
    recipe: str, path: str, unit: Sequence[int], known: Mapping[str, bytes], threads: int
) -> dict[str, bytes]:
    """Run the groups of `unit` in a folder of this node; what is new in it afterwards.

    recipe: resolved, as YAML; path: the file it came from, where relative paths start
    known: files that are there before
    """
    import torch

    torch.set_num_threads(threads)
    loaded, experiments = _experiments(recipe, path)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        for name, content in known.items():
            atomic.write_bytes(out / name, content)
        groups = plan(loaded.recipe, out)
        searches = Searches(out, None)
        for number in unit:
            if groups[number].variant == groups[0].variant:
                experiments.first(groups)
            run_group(groups[number], experiments, searches, RunObserver())
        files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
        made = {name: path.read_bytes() for name, path in files.items()}
        return {name: made[name] for name in made if made[name] != known.get(name)}
