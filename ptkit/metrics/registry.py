"""A metric by its name."""

from __future__ import annotations

from importlib import import_module

from ptkit.errors import UserError, did_you_mean
from ptkit.metrics import metric_modules
from ptkit.metrics.metric import Metric
from ptkit.metrics.own import BroughtMetric, OwnMetric
from ptkit.plugins import brought


def metric(name: str) -> Metric:
    """The metric called `name`, of ptkit's own or brought by another package, or your own,
    `module:function`. Raises UserError for none of them."""
    if ":" in name:
        return OwnMetric(name)
    modules = metric_modules()
    if name in modules:
        made: Metric = import_module(f"ptkit.metrics.{modules[name]}").make(name)
        return made
    others = brought("ptkit.metrics")
    if name not in others:
        raise UserError(f"no metric `{name}`; {did_you_mean(name, (*modules, *others))}")
    return BroughtMetric(name, others[name])
