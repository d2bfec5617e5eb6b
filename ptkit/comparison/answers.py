"""What every method wrote for every test row, worst rows first: the part of a page one browses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ptkit.comparison.summary import MethodSummary
from ptkit.evaluation.prediction import Prediction
from ptkit.metrics.registry import metric

#: Rows, and characters of a text, that a page has.
ROWS, CHARACTERS = 300, 600


def browsable(summaries: Sequence[MethodSummary], *, generation: bool) -> dict[str, Any]:
    """The rows of the first seed, as JSON for the page's own script.

    summaries: one of each method, on the same rows

    methods: their titles
    rows: `input`, `references`, and `answers` in the order of `methods`: the text, and its score
        in 0..1. A label is right or wrong; a text has the leading metric's value of the row alone
    of: how many rows there are; the page has the first of them
    """
    first = summaries[0].samples[:ROWS]
    scores = [_scores(s.samples[:ROWS], s.score, generation=generation) for s in summaries]
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
    }


def _scores(rows: Sequence[Prediction], name: str, *, generation: bool) -> list[float]:
    """Of each row by itself, in 0..1."""
    if not generation:
        return [float(row.prediction == row.references[0]) for row in rows]
    used = metric(name)
    if used.needs is not None or not used.higher_is_better:
        return [float(row.prediction in row.references) for row in rows]
    statistics = used.statistics([r.prediction for r in rows], [r.references for r in rows])
    values = [used.score(statistics[i : i + 1]) / 100 for i in range(len(rows))]
    return [round(value, 3) if math.isfinite(value) else 0.0 for value in values]


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"
