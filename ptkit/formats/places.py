"""Places that a user names: whether something is there, and what was likely meant.

No tensor library is loaded, so that a slip of the pen is told at once.
"""

from __future__ import annotations

from pathlib import Path

from ptkit.errors import AdapterError, UserError, nearest
from ptkit.formats.adapter_folder import CONFIG, adapters_below, runs_below
from ptkit.formats.hub import fetch_adapter, is_on_hub, missing_here

#: Endings of files of rows and columns.
ROW_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def find_adapter(path: Path, *, whole: bool = False) -> Path:
    """The adapter folder that `path` means. It is `path` itself or the `adapter` folder of a run.
    Where no folder is called that here, it is the adapter with this hub id
    (`user/repo[@revision]`).

    whole: fetch the recipe and the card too
    """
    for candidate in (path, path / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    if is_on_hub(str(path)):
        return fetch_adapter(str(path), whole=whole)
    if not path.exists():
        raise AdapterError(missing_here(str(path)))
    if (path / "model" / "config.json").is_file():
        raise AdapterError(
            f"{path} is a full fine-tuning run: it has no adapter, its whole model is in "
            f"{path / 'model'}; give that as the model"
        )
    for kind, below in (("adapters", adapters_below(path)), ("runs", runs_below(path))):
        if below:
            names = ", ".join(f"`{path / folder}`" for folder in below)
            raise AdapterError(f"{path} holds {kind}, name one: {names}")
    raise AdapterError(f"{path} is neither an adapter ({CONFIG} is missing) nor a finished run")


def comparison_recipe(folder: Path) -> Path:
    """The recipe of the comparison in `folder`. Raises UserError where there is none."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{folder} is not a comparison (it has no recipe.yaml)")
    return recipe


def no_such_file(path: Path) -> str:
    """That the data file `path` is not there, with the one beside it that is likely meant."""
    beside = path.parent.iterdir() if path.parent.is_dir() else []
    close = nearest(path.name, [other.name for other in beside if other.suffix in ROW_FILES])
    expected = f"expected {', '.join(ROW_FILES)}"
    told = f"did you mean `{path.with_name(close)}`?" if close else expected
    return f"no such data file: {path}; {told}"
