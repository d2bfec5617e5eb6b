"""From the records of a grid to one row per method and swept value, figures with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ptkit.comparison.same_rows import read_predictions, require_same_rows, say_unknown
from ptkit.comparison.statistics import Difference, in_family, paired_difference, share_of_way
from ptkit.evaluation.prediction import Prediction, statistics_of
from ptkit.evaluation.statistics import (
    Interval,
    Resampled,
    mean_interval,
    resample,
    seeds_interval,
)
from ptkit.formats.cell_record import CellRecord
from ptkit.metrics.registry import metric
from ptkit.recipe.schema import Recipe
from ptkit.training.titles import titled


@dataclass(frozen=True)
class MethodSummary:
    """One method, with one combination of swept values, over all its seeds.

    family: the recipe's entry; sweep: swept key -> value, empty without a sweep
    metrics: over seeds and examples; forgetting, retention, drift: over seeds, on the same text
    domains: forgetting per general text, where there are several
    share: trainable parameters / base parameters; seconds, peak_memory, added_ms: means over seeds
    off_exact: True when it held in every cell; None when the method has no "off"
    against: the score minus the baseline's, with its p value; None for the baseline itself
    way: how far the score gets from the base's (0) to full fine-tuning's (1); None where the recipe
    has not both
    samples: predictions of the first seed, in the order of the test rows
    """

    family: str
    sweep: dict[str, Any]
    kind: str
    trains: bool
    records: tuple[CellRecord, ...]
    metrics: dict[str, Interval]
    score: str
    higher_is_better: bool
    trainable_parameters: int
    share: float
    bytes_on_disk: int
    seconds: float
    peak_memory_bytes: float | None
    added_ms: float | None
    forgetting: Interval | None
    retention: Interval | None
    drift: Interval | None
    domains: dict[str, Interval]
    off_exact: bool | None
    samples: tuple[Prediction, ...]
    against: Difference | None = None
    way: Interval | None = None

    @property
    def title(self) -> str:
        """The method, with its swept values where there are any."""
        return titled(self.family, self.sweep)

    @property
    def trained_together(self) -> int:
        """Cells of the largest training batch any of the records comes from."""
        return max(record.trained_together for record in self.records)

    @property
    def leading(self) -> Interval:
        """The interval of the metric that is *the score*."""
        return self.metrics[self.score]

    @property
    def goodness(self) -> float:
        """The mean score, with its sign changed where less is better: more of it is better."""
        return self.leading.mean if self.higher_is_better else -self.leading.mean


def baseline_of(recipe: Recipe) -> str:
    """The method the others are compared with."""
    return recipe.evaluate.baseline or anchor_of(recipe, "full") or recipe.methods[0].title


def anchor_of(recipe: Recipe, end: Literal["base", "full"]) -> str | None:
    """The title of the method that is this end of the way from the base to full fine-tuning.

    Of several, one without a label of its own comes first. None where there is none.
    """
    own = [method for method in recipe.methods if method.anchor == end]
    own.sort(key=lambda method: method.label is not None)
    return own[0].title if own else None


def best_of(summaries: Sequence[MethodSummary]) -> MethodSummary:
    """The summary with the best mean score: the highest, or lowest where less is better."""
    return max(summaries, key=lambda s: s.goodness)


def basis(summaries: Sequence[MethodSummary]) -> str:
    """What the intervals of `summaries` are over, in words."""
    if all(s.leading.low is None for s in summaries):
        return "not known, because one row does not show how far rows differ"
    alone = [s.title for s in summaries if len(s.records) == 1]
    if len(alone) == len(summaries):
        return "a bootstrap over rows alone, because one seed does not show how far seeds differ"
    both = "Student's t over seeds together with a bootstrap over rows"
    if not alone:
        return both
    return f"{both}; of {', '.join(alone)}, with one seed, over rows alone"


def summarise(folder: Path, records: Sequence[CellRecord], recipe: Recipe) -> list[MethodSummary]:
    """One summary per method and combination of swept values, in the order they were planned.

    Raises UserError for records that are not comparable.
    """
    require_same_rows([(folder / "cells" / record.cell, record) for record in records])
    say_unknown(records)
    groups: dict[tuple[str, str], list[CellRecord]] = {}
    for record in records:
        groups.setdefault((record.method, json.dumps(record.sweep)), []).append(record)
    families = [method.title for method in recipe.methods]
    order = sorted(groups.values(), key=lambda own: families.index(own[0].family))
    trains = {method.title: method.trains for method in recipe.methods}
    summaries, leading = [], []
    for own in order:
        summary, scores = _summary(folder, own, recipe, trains=trains[own[0].family])
        summaries.append(summary)
        leading.append(scores)
    return _compared(summaries, leading, recipe)


def _compared(
    summaries: list[MethodSummary], leading: list[Resampled], recipe: Recipe
) -> list[MethodSummary]:
    """`summaries` with the difference of each from the baseline of the same swept values, and how
    far each gets from the base to full fine-tuning."""
    baseline, ends = baseline_of(recipe), (anchor_of(recipe, "base"), anchor_of(recipe, "full"))

    def of(family: str | None, i: int) -> Resampled | None:
        """What `family` made of the same rows with the swept values of summary `i`."""
        partners = [
            leading[j] for j, other in enumerate(summaries)
            if other.family == family
            and all(summaries[i].sweep.get(k, v) == v for k, v in other.sweep.items())
            and leading[j].n_examples == leading[i].n_examples
        ]  # fmt: skip
        return partners[0] if len(partners) == 1 else None

    found: dict[int, Difference] = {}
    ways: dict[int, Interval | None] = {}
    for i, summary in enumerate(summaries):
        other = None if summary.family == baseline else of(baseline, i)
        if other is not None:
            found[i] = paired_difference(leading[i], other)
        base, full = (of(end, i) for end in ends)
        if base is None or full is None:
            continue
        if summary.family in ends:
            there = float(ends.index(summary.family))
            ways[i] = Interval(there, None, None, None, leading[i].seeds)
        else:
            ways[i] = share_of_way(leading[i], base, full)
    compared = dict(zip(found, in_family(found.values()), strict=True))
    return [replace(s, against=compared.get(i), way=ways.get(i)) for i, s in enumerate(summaries)]


def shown_together(groups: Sequence[Sequence[MethodSummary]]) -> list[list[MethodSummary]]:
    """`groups` of summaries whose differences are all read together: p values are corrected for
    their number."""
    compared = iter(in_family(s.against for own in groups for s in own if s.against is not None))
    return [
        [s if s.against is None else replace(s, against=next(compared)) for s in own]
        for own in groups
    ]


def _summary(
    folder: Path, own: list[CellRecord], recipe: Recipe, *, trains: bool
) -> tuple[MethodSummary, Resampled]:
    """The summary of a method's records, and its scores by the leading metric."""
    first = own[0]
    predictions = [read_predictions(folder / "cells" / record.cell) for record in own]
    metrics: dict[str, Interval] = {}
    scores: list[Resampled] = []
    for name in recipe.task.metrics:
        measure = metric(name)
        per_seed = [statistics_of(measure, rows) for rows in predictions]
        found = resample(measure, per_seed, resamples=recipe.evaluate.bootstrap, seed=0)
        metrics[name] = mean_interval(found).within(*measure.limits)
        scores.append(found)
    retained = [r.retention for r in own if r.retention is not None]
    memory = [r.peak_memory_bytes for r in own if r.peak_memory_bytes is not None]
    added = [r.added_ms for r in own if r.added_ms is not None]
    exact = [r.adapter_off_exact for r in own]

    def over_seeds(key: str) -> Interval | None:
        values = [v for v in (getattr(r, key) for r in retained) if v is not None]
        return seeds_interval(values) if values else None

    domains: dict[str, Interval] = {}
    if retained and len(retained[0].domains) > 1:
        for name in retained[0].domains:
            values = [r.domains[name].forgetting for r in retained]
            domains[name] = seeds_interval(values)
    summary = MethodSummary(
        family=first.family,
        sweep=first.sweep,
        kind=first.kind,
        trains=trains,
        records=tuple(own),
        metrics=metrics,
        score=first.score,
        higher_is_better=metric(first.score).higher_is_better,
        trainable_parameters=first.trainable_parameters,
        share=first.trainable_parameters / first.base_parameters,
        bytes_on_disk=first.bytes_on_disk,
        seconds=float(np.mean([r.train_seconds for r in own])),
        peak_memory_bytes=float(np.mean(memory)) if memory else None,
        added_ms=float(np.mean(added)) if added else None,
        forgetting=over_seeds("forgetting"),
        retention=over_seeds("retention"),
        drift=over_seeds("drift"),
        domains=domains,
        off_exact=None if None in exact else all(exact),
        samples=tuple(predictions[0]),
    )
    return summary, scores[0]
