"""The validated recipe: what an experiment is, and the one place its defaults are defined."""
