"""Finding, reading and validating recipes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RepresenterError

from ptkit.errors import RecipeError, did_you_mean
from ptkit.recipe.faults import recipe_faults
from ptkit.recipe.schema import Recipe
from ptkit.recipe.yaml_source import parse_yaml, read_yaml

#: Endings of files of rows, which are taken for recipes by mistake.
_ROWS = (".csv", ".tsv", ".jsonl", ".parquet")
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    folder: the start of relative paths in it; text: the file as read
    given: split -> rows, where a program handed them over (`task.data.memory`)
    """

    recipe: Recipe
    path: Path
    text: str
    given: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Relative paths in the recipe start here."""
        return self.path.parent

    def resolved(self) -> str:
        """The recipe as YAML with every default and override written out."""
        return recipe_as_yaml(self.recipe)


def recipe_as_yaml(recipe: Recipe) -> str:
    """`recipe` as YAML with every default written out."""
    return _as_yaml(recipe.model_dump(mode="json"))


def _as_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML. Raises RecipeError for a value that YAML has no form for."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    try:
        yaml.dump(dict(values), stream)
    except RepresenterError as error:
        raise RecipeError(f"the recipe has a value that is no text or number: {error}") from error
    return stream.getvalue()


def recipes_folder() -> Path:
    """The shipped recipes: beside the package in a checkout, inside it when installed."""
    installed = _PACKAGE / "_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with ptkit."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or the path itself. Raises RecipeError if neither."""
    path = Path(name_or_path)
    if path.suffix.lower() in _ROWS:
        raise RecipeError(
            f"{path} holds rows, not a recipe; `ptkit init --data {path}` drafts a recipe for it, "
            f"and `train` and `evaluate` read it with `--data {path}`"
        )
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"no such recipe file: {path}")
    raise RecipeError(
        f"no recipe called `{name_or_path}`; {did_you_mean(str(name_or_path), shipped)} "
        "(`ptkit recipes list` shows all)"
    )


def load_recipe(
    recipe: str | Path | Mapping[str, Any], overrides: str | Sequence[str] = ()
) -> LoadedRecipe:
    """Read and validate a recipe file, a shipped recipe by name, or a mapping of a recipe's keys.

    overrides: `key.path=value` assignments, or one, applied before validation.
    Raises RecipeError with one line per fault: file, line, key, what was expected. Relative paths
    in a mapping start at the current folder.
    """
    if isinstance(recipe, Mapping):
        path, text = Path("recipe.yaml"), _as_yaml(recipe)
        source = parse_yaml(text, "the recipe")
    elif isinstance(recipe, str | Path):
        path = find_recipe(recipe)
        source, text = read_yaml(path, str(path)), path.read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"a {type(recipe).__name__} is no recipe; give a file, the name of one that ships, or "
            "a mapping of its keys"
        )
    for assignment in [overrides] if isinstance(overrides, str) else overrides:
        source.set(assignment)
    found, faults = recipe_faults(source)
    if found is None:
        raise RecipeError("\n".join(faults))
    return LoadedRecipe(found, path.resolve(), text)
