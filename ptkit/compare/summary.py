"""From the records of a grid to one row per method, every figure with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptkit.evaluate.metrics import metric
from ptkit.evaluate.statistics import Interval, bootstrap_interval, seeds_interval
from ptkit.recipe.schema import Recipe
from ptkit.train.record import CellRecord

Prediction = dict[str, Any]


@dataclass(frozen=True)
class MethodSummary:
    """One method over all its seeds.

    metrics: bootstrap over seeds and examples; forgetting, retention: Student-t over seeds
    share: trainable parameters / base parameters; seconds, peak_memory: means over seeds
    off_exact: True when it held in every cell; None when the method has no "off"
    samples: predictions of the first seed, in the order of the test rows
    """

    title: str
    kind: str
    trains: bool
    records: tuple[CellRecord, ...]
    metrics: dict[str, Interval]
    score: str
    trainable_parameters: int
    share: float
    bytes_on_disk: int
    seconds: float
    peak_memory_bytes: float | None
    forgetting: Interval | None
    retention: Interval | None
    off_exact: bool | None
    samples: tuple[Prediction, ...]

    @property
    def trained_together(self) -> int:
        """Cells of the largest training batch any of the records comes from."""
        return max(record.trained_together for record in self.records)

    @property
    def leading(self) -> Interval:
        """The interval of the metric that is *the score*."""
        return self.metrics[self.score]


def read_predictions(folder: Path, record: CellRecord) -> list[Prediction]:
    """The rows of a cell's `predictions.jsonl`."""
    path = folder / "cells" / record.cell / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarise(folder: Path, records: Sequence[CellRecord], recipe: Recipe) -> list[MethodSummary]:
    """One summary per method of `recipe`, in its order; methods without a cell are left out."""
    summaries = []
    for method in recipe.methods:
        own = [r for r in records if r.method == method.title]
        if own:
            summaries.append(_summary(folder, own, recipe, trains=method.trains))
    return summaries


def _summary(folder: Path, own: list[CellRecord], recipe: Recipe, *, trains: bool) -> MethodSummary:
    first = own[0]
    predictions = [read_predictions(folder, record) for record in own]
    metrics: dict[str, Interval] = {}
    for name in recipe.task.metrics:
        measure = metric(name)
        per_seed = [
            measure.statistics([r["prediction"] for r in rows], [r["references"] for r in rows])
            for rows in predictions
        ]
        metrics[name] = bootstrap_interval(
            measure, per_seed, resamples=recipe.evaluate.bootstrap, seed=0
        )
    retained = [r.retention for r in own if r.retention is not None]
    memory = [r.peak_memory_bytes for r in own if r.peak_memory_bytes is not None]
    exact = [r.adapter_off_exact for r in own]
    return MethodSummary(
        title=first.method,
        kind=first.kind,
        trains=trains,
        records=tuple(own),
        metrics=metrics,
        score=first.score,
        trainable_parameters=first.trainable_parameters,
        share=first.trainable_parameters / first.base_parameters,
        bytes_on_disk=first.bytes_on_disk,
        seconds=float(np.mean([r.train_seconds for r in own])),
        peak_memory_bytes=float(np.mean(memory)) if memory else None,
        forgetting=seeds_interval([r["forgetting"] for r in retained]) if retained else None,
        retention=seeds_interval([r["retention"] for r in retained]) if retained else None,
        off_exact=None if None in exact else all(exact),
        samples=tuple(predictions[0]),
    )
