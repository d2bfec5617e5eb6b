"""What every method wrote for every test row, worst rows first: the part of a page one browses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ptkit.comparison.summary import MethodSummary
from ptkit.evaluation.prediction import Prediction, statistics_of
from ptkit.metrics.metric import Metric
from ptkit.metrics.registry import metric

#: Rows, and characters of a text, that a page has.
ROWS, CHARACTERS = 300, 600


def browsable(summaries: Sequence[MethodSummary], *, generation: bool) -> dict[str, Any]:
    """The rows of the first seed, as JSON for the page's own script.

    summaries: one of each method, on the same rows

    methods: their titles
    rows: `input`, `references`, and `answers` in the order of `methods`: the text, and its score.
        A label is right (1) or wrong (0). A text has the leading metric's value of the row alone,
        as the metric gives it; null where there is none
    of: how many rows there are; the page has the first of them
    better: 1 where more is better, else -1; digits: those shown behind the point of a score
    """
    first = summaries[0].samples[:ROWS]
    used = metric(summaries[0].score) if generation else None
    scores = [_scores(s.samples[:ROWS], used) for s in summaries]
    rows = [
        {
            "input": _cut(row.input),
            "references": [_cut(text) for text in row.references[:5]],
            "answers": [
                [_cut(summary.samples[i].prediction), scores[j][i]]
                for j, summary in enumerate(summaries)
            ],
        }
        for i, row in enumerate(first)
    ]
    return {
        "methods": [s.title for s in summaries],
        "rows": rows,
        "of": len(summaries[0].samples),
        "labels": not generation,
        "better": -1 if used is not None and not used.higher_is_better else 1,
        "digits": 0 if used is None or used.limits == Metric.limits else 2,
    }


def _scores(rows: Sequence[Prediction], used: Metric | None) -> list[float | None]:
    """Of each row by itself. used: the metric of texts; None for labels"""
    if used is None:
        return [float(row.prediction == row.references[0]) for row in rows]
    statistics = statistics_of(used, rows)
    values = [used.score(statistics[i : i + 1]) for i in range(len(rows))]
    return [round(value, 3) if math.isfinite(value) else None for value in values]


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"
