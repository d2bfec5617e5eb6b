"""Functions of yours, and of other packages, as metrics."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

from ptkit.errors import UserError
from ptkit.metrics.metric import MeanOverExamples, Statistics
from ptkit.plugins import loaded, origin


class OwnMetric(MeanOverExamples):
    """A function of yours, `module:function`: (prediction, references) -> a number, more is better.

    The score is the mean over examples, as it comes: it is not multiplied by 100.
    """

    limits = (-math.inf, math.inf)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        module, _, function = name.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules of the current folder, as `python -m` finds them
        try:
            self._function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"the metric `{name}` cannot be imported: {error}") from error

    def value(self, prediction: str, references: Sequence[str]) -> float:
        return float(self._function(prediction, list(references)))

    def score(self, rows: Statistics) -> float:
        return float(rows.mean())

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"mean of {self.name}, source {_source(self._function)}"


def _source(function: Any) -> str:
    """Eight hex digits over a function's source, or its name where there is none to read."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # built in, or a callable object
        text = f"{type(function).__module__}.{getattr(function, '__qualname__', type(function))}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class BroughtMetric(OwnMetric):
    """Such a function that another package brings under a name (see `ptkit.plugins`)."""

    def __init__(self, name: str, entry: EntryPoint) -> None:
        MeanOverExamples.__init__(self, name)
        self._function, self._origin = loaded(entry), origin(entry)

    def signature(self, references: Sequence[Sequence[str]]) -> str:
        return f"mean of {self.name}, {self._origin}"
