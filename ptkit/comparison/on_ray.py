"""The cells of a comparison as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptkit.comparison.grid import Experiments, claim_folder, plan, tuned
from ptkit.errors import PtkitError, UserError
from ptkit.formats import atomic
from ptkit.recipe import LoadedRecipe, load_recipe
from ptkit.training.record import CellRecord
from ptkit.training.run import Observer, run_cells

#: How often a task is given to another node after its own was lost.
RETRIES = 10


def run_on_ray(
    loaded: LoadedRecipe,
    out: Path,
    address: str | None,
    *,
    cpus: float,
    gpus: float,
    observer: Observer | None = None,
) -> list[CellRecord]:
    """Run the cells that are not finished yet on a Ray cluster and return the records of all.

    address: `ray://HOST:PORT`, `HOST:PORT` or `auto`; None starts Ray on this machine
    cpus, gpus: what one cell needs; a cell uses as many threads as it has CPUs

    Nodes need the same ptkit, and the files the recipe names (model, data) in the same places;
    results travel as bytes and are written here. A cell whose node is lost runs again on another.
    Raises UserError when Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("`--on ray` needs Ray: pip install 'ptkit[ray]'") from error
    observer = observer or Observer()
    claim_folder(loaded, out)
    groups = plan(loaded.recipe, out)
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
        source = (loaded.resolved(), str(loaded.path))
        waiting = {remote.remote(*source, unit, max(1, round(cpus))): unit for unit in todo}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            unit = waiting.pop(done)
            # Records last: they say that a cell is finished.
            files = sorted(_result(ray, done).items(), key=lambda f: f[0].endswith("record.json"))
            for name, content in files:
                atomic.write_bytes(out / name, content)
            for number in unit:
                for cell in groups[number].cells:
                    observer.cell_finished(CellRecord.read(cell.done), reused=False)
    finally:
        if started:
            ray.shutdown()
    return [CellRecord.read(cell.done) for group in groups for cell in group.cells]


def _units(loaded: LoadedRecipe, out: Path) -> list[list[int]]:
    """Numbers of the groups that run in one task: all seeds of a method whose settings are
    searched for, so that the search is made once; otherwise one group each."""
    searched = set(loaded.recipe.budget.search) if loaded.recipe.budget else set()
    units: dict[Any, list[int]] = {}
    for number, group in enumerate(plan(loaded.recipe, out)):
        cell = group.cells[0]
        key = (cell.variant, cell.method.title) if cell.family in searched else number
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


def _run(recipe: str, path: str, unit: Sequence[int], threads: int) -> dict[str, bytes]:
    """Run the groups of `unit` in a folder of this node; what is in it afterwards.

    recipe: resolved, as YAML; path: the file it came from, where relative paths start
    """
    import torch

    torch.set_num_threads(threads)
    loaded, experiments = _experiments(recipe, path)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        groups = plan(loaded.recipe, out)
        for number in unit:
            group = groups[number]
            experiment = experiments.of(group.variant)
            run_cells(experiment, [tuned(experiment, c, out, None) for c in group.cells])
        files = (p for p in out.rglob("*") if p.is_file())
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}
