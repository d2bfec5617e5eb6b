"""The method that a single run of a recipe is about."""

from __future__ import annotations

from ptkit.errors import UserError
from ptkit.recipe.schema import Recipe
from ptkit.section import MethodSection


def one_method(recipe: Recipe, title: str | None) -> MethodSection:
    """The method a single run is about. Raises UserError when the choice is not clear."""
    if title is not None:
        try:
            return recipe.method(title)
        except KeyError as error:
            raise UserError(str(error.args[0])) from error
    if len(recipe.methods) == 1:  # a baseline, say: it is measured
        return recipe.methods[0]
    trained = [m for m in recipe.methods if m.trains]
    if len(trained) != 1:
        names = ", ".join(m.title for m in recipe.methods)
        raise UserError(f"the recipe has several methods; choose one with --method: {names}")
    return trained[0]
