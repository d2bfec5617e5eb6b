"""The grid of a comparison: every method with every seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.recipe import LoadedRecipe
from ptkit.recipe.schema import MethodSection, Recipe
from ptkit.runtime.base_model import Base
from ptkit.train.experiment import prepare
from ptkit.train.record import CellRecord
from ptkit.train.run import Cell, Observer, cell_name, run_cells


def groups(recipe: Recipe) -> Iterator[list[tuple[MethodSection, int]]]:
    """The cells of `recipe` in the order they run, those that share a training batch together.

    Seed by seed (`train.together` of them at a time), so that an unfinished grid still compares
    methods. Methods that train nothing run with the first seed only.
    """
    together = recipe.train.together
    for first in range(0, len(recipe.seeds), together):
        seeds = recipe.seeds[first : first + together]
        for method in recipe.methods:
            own = [s for s in seeds if method.trains or s == recipe.seeds[0]]
            if method.shares_batch:
                yield [(method, seed) for seed in own]
            else:
                yield from ([(method, seed)] for seed in own)


def cells(recipe: Recipe) -> list[tuple[MethodSection, int]]:
    """Every cell of `recipe`, in the order they run."""
    return [cell for group in groups(recipe) for cell in group]


def run_grid(
    loaded: LoadedRecipe, out: Path, *, observer: Observer | None = None, base: Base | None = None
) -> list[CellRecord]:
    """Run the cells that are not finished yet and return the records of all.

    out: the comparison's folder; killed at any moment, the next call goes on from there.
    Raises UserError when it holds another recipe's comparison.
    """
    resolved = loaded.resolved()
    kept = out / "recipe.yaml"
    if kept.exists() and kept.read_text(encoding="utf-8") != resolved:
        raise UserError(
            f"{out} holds the comparison of another recipe (or of this one before it was "
            "changed); choose another --out, or pass --fresh to start over"
        )
    experiment = prepare(loaded, base)
    atomic.write_text(kept, resolved)
    return [
        record
        for group in groups(loaded.recipe)
        for record in run_cells(
            experiment,
            [Cell(m, seed, out / "cells" / cell_name(m, seed)) for m, seed in group],
            observer,
        )
    ]
