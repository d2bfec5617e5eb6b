"""Running a comparison: its cells one after the other, those that are not finished yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptkit.comparison.cells import Group, open_output_folder, plan, require_same_recipe
from ptkit.comparison.search import Searches, require_sampler
from ptkit.errors import UserError
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.expansion import Variant
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.schema import ModelSection
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import Experiment, prepare
from ptkit.training.failure import FAILED, Failure, attempted
from ptkit.training.forecast import Forecast, forecast, is_long
from ptkit.training.observer import RunObserver
from ptkit.training.ready import require_ready, require_supported
from ptkit.training.run import run_cells


def run_grid(
    loaded: LoadedRecipe,
    out: Path,
    *,
    observer: RunObserver | None = None,
    base: Base | None = None,
    experiments: Experiments | None = None,
) -> list[CellRecord]:
    """Run the cells that are not finished yet and return the records of all that are now.

    out: the comparison's folder; killed at any moment, the next call goes on from there
    base: a loaded one, instead of loading the recipe's
    experiments: of the recipe, where one has been made ready already

    A cell that fails leaves the others alone, and the next call tries it again.
    `ptkit.comparison.cells.failures` tells which did and why. Raises UserError for what is found to
    be wrong before the first cell is trained, FolderError when `out` holds another recipe's
    comparison.
    """
    require_same_recipe(loaded, out)
    observer = observer or RunObserver()
    experiments = experiments or Experiments(loaded, base)
    # What cannot be carried out leaves nothing behind.
    groups, first = require_grid(loaded, out, experiments)
    observer.prepared(first.data_lines())
    cells_of_all = [cell for group in groups for cell in group.cells]
    if is_long(first, cells_of_all):
        observer.planned(lambda: forecast(first, cells_of_all))
    open_output_folder(loaded, out)
    searches = Searches(out, observer)
    return [
        record for group in groups for record in run_group(group, experiments, searches, observer)
    ]


def require_grid(
    loaded: LoadedRecipe, out: Path, experiments: Experiments
) -> tuple[list[Group], Experiment]:
    """The groups of a comparison and the experiment of the first of them, made ready to run.

    Raises UserError for what is found to be wrong before the first cell is trained.
    """
    groups = supported_groups(loaded, out)
    return groups, experiments.first(groups)


def supported_groups(loaded: LoadedRecipe, out: Path) -> list[Group]:
    """The groups of a comparison (see `plan`). Raises UserError for what can be known to be wrong
    with them before anything is loaded."""
    require_sampler(loaded.recipe.budget)
    groups = plan(loaded.recipe, out)
    for group in groups:
        require_supported(group.variant.recipe, [cell.method for cell in group.cells])
    return groups


def run_group(
    group: Group, experiments: Experiments, searches: Searches, observer: RunObserver
) -> list[CellRecord]:
    """The records of the cells of `group` that have one or get one now; the others leave a
    `Failure` in their folders. What fails in one batch is tried again cell by cell."""

    def run() -> list[CellRecord]:
        experiment = experiments.of(group.variant)
        own = [searches.tuned(experiment, cell) for cell in group.cells]
        return run_cells(experiment, own, observer)

    found = attempted(group.cells[0], run)
    if not isinstance(found, Failure):
        return found
    if len(group.cells) == 1:
        observer.cell_failed(found)
        return []
    (group.cells[0].folder / FAILED).unlink(missing_ok=True)
    alone = [replace(group, cells=(cell,)) for cell in group.cells]
    return [r for each in alone for r in run_group(each, experiments, searches, observer)]


def forecast_grid(
    loaded: LoadedRecipe, out: Path, *, fresh: bool = False
) -> tuple[list[str], Forecast]:
    """What was decided about the data, in lines, and what the unfinished cells will take.

    Where a recipe sweeps what a step costs (a model, a batch size), the first value stands for all.
    Nothing is written to `out`. fresh: what is there will be deleted
    """
    if not fresh:
        require_same_recipe(loaded, out)
    groups, experiment = require_grid(loaded, out, Experiments(loaded))
    cells = [cell for group in groups for cell in group.cells]
    return experiment.data_lines(), forecast(experiment, cells, fresh=fresh)


class Experiments:
    """The variants of a recipe made ready to run, one at a time; their base is loaded once."""

    def __init__(self, loaded: LoadedRecipe, base: Base | None = None) -> None:
        self._loaded = loaded
        self._base = base
        self._model: ModelSection | None = loaded.recipe.model if base else None
        self._last: tuple[Variant, Experiment] | None = None
        self._failed: tuple[Variant, str] | None = None

    def first(self, groups: Sequence[Group]) -> Experiment:
        """The experiment of the first of `groups`. Raises UserError for what is wrong with any of
        the cells that share its variant, before one is trained."""
        variant = groups[0].variant
        experiment = self.of(variant)
        own = [cell for group in groups if group.variant == variant for cell in group.cells]
        require_ready(experiment, own)
        return experiment

    def of(self, variant: Variant) -> Experiment:
        """The experiment of `variant`, prepared when it is not the one asked for last. Raises what
        is wrong with it; asked again, UserError that says the same."""
        if self._last is not None and self._last[0].recipe == variant.recipe:
            return self._last[1]
        if self._failed is not None and self._failed[0].recipe == variant.recipe:
            raise UserError(self._failed[1])
        model = variant.recipe.model
        base = self._base if model == self._model else None
        try:
            experiment = prepare(replace(self._loaded, recipe=variant.recipe), base)
        except UserError as error:  # a base that is not there, say: looking again takes time
            self._failed = variant, str(error)
            raise
        self._base, self._model = experiment.base, model
        self._last = variant, experiment
        return experiment
