"""Datasets, templates and the examples a task is made of."""
