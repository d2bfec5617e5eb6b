"""The grid of a comparison: every method with every seed, and every value of a sweep.

No model is loaded to know it, nor to read what became of its cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptkit.errors import FolderError
from ptkit.formats import atomic
from ptkit.recipe.expansion import Entry, Variant, expand
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.schema import Recipe
from ptkit.section import MethodSection
from ptkit.training.cell import Cell, cell_name, folder_name
from ptkit.training.failure import FAILED, Failure


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


def failures(recipe: Recipe, out: Path) -> list[Failure]:
    """Why cells of the comparison in `out` have no record, of those that were tried."""
    return [
        Failure.read(cell.folder)
        for group in plan(recipe, out)
        for cell in group.cells
        if not cell.done.exists() and (cell.folder / FAILED).exists()
    ]


def open_output_folder(loaded: LoadedRecipe, out: Path) -> None:
    """Keep the recipe in `out`. Raises FolderError when another one's comparison is there."""
    require_same_recipe(loaded, out)
    if not (out / "recipe.yaml").exists():
        atomic.write_text(out / "recipe.yaml", loaded.resolved())


def require_same_recipe(loaded: LoadedRecipe, out: Path) -> None:
    """Raise FolderError when `out` holds another recipe's comparison."""
    kept = out / "recipe.yaml"
    if kept.exists() and kept.read_text(encoding="utf-8") != loaded.resolved():
        raise FolderError(
            f"{out} holds the comparison of another recipe (or of this one before it was "
            "changed); choose another --out, or pass --fresh to start over"
        )
