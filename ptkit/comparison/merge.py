"""Reading comparisons back from their folders, and making one of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptkit.comparison.cells import failures, open_output_folder, plan
from ptkit.comparison.same_rows import require_same_rows
from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.formats.cell_record import CellRecord
from ptkit.formats.places import comparison_recipe
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.training.cell import IDENTITY

#: What parts of one comparison, made on different machines, may differ in.
OWN: dict[str, Any] = {
    **dict.fromkeys(("name", "description", "seeds", "methods"), True),
    "train": TrainSection.NOT_OF_RESULT,
}


@dataclass(frozen=True)
class MergedComparison:
    """A comparison's folder, its recipe, the records that are there, and how many are not."""

    folder: Path
    loaded: LoadedRecipe
    records: tuple[CellRecord, ...]
    missing: int


def read_comparison(folder: Path) -> MergedComparison:
    """Read what `ptkit compare` left in `folder`. Raises UserError when it holds no cell."""
    loaded = load_recipe(comparison_recipe(folder))
    cells = [cell for group in plan(loaded.recipe, folder) for cell in group.cells]
    records = tuple(CellRecord.read(cell.done) for cell in cells if cell.done.is_file())
    if not records:
        raise UserError(f"{folder} holds no finished cell")
    return MergedComparison(folder, loaded, records, len(cells) - len(records))


def merge(parts: Sequence[MergedComparison], out: Path) -> MergedComparison:
    """One comparison in `out` with the methods, seeds and cells of all `parts`.

    Only what cells are, their records, predictions and reasons of failure are copied. Raises
    UserError in these cases:

    - The parts' recipes differ in more than name, seeds, methods and what a result does not depend
      on.
    - They call different settings by one name.
    - Two parts hold different results for one cell.
    - Their cells were scored on other rows or texts, or made of another base.
    """
    first = parts[0]
    shared = first.loaded.recipe.model_dump(exclude=OWN)
    methods = {m.title: m for m in first.loaded.recipe.methods}
    seeds = list(first.loaded.recipe.seeds)
    for part in parts[1:]:
        recipe = part.loaded.recipe
        other = recipe.model_dump(exclude=OWN)
        changed = sorted(key for key in shared if shared[key] != other[key])
        if changed:
            raise UserError(
                f"{part.folder} and {first.folder} differ in {', '.join(f'`{k}`' for k in changed)}"
                "; only comparisons that differ in seeds and methods can be merged"
            )
        for method in recipe.methods:
            if methods.setdefault(method.title, method) != method:
                raise UserError(
                    f"{part.folder} and {first.folder} mean different settings by the method "
                    f"`{method.title}`; give one of them another `label`"
                )
        seeds += [seed for seed in recipe.seeds if seed not in seeds]
    merged = first.loaded.recipe.model_copy(
        update={"methods": list(methods.values()), "seeds": seeds}
    )
    loaded = replace(first.loaded, recipe=merged)
    require_same_rows([(part.folder / "cells" / r.cell, r) for part in parts for r in part.records])
    open_output_folder(loaded, out)
    for part in parts:
        for record in part.records:
            _copy(part.folder / "cells" / record.cell, out / "cells" / record.cell)
        for failure in failures(part.loaded.recipe, part.folder):
            failure.write(out / "cells" / failure.cell)  # another part may have its record
    return read_comparison(out)


def _copy(source: Path, target: Path) -> None:
    """Copy a cell: what it is, too, so that the next run in `target` knows another one."""
    if (source / IDENTITY).is_file() and not (target / IDENTITY).exists():
        atomic.write_bytes(target / IDENTITY, (source / IDENTITY).read_bytes())
    for name in ("predictions.jsonl", "record.json"):  # the record last: it says "finished"
        content, there = (source / name).read_bytes(), target / name
        if there.is_file() and there.read_bytes() != content:
            raise UserError(
                f"{source} and {target} hold different results for one cell; remove one of them"
            )
        atomic.write_bytes(there, content)
