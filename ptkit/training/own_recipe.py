"""The recipe an adapter was trained by, and other rows to score it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptkit.data.read_files import read_files
from ptkit.errors import AdapterError, DataError, UserError
from ptkit.formats.adapter_folder import CONFIG, RECIPE
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.recipe.tasks import DataSection, SplitLimits


def own_recipe(
    adapter: Path,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    otherwise: str = "give --data FILE",
) -> LoadedRecipe:
    """The recipe in the folder of an adapter, with its data found from where the command runs.

    data: rows that are read in place of its own, which then need not be here
    otherwise: what else can be done where its files are not here

    Raises AdapterError without one, and DataError where its files are not here. Raises UserError
    where it would run code of its own.
    """
    path = adapter / RECIPE
    if not path.is_file():
        raise AdapterError(f"{adapter} has no {RECIPE}; name the recipe to evaluate it on")
    loaded = load_recipe(path, overrides)
    own = [name for name in loaded.recipe.task.metrics if ":" in name]
    if own:
        raise UserError(
            f"the recipe in {adapter} scores with code of its own ({', '.join(own)}); read it, and "
            f"name it as the recipe if you trust it: {path}"
        )
    section = loaded.recipe.task.data
    if data is not None or section.files is None:
        return loaded
    files = _named_files(section)
    found = _from_here(loaded, files)
    if found is not None:
        return found
    raise DataError(
        f"the adapter was trained on {', '.join(f'`{name}`' for name in files)}, not found from "
        f"here; run this where the recipe's paths start, or {otherwise}"
    )


def found_from_here(loaded: LoadedRecipe) -> LoadedRecipe:
    """`loaded` with its data found from where the command runs, if ptkit wrote it beside results.
    Its paths then start where the recipe was that those were made by.

    Raises DataError where its files are in neither place.
    """
    written = (loaded.folder / "cells").is_dir() or (loaded.folder / CONFIG).is_file()
    section = loaded.recipe.task.data
    if not written or section.files is None:
        return loaded
    files = _named_files(section)
    found = _from_here(loaded, files)
    if found is None:
        raise DataError(
            f"{loaded.path} names {', '.join(f'`{name}`' for name in files)}, not found from here; "
            "run this where the paths of the recipe start that it was made by"
        )
    return found


def _named_files(section: DataSection) -> list[str]:
    """The files that `section` names, of all splits."""
    return [
        name
        for names in (section.files or {}).values()
        for name in ([names] if isinstance(names, str) else names)
    ]


def _from_here(loaded: LoadedRecipe, files: Sequence[str]) -> LoadedRecipe | None:
    """`loaded` with its paths starting at its own folder or the current one, whichever has all of
    `files`; None where neither has."""
    for folder in (loaded.folder, Path.cwd()):
        if all((folder / Path(name).expanduser()).is_file() for name in files):
            return replace(loaded, path=folder / RECIPE)
    return None


def with_test_rows(loaded: LoadedRecipe, file: Path) -> LoadedRecipe:
    """`loaded` with the rows of `file` as all there are: they are scored, and nothing is trained.

    Raises DataError as `read_files` does.
    """
    table = read_files([file])
    limits = SplitLimits()
    section = DataSection(memory=True, limits=limits, draw=loaded.recipe.task.data.draw)
    if section.draw == "seed":  # draws of training rows, of which there are none
        section = section.model_copy(update={"draw": "balanced"})
    task = loaded.recipe.task.model_copy(update={"data": section})
    recipe = loaded.recipe.model_copy(update={"task": task})
    given = {"train": table, "validation": table, "test": table}
    return replace(loaded, recipe=recipe, given=given)
