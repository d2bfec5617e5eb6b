"""The grid of a comparison: every method with every seed, and every value of a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ptkit.comparison.search import tune
from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.methods import require_method_fits
from ptkit.recipe import LoadedRecipe
from ptkit.recipe.expansion import Entry, Variant, expand
from ptkit.recipe.schema import MethodSection, ModelSection, Recipe
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import Experiment, prepare
from ptkit.training.forecast import Forecast, forecast, is_long
from ptkit.training.record import CellRecord
from ptkit.training.run import Cell, Observer, cell_name, folder_name, run_cells


@dataclass(frozen=True)
class Group:
    """Cells of one variant that share a training batch (mostly one cell)."""

    variant: Variant
    cells: tuple[Cell, ...]


def plan(recipe: Recipe, out: Path) -> list[Group]:
    """All cells of `recipe` in the order they run, below the comparison's folder `out`.

    Variant by variant, and seed by seed within (`train.together` of them at a time), so that an
    unfinished grid still compares methods. Methods that train nothing run with the first seed.
    """
    return [
        Group(variant, tuple(cells))
        for variant in expand(recipe)
        for cells in _cells(variant, out / "cells")
    ]


def cells(recipe: Recipe) -> list[tuple[MethodSection, int]]:
    """Every cell of `recipe`, in the order they run."""
    return [(c.method, c.seed) for group in plan(recipe, Path()) for c in group.cells]


def _cells(variant: Variant, folder: Path) -> Iterator[list[Cell]]:
    recipe = variant.recipe
    name = folder_name(" ".join(f"{k}={v}" for k, v in variant.settings.items()))
    home = folder / name if name else folder

    def cell(entry: Entry, seed: int) -> Cell:
        return Cell(
            entry.section, seed, home / cell_name(entry.section, seed), variant=name,
            family=entry.family, sweep={**variant.settings, **entry.settings},
        )  # fmt: skip

    together = recipe.train.together
    for first in range(0, len(recipe.seeds), together):
        seeds = recipe.seeds[first : first + together]
        for entry in variant.entries:
            method = entry.section
            own = [s for s in seeds if method.trains or s == recipe.seeds[0]]
            if method.shares_batch:
                yield [cell(entry, seed) for seed in own]
            else:
                yield from ([cell(entry, seed)] for seed in own)


def run_grid(
    loaded: LoadedRecipe, out: Path, *, observer: Observer | None = None, base: Base | None = None
) -> list[CellRecord]:
    """Run the cells that are not finished yet and return the records of all.

    out: the comparison's folder; killed at any moment, the next call goes on from there.
    Raises UserError when it holds another recipe's comparison.
    """
    _require_unclaimed(loaded, out)
    records = []
    experiments = Experiments(loaded, base)
    groups = plan(loaded.recipe, out)
    first = experiments.of(groups[0].variant)  # what cannot be carried out leaves nothing behind
    if observer is not None:
        observer.prepared(first.data_lines())
        cells_of_all = [cell for group in groups for cell in group.cells]
        if is_long(first, cells_of_all):
            observer.planned(lambda: forecast(first, cells_of_all))
    claim_folder(loaded, out)
    for group in groups:
        experiment = experiments.of(group.variant)
        own = [tuned(experiment, cell, out, observer) for cell in group.cells]
        records += run_cells(experiment, own, observer)
    return records


def forecast_grid(loaded: LoadedRecipe, out: Path) -> tuple[list[str], Forecast]:
    """What was decided about the data, in lines, and what the unfinished cells will take.

    Where a recipe sweeps what a step costs (a model, a batch size), the first value stands for all.
    Nothing is written to `out`.
    """
    _require_unclaimed(loaded, out)
    groups = plan(loaded.recipe, out)
    experiment = Experiments(loaded).of(groups[0].variant)
    cells = [cell for group in groups for cell in group.cells]
    return experiment.data_lines(), forecast(experiment, cells)


def claim_folder(loaded: LoadedRecipe, out: Path) -> None:
    """Keep the recipe in `out`. Raises UserError when another one's comparison is there."""
    _require_unclaimed(loaded, out)
    if not (out / "recipe.yaml").exists():
        atomic.write_text(out / "recipe.yaml", loaded.resolved())


def _require_unclaimed(loaded: LoadedRecipe, out: Path) -> None:
    """Raise UserError when `out` holds another recipe's comparison."""
    kept = out / "recipe.yaml"
    if kept.exists() and kept.read_text(encoding="utf-8") != loaded.resolved():
        raise UserError(
            f"{out} holds the comparison of another recipe (or of this one before it was "
            "changed); choose another --out, or pass --fresh to start over"
        )


class Experiments:
    """The variants of a recipe made ready to run, one at a time; their base is loaded once."""

    def __init__(self, loaded: LoadedRecipe, base: Base | None = None) -> None:
        self._loaded = loaded
        self._base = base
        self._model: ModelSection | None = loaded.recipe.model if base else None
        self._last: tuple[Variant, Experiment] | None = None

    def of(self, variant: Variant) -> Experiment:
        """The experiment of `variant`, prepared when it is not the one asked for last."""
        if self._last is not None and self._last[0].recipe == variant.recipe:
            return self._last[1]
        model = variant.recipe.model
        base = self._base if model == self._model else None
        experiment = prepare(replace(self._loaded, recipe=variant.recipe), base)
        for entry in variant.entries:  # before the first cell is trained
            require_method_fits(entry.section, experiment.base)
        self._base, self._model = experiment.base, model
        self._last = variant, experiment
        return experiment


def tuned(experiment: Experiment, cell: Cell, out: Path, observer: Observer | None) -> Cell:
    """`cell` with the settings a search finds, where the recipe's budget asks for one."""
    budget = experiment.recipe.budget
    space = budget.search.get(cell.family or "") if budget else None
    if budget is None or not space:
        return cell
    # Below the variant's own folder: other data may want other settings.
    folder = out / "trials" / cell.variant
    found = tune(experiment, cell.method, space, budget, folder, observer)
    return replace(cell, method=found.section, tuned=found.as_dict(budget))
