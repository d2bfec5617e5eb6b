"""Which rows the figures of a comparison are of; the variants of a sweep may have unlike ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ptkit.comparison.charts import best_of_families
from ptkit.comparison.summary import MethodSummary, best_of
from ptkit.evaluation.prediction import Prediction
from ptkit.formats.figures import RecordedRetention, scored_rows


def span(counts: Iterable[int], form: str = ",") -> str:
    """`counts` in words: the one that all are, or from the least to the most."""
    known = [f"{count:{form}}" for count in sorted({*counts})]
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}"


def count_scored(summaries: Sequence[MethodSummary]) -> str:
    """How many rows were scored."""
    return span((record.n_test for s in summaries for record in s.records), "d")


def kind_scored(summaries: Sequence[MethodSummary]) -> str:
    """What the scored rows are, in words that follow their number. Of unlike numbers of rows that
    were learnt from too, the largest is told."""
    records = [record for s in summaries for record in s.records]
    leaks: dict[str, set[int]] = {}
    for other in dict.fromkeys(other for record in records for other in record.test_repeats):
        leaks[other] = {record.test_repeats.get(other, 0) for record in records}
    most = {other: max(counts) for other, counts in leaks.items()}
    unlike = {other for other, counts in leaks.items() if len(counts) > 1}
    kinds = dict.fromkeys((record.test_split, record.test_chose) for record in records)
    return " or ".join(scored_rows(*kind, most, unlike) for kind in kinds)


def retained(summaries: Sequence[MethodSummary]) -> list[RecordedRetention]:
    """What is left of the base under each cell, of those where it was measured."""
    records = (record for s in summaries for record in s.records)
    return [record.retention for record in records if record.retention is not None]


def on_the_same_rows(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """The best of each method among those that were scored on the rows of the best of all."""
    rows = _rows(best_of(summaries).samples)
    return best_of_families([s for s in summaries if _rows(s.samples) == rows])


def _rows(samples: Sequence[Prediction]) -> list[tuple[str, Sequence[str]]]:
    return [(row.input, row.references) for row in samples]
