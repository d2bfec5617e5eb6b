"""The validated recipe: what an experiment is, and the one place its defaults are defined."""

from ptkit.recipe.load import LoadedRecipe, load_recipe, shipped_recipes

__all__ = ["LoadedRecipe", "load_recipe", "shipped_recipes"]
