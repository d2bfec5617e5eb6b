"""Comparisons: the grid of cells, and what is made of their records."""
