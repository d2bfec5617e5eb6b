"""The grid of a comparison: every method with every seed, one cell after the other."""

from __future__ import annotations

from pathlib import Path

from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.recipe import LoadedRecipe
from ptkit.recipe.schema import MethodSection, Recipe
from ptkit.runtime.base_model import Base
from ptkit.train.experiment import prepare
from ptkit.train.record import CellRecord
from ptkit.train.run import Observer, cell_name, run_cell


def cells(recipe: Recipe) -> list[tuple[MethodSection, int]]:
    """Every cell of `recipe`, seed by seed, so that an unfinished grid still compares methods.

    Methods that train nothing run with the first seed only.
    """
    return [
        (method, seed)
        for seed in recipe.seeds
        for method in recipe.methods
        if method.trains or seed == recipe.seeds[0]
    ]


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
        run_cell(
            experiment, method, seed, out / "cells" / cell_name(method, seed), observer=observer
        )
        for method, seed in cells(loaded.recipe)
    ]
