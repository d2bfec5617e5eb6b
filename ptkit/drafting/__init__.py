"""A recipe drafted from a data file: what its columns hold, what fits, and why."""
